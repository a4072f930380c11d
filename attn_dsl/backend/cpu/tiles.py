"""What a tile is: some query rows of some heads against runs of keys, their positions and masks.

Where the mask reads tensors at positions, which no closed form knows, the mask itself is evaluated run by run and the
blocks that it leaves empty are passed over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_dsl.backend.cpu.functions import Emitted
from attn_dsl.backend.cpu.problem import BLOCK, Part, Problem, Run, joined, pieces
from attn_dsl.backend.cpu.relative import antidiagonals
from attn_dsl.backend.cpu.scratch import scratch

RECENT = 4
"""Masks over rows and keys that are kept for the other heads."""
KNOWN = 64
"""Masks over `q - k` that are kept for the next tile."""


class Visit(NamedTuple):
    """A run and, where it is masked, its mask, broadcastable to `[batches, heads, rows, keys]`.

    `keep` is bool; `limit` is plus infinity where it is true, minus infinity elsewhere: the logits' upper bound.
    """

    begin: int
    end: int
    keep: Tensor | None = None
    limit: Tensor | None = None


@dataclass(frozen=True)
class Tile:
    """The query rows `[start, stop)` of the heads `[h0, h1)` of the batches `[b0, b1)`; the last row
    first where the problem says `descending`.

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

    def gather(self, name: str, x: Tensor, factor: float = 1.0) -> Tensor:
        """The rows of `x [B, H, Q, D]`, times a factor, a matrix for each key/value head, in scratch of that name."""
        rows = x[self.index].to(self.problem.dtype)
        result = scratch(name, rows.shape, self.problem.dtype)
        torch.mul(rows.flip(2) if self.problem.descending else rows, factor, out=result)
        return result.view(self.matrices, self.shared * self.rows, x.shape[3])

    def scatter(self, x: Tensor, rows: Tensor) -> None:
        """Write matrices back to the rows of `x [B, H, Q, ...]`."""
        rows = rows.view(self.b1 - self.b0, self.h1 - self.h0, self.rows, *x.shape[3:])
        x[self.index] = rows.flip(2) if self.problem.descending else rows

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
        return self.last.view(-1, 1, 1, 1) - (steps if self.problem.descending else steps.flip(0)).view(-1, 1)

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
        if not self.problem.functions.by_distance:
            return ()
        return tuple(antidiagonals(v, self.rows, end - begin) for v in self.by_distance(function, begin, end))

    def visits(self) -> Iterator[Visit]:
        """The runs with their masks, cut to the tile shape, the last first; what the mask leaves empty is left out.

        The last keys that rows see tend to be the nearest, which biases favour: a maximum that is found there stays.
        """
        functions = self.problem.functions
        for run in reversed(self.runs):
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
        if self.problem.keeps_masks and place in known:
            return known[place]
        (keep,) = self.by_distance(self.problem.functions.mask_relative, run.begin, run.end)
        keep, limit = (antidiagonals(v, self.rows, run.end - run.begin) for v in (keep, self.limit(keep)))
        if not self.problem.descending:
            keep, limit = (x.flip(2).contiguous() for x in (keep, limit))
        if self.problem.keeps_masks and len(known) < KNOWN:
            known[place] = keep, limit
        return keep, limit

    def _visits(self, run: Run, mask: Emitted) -> Sequence[Visit]:
        """The run in pieces with their masks. Tiles of other heads ask again, at once: the last answers are kept."""
        if self.problem.functions.mask_by_head:
            return list(self._masked(run, mask))
        known, place = self.problem.visits, (run, self.start, self.b0, self.b1)
        found = known.get(place)
        if found is None:
            found = known[place] = list(self._masked(run, mask))
            for old in list(known)[:-RECENT]:
                known.pop(old, None)
        return found

    def _masked(self, run: Run, mask: Emitted) -> Iterator[Visit]:
        # Copied, since torch lays out what it makes of antidiagonals alone by columns.
        relative = [x.contiguous() for x in self.relative(self.problem.functions.mask_relative, run.begin, run.end)]
        keep = mask(*self.arguments(run.begin, run.end), relative)
        if not isinstance(keep, Tensor):
            keep = torch.tensor(keep).view(1, 1, 1, 1)
        keep = keep.expand(*keep.shape[:3], run.end - run.begin)
        runs: Sequence[Run] = (run,)
        if self.problem.functions.mask_reads_positions:
            runs = self._seen(run, keep)
        for begin, end, masked in reversed(runs):
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
        cut = (part for whole in joined(found, math.inf) for part in pieces(whole, limit))
        return joined(cut, limit)

    def limit(self, keep: Tensor) -> Tensor:
        return keep.to(self.problem.dtype).sub_(0.5).mul_(math.inf)


def tiles(problem: Problem, part: Part | None = None) -> Iterator[Tile]:
    """Every tile row of every head (of a part) once, the last rows first, heads with equal runs together."""
    for start in reversed(range(0, problem.q_len, problem.shape.rows)):
        stop = min(start + problem.shape.rows, problem.q_len)
        for rectangle, runs in problem.rectangles(start, stop, part or (0, problem.batch, 0, problem.heads)):
            for b0, b1, h0, h1 in problem.chunks(*rectangle):
                yield Tile(problem, start, stop, b0, b1, h0, h1, runs)
