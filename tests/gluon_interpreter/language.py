"""`triton.language` and Gluon as functions on `Value`: what kernels find under the names `tl` and `gl`."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.experimental.gluon import language as gluon

from gluon_interpreter import machine, values
from gluon_interpreter.assembly import assembly
from gluon_interpreter.faults import Fault
from gluon_interpreter.machine import Partition, Pending, Task
from gluon_interpreter.order import Clock
from gluon_interpreter.shared import Barrier, Memory, Piece, places
from gluon_interpreter.tensors import Descriptor
from gluon_interpreter.values import Array, Number, Value, common, elementwise, encoded, size_of, valued

NVMMASharedLayout, SwizzledSharedLayout = gluon.NVMMASharedLayout, gluon.SwizzledSharedLayout


def __getattr__(name: str) -> Any:
    found = getattr(tl, name, None)
    if isinstance(found, tl.dtype):
        return found
    raise AttributeError(f"the interpreter does not know `{name}` of Triton's language")


def warps_of(layout: Any) -> Any:
    """Which thread has which element is the compiler's business: a layout of registers is the number of its warps."""
    if hasattr(layout, "parent"):
        return warps_of(layout.parent)
    return 2 ** len(layout.warp_bases) if hasattr(layout, "warp_bases") else math.prod(layout.warps_per_cta)


def BlockedLayout(size_per_thread: Any, threads_per_warp: Any, warps_per_cta: Any, order: Any) -> int:
    return math.prod(warps_per_cta)


def NVMMADistributedLayout(version: Any, warps_per_cta: Any, instr_shape: Any) -> int:
    return math.prod(warps_per_cta)


def DistributedLinearLayout(reg_bases: Any, lane_bases: Any, warp_bases: Any, block_bases: Any, shape: Any) -> int:
    return 2 ** len(warp_bases)


def SliceLayout(dim: int, parent: int | None) -> int | None:
    return parent


def DotOperandLayout(operand_index: int, parent: int | None, k_width: int) -> int | None:
    return parent


def constexpr(x: Any) -> Any:
    return x


def static_assert(condition: Any, message: str = "") -> None:
    if not condition:
        raise Fault(message)


def static_range(*bounds: int) -> Any:
    return range_(*map(int, bounds))


range_ = range


def device_range(*bounds: Any) -> Any:
    """`range` as a kernel has it: its numbers are the device's."""
    return (Value(i, tl.int32) for i in range_(*map(int, bounds)))


# ---------------------------------------------------------------- programs


def program_id(axis: int) -> Value:
    return Value(machine.running().program.number, tl.int32)


def num_programs(axis: int) -> Value:
    return Value(machine.running().program.machine.programs, tl.int32)


def warp_specialize(functions: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]) -> None:
    """The first partition goes on in the warps of the program, the others in new ones."""
    own = machine.running()
    program, told = own.program, own.tell()
    (first, given), *rest = functions
    others = [
        Partition(program, f"partition {i} ({work.__name__})", count, told.copy(), _call(work, arguments))
        for i, ((work, arguments), count) in enumerate(zip(rest, warps, strict=True), 1)
    ]
    own.name = f"program {program.number}, partition 0 ({first.__name__})"
    first(*given)
    own.hand_over(lambda: all(other.over for other in others), "the other partitions")
    for other in others:
        own.clock.join(other.clock)


def _call(work: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[[], None]:
    return lambda: work(*arguments)


# ---------------------------------------------------------------- making and shaping


def arange(start: Any, end: Any, layout: Any = None) -> Value:
    machine.running().spreads(layout)
    return Value(np.arange(int(start), int(end)), tl.int32)


def full(shape: Any, value: Any, dtype: tl.dtype, layout: Any = None) -> Value:
    machine.running().spreads(layout)
    return Value(np.full(tuple(shape), getattr(value, "data", value)), dtype)


def zeros(shape: Any, dtype: tl.dtype, layout: Any = None) -> Value:
    return full(shape, 0, dtype)


def zeros_like(x: Value) -> Value:
    return full(x.shape, 0, x.dtype)


def to_tensor(x: Any) -> Value:
    return valued(x)


def convert_layout(x: Any, layout: Any, assert_trivial: bool = False) -> Any:
    machine.running().spreads(layout)
    return x


def multiple_of(x: Value, values: Any) -> Value:
    """x, of which the first element in each row, an address in bytes, is a multiple of the last value."""
    first = x.data[..., 0] if x.data.ndim else x.data
    return _promised(x, bool((first % np.ravel(values)[-1] == 0).all()), f"multiple of {values}")


def max_contiguous(x: Value, values: Any) -> Value:
    """x, whose rows go in runs of neighbours, of so many elements as the last value says."""
    runs = x.data.reshape(-1, int(np.ravel(values)[-1]))
    step = size_of(x.dtype.element_ty) if x.dtype.is_ptr() else 1
    return _promised(x, bool((np.diff(runs, axis=1) == step).all()), f"contiguous by {values}")


def max_constancy(x: Value, values: Any) -> Value:
    """x, whose rows go in runs of equals, of so many elements as the last value says."""
    runs = x.data.reshape(-1, int(np.ravel(values)[-1]))
    return _promised(x, bool((runs == runs[:, :1]).all()), f"constant by {values}")


def _promised(x: Value, kept: bool, what: str) -> Value:
    if not kept:
        raise Fault(f"the compiler is told that a tensor is {what}, and it is not")
    return x


def reshape(x: Value, shape: Any) -> Value:
    return Value(x.data.reshape(tuple(shape)), x.dtype)


def permute(x: Value, order: Any) -> Value:
    return Value(x.data.transpose(order), x.dtype)


def trans(x: Value) -> Value:
    return x.T


def expand_dims(x: Value, axis: int) -> Value:
    return Value(np.expand_dims(x.data, axis), x.dtype)


def broadcast(x: Value, y: Value) -> tuple[Value, Value]:
    a, b = np.broadcast_arrays(x.data, y.data)
    return Value(a, x.dtype), Value(b, y.dtype)


def broadcast_to(x: Any, shape: Any) -> Value:
    x = valued(x)
    return Value(np.broadcast_to(x.data, tuple(shape)), x.dtype)


def split(x: Value) -> tuple[Value, Value]:
    return x[..., 0], x[..., 1]


def join(x: Value, y: Value) -> Value:
    return Value(np.stack([x.data, y.data], -1), x.dtype)


# ---------------------------------------------------------------- arithmetic


def where(condition: Any, x: Any, y: Any) -> Value:
    keep = np.asarray(getattr(condition, "data", condition)) != 0
    if isinstance(x, Value) and x.dtype.is_ptr():
        return Value(np.where(keep, x.data, y.data), x.dtype)
    return elementwise(lambda a, b: np.where(keep, a, b), x, y, dtype=common(x, y))


def maximum(x: Any, y: Any) -> Value:
    return elementwise(np.fmax, x, y, dtype=common(x, y))


def minimum(x: Any, y: Any) -> Value:
    return elementwise(np.fmin, x, y, dtype=common(x, y))


def cdiv(x: Any, y: Any) -> Any:
    return (x + y - 1) // y


def fma(x: Any, y: Any, z: Any) -> Value:
    exact = np.float64
    return Value(*(lambda d: (valued(x).data.astype(exact) * valued(y).data + valued(z).data, d))(common(x, z)))


def _function(function: Callable[..., Array]) -> Callable[[Any], Value]:
    def apply(x: Value | Number) -> Value:
        return elementwise(function, x, dtype=valued(x).dtype)

    return apply


abs, sqrt, floor, ceil = map(_function, (np.abs, np.sqrt, np.floor, np.ceil))
exp, exp2, log, log2 = map(_function, (np.exp, np.exp2, np.log, np.log2))
sin, cos, tanh, erf = map(_function, (np.sin, np.cos, np.tanh, values.erf))
rsqrt = _function(lambda x: 1 / np.sqrt(x))
sigmoid = _function(lambda x: 1 / (1 + np.exp(-x)))


def _reduced(function: Callable[..., Array], x: Value, axis: int | None, **ways: Any) -> Value:
    dtype = x.dtype
    if not dtype.is_floating() and int(dtype.primitive_bitwidth) < 32:
        dtype = tl.int32
    return Value(function(x.to(dtype).data, axis=axis, **ways), dtype)


def sum(x: Value, axis: int | None = None, keep_dims: bool = False) -> Value:
    return _reduced(np.add.reduce, x, axis, keepdims=keep_dims)


def max(x: Value, axis: int | None = None, keep_dims: bool = False) -> Value:
    return _reduced(np.fmax.reduce, x, axis, keepdims=keep_dims)


def min(x: Value, axis: int | None = None, keep_dims: bool = False) -> Value:
    return _reduced(np.fmin.reduce, x, axis, keepdims=keep_dims)


def cumsum(x: Value, axis: int = 0) -> Value:
    return _reduced(np.cumsum, x, axis)


def dot(x: Value, y: Value, acc: Value | None = None, input_precision: str = "ieee") -> Value:
    product = np.matmul(x.data, y.data, dtype=np.float32)
    return Value(product if acc is None else product + acc.data, tl.float32)


def inline_asm_elementwise(
    asm: str, constraints: str, args: list[Any], dtype: Any, is_pure: bool, pack: int
) -> Any:  # fmt: skip
    return assembly(asm, args, dtype)


# ---------------------------------------------------------------- global memory


def load(pointer: Value, mask: Any = None, other: Any = None) -> Value:
    return machine.running().program.machine.tensors.load(pointer, mask, other)


def store(pointer: Value, value: Any, mask: Any = None) -> None:
    machine.running().program.machine.tensors.store(pointer, value, mask)


def _atomic(function: Any) -> Callable[..., Value]:
    def apply(pointer: Value, value: Any, mask: Any = None, sem: str | None = None) -> Value:
        own = machine.running()
        own.hand_over()
        return own.program.machine.tensors.change(function, pointer, value, mask)

    return apply


atomic_add, atomic_max, atomic_or = _atomic(np.add), _atomic(np.maximum), _atomic(np.bitwise_or)


# ---------------------------------------------------------------- shared memory and barriers


def allocate_shared_memory(dtype: tl.dtype, shape: Any, layout: Any) -> Memory:
    program, shape = machine.running().program, [int(n) for n in shape]
    where = places(shape, dtype, layout)
    piece = Piece(int(where.size) * size_of(dtype), f"shared memory {len(program.pieces)}, {dtype}{shape}")
    program.pieces.append(piece)
    return Memory(piece, where, dtype, layout)


def thread_barrier() -> None:
    """The threads of a partition go in step here anyway."""


def fence_async_shared() -> None:
    machine.running().fence()


class mbarrier:
    MBarrierLayout = gluon.nvidia.hopper.mbarrier.MBarrierLayout

    @staticmethod
    def init(memory: Memory, count: int) -> None:
        place = int(memory.where.min())
        machine.running().writes(memory)
        memory.piece.barriers[place] = Barrier(f"{memory.piece.remembered.name} at {place // 8}", count)

    @staticmethod
    def expect(memory: Memory, bytes: int) -> None:
        own = machine.running()
        own.hand_over()
        memory.barrier.arrive(own.tell(), 1, bytes)

    @staticmethod
    def arrive(memory: Memory, count: int = 1) -> None:
        own = machine.running()
        own.hand_over()
        memory.barrier.arrive(own.tell(), count)

    @staticmethod
    def wait(memory: Memory, phase: Any) -> None:
        own, barrier, parity = machine.running(), memory.barrier, int(phase)
        own.hand_over(lambda: barrier.passes(parity), f"parity {parity} of {barrier.name}, {barrier.over} phases over")
        own.clock.join(barrier.known())


# ---------------------------------------------------------------- the copy engine


def async_load(descriptor: Descriptor, corner: Any, barrier: Memory, target: Memory) -> None:
    own, at, signal = machine.running(), [int(c) for c in corner], barrier.barrier
    task = own.issue("the copy to shared memory")

    def move() -> None:
        task.reads(barrier)
        task.writes(target)
        target.put(descriptor.read(at).reshape(target.where.shape))
        signal.arrive(task.clock, 0, -descriptor.block_type.nbytes)

    if list(target.shape) != descriptor.block_type.shape or target.dtype != descriptor.dtype:
        raise Fault(f"a block of {descriptor.dtype} {descriptor.block_type.shape} to {target.dtype} {target.shape}")
    task.steps.append(move)
    own.hand_over()


def _from_shared(what: str, descriptor: Descriptor, corner: Any, source: Memory, add: bool) -> None:
    own, at = machine.running(), [int(c) for c in corner]
    task = own.issue(what)
    block: list[Array] = []

    def read() -> None:
        task.reads(source)
        block.append(source.words().reshape(descriptor.block_type.shape))

    if list(source.shape) != descriptor.block_type.shape or source.dtype != descriptor.dtype:
        raise Fault(f"a block of {descriptor.dtype} {descriptor.block_type.shape} from {source.dtype} {source.shape}")
    task.steps += [read, lambda: descriptor.write(at, block[0], add)]
    own.stores.append(task)
    own.hand_over()


def async_store(descriptor: Descriptor, corner: Any, source: Memory) -> None:
    _from_shared("the copy from shared memory", descriptor, corner, source, False)


def async_add(descriptor: Descriptor, corner: Any, source: Memory) -> None:
    _from_shared("the addition from shared memory", descriptor, corner, source, True)


class tma:
    async_copy_global_to_shared = async_load = staticmethod(async_load)
    async_copy_shared_to_global = async_store = staticmethod(async_store)

    @staticmethod
    def store_wait(pendings: int) -> None:
        """Until all but the last `pendings` have read their shared memory."""
        own = machine.running()
        awaited = own.stores[: len(own.stores) - pendings]
        own.hand_over(lambda: all(task.passed > 0 for task in awaited), "the copy engine to read shared memory")
        own.settle(awaited)


# ---------------------------------------------------------------- asynchronous copies of threads


class async_copy:
    """`cp.async`: what the threads of a partition copy themselves, element by element, through the generic proxy."""

    @staticmethod
    def async_load(
        target: Memory, pointer: Value, mask: Any = None, cache_modifier: str = "", eviction_policy: str = ""
    ) -> None:  # fmt: skip
        own = machine.running()
        task, tensors = own.issue("the asynchronous copy"), own.program.machine.tensors

        def move() -> None:
            task.writes(target, generic=True)
            target.put(encoded(tensors.load(pointer, mask, 0).data, target.dtype))

        if pointer.dtype.element_ty != target.dtype or list(pointer.shape) != target.shape:
            raise Fault(f"a copy of {pointer.dtype.element_ty} {list(pointer.shape)} to {target.dtype} {target.shape}")
        tensors.load(pointer, mask, 0)  # that there is something is found here, in the kernel's text
        task.steps.append(move)
        own.copies.add(task)
        own.hand_over()

    async_copy_global_to_shared = async_load

    @staticmethod
    def mbarrier_arrive(memory: Memory, increment_count: bool = True) -> None:
        """Each thread arrives once all that it has copied is there. Who waits hears of the copies, and of nothing else
        that the threads did before."""
        own, barrier = machine.running(), memory.barrier
        task = own.issue("the arrival after asynchronous copies", after=own.copies.pending)
        task.clock = Clock(tasks=own.copies.issued | 1 << task.number)
        if increment_count:
            barrier.await_more(own.threads)
        task.steps.append(lambda: barrier.arrive(task.clock, own.threads))
        own.hand_over()

    @staticmethod
    def commit_group() -> None:
        machine.running().copies.groups.append([])

    @staticmethod
    def wait_group(num_outstanding: int = 0) -> None:
        """Until all but the last groups that were committed are there."""
        own, groups = machine.running(), machine.running().copies.groups
        over = builtins.max(len(groups) - 1 - num_outstanding, 0)
        awaited = [task for group in groups[:over] for task in group]
        own.hand_over(lambda: all(task.done for task in awaited), "asynchronous copies")
        own.settle(awaited)
        del groups[:over]


# ---------------------------------------------------------------- the tensor cores


def warpgroup_mma(
    a: Any, b: Memory, acc: Any, *, use_acc: Any = True, is_async: bool = False
) -> Any:  # fmt: skip
    """a b + acc, once the tensor cores come to it; they take products in the order of their issue."""
    own = machine.running()
    task = own.issue("the product", after=tuple(own.products[-1:]))
    pending = Pending(task)
    add = bool(use_acc)

    def multiply() -> None:
        for operand in (a, b):
            if isinstance(operand, Memory):
                task.reads(operand)
        x = a.numbers() if isinstance(a, Memory) else a.data
        before: Any = acc.value if isinstance(acc, Pending) else acc
        with np.errstate(all="ignore"):
            product = np.matmul(x, b.numbers(), dtype=np.float32)
            pending.value = Value(product + before.data if add else product, tl.float32)

    if own.threads != 128:
        raise Fault(f"a product by {own.threads} threads")
    task.steps.append(multiply)
    own.products.append(task)
    own.hand_over()
    return pending if is_async else warpgroup_mma_wait(0, deps=[pending])


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Any = None) -> Any:
    own = machine.running()
    awaited: list[Task] = own.products[: len(own.products) - num_outstanding]
    own.hand_over(lambda: all(task.done for task in awaited), "the tensor cores")
    own.settle(awaited)
    del own.products[: len(awaited)]
    results = tuple(
        x.value if isinstance(x, Pending) and not any(x.task is task for task in own.products) else x for x in deps
    )
    return results[0] if len(results) == 1 else results


def reinterpret(memory: Memory, dtype: tl.dtype, shape: Any, layout: Any) -> Memory:
    return memory.reinterpret(dtype, shape, layout)
