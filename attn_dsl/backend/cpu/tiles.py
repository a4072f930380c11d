"""Which tiles a call visits, and what each of them is: positions, masks, heads.

A tile is some query rows of some heads against a run of keys. The schedule's integer functions give the runs of each
row of tiles, in closed form; where the mask reads tensors at positions, which no closed form knows, the mask itself is
evaluated run by run and the blocks that it leaves empty are passed over. No memory grows with the length squared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_dsl.backend.cpu.functions import Emitted, ScheduleFunctions, TileFunctions
from attn_dsl.backend.cpu.relative import antidiagonals

BLOCK = 64
"""Keys in a tile of the schedule. Runs are made of these, up to `TileShape.keys` long."""
CACHE = 5 << 18
"""Bytes of logits in a tile: about what a core's cache holds from one operation to the next."""
ROWS = 512
"""Query rows of a tile where rows see many keys."""
FEW_OPERATIONS = 50_000_000
"""Below so many floating-point operations threads cost more than they bring."""
KNOWN = 64
"""Masks over `q - k` that are kept for the next tile."""
WIDE = 4096
"""Keys at a time for which a mask that reads tensors is evaluated."""


@dataclass(frozen=True)
class TileShape:
    """Query rows, keys and key/value heads that are processed together."""

    rows: int
    keys: int
    heads: int

    @staticmethod
    def of(rows: int, visited: int, kv_heads: int, group: int, dtype: torch.dtype, threads: int) -> TileShape:
        """The shape for so many rows of a head; `visited` keys are what a row of tiles sees, `kv_heads` of all batches.

        512 x 512 in one head fills a core's cache; fewer rows go with longer runs of keys, and with several heads.
        """
        keys = min(max(512 * 512 // (rows * group), 512), 4096, math.ceil(visited / BLOCK) * BLOCK)
        heads = max(CACHE // (rows * group * keys * dtype.itemsize), 1)
        return TileShape(rows, keys, min(heads, math.ceil(kv_heads / threads)))


Part = tuple[int, int, int, int]
"""The heads `[h0, h1)` of the batches `[b0, b1)`, as `(b0, b1, h0, h1)`: whole groups, or a part of one."""


class Run(NamedTuple):
    """The keys `[begin, end)`; unless `masked`, every row sees them all."""

    begin: int
    end: int
    masked: bool


class Visit(NamedTuple):
    """A run and, where it is masked, its mask, broadcastable to `[batches, heads, rows, keys]`.

    `keep` is bool; `limit` is plus infinity where it is true, minus infinity elsewhere: the logits' upper bound.
    """

    begin: int
    end: int
    keep: Tensor | None = None
    limit: Tensor | None = None


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

    def shaped(self) -> Problem:
        """The problem with the tile shape that fits its schedule.

        A row of tiles computes the whole runs that its rows see: with few keys, as in a window, fewer rows waste less.
        Measured on two Zen cores: smaller tiles lose to the cost of a call, larger ones to the cache.
        """
        rows = min(self.q_len, max(ROWS // self.group, 32))
        while True:
            start = (self.q_len - rows) // 2
            visited = sum(run.end - run.begin for run in self.runs(0, 0, start, start + rows))
            if rows <= 128 or visited >= 4 * rows or self.functions.mask_reads_positions:
                break
            rows //= 2
        kv_heads, visited = self.batch * self.kv_heads, max(visited, BLOCK)
        shape = TileShape.of(rows, visited, kv_heads, self.group, self.dtype, self.threads)
        return replace(self, shape=shape)

    def workers(self, pieces: int) -> int:
        """Threads to share so many independent pieces of work; 0 where torch must thread the few that there are."""
        if self.threads == 1:
            return 1
        return self.threads if pieces >= self.threads else 0

    @cached_property
    def lists(self) -> tuple[Any, ...]:
        """The captured tensors that the schedule reads, as nested lists."""
        names = self.schedule.slots
        return tuple(t.tolist() if i in names else None for i, t in enumerate(self.tensors))

    @cached_property
    def masks(self) -> dict[tuple[int, int, int], tuple[Tensor, Tensor]]:
        """Masks over `q - k` that have been evaluated, by what they depend on."""
        return {}

    @cached_property
    def keys(self) -> Tensor:
        return torch.arange(self.kv_len).view(1, 1, 1, -1)

    @cached_property
    def steps(self) -> Tensor:
        return torch.arange(self.q_len + self.kv_len)

    def parts(self) -> list[Part]:
        """All heads, in parts that share no key/value head."""
        return list(self._chunks(0, self.batch, 0, self.heads))

    def tiles(self, part: Part | None = None) -> Iterator[Tile]:
        """Every tile row of every head (of a part) once, the last rows first, heads with equal runs together."""
        for start in reversed(range(0, self.q_len, self.shape.rows)):
            stop = min(start + self.shape.rows, self.q_len)
            for rectangle, runs in self._rectangles(start, stop, part or (0, self.batch, 0, self.heads)):
                for b0, b1, h0, h1 in self._chunks(*rectangle):
                    yield Tile(self, start, stop, b0, b1, h0, h1, runs)

    def _rectangles(self, start: int, stop: int, part: Part) -> Iterator[tuple[Part, tuple[Run, ...]]]:
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

    def _chunks(self, b0: int, b1: int, h0: int, h1: int) -> Iterator[Part]:
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
        whole = _joined(sorted(blocks), math.inf)
        if self.functions.mask_reads_positions:
            return tuple(piece for run in whole for piece in _pieces(run, WIDE if run.masked else self.shape.keys))
        near = _joined((piece for run in whole for piece in _pieces(run, self.shape.keys)), self.shape.keys)
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


@dataclass(frozen=True)
class Tile:
    """The query rows `[start, stop)` of the heads `[h0, h1)` of the batches `[b0, b1)`; the last row
    first where the functions are `by_distance`.

    Its matrices are `[(b1 - b0) * key/value heads, query heads of each * rows, ...]`; seen as
    `[batches, heads, rows, ...]` they have no copy.
    """

    problem: Problem
    start: int
    stop: int
    b0: int
    b1: int
    h0: int
    h1: int
    runs: tuple[Run, ...]

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def shared(self) -> int:
        """Query heads of the tile for each of its key/value heads."""
        return min(self.problem.group, self.h1 - self.h0)

    @property
    def kv(self) -> slice:
        """The key/value heads in tensors `[B * HK, KV, D]`."""
        problem = self.problem
        first = self.b0 * problem.kv_heads + self.h0 // problem.group
        return slice(first, first + self.matrices)

    @property
    def matrices(self) -> int:
        return (self.b1 - self.b0) * (self.h1 - self.h0) // self.shared

    @property
    def index(self) -> tuple[slice, slice, slice]:
        """The rows in tensors `[B, H, Q, ...]`."""
        return slice(self.b0, self.b1), slice(self.h0, self.h1), slice(self.start, self.stop)

    def gather(self, x: Tensor, factor: float = 1.0) -> Tensor:
        """The rows of `x [B, H, Q, D]`, times a factor, as a fresh matrix for each key/value head."""
        rows = x[self.index].to(self.problem.dtype)
        if self.problem.functions.by_distance:
            rows = rows.flip(2)
        return (rows * factor).reshape(self.matrices, self.shared * self.rows, x.shape[3])

    def scatter(self, x: Tensor, rows: Tensor) -> None:
        """Write matrices back to the rows of `x [B, H, Q, ...]`."""
        rows = rows.view(self.b1 - self.b0, self.h1 - self.h0, self.rows, *x.shape[3:])
        x[self.index] = rows.flip(2) if self.problem.functions.by_distance else rows

    def places(self, x: Tensor) -> Tensor:
        """Matrices `[matrices, shared * rows, keys]` as `[batches, heads, rows, keys]`."""
        return x.view(self.b1 - self.b0, self.h1 - self.h0, self.rows, x.shape[-1])

    @cached_property
    def b(self) -> Tensor:
        return torch.arange(self.b0, self.b1).view(-1, 1, 1, 1)

    @cached_property
    def h(self) -> Tensor:
        return torch.arange(self.h0, self.h1).view(1, -1, 1, 1)

    @cached_property
    def q(self) -> Tensor:
        """Positions of the rows: `[1 or batches, 1, rows, 1]`."""
        steps = self.problem.steps[: self.rows]
        return self.last.view(-1, 1, 1, 1) - (steps if self.problem.functions.by_distance else steps.flip(0)).view(
            -1, 1
        )

    @cached_property
    def last(self) -> Tensor:
        """Position of the last query: `[1]`, or one for each batch."""
        offsets = self.problem.offsets
        return torch.tensor(offsets if len(offsets) == 1 else offsets[self.b0 : self.b1]) + (self.stop - 1)

    def arguments(self, begin: int, end: int) -> tuple[Any, ...]:
        """`b, h, q, k, scalars, tensors` of the tile functions."""
        problem = self.problem
        return self.b, self.h, self.q, problem.keys[..., begin:end], problem.scalars, problem.tensors

    def by_distance(self, function: Emitted, begin: int, end: int) -> Sequence[Any]:
        """What a function of `q - k` says along the antidiagonals: `[1 or batches, 1 or heads, rows + keys - 1]`."""
        distance = (self.last - begin).view(-1, 1, 1) - self.problem.steps[: self.rows + end - begin - 1]
        problem = self.problem
        return function(self.b[..., 0], self.h[..., 0], distance, problem.scalars, problem.tensors)  # type: ignore[no-any-return]

    def relative(self, function: Emitted, begin: int, end: int) -> tuple[Tensor, ...]:
        """The same, spread over the tile."""
        return tuple(antidiagonals(v, self.rows, end - begin) for v in self.by_distance(function, begin, end))

    def visits(self) -> Iterator[Visit]:
        """The runs with their masks, cut to the tile shape; what the mask leaves empty is left out."""
        functions = self.problem.functions
        for run in self.runs:
            if not run.masked or functions.mask is None:
                yield Visit(run.begin, run.end)
            elif functions.mask_by_distance:
                yield Visit(run.begin, run.end, *self._mask_by_distance(run))
            else:
                yield from self._visits(run, functions.mask)

    def _mask_by_distance(self, run: Run) -> tuple[Tensor, Tensor]:
        """`keep` and `limit` of a mask over `q - k`: the same for all tiles that stand alike to their keys."""
        known = self.problem.masks
        place = (self.problem.offsets[0] + self.stop - run.begin, self.rows, run.end - run.begin)
        found = known.get(place)
        if found is None:
            (keep,) = self.by_distance(self.problem.functions.mask_relative, run.begin, run.end)
            found = tuple(antidiagonals(v, self.rows, run.end - run.begin) for v in (keep, self.limit(keep)))
            if len(self.problem.offsets) == 1 and keep.shape[:2] == (1, 1) and len(known) < KNOWN:
                known[place] = found
        return found

    def _visits(self, run: Run, mask: Emitted) -> Iterator[Visit]:
        relative = self.relative(self.problem.functions.mask_relative, run.begin, run.end)
        keep = mask(*self.arguments(run.begin, run.end), relative)
        if not isinstance(keep, Tensor):
            keep = torch.tensor(keep).view(1, 1, 1, 1)
        keep = keep.expand(*keep.shape[:3], run.end - run.begin)
        runs: Sequence[Run] = (run,)
        if self.problem.functions.mask_reads_positions:
            runs = self._seen(run, keep)
        for begin, end, masked in runs:
            if masked:
                piece = keep[..., begin - run.begin : end - run.begin]
                yield Visit(begin, end, piece, self.limit(piece))
            else:
                yield Visit(begin, end)

    def _seen(self, run: Run, keep: Tensor) -> list[Run]:
        """The run in pieces, without the blocks of which no row sees any key."""
        keys = run.end - run.begin
        blocks = -(-keys // BLOCK)
        seen = keep.new_zeros(blocks * BLOCK)
        full = keep.new_ones(blocks * BLOCK)
        flat = keep.reshape(-1, keys)
        seen[:keys], full[:keys] = flat.any(0), flat.all(0)
        answers = zip(seen.view(-1, BLOCK).any(1).tolist(), full.view(-1, BLOCK).all(1).tolist(), strict=True)
        begins = range(run.begin, run.end, BLOCK)
        found = (
            Run(at, min(at + BLOCK, run.end), not whole)
            for at, (some, whole) in zip(begins, answers, strict=True)
            if some
        )
        limit = self.problem.shape.keys
        pieces = (piece for run in _joined(found, math.inf) for piece in _pieces(run, limit))
        return list(_joined(pieces, limit))

    def limit(self, keep: Tensor) -> Tensor:
        return keep.to(self.problem.dtype).sub_(0.5).mul_(math.inf)


def _joined(runs: Iterator[Run] | Sequence[Run], limit: float) -> list[Run]:
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


def _pieces(run: Run, keys: int) -> Iterator[Run]:
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
