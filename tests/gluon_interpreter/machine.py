"""Who executes: warps in partitions, the copy engine and the tensor cores, in an order that a seed decides.

Each partition of a program is a thread of Python, of which one runs at a time. It hands over wherever it meets another
(barriers, copies, products); who goes on next, and whether a task of the copy engine or the tensor cores is done
before, is chosen at random among those who can. When nobody can, that is a deadlock.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gluon_interpreter.faults import Deadlock, Fault, Race, Site, site, text
from gluon_interpreter.order import Access, Clock, access

if TYPE_CHECKING:
    from gluon_interpreter.shared import Memory, Named, Piece
    from gluon_interpreter.tensors import Tensors

_own = threading.local()


def running() -> Partition:
    """The one whose text is executed."""
    found: Partition = _own.partition
    return found


class Stopped(BaseException):
    """Ends the threads of a launch in which something was found wrong."""


@dataclass
class Task:
    """What happens beside a partition: work of the copy engine or the tensor cores, copies that its threads issued.

    `steps` happen one after the other, at any time after the issue and the tasks of `after`.
    """

    number: int
    what: str
    owner: Partition
    clock: Clock
    at: Site
    steps: list[Callable[[], None]]
    after: tuple[Task, ...] = ()
    pieces: list[Piece] = field(default_factory=list)
    passed: int = 0

    @property
    def done(self) -> bool:
        return self.passed == len(self.steps)

    @property
    def ready(self) -> bool:
        return all(task.done for task in self.after)

    def step(self) -> None:
        self.steps[self.passed]()
        self.passed += 1

    def _access(self, memory: Memory, generic: bool) -> Access:
        self.pieces.append(memory.piece)
        return Access(self.what, memory.region, self.owner.number, 0, self.number, self.at, generic)

    def reads(self, memory: Memory) -> None:
        memory.piece.remembered.read(self._access(memory, False), self.clock, asynchronous=True)

    def writes(self, memory: Memory, generic: bool = False) -> None:
        memory.piece.remembered.write(self._access(memory, generic), self.clock)


class Pending:
    """The registers that a product is written to, until it was waited for."""

    type = type("Type", (), {"layout": None})()

    def __init__(self, task: Task) -> None:
        self.task = task
        self.value: Any = None

    def _refuse(self, *_: Any) -> Any:
        raise Race(f"the result of {self.task.what} at {text(self.task.at)} is used before it was waited for")

    __getattr__ = __getitem__ = __neg__ = __lt__ = __gt__ = __add__ = __radd__ = __sub__ = __rsub__ = _refuse
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse


@dataclass
class Copies:
    """Asynchronous copies that the threads of a partition have issued: all, as bits, and those of each group."""

    issued: int = 0
    groups: list[list[Task]] = field(default_factory=lambda: [[]])

    def add(self, task: Task) -> None:
        self.issued |= 1 << task.number
        self.groups[-1].append(task)

    @property
    def pending(self) -> tuple[Task, ...]:
        return tuple(task for group in self.groups for task in group if not task.done)


class Program:
    """One program of a launch, with its shared memory and barriers."""

    def __init__(self, machine: Machine, number: int) -> None:
        self.machine, self.number = machine, number
        self.pieces: list[Piece] = []
        self.named: dict[int, Named] = {}
        self.tasks: list[Task] = []

    def ends(self, clock: Clock) -> None:
        """Shared memory is another program's from now on: whatever reads or writes it must be known to be over."""
        for task in self.tasks:
            if not clock.tasks >> task.number & 1:
                raise Fault(f"the end of program {self.number} has not waited for {task.what} at {text(task.at)}")


class Partition:
    """A partition of warps of a program."""

    def __init__(self, program: Program, name: str, warps: int, clock: Clock, work: Callable[[], None]) -> None:
        machine = program.machine
        self.program, self.name, self.threads = program, f"program {program.number}, {name}", 32 * warps
        self.number = machine.numbered()
        self.clock = clock
        self.clock.partitions[self.number] = 0
        self.products: list[Task] = []
        self.stores: list[Task] = []
        self.copies = Copies()
        self.until: Callable[[], bool] | None = None
        self.waits = ""
        self.over = False
        self._turn = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()
        machine.partitions.append(self)

    def _run(self, work: Callable[[], None]) -> None:
        self._turn.acquire()
        _own.partition = self
        machine = self.program.machine
        try:
            if machine.fault is None:
                work()
        except Stopped:
            pass
        except BaseException as fault:
            machine.fault = machine.fault or fault
        self.over = True
        machine.back.release()

    def go(self) -> None:
        self._turn.release()
        self.program.machine.back.acquire()

    def hand_over(self, until: Callable[[], bool] | None = None, waits: str = "") -> None:
        """Let others run, until a condition holds."""
        machine = self.program.machine
        self.until, self.waits = until, f"{waits} at {text(site())}" if until else ""
        machine.back.release()
        self._turn.acquire()
        if machine.fault is not None:
            raise Stopped
        self.until = None

    def spreads(self, layout: int | None) -> None:
        """Fault unless a layout, where it is known, is one of as many warps as there are."""
        if layout is not None and 32 * layout != self.threads:
            raise Fault(f"a layout of {layout} warps in {self.name}, which has {self.threads // 32}")

    # What the partition does in memory.

    def _access(self, what: str, memory: Memory) -> Access:
        return access(f"{what} of {self.name}", memory.region, self.number, self.clock.partitions[self.number])

    def reads(self, memory: Memory) -> None:
        memory.piece.remembered.read(self._access("the read", memory), self.clock, asynchronous=False)

    def writes(self, memory: Memory) -> None:
        memory.piece.remembered.write(self._access("the write", memory), self.clock)

    def fence(self) -> None:
        for piece in self.program.pieces:
            piece.remembered.fence(self.number, self.clock)

    def tell(self) -> Clock:
        """What those know who hear of this moment."""
        told = self.clock.copy()
        self.clock.partitions[self.number] += 1
        return told

    # Tasks.

    def issue(self, what: str, *, after: tuple[Task, ...] = ()) -> Task:
        machine = self.program.machine
        number = machine.tasks_made
        machine.tasks_made += 1
        clock = self.tell()
        clock.tasks |= 1 << number
        task = Task(number, f"{what} of {self.name}", self, clock, site(), [], after)
        machine.tasks.append(task)
        self.program.tasks.append(task)
        return task

    def settle(self, tasks: list[Task]) -> None:
        """The tasks are over, and the partition knows."""
        for task in tasks:
            self.clock.join(task.clock)
            for piece in task.pieces:
                piece.remembered.settle(task.number, self.number, self.clock.partitions[self.number])


class Machine:
    """A GPU on which `resident` programs of a launch run at a time. Its `run` is a runner of kernels."""

    def __init__(self, seed: int = 0, resident: int = 2) -> None:
        self.random = random.Random(seed)
        self.resident = resident
        self.fault: BaseException | None = None
        self.partitions: list[Partition] = []
        self.tasks: list[Task] = []
        self.tasks_made = 0
        self.back = threading.Semaphore(0)
        self.tensors: Tensors
        self.programs = 0
        self._numbers = 0

    def numbered(self) -> int:
        self._numbers += 1
        return self._numbers

    def run(self, kernel: Any, programs: int, arguments: tuple[Any, ...], options: Any) -> None:
        """Execute a kernel, Gluon's or Triton's, on tensors of the CPU."""
        from gluon_interpreter.tensors import Tensors
        from gluon_interpreter.translate import function_of, handed, meaning

        self.tensors, self.programs, self.tasks_made = Tensors(), programs, 0
        given = tuple(handed(x, self.tensors) for x in arguments)
        known = {name: meaning(x) for name, x in options.items() if name in kernel.arg_names}
        function = function_of(kernel)
        warps = options.get("num_warps", 4)
        following = 0
        self.partitions, self.tasks = [], []
        while following < programs or self.partitions or self.tasks:
            while following < programs and len({p.program.number for p in self.partitions}) < self.resident:
                self._begin(Program(self, following), warps, lambda: function(*given, **known))
                following += 1
            self._advance()
            if self.fault is not None:
                self._stop()

    def _begin(self, program: Program, warps: int, kernel: Callable[[], None]) -> None:
        def work() -> None:
            kernel()
            program.ends(running().clock)

        Partition(program, "all warps", warps, Clock(), work)

    def _advance(self) -> None:
        """Let one that can do something."""
        able: list[Partition | Task] = [p for p in self.partitions if p.until is None or p.until()]
        able += [task for task in self.tasks if task.ready]
        if not able:
            waiting = "\n".join(f"  {p.name} waits for {p.waits}" for p in self.partitions)
            self.fault = Deadlock(f"nobody can go on:\n{waiting}")
            return
        chosen = self.random.choice(able)
        if isinstance(chosen, Partition):
            chosen.go()
            if chosen.over:
                self.partitions.remove(chosen)
        else:
            try:
                chosen.step()
            except Fault as fault:
                self.fault = fault
            if chosen.done:
                self.tasks.remove(chosen)

    def _stop(self) -> None:
        for left in list(self.partitions):
            while not left.over:
                left.go()
        self.partitions, self.tasks = [], []
        fault, self.fault = self.fault, None
        assert fault is not None
        raise fault
