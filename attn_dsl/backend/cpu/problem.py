"""A call as the tile loops take it: its numbers, its tile shape, and the runs of keys that each row of tiles visits.

The schedule's integer functions give the runs, in closed form. No memory grows with the length squared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from attn_dsl.backend.cpu.functions import ScheduleFunctions, TileFunctions
from attn_dsl.backend.cpu.workers import operations_on, spread

T = TypeVar("T")

BLOCK = 64
"""Keys in a tile of the schedule. Runs are made of these, up to `TileShape.keys` long."""
KEYS = 640
"""Keys of a tile, where so many are seen."""
CACHE = 5 << 19
"""Bytes of logits in a tile: more leave the cache between operations, fewer pay for more operations."""
ROWS = (512, 256, 128)
"""Query rows of a tile, of all heads that share its keys."""
SCATTERED = 128
"""The same, where only the mask itself knows which keys are seen."""
HALVING = 1.08
"""What half as many rows cost for each pair. Measured on two Zen cores."""
TALL = (2048, 1024)
"""The same, where all rows see the same keys."""
CELLS = 3 << 17
"""Logits in such a tile."""
FEW_OPERATIONS = 50_000_000
"""Below so many floating-point operations threads cost more than they bring."""
WIDE = 4096
"""Keys at a time for which a mask that reads tensors is evaluated."""


@dataclass(frozen=True)
class TileShape:
    """Query rows, keys and key/value heads that are processed together."""

    rows: int
    keys: int
    heads: int

    @staticmethod
    def of(problem: Problem, rows: int, visited: int) -> TileShape:
        """The shape for so many rows of a head; `visited` keys are what a row of tiles sees.

        Fewer rows go with several heads, so long as every thread gets some tiles: a mask is made once for them.
        """
        group, threads = problem.group, problem.threads
        keys = min(KEYS, math.ceil(visited / BLOCK) * BLOCK)
        heads = CACHE // (rows * group * keys * problem.dtype.itemsize)
        tiles = problem.batch * problem.kv_heads * math.ceil(problem.q_len / rows)
        return TileShape(rows, keys, max(min(heads, tiles // (4 * threads)), 1))

    @staticmethod
    def tall(problem: Problem) -> TileShape | None:
        """The shape where all rows see the same keys, and so none waste any: one head, and as many rows as there are.

        A tall product is the fastest, if every thread gets some tiles.
        """
        group, matrices = problem.group, problem.batch * problem.kv_heads
        for rows in TALL:
            if rows <= problem.q_len * group and rows % group == 0:
                rows //= group
                if matrices * math.ceil(problem.q_len / rows) >= 4 * problem.threads:
                    return TileShape(rows, CELLS // (rows * group), 1)
        return None


Part = tuple[int, int, int, int]
"""The heads `[h0, h1)` of the batches `[b0, b1)`, as `(b0, b1, h0, h1)`: whole groups, or a part of one."""


class Run(NamedTuple):
    """The keys `[begin, end)`; unless `masked`, every row sees them all."""

    begin: int
    end: int
    masked: bool


@dataclass(frozen=True)
class Problem:
    """A checked call. `dtype` is that of the arithmetic: float32, or float64 for float64 inputs."""

    functions: TileFunctions
    schedule: ScheduleFunctions
    shape: TileShape
    threads: int
    """How many are worth their while."""
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    scale: float
    offsets: tuple[int, ...]
    """Position of the first query: one for all batches, or one for each."""
    scalars: tuple[Any, ...]
    tensors: tuple[Tensor, ...]

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def keeps_masks(self) -> bool:
        """Whether the mask of a tile is the same for all tiles that stand alike to their keys."""
        return self.functions.mask_alike and len(self.offsets) == 1

    @cached_property
    def descending(self) -> bool:
        """Whether tiles hold their last row first, as what works along antidiagonals wants it."""
        return self.functions.by_distance or (self.functions.mask_by_distance and not self.keeps_masks)

    def shaped(self) -> Problem:
        """The problem with the tile shape that fits its schedule.

        A row of tiles computes the whole runs that its rows see: fewer rows waste less, and make more tiles of it.
        """
        if not any(run.masked for run in self.runs(0, 0, 0, self.q_len)):
            tall = TileShape.tall(self)
            if tall is not None:
                return replace(self, shape=tall)
        if self.functions.mask_reads_positions:
            return replace(self, shape=TileShape.of(self, min(max(SCATTERED // self.group, 1), self.q_len), KEYS))
        found: list[tuple[float, int, int]] = []
        for halvings, height in enumerate(ROWS if self.threads > 1 else ROWS[:1]):
            rows = min(max(height // self.group, 1), self.q_len)
            if not found or rows < found[-1][1]:
                visited = self._visited(rows)
                found.append((visited * HALVING**halvings, rows, visited))
        _, rows, visited = min(found, key=lambda item: item[0])
        return replace(self, shape=TileShape.of(self, rows, max(visited, BLOCK)))

    def _visited(self, rows: int) -> int:
        """How many keys a tile of so many rows sees, on average over four places."""
        last = (self.q_len - rows) // BLOCK
        starts = {last * eighths // 8 * BLOCK for eighths in (1, 3, 5, 7)}
        runs = [run for start in starts for run in self.runs(0, 0, start, start + rows)]
        return sum(run.end - run.begin for run in runs) // len(starts)

    def spread(self, work: Callable[[Iterator[T]], None], items: Iterator[T], pieces: int) -> None:
        """Run `work` over so many independent items: on all threads or, where the items are too few, with torch's."""
        if pieces < self.threads:
            with operations_on(self.threads):
                work(items)
        else:
            spread(work, items, self.threads)

    @cached_property
    def lists(self) -> tuple[Any, ...]:
        """The captured tensors that the schedule reads, as nested lists."""
        return tuple(t.tolist() if i in self.schedule.slots else None for i, t in enumerate(self.tensors))

    @cached_property
    def masks(self) -> dict[tuple[int, int, int], tuple[Tensor, Tensor]]:
        """Masks over `q - k` that have been evaluated, by what they depend on."""
        return {}

    @cached_property
    def visits(self) -> dict[tuple[Any, ...], Any]:
        """Runs in pieces with their masks, by run, rows and batches: those of the last tiles."""
        return {}

    @cached_property
    def keys(self) -> Tensor:
        return torch.arange(self.kv_len).view(1, 1, 1, -1)

    @cached_property
    def steps(self) -> Tensor:
        return torch.arange(self.q_len + self.kv_len)

    def parts(self) -> list[Part]:
        """All heads, in parts that share no key/value head, for every thread one if there are so many."""
        heads = min(self.shape.heads, math.ceil(self.batch * self.kv_heads / self.threads))
        shape = replace(self.shape, heads=heads)
        return list(replace(self, shape=shape).chunks(0, self.batch, 0, self.heads))

    def rectangles(self, start: int, stop: int, part: Part) -> Iterator[tuple[Part, tuple[Run, ...]]]:
        """The part, cut into parts with equal runs."""
        b0, b1, h0, h1 = part
        if not self.schedule.per_head:
            per_batch = self.schedule.per_batch or len(self.offsets) > 1
            rows = [self.runs(b, h0, start, stop) for b in (range(b0, b1) if per_batch else (b0,))]
            for low, high in _equal(rows) if per_batch else [(0, b1 - b0)]:
                yield (b0 + low, b0 + high, h0, h1), rows[low]
            return
        for b in range(b0, b1):
            heads = [self.runs(b, h, start, stop) for h in range(h0, h1)]
            for first, last in _equal(heads):
                for low, high in _cut(h0 + first, h0 + last, self.group):
                    yield (b, b + 1, low, high), heads[low - h0]

    def chunks(self, b0: int, b1: int, h0: int, h1: int) -> Iterator[Part]:
        """The rectangle in pieces of at most `shape.heads` key/value heads."""
        groups = max((h1 - h0) // self.group, 1)
        if groups > self.shape.heads // 2 or b1 - b0 == 1:
            step = self.shape.heads * self.group
            for b in range(b0, b1):
                yield from ((b, b + 1, h, min(h + step, h1)) for h in range(h0, h1, step))
        else:
            several = self.shape.heads // groups
            yield from ((b, min(b + several, b1), h0, h1) for b in range(b0, b1, several))

    def runs(self, b: int, h: int, start: int, stop: int) -> tuple[Run, ...]:
        """The runs that the rows `[start, stop)` of a head visit, ascending."""
        offset = self.offsets[b] if len(self.offsets) > 1 else self.offsets[0]
        q0, q1 = offset + start, offset + stop - 1
        ranges = self.schedule.kv_ranges(b, h, q0, q1, offset, BLOCK, self.scalars, self.lists)
        found = (
            Run(begin * BLOCK, min(end * BLOCK, self.kv_len), masked) for begin, end, masked in ranges if begin < end
        )
        blocks = (block for run in found for block in self._decided(run, b, h, q0, q1, offset))
        whole = joined(sorted(blocks), math.inf)
        if self.functions.mask_reads_positions:
            return tuple(part for run in whole for part in pieces(run, WIDE if run.masked else self.shape.keys))
        near = joined((part for run in whole for part in pieces(run, self.shape.keys)), self.shape.keys)
        return tuple(near)

    def _decided(self, run: Run, b: int, h: int, q0: int, q1: int, offset: int) -> Iterator[Run]:
        """The run without the blocks that are proved empty, those proved full unmasked."""
        skip, full = self.schedule.kv_skip, self.schedule.kv_full
        if skip is None and (full is None or not run.masked):
            yield run
            return
        for begin in range(run.begin, run.end, BLOCK):
            end = min(begin + BLOCK, run.end)
            place = (b, h, q0, q1, begin, end - 1, offset, self.scalars, self.lists)
            if skip is None or not skip(*place):
                yield Run(begin, end, run.masked and not (full is not None and full(*place)))


def joined(runs: Iterator[Run] | Sequence[Run], limit: float) -> list[Run]:
    """Adjacent runs made one: those of one kind or, given a limit, all that stay within it."""
    result: list[Run] = []
    for run in runs:
        if result and result[-1].end == run.begin:
            begin, _, masked = result[-1]
            if masked == run.masked if limit == math.inf else run.end - begin <= limit:
                result[-1] = Run(begin, run.end, masked or run.masked)
                continue
        result.append(run)
    return result


def pieces(run: Run, keys: int) -> Iterator[Run]:
    """The run in pieces of at most `keys`, about equal, that begin at blocks."""
    count = -(-(run.end - run.begin) // keys)
    step = math.ceil((run.end - run.begin) / (count * BLOCK)) * BLOCK
    for begin in range(run.begin, run.end, step):
        yield Run(begin, min(begin + step, run.end), run.masked)


def _equal(rows: Sequence[tuple[Run, ...]]) -> Iterator[tuple[int, int]]:
    """The half-open ranges of equal neighbours."""
    begin = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[begin]:
            yield begin, i
            begin = i


def _cut(h0: int, h1: int, group: int) -> Iterator[tuple[int, int]]:
    """`[h0, h1)` cut into whole groups of heads, in one piece, and parts of groups at its ends."""
    low, high = min(-(-h0 // group) * group, h1), max(h1 // group * group, h0)
    if high <= low and h0 // group == (h1 - 1) // group:
        yield h0, h1
        return
    yield from ((a, b) for a, b in ((h0, low), (low, high), (high, h1)) if a < b)
