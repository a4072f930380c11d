"""How tensors [B, H, S, D] and lines [B, H, S] of a call are seen in another order of positions.

`Classes`      residue classes, by strides alone
`Permutation`  positions as a sort has them, by one copy
`Grid`         strips of a grid, which the Hopper forward kernel reads in boxes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attn_dsl.passes.order import Place


class Layout(Protocol):
    """An order of the positions of queries and, where `keys` is said, of keys.

    both_passes: the backward pass takes it as well as the forward.
    """

    @property
    def both_passes(self) -> bool: ...

    def is_view(self, x: Tensor) -> bool:
        """Whether strides alone can say it."""

    def split(self, x: Tensor, *, keys: bool = False) -> Tensor:
        """A tensor [B, H, S, D] in this order."""

    def split_line(self, x: Tensor, filler: float) -> Tensor:
        """Numbers of queries [B, H, S] in this order, contiguous; `filler` for what fills sequences up."""

    def target(self, shape: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor] | None:
        """A new tensor of at least these rows in the order of the caller, and the same in this order, to write to;
        None where strides cannot say it."""

    def join(self, x: Tensor, rows: int, *, keys: bool = False) -> Tensor:
        """The first rows, in the order of the caller, of a tensor or a line in this order."""


@dataclass(frozen=True)
class Classes:
    """`count` interleaved sequences, placed as `Place` says.

    `batch` is that of the call. Sequences are as long as the longest; what one lacks is filled up.
    """

    count: int
    place: Place
    batch: int
    both_passes: bool = True

    def is_view(self, x: Tensor) -> bool:
        (batch, heads, rows, _), stride = x.shape, x.stride()
        if rows % self.count:
            return False
        match self.place:
            case Place.BATCH:
                return batch == 1
            case Place.HEAD:
                return heads == 1 or stride[2] == heads * stride[1]
            case Place.PAIR:
                return 1 in (batch, heads) or stride[0] == heads * stride[1]

    def _new(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An empty tensor for as many rows as all sequences have, laid out so that they are a view."""
        batch, heads, rows, dim = shape
        rows += -rows % self.count
        if self.place is Place.HEAD:
            return like.new_empty(batch, rows, heads, dim).transpose(1, 2)
        return like.new_empty(batch, heads, rows, dim)

    def target(self, shape: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
        made = self._new(shape, like)
        return made, self._view(made)

    def split(self, x: Tensor, *, keys: bool = False) -> Tensor:
        """A view of the tensor, or of a copy with rows of zeros at the end."""
        if not self.is_view(x):
            rows, copy = x.shape[2], self._new(x.shape, x)
            copy[:, :, :rows].copy_(x)
            copy[:, :, rows:].zero_()
            x = copy
        return self._view(x)

    def _view(self, x: Tensor) -> Tensor:
        (batch, heads, rows, dim), (by_batch, by_head, by_row, by_column) = x.shape, x.stride()
        match self.place:
            case Place.BATCH:
                outer = by_row, by_head
            case Place.HEAD:
                outer = by_batch, by_row if heads == 1 else by_head
            case Place.PAIR:
                outer = by_batch if heads == 1 else by_head, by_row
        shape = (*self._outer(batch, heads), rows // self.count, dim)
        return x.as_strided(shape, (*outer, by_row * self.count, by_column), x.storage_offset())

    def _outer(self, batch: int, heads: int) -> tuple[int, int]:
        """The batch and heads of what has such in the order of the caller."""
        match self.place:
            case Place.BATCH:
                return self.count, heads
            case Place.HEAD:
                return batch, self.count * heads
            case Place.PAIR:
                return batch * heads, self.count

    def split_line(self, x: Tensor, filler: float) -> Tensor:
        batch, heads, rows = x.shape
        x = torch.nn.functional.pad(x, (0, -rows % self.count), value=filler).view(batch, heads, -1, self.count)
        x = x.permute(0, 1, 3, 2) if self.place is Place.PAIR else x.permute(0, 3, 1, 2)
        return x.reshape(*self._outer(batch, heads), -1).contiguous()

    def join(self, x: Tensor, rows: int, *, keys: bool = False) -> Tensor:
        first = (self.batch, -1, self.count) if self.place is Place.PAIR else (self.batch, self.count, -1)
        x = x.reshape(*first, *x.shape[2:])
        return x.movedim(2 if self.place is Place.PAIR else 1, 3).flatten(2, 3)[:, :, :rows]


@dataclass(frozen=True)
class Permutation:
    """Row i is the row `queries[b, h, i]` of the caller's, and likewise for keys: dense integers [B, H, S], B and H as
    in the call or 1."""

    queries: Tensor
    keys: Tensor
    both_passes: bool = True

    def is_view(self, x: Tensor) -> bool:
        return False

    def split(self, x: Tensor, *, keys: bool = False) -> Tensor:
        return _permuted(x, self.keys if keys else self.queries, scatter=False)

    def split_line(self, x: Tensor, filler: float) -> Tensor:
        return x.gather(2, self.queries.expand(x.shape).long())

    def target(self, shape: Sequence[int], like: Tensor) -> None:
        return None

    def join(self, x: Tensor, rows: int, *, keys: bool = False) -> Tensor:
        index = self.keys if keys else self.queries
        if x.dim() == 4:
            return _permuted(x, index, scatter=True)
        return torch.empty_like(x).scatter_(2, index.expand(x.shape).long(), x)


@dataclass(frozen=True)
class Grid:
    """Tensors as they are, which a kernel reads in boxes; its lines are those of strips, the heads of each together.

    The backward pass goes by strips of keys, with a call of its own.

    width: of the grid. columns: of queries in a strip.
    """

    width: int
    columns: int
    both_passes: bool = False

    def is_view(self, x: Tensor) -> bool:
        return True

    def split(self, x: Tensor, *, keys: bool = False) -> Tensor:
        return x

    def split_line(self, x: Tensor, filler: float) -> Tensor:
        (batch, heads, _), strips = x.shape, -(-self.width // self.columns)
        grid = x.reshape(batch, heads, -1, self.width)
        grid = torch.nn.functional.pad(grid, (0, strips * self.columns - self.width), value=filler)
        grid = grid.view(batch, heads, -1, strips, self.columns)
        return grid.permute(0, 3, 1, 2, 4).reshape(batch, strips * heads, -1).contiguous()

    def target(self, shape: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
        made = like.new_empty(*shape)
        return made, made

    def join(self, x: Tensor, rows: int, *, keys: bool = False) -> Tensor:
        strips = -(-self.width // self.columns)
        x = x.view(x.shape[0], strips, -1, x.shape[2] // self.columns, self.columns)  # [B, strip, H, y, x]
        return x.permute(0, 2, 3, 1, 4).flatten(3, 4)[..., : self.width].flatten(2, 3)


def _permuted(x: Tensor, index: Tensor, *, scatter: bool) -> Tensor:
    """As `launch_permute.permuted`, on any device."""
    if x.is_cuda:
        from attn_dsl.backend.portable.launch_permute import permuted

        return permuted((x,), (index,), scatter=scatter)[0]
    made, index = torch.empty(x.shape, dtype=x.dtype, device=x.device), index.expand(x.shape[:3]).long()
    for source, target, rows in zip(x.flatten(0, 1), made.flatten(0, 1), index.flatten(0, 1), strict=True):
        if scatter:
            target.index_copy_(0, rows, source)
        else:
            torch.index_select(source, 0, rows, out=target)
    return made
