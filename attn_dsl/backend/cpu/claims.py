"""What is proved of tiles at the call: by interval arithmetic over the least and the greatest that the sides of the
mask take in the rows and in the keys of a tile.

    doc[b, q] == doc[b, k]     empty where the documents of the rows end before those of the keys begin, or the reverse

That takes O(Q + KV) for the sides and a few operations for each tile; no pair is looked at.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from attn_dsl.backend.cpu.functions import MaskFunctions
from attn_dsl.backend.cpu.intervals import Interval, Known, evaluate, number
from attn_dsl.ir.nodes import Load, Node, post_order
from attn_dsl.ir.types import Type

CELLS = 1 << 17
"""Tiles that are decided at a time."""
MOST = 8
"""Blocks of rows in a tile row at most, of those that are decided in blocks."""
EMPTY, PARTIAL, FULL = 0, 1, 2
INT32 = 2.0**31
INTEGERS = ((torch.int16, 2.0**15), (torch.int32, INT32), (torch.int64, 2.0**62))


@dataclass
class Claims:
    """rows, keys: the values of the mask's sides, `[1 or B, 1 or H, 1 or Q, 1]` and `[1 or B, 1 or H, 1, 1 or KV]`.

    numbers: the scalars by node. tensors: the captured ones by name. block: keys in a tile; blocks: how many of them.
    """

    mask: MaskFunctions
    rows: Sequence[Tensor]
    keys: Sequence[Tensor]
    numbers: Mapping[Node, bool | int | float]
    tensors: Mapping[str, Tensor]
    block: int
    blocks: int
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _decided_at: tuple[int, int, int] | None = None
    _codes: Tensor = field(default_factory=lambda: torch.empty(0))
    _known: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    _extremes: dict[int, list[Interval | None]] = field(default_factory=dict)

    def integers(self) -> torch.dtype | None:
        """The narrowest dtype that holds every integer of the margin over all pairs; None where none is sure to.

        Indices are int64.
        """
        sides = [_ends(x, (0, 1, 2, 3)) for x in (*self.rows, *self.keys)]
        known = self._evaluated([None if side is None else Interval(*side) for side in sides])
        largest = 0.0
        for node in post_order(self.mask.margin):
            if node.type is Type.INT and node in known:
                interval = known[node]
                if interval is None:
                    return None
                largest = max(largest, -interval.low.amin().item(), interval.high.amax().item())
            if isinstance(node, Load) and node in known:
                largest = max(largest, INT32)
        return next((dtype for dtype, bound in INTEGERS if largest + 1 < bound), None)

    def codes(self, tile: int, height: int) -> Tensor:
        """EMPTY, PARTIAL or FULL of the tile row `[tile * height, (tile + 1) * height)`: `[1 or B, 1 or H, blocks]`.

        Tall rows are decided in parts, which see less.
        """
        codes, place = self._rows_of(tile, height)
        return codes[:, :, place if codes.shape[2] > 1 else 0]

    def visited(self, height: int) -> float:
        """How many blocks the head that sees most visits in a tile row, on average over the first rows."""
        codes, _ = self._rows_of(0, height)
        return float((codes > EMPTY).sum(3).amax(1).double().mean())

    def _rows_of(self, tile: int, height: int) -> tuple[Tensor, int]:
        """Codes `[1 or B, 1 or H, tile rows, blocks]` around a tile row, and its place in them."""
        unit = self.block if height % self.block == 0 else height
        parts = height // unit
        size = max(CELLS // (self._cells * MOST), 1) * MOST if MOST % parts == 0 else parts
        chunk, place = divmod(tile * parts, size)
        with self._lock:  # threads of a backward pass walk tile rows of their own
            if (height, size, chunk) not in self._known:
                if self._decided_at != (unit, size, chunk):
                    self._decided_at, self._codes = (unit, size, chunk), self._decided(chunk * size, size, unit)
                    self._known.clear()
                self._known[height, size, chunk] = _joined(self._codes, parts)
            return self._known[height, size, chunk], place // parts

    @cached_property
    def _cells(self) -> int:
        sides = (*self.rows, *self.keys)
        return self.blocks * math.prod(max((x.shape[axis] for x in sides), default=1) for axis in (0, 1))

    def _decided(self, first: int, count: int, height: int) -> Tensor:
        rows = [
            end and Interval(*(x if x.shape[2] == 1 else x[:, :, first : first + count] for x in end))
            for end in self._row_extremes(height)
        ]
        margin = self._evaluated([*rows, *self._key_extremes])[self.mask.margin]
        if margin is None:
            return torch.full((1, 1, 1, self.blocks), PARTIAL, dtype=torch.uint8)
        possible, certain = (end >= 0 for end in margin)
        codes = (possible.to(torch.uint8) + certain).view((1, 1, 1, 1)[: 4 - possible.dim()] + possible.shape)
        return codes.expand(*codes.shape[:3], self.blocks)

    def _evaluated(self, sides: Sequence[Interval | None]) -> Known:
        given: Known = dict(zip((*self.mask.sides.rows, *self.mask.sides.keys), sides, strict=True))
        given.update(self._numbers)
        return evaluate(self.mask.margin, given, self.tensors)

    @cached_property
    def _numbers(self) -> Known:
        used = set(post_order(self.mask.margin))
        return {node: number(value) for node, value in self.numbers.items() if node in used}

    def _row_extremes(self, height: int) -> list[Interval | None]:
        if height not in self._extremes:
            self._extremes[height] = [_extremes(x, 2, height) for x in self.rows]
        return self._extremes[height]

    @cached_property
    def _key_extremes(self) -> list[Interval | None]:
        return [_extremes(x, 3, self.block) for x in self.keys]


def together(codes: Tensor, axis: int) -> Tensor:
    """What codes along an axis say of all of it."""
    return torch.where(codes.amin(axis) == FULL, FULL, codes.amax(axis).clamp_(max=PARTIAL))


def _joined(codes: Tensor, parts: int) -> Tensor:
    """The codes `[1 or B, 1 or H, rows, blocks]` of so many rows at a time."""
    if codes.shape[2] == 1 or parts == 1:
        return codes
    missing = -codes.shape[2] % parts
    if missing:  # the last row is short: its last part again
        codes = torch.cat([codes, codes[:, :, -1:].expand(-1, -1, missing, -1)], 2)
    return together(codes.reshape(*codes.shape[:2], -1, parts, codes.shape[3]), 3)


def _extremes(x: Tensor, axis: int, width: int) -> Interval | None:
    """The least and the greatest of every `width` elements along an axis, which shrinks to their number."""
    if x.shape[axis] > 1:
        missing = -x.shape[axis] % width
        if missing:
            x = torch.cat([x, x.narrow(axis, -1, 1).expand(*(missing if i == axis else -1 for i in range(4)))], axis)
        x = x.reshape(*x.shape[:axis], -1, width, *x.shape[axis + 1 :])
        axis += 1
    ends = _ends(x, (axis,))
    if ends is None:
        return None
    return Interval(*(end.squeeze(axis) for end in ends)) if x.dim() == 5 else Interval(*ends)


def _ends(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    """Minimum and maximum over axes; None where something is not finite, or an integer beyond what float64 tells."""
    if x.dtype is torch.bool:
        x = x.to(torch.uint8)
    low, high = x.amin(axes, keepdim=True).double(), x.amax(axes, keepdim=True).double()
    bound = math.inf if x.dtype.is_floating_point else 2.0**53
    if not (low.amin() > -bound and high.amax() < bound):
        return None
    return low, high
