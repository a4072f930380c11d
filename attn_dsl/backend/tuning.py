"""Search tile shapes for a variant on the GPU at hand, and remember them.

What is found is kept on disk by (variant, architecture, dtype, head dimensions), candidate by candidate, so that an
interrupted search loses nothing and goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attn_dsl.backend import cache
from attn_dsl.backend.binding import Call
from attn_dsl.backend.execute import Options, Program, portable_call
from attn_dsl.backend.portable import launch
from attn_dsl.backend.portable.tiles import Tile, Tiles

PASSES = ("forward", "keys", "queries")
"""The kernels that have tiles: forward; dK and dV; dQ."""
_FILE = "tiles.json"

Timer = Callable[[Callable[[], object], Tiles], float]
"""Milliseconds of a function that runs with the given tiles."""
OnTrial = Callable[[str, Tile, float], None]
"""Called after each trial with the kernel, the tile and its milliseconds, infinite where it does not run."""


@dataclass(frozen=True)
class Subject:
    """What a choice of tiles is for."""

    variant: str
    text: str = field(repr=False)
    capability: tuple[int, int]
    dtype: str
    head_dim: int
    value_head_dim: int

    @staticmethod
    def of(program: Program, query: Tensor, value: Tensor, capability: tuple[int, int]) -> Subject:
        dtype = str(query.dtype).removeprefix("torch.")
        return Subject(program.variant.name, program.text, capability, dtype, query.shape[3], value.shape[3])

    @property
    def key(self) -> str:
        return cache.digest(self.text, *map(str, self.capability), self.dtype, f"{self.head_dim} {self.value_head_dim}")

    @property
    def name(self) -> str:
        sm = "".join(map(str, self.capability))
        return f"{self.variant}.sm_{sm}.{self.dtype}.{self.head_dim}_{self.value_head_dim}"


@dataclass
class Tuned:
    """What is known: milliseconds of each tile that was tried, by kernel; infinite where it does not run."""

    trials: dict[str, dict[Tile, float]] = field(default_factory=lambda: {name: {} for name in PASSES})
    finished: bool = False

    def best(self, name: str) -> Tile | None:
        """The fastest tile of a kernel, None where none ran."""
        ran = {tile: ms for tile, ms in self.trials[name].items() if math.isfinite(ms)}
        return min(ran, key=lambda tile: ran[tile]) if ran else None

    def tiles(self, default: Tiles) -> Tiles:
        """The choice for all kernels; what was not tried stays as it is."""
        return dataclasses.replace(default, **{n: tile for n in PASSES if (tile := self.best(n)) is not None})

    def to_json(self) -> str:
        trials = {
            name: [[*dataclasses.astuple(t), ms] for t, ms in found.items()] for name, found in self.trials.items()
        }
        return json.dumps({"finished": self.finished, "trials": trials})

    @staticmethod
    def from_json(text: str | bytes) -> Tuned:
        data = json.loads(text)
        trials = {name: {Tile(*row[:-1]): float(row[-1]) for row in data["trials"][name]} for name in PASSES}
        return Tuned(trials, bool(data["finished"]))


def recall(subject: Subject) -> Tuned | None:
    """What an earlier search found."""
    entry = cache.find(cache.TUNING, subject.name, subject.key)
    return None if entry is None else Tuned.from_json(entry.files[_FILE].read_bytes())


def remember(subject: Subject, tuned: Tuned) -> None:
    """Store, in place of what is there."""
    inputs = {name: str(value) for name, value in dataclasses.asdict(subject).items()}
    files = {_FILE: tuned.to_json().encode()}
    cache.put(cache.TUNING, subject.name, subject.key, files, inputs, replace=True)
    _choice.cache_clear()


def chosen(program: Program, query: Tensor, value: Tensor, capability: tuple[int, int]) -> Tiles | None:
    """The tiles that a search found for calls like this one, None where there was none; the disk is asked once."""
    return _choice(program, query.dtype, query.shape[3], value.shape[3], capability)


@functools.lru_cache(maxsize=1024)
def _choice(
    program: Program, dtype: torch.dtype, dim: int, value_dim: int, capability: tuple[int, int]
) -> Tiles | None:
    subject = Subject(program.variant.name, program.text, capability, str(dtype).removeprefix("torch."), dim, value_dim)
    tuned = recall(subject)
    return None if tuned is None else tuned.tiles(program.kernels.table(capability, dtype, dim, value_dim))


def candidates(name: str, dtype: torch.dtype, dim: int) -> Iterator[Tile]:
    """Tiles worth a trial: accumulators must have a chance to stay in registers, and pipelines in shared memory."""
    wide = dtype.itemsize == 4
    sizes = (16, 32, 64) if wide else (32, 64, 128)
    for rows, keys, warps, stages in itertools.product(sizes, sizes, (4, 8), (1, 2, 3, 4)):
        held = {"forward": rows, "keys": 2 * keys, "queries": rows}[name] * dim + rows * keys
        streamed = {"forward": 2 * keys, "keys": 2 * rows, "queries": 2 * keys}[name] * dim * dtype.itemsize * stages
        if held <= warps * 32 * 192 and streamed <= 200 * 1024:
            yield Tile(rows, keys, warps, stages)


def search(
    program: Program,
    call: launch.Call,
    capability: tuple[int, int],
    *,
    timer: Timer,
    wanted: frozenset[str] = frozenset(),
    backward: bool = True,
    on_trial: OnTrial = lambda name, tile, ms: None,
) -> Tuned:
    """Try every candidate for each kernel, saving after each trial. An interrupt ends the search, not the program."""
    subject = Subject.of(program, call.query, call.value, capability)
    tuned = recall(subject) or Tuned()
    default = program.kernels.table(capability, call.query.dtype, call.query.shape[3], call.value.shape[3])
    try:
        for name, tile in plan(call, default, backward=backward):
            if tile in tuned.trials[name]:
                continue
            tiles = dataclasses.replace(tuned.tiles(default), **{name: tile})
            run = _pass(program, dataclasses.replace(call, tiles=tiles), name, wanted)
            tuned.trials[name][tile] = _timed(timer, run, tiles)
            remember(subject, tuned)
            on_trial(name, tile, tuned.trials[name][tile])
        tuned.finished = backward
        remember(subject, tuned)
    except KeyboardInterrupt:
        pass
    return tuned


def run(program: Program, call: Call, options: Options, *, wanted: frozenset[str], backward: bool) -> Tuned:
    """Search on the GPU of the call's tensors, with a progress bar, and print what was chosen."""
    from rich import print as show_line

    bound = portable_call(program, call, options)
    capability = torch.cuda.get_device_capability(call.query.device)
    known = recall(Subject.of(program, call.query, call.value, capability))
    default = program.kernels.table(capability, call.query.dtype, call.query.shape[3], call.value.shape[3])
    progress, on_trial = show(bound, default, backward=backward, known=known)
    with progress, torch.no_grad():
        tuned = search(
            program, bound, capability, timer=device_timer, wanted=wanted, backward=backward, on_trial=on_trial
        )
    for name, text in summary(tuned).items():
        show_line(f"{name:8} {text}")
    if not tuned.finished and backward:
        show_line("stopped early; what was tried is saved, and the next search goes on from there")
    return tuned


def plan(call: launch.Call, default: Tiles, *, backward: bool) -> list[tuple[str, Tile]]:
    """The trials in order, the default of each kernel first."""
    found = []
    for name in PASSES if backward else PASSES[:1]:
        first = getattr(default, name)
        others = (tile for tile in candidates(name, call.query.dtype, call.query.shape[3]) if tile != first)
        found += [(name, tile) for tile in (first, *others)]
    return found


def _pass(program: Program, call: launch.Call, name: str, wanted: frozenset[str]) -> Callable[[], object]:
    """The function to time. Backward runs whole, over the outputs of one forward run."""
    if name == "forward":
        return lambda: launch.forward(program.kernels, call)

    @functools.cache
    def outputs() -> tuple[Tensor, Tensor, Tensor]:
        return launch.forward(program.kernels, call)

    def run() -> object:
        out, _, shifted = outputs()
        return launch.backward(program.kernels, call, out, shifted, out, None, wanted)

    return run


def _timed(timer: Timer, run: Callable[[], object], tiles: Tiles) -> float:
    """Infinite where the compiler or the device refuses the tiles."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        return timer(run, tiles)
    except (OutOfResources, PTXASError, CompilationError):
        return math.inf


def device_timer(run: Callable[[], object], tiles: Tiles) -> float:
    """The median of some tens of runs on the current device."""
    from triton.testing import do_bench

    return float(statistics.median(do_bench(run, warmup=10, rep=60, return_mode="all")))


def show(call: launch.Call, default: Tiles, *, backward: bool, known: Tuned | None) -> Any:
    """A progress bar over the trials with the best so far: `(progress, on_trial)`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    trials = plan(call, default, backward=backward)
    done = sum(known is not None and tile in known.trials[name] for name, tile in trials)
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True
    )
    task = progress.add_task("tuning", total=len(trials), completed=done)
    best: dict[str, tuple[float, Tile]] = {}

    def on_trial(name: str, tile: Tile, ms: float) -> None:
        best[name] = min(best.get(name, (math.inf, tile)), (ms, tile), key=lambda pair: pair[0])
        ms, tile = best[name]
        shape = f"{tile.rows} x {tile.keys}, {tile.warps} warps, {tile.stages} stages"
        progress.update(task, advance=1, description=f"{name}: best {ms:.3f} ms at {shape}")

    return progress, on_trial


def summary(tuned: Tuned) -> Mapping[str, str]:
    """For each kernel its choice and how many tiles ran, for people."""
    found = {}
    for name in PASSES:
        tile, trials = tuned.best(name), tuned.trials[name]
        if tile is not None:
            ran = sum(map(math.isfinite, trials.values()))
            found[name] = f"{tile.rows} x {tile.keys}, {tile.warps} warps, {tile.stages} stages: {trials[tile]:.3f} ms"
            found[name] += f", the best of {ran} ({len(trials) - ran} do not run)"
    return found
