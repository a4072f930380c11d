"""Positions sorted by one kernel: as a stable sort, with the ends of runs of equal elements."""

from __future__ import annotations

import pytest
import torch
from portable_support import program_of
from torch import Tensor

from attn_dsl.backend import sorting
from attn_dsl.backend.portable import launch_sort
from attn_dsl.backend.portable.launch_sort import BINS, sorted_positions
from attn_dsl.passes.order_by_data import BLOCK, ENDS


def agrees(tensor: Tensor) -> None:
    elements, order = torch.sort(tensor, dim=-1, stable=True)
    found, ends = sorted_positions(tensor, BLOCK, ENDS)
    assert found is not None and found.dtype is torch.int16 and torch.equal(found.long(), order)
    for end in ENDS:
        for x, y in zip(ends[end], sorting.encoded(end, sorting._places(end, elements)), strict=True):
            assert torch.equal(x, y), end
    nothing, only = sorted_positions(tensor, BLOCK, ("last",), ordered=False)
    assert nothing is None and all(torch.equal(x, y) for x, y in zip(only["last"], ends["last"], strict=True))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of which a short row has several."""
    monkeypatch.setattr(launch_sort, "CHUNK", 128)
    monkeypatch.setattr(launch_sort, "PART", 32)
    launch_sort._known.clear()


@pytest.mark.parametrize("length", [1, 100, 256, 515])
@pytest.mark.parametrize("values", [1, 7, BINS])
def test_values_that_fit_the_bins_are_counted(length: int, values: int) -> None:
    generator = torch.Generator().manual_seed(length)
    agrees(torch.randint(-3, values - 3, (2, 1, length), generator=generator, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_values_from_a_wide_range_are_compared(dtype: torch.dtype) -> None:
    generator, info = torch.Generator().manual_seed(1), torch.iinfo(dtype)
    drawn = torch.tensor([info.min, info.max, 0, -1, 70000], dtype=dtype)
    agrees(drawn[torch.randint(0, 5, (1, 2, 300), generator=generator)])
    agrees(torch.randint(0, BINS + 1, (1, 1, 300), generator=generator, dtype=dtype) * BINS)


def test_rows_may_stand_apart() -> None:
    tensor = torch.randint(0, 9, (70, 3, 2), dtype=torch.int32).permute(1, 2, 0)
    agrees(tensor)
    agrees(tensor[:1].expand(2, -1, -1))


@pytest.mark.parametrize(("axes", "axis"), [("k", 0), ("kb", 0), ("bk", 1), ("bhk", 2), ("bkh", 1), ("khb", 0)])
def test_what_a_kernel_finds_has_the_axes_of_the_tensor(axes: str, axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, indices = {"b": ("B", 2), "h": ("H", 3), "k": ("KV", 150)}, {"b": "b", "h": "h"}
    extents = ", ".join(sizes[name][0] for name in axes)
    sides = [", ".join(indices.get(name, side) for name in axes) for side in "qk"]
    (by,) = program_of(f"attention t()\ntensor t: int32[{extents}]\nmask = t[{sides[0]}] == t[{sides[1]}]\n").orders
    tensor = torch.randint(0, 5, [sizes[name][1] for name in axes], dtype=torch.int32)
    names = [name for end in ENDS for name in by.end_names[end]]
    plain = sorting.made(by, tensor, names)
    monkeypatch.setattr(sorting, "_by_kernel", lambda *given: True)
    found = sorting.made(by, tensor, names)
    assert torch.equal(found.order.long(), plain.order) and by.axis == axis
    for end in ENDS:
        assert all(torch.equal(x, y) for x, y in zip(found.ends[end], plain.ends[end], strict=True))
    missing = sorting._ends(by, tensor, found.order, ("last",))
    assert torch.equal(missing["last"][0], plain.ends["last"][0])
