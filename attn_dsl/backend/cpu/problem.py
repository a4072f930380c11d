"""A call as the tile loops take it: its numbers, its tile shape, and the runs of keys that each row of tiles visits.

The schedule's integer functions give the runs, in closed form. No memory grows with the length squared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from attn_dsl.backend.cpu.claims import EMPTY, PARTIAL, Claims
from attn_dsl.backend.cpu.functions import ScheduleFunctions, TileFunctions
from attn_dsl.backend.cpu.pieces import BLOCK, Piece, Run, Seen, cut, joined
from attn_dsl.backend.cpu.shapes import TileShape, chosen
from attn_dsl.backend.cpu.workers import operations_on, spread

T = TypeVar("T")

FEW_PIECES = 4
"""Keys in more pieces than these are gathered."""
FEW_OPERATIONS = 50_000_000
"""Below so many floating-point operations threads cost more than they bring."""


Part = tuple[int, int, int, int]
"""The heads `[h0, h1)` of the batches `[b0, b1)`, as `(b0, b1, h0, h1)`: whole groups, or a part of one."""


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
    names: tuple[str, ...]
    """Of the captured tensors."""
    tensors: tuple[Tensor, ...]

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def keeps_masks(self) -> bool:
        """Whether the mask of a tile is the same for all tiles that stand alike to their keys."""
        mask = self.functions.mask
        return mask is not None and mask.alike and len(self.offsets) == 1

    @cached_property
    def descending(self) -> bool:
        """Whether tiles hold their last row first, as what works along antidiagonals wants it."""
        mask = self.functions.mask
        return self.functions.by_distance or (mask is not None and mask.by_distance and not self.keeps_masks)

    def offset(self, b: int) -> int:
        """Position of the first query of a batch entry."""
        return self.offsets[b] if len(self.offsets) > 1 else self.offsets[0]

    def shaped(self) -> Problem:
        """The problem with the tile shape that fits its schedule."""
        return self._with(chosen(self))

    def _with(self, shape: TileShape) -> Problem:
        """The problem with a tile shape; what was computed of it holds for any."""
        result = replace(self, shape=shape)
        result.__dict__.update({**self.__dict__, "shape": shape})
        return result

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
    def masks(self) -> dict[tuple[int, int, int, int], Tensor]:
        """Limits of masks over `q - k` that have been evaluated, by what they depend on."""
        return {}

    @cached_property
    def limits(self) -> dict[tuple[Any, ...], Tensor]:
        """Limits of other masks, by run, rows and batches: those of the last tiles."""
        return {}

    @cached_property
    def rows(self) -> Tensor:
        """Positions of the queries: `[1 or B, 1, Q, 1]`."""
        return (torch.tensor(self.offsets).view(-1, 1) + torch.arange(self.q_len)).view(-1, 1, self.q_len, 1)

    @cached_property
    def keys(self) -> Tensor:
        """Positions of the keys, up to whole blocks (past the end the last one again): `[1, 1, 1, KV...]`."""
        return torch.arange(self.padded_keys).clamp_(max=self.kv_len - 1).view(1, 1, 1, -1)

    @property
    def padded_keys(self) -> int:
        return math.ceil(self.kv_len / BLOCK) * BLOCK

    @cached_property
    def claims(self) -> Claims | None:
        """What is proved of the tiles of this call; None without a mask."""
        mask = self.functions.mask
        if mask is None:
            return None
        b, h = torch.arange(self.batch).view(-1, 1, 1, 1), torch.arange(self.heads).view(1, -1, 1, 1)
        given = self.scalars, self.tensors
        rows = [_four(x, self.rows) for x in mask.row_sides(b, h, self.rows, *given)]
        keys = [_four(x, self.keys) for x in mask.key_sides(b, h, self.keys, *given)]
        numbers = dict(zip(self.functions.scalars, self.scalars, strict=True))
        return Claims(mask, rows, keys, numbers, dict(zip(self.names, self.tensors, strict=True)), BLOCK,
                      self.padded_keys // BLOCK)  # fmt: skip

    @cached_property
    def integers(self) -> torch.dtype | None:
        """In which integers masks are computed; None where they may leave 64 bits."""
        return torch.int64 if self.claims is None else self.claims.integers()

    @cached_property
    def sides(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The sides of the mask, for all rows and for all keys."""
        if self.claims is None:
            return (), ()
        return [self.narrow(x) for x in self.claims.rows], [self.narrow(x) for x in self.claims.keys]

    def narrow(self, x: Tensor) -> Tensor:
        """Integers in the dtype of `integers`."""
        return x.to(self.integers or torch.int64) if x.dtype is torch.int64 else x

    @property
    def gathers(self) -> bool:
        """Whether tiles may see keys by number instead of in runs."""
        return self.functions.mask is not None and self.functions.mask.reads_positions

    @cached_property
    def steps(self) -> Tensor:
        return torch.arange(self.q_len + self.kv_len)

    def parts(self) -> list[Part]:
        """All heads, in parts that share no key/value head, for every thread one if there are so many."""
        heads = min(max(self.shape.heads, self.shape.depth), math.ceil(self.batch * self.kv_heads / self.threads))
        shape = replace(self.shape, heads=heads)
        return list(replace(self, shape=shape).chunks(0, self.batch, 0, self.heads))

    def rectangles(self, tile: int, part: Part, shape: TileShape) -> Iterator[tuple[Part, Seen]]:
        """The part, cut into parts that see the same keys in a row of tiles; or with what each head sees."""
        start, stop = tile * shape.rows, min((tile + 1) * shape.rows, self.q_len)
        b0, b1, h0, h1 = part
        if self.gathers:
            assert self.claims is not None
            decided = self.claims.codes(tile, shape.rows)
            for b in range(b0, b1):
                codes = decided[min(b, decided.shape[0] - 1)]
                codes = codes[h0:h1] if codes.shape[0] > 1 else codes
                pieces = self._pieces_of(codes[0], shape.keys) if codes.shape[0] == 1 else ()
                if 0 < len(pieces) <= FEW_PIECES or not (pieces or codes.any()):
                    yield (b, b + 1, h0, h1), pieces
                else:
                    yield (b, b + 1, h0, h1), codes.expand(h1 - h0, -1)
            return
        if not self.schedule.per_head:
            per_batch = self.schedule.per_batch or len(self.offsets) > 1
            rows = [self._pieces(b, h0, start, stop, shape.keys) for b in (range(b0, b1) if per_batch else (b0,))]
            for low, high in _equal(rows) if per_batch else [(0, b1 - b0)]:
                yield (b0 + low, b0 + high, h0, h1), rows[low]
            return
        for b in range(b0, b1):
            heads = [self._pieces(b, h, start, stop, shape.keys) for h in range(h0, h1)]
            for first, last in _equal(heads):
                for low, high in _cut(h0 + first, h0 + last, self.group):
                    yield (b, b + 1, low, high), heads[low - h0]

    def chunks(self, b0: int, b1: int, h0: int, h1: int, limit: int | None = None) -> Iterator[Part]:
        """The rectangle in pieces of at most `limit` key/value heads; `shape.heads` unless given."""
        limit = self.shape.heads if limit is None else limit
        groups = max((h1 - h0) // self.group, 1)
        if groups > limit // 2 or b1 - b0 == 1:
            step = limit * self.group
            for b in range(b0, b1):
                yield from ((b, b + 1, h, min(h + step, h1)) for h in range(h0, h1, step))
        else:
            several = limit // groups
            yield from ((b, min(b + several, b1), h0, h1) for b in range(b0, b1, several))

    def _pieces_of(self, codes: Tensor, keys: int) -> tuple[Piece, ...]:
        """What `codes [blocks]` say, in pieces of at most so many keys."""
        found, begin = [], 0
        for code, blocks in itertools.groupby(codes.tolist()):
            end = begin + BLOCK * sum(1 for _ in blocks)
            if code != EMPTY:
                found.append(Run(begin, min(end, self.kv_len), code == PARTIAL))
            begin = end
        return cut(found, keys)

    def _pieces(self, b: int, h: int, start: int, stop: int, keys: int) -> tuple[Piece, ...]:
        """What the rows `[start, stop)` of a head visit, ascending, in pieces of at most so many keys."""
        return cut(self.scheduled(b, h, start, stop), keys)

    def scheduled(self, b: int, h: int, start: int, stop: int) -> list[Run]:
        """The runs that the schedule leaves when it is asked block by block, ascending."""
        runs = self._ranges(b, h, start, stop)
        return joined(sorted(block for run in runs for block in self._decided(run, b, h, start, stop)))

    def _ranges(self, b: int, h: int, start: int, stop: int) -> Iterator[Run]:
        """The schedule's ranges, of whole blocks."""
        offset = self.offset(b)
        place = b, h, offset + start, offset + stop - 1, offset, BLOCK, self.scalars, self.lists
        for begin, end, masked in self.schedule.kv_ranges(*place):
            if begin < end:
                yield Run(begin * BLOCK, min(end * BLOCK, self.kv_len), masked)

    def _decided(self, run: Run, b: int, h: int, start: int, stop: int) -> Iterator[Run]:
        """The run without the blocks that are proved empty, those proved full unmasked."""
        skip, full = self.schedule.kv_skip, self.schedule.kv_full
        if skip is None and (full is None or not run.masked):
            yield run
            return
        offset = self.offset(b)
        for begin in range(run.begin, run.end, BLOCK):
            end = min(begin + BLOCK, run.end)
            place = (b, h, offset + start, offset + stop - 1, begin, end - 1, offset, self.scalars, self.lists)
            if skip is None or not skip(*place):
                yield Run(begin, end, run.masked and not (full is not None and full(*place)))


def _four(x: Any, like: Tensor) -> Tensor:
    """A side as a tensor of four axes; it may be a number."""
    side: Tensor = torch.as_tensor(x)
    return side if side.dim() == like.dim() else side.view(1, 1, 1, 1)


def _equal(rows: Sequence[tuple[Piece, ...]]) -> Iterator[tuple[int, int]]:
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
