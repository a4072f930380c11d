"""A tile: some query rows of some heads against pieces of keys, or blocks of keys by number; their masks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_dsl.backend.cpu.claims import EMPTY, FULL, PARTIAL, together
from attn_dsl.backend.cpu.functions import Emitted, MaskFunctions
from attn_dsl.backend.cpu.pieces import BLOCK, Seen, steps
from attn_dsl.backend.cpu.problem import Part, Problem
from attn_dsl.backend.cpu.relative import antidiagonals
from attn_dsl.backend.cpu.scratch import scratch

RECENT = 16
"""Limits over rows and keys that are kept for the other heads."""
KNOWN = 64
"""Limits over `q - k` that are kept for the next tile."""


Row = list[tuple[Part, Seen]]
"""A row of tiles, cut into parts that see the same keys."""


class Limit(NamedTuple):
    """An upper bound of the logits of the keys `[begin, end)` of a visit, spread over `[batches, heads, rows, keys]`:
    plus infinity where the mask keeps a pair, minus infinity elsewhere.
    """

    begin: int
    end: int
    bound: Tensor


@dataclass(frozen=True)
class Visit:
    """The keys `[begin, end)`, or those of some blocks for each key/value head: `blocks [matrices, count]`.

    The tile rows of a stack see keys that lie `step` further on from one to the next. Beyond the `limits`, every row
    sees every key.
    """

    begin: int
    end: int
    step: int = 0
    limits: tuple[Limit, ...] = ()
    blocks: Tensor | None = None

    @property
    def keys(self) -> int:
        """How many."""
        return self.end - self.begin if self.blocks is None else BLOCK * self.blocks.shape[1]

    @property
    def places(self) -> Tensor:
        """Positions of the keys of the blocks, past the end too: `[matrices, keys]`."""
        assert self.blocks is not None
        return (self.blocks.unsqueeze(2) * BLOCK + torch.arange(BLOCK)).flatten(1)

    def keep(self) -> Tensor | None:
        """The mask itself, `[batches, heads, rows, keys]`, axes may be 1; None where it keeps all."""
        if not self.limits:
            return None
        lead = torch.broadcast_shapes(*(limit.bound.shape[:3] for limit in self.limits))  # type: ignore[no-untyped-call]
        keep = torch.ones((*lead, self.keys), dtype=torch.bool)
        for begin, end, bound in self.limits:
            keep[..., begin:end] &= bound > 0
        return keep

    def of(self, name: str, x: Tensor, stack: int) -> Tensor:
        """The keys of `x [matrices, keys, D]`, for each row of a stack; gathered ones in scratch of that name."""
        if stack > 1:
            strides = (self.step * x.stride(1), x.stride(1), x.stride(2))
            return x.as_strided((stack, self.keys, x.shape[2]), strides, x.storage_offset() + self.begin * x.stride(1))
        if self.blocks is None:
            return x[:, self.begin : self.end]
        flat = x.reshape(-1, BLOCK * x.shape[2])
        found = scratch(name, (self.blocks.numel(), flat.shape[1]), x.dtype)
        return torch.index_select(flat, 0, self._places(x), out=found).view(x.shape[0], -1, x.shape[2])

    def add(self, x: Tensor, left: Tensor, right: Tensor) -> None:
        """Add the product of two stacks of matrices to the keys of `x`."""
        if self.blocks is None:
            x[:, self.begin : self.end].baddbmm_(left, right)
        else:
            rows = torch.bmm(left, right).view(self.blocks.numel(), -1)
            x.view(-1, BLOCK * x.shape[2]).index_add_(0, self._places(x), rows)

    def _places(self, x: Tensor) -> Tensor:
        """Numbers of the blocks among those of all matrices."""
        assert self.blocks is not None
        return (self.blocks + torch.arange(x.shape[0]).view(-1, 1) * (x.shape[1] // BLOCK)).flatten()


@dataclass(frozen=True)
class Tile:
    """The query rows `[start, stop)` of the heads `[h0, h1)` of the batches `[b0, b1)`; the last row
    first where the problem says `descending`. Of one batch and key/value head, a `stack` of several tile rows.

    Its matrices are `[(b1 - b0) * key/value heads, query heads of each * rows, ...]`; seen as
    `[batches, heads, rows, ...]` they have no copy. The tile rows of a stack stand in place of batches.
    """

    problem: Problem
    start: int
    stop: int
    b0: int
    b1: int
    h0: int
    h1: int
    seen: Seen
    stack: int = 1
    steps: tuple[int, ...] = ()
    """By how much each piece that is seen moves from one row of the stack to the next."""

    @property
    def rows(self) -> int:
        return (self.stop - self.start) // self.stack

    @property
    def shared(self) -> int:
        """Query heads of the tile for each of its key/value heads."""
        return min(self.problem.group, self.h1 - self.h0)

    @property
    def lead(self) -> tuple[int, int]:
        """Batches (or rows of the stack) and heads."""
        return self.stack if self.stack > 1 else self.b1 - self.b0, self.h1 - self.h0

    @property
    def kv(self) -> slice:
        """The key/value heads in tensors `[B * HK, KV, D]`."""
        problem = self.problem
        first = self.b0 * problem.kv_heads + self.h0 // problem.group
        return slice(first, first + (self.matrices if self.stack == 1 else 1))

    @property
    def matrices(self) -> int:
        return self.lead[0] * self.lead[1] // self.shared

    @property
    def index(self) -> tuple[slice, slice, slice]:
        """The rows in tensors `[B, H, Q, ...]`."""
        return slice(self.b0, self.b1), slice(self.h0, self.h1), slice(self.start, self.stop)

    def gather(self, name: str, x: Tensor, factor: float = 1.0) -> Tensor:
        """The rows of `x [B, H, Q, D]`, times a factor, a matrix for each key/value head, in scratch of that name."""
        rows = self._apart(x[self.index].to(self.problem.dtype))
        result = scratch(name, rows.shape, self.problem.dtype)
        torch.mul(rows, factor, out=result)
        return result.view(self.matrices, self.shared * self.rows, x.shape[3])

    def scatter(self, x: Tensor, rows: Tensor) -> None:
        """Write matrices back to the rows of `x [B, H, Q, ...]`."""
        rows = rows.view(*self.lead, self.rows, *x.shape[3:])
        rows = rows.flip(2) if self.problem.descending else rows
        if self.stack > 1:
            x[self.index][0].view(rows.shape[1], self.stack, *rows.shape[2:]).copy_(rows.transpose(0, 1))
        else:
            x[self.index] = rows

    def _apart(self, x: Tensor) -> Tensor:
        """`[1 or batches, 1 or heads, all rows, ...]` by rows of the stack, in the order of the tile."""
        if self.stack > 1:
            x = x[0].view(x.shape[1], self.stack, -1, *x.shape[3:]).transpose(0, 1)
        return x.flip(2) if self.problem.descending else x

    def places(self, x: Tensor) -> Tensor:
        """Matrices `[matrices, shared * rows, keys]` as `[batches, heads, rows, keys]`."""
        return x.view(*self.lead, self.rows, x.shape[-1])

    @cached_property
    def b(self) -> Tensor:
        return torch.arange(self.b0, self.b1).view(-1, 1, 1, 1)

    @cached_property
    def h(self) -> Tensor:
        return torch.arange(self.h0, self.h1).view(1, -1, 1, 1)

    @cached_property
    def q(self) -> Tensor:
        """Positions of the rows: `[1 or batches, 1, rows, 1]`."""
        return self._own(self.problem.rows)

    def _own(self, x: Tensor, visit: Visit | None = None, begin: int = 0, end: int | None = None) -> Tensor:
        """What of a side of the mask, or of the positions, is the tile's (and of the visit's keys `[begin, end)`)."""
        x = x[self.b0 : self.b1] if x.shape[0] > 1 else x
        x = x[:, self.h0 : self.h1] if x.shape[1] > 1 else x
        if x.shape[2] > 1:
            return self._apart(x[:, :, self.start : self.stop])
        if visit is None or x.shape[3] == 1:
            return x
        end = visit.keys if end is None else end
        if visit.blocks is None:
            x = x[..., visit.begin + begin : visit.begin + end + visit.step * (self.stack - 1)]
            return x if visit.step == 0 else x.unfold(3, end - begin, visit.step)[0].permute(2, 0, 1, 3)
        numbers = visit.blocks[:, begin // BLOCK : end // BLOCK]
        blocks = x.reshape(*x.shape[:2], -1, BLOCK)
        heads = numbers.view(self.b1 - self.b0, -1, numbers.shape[1]).repeat_interleave(self.shared, 1)
        blocks = blocks.expand(*heads.shape[:2], -1, -1)
        gathered = blocks.gather(2, heads.unsqueeze(3).expand(-1, -1, -1, BLOCK))
        return gathered.view(*gathered.shape[:2], 1, -1)

    @cached_property
    def last(self) -> Tensor:
        """Position of the last query: `[1]`, or one for each batch or row of the stack."""
        offsets = self.problem.offsets
        last = torch.tensor(offsets if len(offsets) == 1 else offsets[self.b0 : self.b1]) + (self.stop - 1)
        return last if self.stack == 1 else last - self.rows * torch.arange(self.stack - 1, -1, -1)

    def arguments(self, visit: Visit) -> tuple[Any, ...]:
        """`b, h, q, k, scalars, tensors` of the tile functions."""
        return self.b, self.h, self.q, self._own(self.problem.keys, visit), *self.captured

    @property
    def captured(self) -> tuple[Any, Any]:
        """The last arguments of the tile functions: `scalars, tensors`."""
        return self.problem.scalars, self.problem.tensors

    def by_distance(self, function: Emitted, visit: Visit, begin: int = 0, end: int | None = None) -> Sequence[Any]:
        """What a function of `q - k` says along the antidiagonals: `[1 or batches, 1 or heads, rows + keys - 1]`.

        Of gathered keys it is said of each pair.
        """
        problem = self.problem
        end = visit.keys if end is None else end
        if visit.blocks is not None:
            k = self._own(problem.keys, visit, begin, end)
            return function(self.b, self.h, self.q - k, problem.scalars, problem.tensors)  # type: ignore[no-any-return]
        first = self.last - (visit.begin + begin)
        if self.stack > 1:
            first = first[:1] if visit.step == self.rows else first - visit.step * torch.arange(self.stack)
        distance = first.view(-1, 1, 1) - problem.steps[: self.rows + end - begin - 1]
        return function(self.b[..., 0], self.h[..., 0], distance, problem.scalars, problem.tensors)  # type: ignore[no-any-return]

    def relative(self, function: Emitted, visit: Visit, begin: int = 0, end: int | None = None) -> tuple[Tensor, ...]:
        """The same, spread over the tile."""
        end = visit.keys if end is None else end
        found = self.by_distance(function, visit, begin, end)
        if visit.blocks is not None:
            return tuple(found)
        return tuple(antidiagonals(v, self.rows, end - begin) for v in found)

    def visits(self) -> Iterator[Visit]:
        """What the tile sees, with the limits of the mask; of pieces the last first.

        The last keys that rows see tend to be the nearest, which biases favour: a maximum that is found there stays.
        """
        mask = self.problem.functions.mask
        if isinstance(self.seen, Tensor):
            assert mask is not None
            yield from self._gathered(self.seen, mask)
            return
        for piece, step in zip(reversed(self.seen), reversed(self.steps or (0,) * len(self.seen)), strict=True):
            visit = Visit(piece.begin, piece.end, step)
            if mask is None:
                yield visit
                continue
            found = self._limit_by_distance if mask.by_distance else self._limit
            ranges = ((begin - piece.begin, end - piece.begin) for begin, end in piece.masked)
            yield replace(visit, limits=tuple(Limit(*place, found(visit, mask, *place)) for place in ranges))

    def _gathered(self, codes: Tensor, mask: MaskFunctions) -> Iterator[Visit]:
        """The seen blocks, masked ones first, of all heads together; where one has fewer, the rest is masked."""
        codes = codes[: self.h1 - self.h0].view(-1, self.shared, codes.shape[1])
        codes = together(codes, 1)
        order = torch.where(codes == EMPTY, FULL + 1, codes).argsort(dim=1, stable=True)
        masked, seen = (codes == PARTIAL).sum(1), (codes > EMPTY).sum(1)
        most_masked, most, fewest = int(masked.amax()), int(seen.amax()), int(seen.amin())
        if self.problem.kv_len < self.problem.padded_keys:  # the last block is masked, wherever it stands
            fewest = 0
        step = max(self.problem.shape.keys // BLOCK, 1)
        for first in range(0, most, step):
            last = min(first + step, most)
            visit, limits = Visit(0, 0, blocks=order[:, first:last]), []
            if first < most_masked:
                place = 0, BLOCK * (min(last, most_masked) - first)
                limits.append(Limit(*place, self._limit_of(self._margin(visit, mask, *place))))
            if last > fewest:
                begin = max(fewest - first, 0)
                inside = (torch.arange(first, last) < seen.view(-1, 1)).repeat_interleave(BLOCK, 1)
                inside = (inside & (visit.places < self.problem.kv_len))[:, BLOCK * begin :]
                inside = inside.repeat_interleave(self.shared, 0).view(*self.lead, 1, -1)
                limits.append(Limit(BLOCK * begin, visit.keys, self._limit_of(inside.to(torch.int16).sub_(1))))
            yield replace(visit, limits=tuple(limits))

    def _limit_by_distance(self, visit: Visit, mask: MaskFunctions, begin: int, end: int) -> Tensor:
        """The limit of a mask over `q - k`: the same for all tiles that stand alike to their keys."""
        problem, known = self.problem, self.problem.masks
        first = problem.offsets[0] + self.start + self.rows - visit.begin - begin
        place = (first, self.rows, end - begin, 1 if visit.step else self.stack)
        if problem.keeps_masks and place in known:
            return known[place]
        (margin,) = self.by_distance(mask.relative, visit, begin, end)
        limit = antidiagonals(self._limit_of(margin), self.rows, end - begin)
        if not problem.descending:
            limit = limit.flip(2).contiguous()
        if problem.keeps_masks and len(known) < KNOWN:
            known[place] = limit
        return limit

    def _limit(self, visit: Visit, mask: MaskFunctions, begin: int, end: int) -> Tensor:
        """The limit of another mask. Tiles of other heads ask again, at once: the last answers are kept."""
        if mask.by_head:
            return self._limit_of(self._margin(visit, mask, begin, end))
        keys = visit.begin + begin, visit.begin + end
        known, place = self.problem.limits, (*keys, self.start, self.stack, self.b0, self.b1)
        found = known.get(place)
        if found is None:
            found = known[place] = self._limit_of(self._margin(visit, mask, begin, end))
            for old in list(known)[:-RECENT]:
                known.pop(old, None)
        return found

    def _margin(self, visit: Visit, mask: MaskFunctions, begin: int, end: int) -> Tensor:
        """Not negative where the mask keeps a pair: `[batches, heads, rows, keys]`, axes may be 1."""
        problem = self.problem
        rows, keys = problem.sides
        relative: Sequence[Tensor] = ()
        if mask.partly:  # copied, since torch lays out what it makes of antidiagonals alone by columns
            relative = [problem.narrow(x).contiguous() for x in self.relative(mask.relative, visit, begin, end)]
        own = [self._own(x) for x in rows], [self._own(x, visit, begin, end) for x in keys]
        return torch.as_tensor(mask.of_sides(*own, relative, problem.scalars, problem.tensors))

    def _limit_of(self, margin: Tensor) -> Tensor:
        return margin.to(self.problem.dtype).add_(0.5).mul_(math.inf)


def tiles(problem: Problem, part: Part | None = None, *, stacks: bool = False) -> Iterator[Tile]:
    """Every tile row of every head (of a part) once, the last rows first, heads that see the same keys together.

    With `stacks`, up to `shape.depth` tile rows of a head together, where they stand alike to their keys.
    """
    shape = problem.shape
    whole = part or (0, problem.batch, 0, problem.heads)
    waiting: list[Row] = []

    def emitted(first: int) -> Iterator[Tile]:
        """The tile rows that wait, of which the lowest has that number."""
        count = len(waiting)
        start, stop = first * shape.rows, min((first + count) * shape.rows, problem.q_len)
        moves = _steps(waiting[-1], waiting[-2], shape.rows) if count > 1 else None
        for (b0, b1, h0, h1), seen in waiting[-1]:
            limit = 1 if count > 1 else max(shape.heads, shape.depth)
            for c0, c1, g0, g1 in problem.chunks(b0, b1, h0, h1, limit):
                own = seen[g0 - h0 : g1 - h0] if isinstance(seen, Tensor) else seen
                yield Tile(problem, start, stop, c0, c1, g0, g1, own, count, moves or ())

    depth = shape.depth if stacks else 1
    for number in reversed(range(math.ceil(problem.q_len / shape.rows))):
        row = list(problem.rectangles(number, whole, shape))
        above_is_whole = (number + 2) * shape.rows <= problem.q_len
        if waiting and not (len(waiting) < depth and above_is_whole and _follows(row, waiting, shape.rows)):
            yield from emitted(number + 1)
            waiting.clear()
        waiting.append(row)
    yield from emitted(0)


def _follows(row: Row, waiting: Sequence[Row], rows: int) -> bool:
    """Whether a tile row stands to its keys as those above it that wait."""
    found = _steps(row, waiting[-1], rows)
    return found is not None and (len(waiting) == 1 or found == _steps(waiting[-1], waiting[-2], rows))


def _steps(row: Row, above: Row, rows: int) -> tuple[int, ...] | None:
    """`steps` of tile rows that are not cut, to the one above."""
    if len(row) != 1 or len(above) != 1 or row[0][0] != above[0][0]:
        return None
    return steps(row[0][1], above[0][1], rows)
