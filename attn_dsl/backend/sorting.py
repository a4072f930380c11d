"""Positions sorted by what a tensor holds, and the runs of equal elements in that order (`passes/order_by_data.py`).

A sort is made once for tensors that do not change (`kept.py`), whatever layers and calls read them. On a GPU two
kernels make what a forward pass wants, and two what a backward pass wants beside; rows of more than 16384 positions are
sorted by PyTorch. What stays is the order, 2 bytes a position, or 4 in such rows, and for each end of runs that a pass
asks about a byte a position and 4 for each block of them; the elements themselves are not kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attn_dsl.backend.kept import Store
from attn_dsl.backend.layouts import Permutation
from attn_dsl.passes.order_by_data import BEYOND, BLOCK, ENDS, End, Sorted

DTYPES = (torch.int16, torch.int32)
"""Of orders on a GPU: of rows that our kernels sort, and of longer ones."""
Codes = tuple[Tensor, Tensor]
"""An end of runs: uint8 for each place, int32 for each block of places."""


@dataclass(frozen=True)
class Runs:
    """Ends of the runs of equal elements of a sorted tensor."""

    ends: Mapping[End, Codes]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for codes in self.ends.values() for tensor in codes)

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)

    def text(self) -> str:
        """For people."""
        return f"{' and '.join(self.ends)} places of runs of equal elements: {self.bytes} bytes"


@dataclass(frozen=True)
class Sort(Runs):
    """order: the positions along the axis of a tensor, equal elements in the order given. places: the same in int32, as
    a variant reads it, where it does."""

    by: Sorted
    order: Tensor
    places: Tensor | None = None
    layouts: dict[tuple[int, int], Permutation] = field(default_factory=dict)
    """By the heads of queries and of keys."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.order, *super().tensors, *(() if self.places is None else (self.places,)))

    def text(self) -> str:
        """For people."""
        what = "".join(f", {end} places of runs" for end in self.ends)
        return f"positions sorted by `{self.by.tensor.name}`{what}: {self.bytes} bytes"

    def layout(self, heads: int, kv_heads: int) -> Permutation:
        """That of calls with so many heads."""
        found = self.layouts.get((heads, kv_heads))
        if found is None:
            queries, keys = (_spread(self.by, self.order, kv_heads, count) for count in (heads, kv_heads))
            found = self.layouts[heads, kv_heads] = Permutation(queries, keys)
        return found


_sorts: Store[Sort] = Store()
_runs: Store[Runs] = Store()


def sort(by: Sorted, tensor: Tensor, names: Sequence[str]) -> Sort:
    """The sort of a tensor, with what a variant whose captured tensors have such names reads of it."""
    place = (by.axis, by.indices, *_wanted(by, names))
    return _sorts.find(place, (tensor,), tensor.device, lambda: made(by, tensor, names))


def _wanted(by: Sorted, names: Sequence[str]) -> tuple[tuple[End, ...], bool]:
    """Which ends of runs such a variant reads, and whether it reads the order."""
    return tuple(end for end in ENDS if by.end_names[end][0] in names), by.order_name in names


def read(by: Sorted, tensor: Tensor, known: Sort, names: Sequence[str]) -> dict[str, Tensor]:
    """What such a variant reads of a sort, by name; the ends of runs that are not `known` are found."""
    found: dict[str, Tensor] = {}
    for name in names:
        if name == by.order_name:
            found[name] = known.order.to(torch.int32) if known.places is None else known.places
    ends, _ = _wanted(by, names)
    missing = tuple(end for end in ends if end not in known.ends)
    others: Mapping[End, Codes] = {}
    if missing:
        place = (by.axis, by.indices, missing)
        others = _runs.find(place, (tensor,), tensor.device, lambda: Runs(_ends(by, tensor, known.order, missing))).ends
    for end in ends:
        found |= zip(by.end_names[end], known.ends[end] if end in known.ends else others[end], strict=True)
    return found


def made(by: Sorted, tensor: Tensor, names: Sequence[str]) -> Sort:
    """`sort`, made anew."""
    ends, ordered = _wanted(by, names)
    if _by_kernel(by, tensor):
        order, runs = _launched(by, tensor, ends)
        assert order is not None
    else:
        order = torch.sort(tensor, dim=by.axis, stable=True).indices
        runs = _ends(by, tensor, order, ends)
        order = order.to(torch.int32) if tensor.is_cuda else order
    return Sort(runs, by, order, order.to(torch.int32) if ordered else None)


def _by_kernel(by: Sorted, tensor: Tensor) -> bool:
    """Whether our kernels sort, which pays for rows that are not long."""
    if not tensor.is_cuda or tensor.dim() > 3:
        return False
    from attn_dsl.backend.portable.launch_sort import LONGEST

    return tensor.shape[by.axis] <= LONGEST


def _launched(
    by: Sorted, tensor: Tensor, ends: Sequence[End], *, ordered: bool = True
) -> tuple[Tensor | None, dict[End, Codes]]:
    from attn_dsl.backend.portable.launch_sort import sorted_positions

    along = tensor.movedim(by.axis, -1)
    beside = along.shape[:-1]
    order, found = sorted_positions(along.reshape(*beside, *[1] * (3 - tensor.dim()), -1), BLOCK, ends, ordered=ordered)

    def back(x: Tensor) -> Tensor:
        return x.reshape(*beside, -1).movedim(-1, by.axis)

    runs = {end: (back(codes), back(blocks)) for end in ends for codes, blocks in [found[end]]}
    return None if order is None else back(order), runs


def _ends(by: Sorted, tensor: Tensor, order: Tensor, ends: Sequence[End]) -> dict[End, Codes]:
    """Of a tensor that has that order."""
    if _by_kernel(by, tensor):
        return _launched(by, tensor, ends, ordered=False)[1]
    elements = tensor.gather(by.axis, order.long()).movedim(by.axis, -1)
    found: dict[End, Codes] = {}
    for end in ends:
        codes, blocks = encoded(end, _places(end, elements))
        found[end] = codes.movedim(-1, by.axis), blocks.movedim(-1, by.axis)
    return found


def _places(end: End, elements: Tensor) -> Tensor:
    """Of the runs of equal elements along the last axis, for each element: int64."""
    if end == "last":
        return elements.shape[-1] - 1 - _places("first", elements.flip(-1)).flip(-1)
    place = torch.arange(elements.shape[-1], device=elements.device).expand(elements.shape)
    begins = torch.ones_like(elements, dtype=torch.bool)
    begins[..., 1:] = elements[..., 1:] != elements[..., :-1]
    return torch.where(begins, place, 0).cummax(-1).values


def encoded(end: End, places: Tensor) -> Codes:
    """Ends [..., S] as a variant reads them: uint8 [..., S] and int32 [..., blocks]."""
    length = places.shape[-1]
    block = torch.arange(length, device=places.device) // BLOCK
    inside = places // BLOCK == block
    codes = torch.where(inside, places - block * BLOCK, BEYOND[end]).to(torch.uint8)
    edges = torch.arange(0, length, BLOCK, device=places.device)
    if end == "last":
        edges = (edges + BLOCK - 1).clamp(max=length - 1)
    return codes.contiguous(), places[..., edges].to(torch.int32).contiguous()


def _spread(by: Sorted, index: Tensor, kv_heads: int, heads: int) -> Tensor:
    """The places [B or 1, H or 1, S] in the order, for so many heads, dense."""
    index = index.movedim(by.axis, -1)
    beside = [name for axis, name in enumerate(by.indices) if axis != by.axis]
    if beside in (["h", "b"], ["hk", "b"]):
        index = index.transpose(0, 1)
    if "b" not in beside:
        index = index.unsqueeze(0)
    if not {"h", "hk"} & set(beside):
        return index.unsqueeze(1).contiguous()
    index = index.repeat_interleave(heads // kv_heads, 1) if "hk" in beside and heads != kv_heads else index
    return index.contiguous()
