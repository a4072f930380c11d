"""Positions sorted by kernels: as a stable sort, with the ends of runs of equal elements."""

from __future__ import annotations

from collections.abc import Iterator

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


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sections of which a short row has several."""
    monkeypatch.setattr(launch_sort, "SECTION", 256)
    monkeypatch.setattr(launch_sort, "LONGEST", 2048)
    launch_sort._known.clear()
    yield
    launch_sort._known.clear()


def drawn(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(shape[-1]), dtype=dtype)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("length", [1, 100, 255, 256, 257, 770])
@pytest.mark.parametrize("values", [1, 7, BINS])
def test_values_that_fit_the_bins_are_counted(length: int, values: int) -> None:
    agrees(drawn(-3, values - 3, (2, 1, length)))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("lowest", [-BINS, -1, 0, BINS - 2, 1000 * BINS + 77, 2**31 - BINS, -(2**31)])
def test_bins_begin_at_any_value(lowest: int) -> None:
    x = drawn(0, BINS, (1, 2, 600), torch.int64) + lowest
    x[..., 500], x[..., 17] = lowest, lowest + BINS - 1
    agrees(x.to(torch.int32))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integers_of_any_type_are_sorted(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    for low, high in ((info.min, info.max), (info.max - 2, info.max), (info.min, info.min + 2)):
        agrees(drawn(low, high, (1, 2, 300), dtype))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("length", [1, 257, 600])
def test_values_from_a_wide_range_are_searched_for(dtype: torch.dtype, length: int) -> None:
    info = torch.iinfo(dtype)
    extremes = torch.tensor([info.min, info.max, 0, -1, 70000], dtype=dtype)
    agrees(extremes[drawn(0, 5, (1, 2, length), torch.int64)])
    agrees(drawn(0, BINS + 1, (1, 1, length), dtype) * BINS)
    agrees(drawn(info.min, info.max, (1, 1, length), dtype))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("above", [BINS - 1, BINS])
def test_one_value_decides_whether_bins_suffice(above: int) -> None:
    """Of rows that differ, each decides for itself; the values of the first are equal modulo the bins."""
    x = torch.zeros(2, 1, 515, dtype=torch.int32)
    x[0, 0, 3], x[1] = above, drawn(0, 2, (515,))
    agrees(x)


@pytest.mark.parametrize("length", [1023, 1025, 2500])
def test_sections_have_the_size_that_gpus_take(length: int) -> None:
    agrees(drawn(0, 64, (1, 1, length)))
    agrees(drawn(0, 10**9, (1, 1, length)) // 10**6)


@pytest.mark.usefixtures("short")
def test_rows_may_stand_apart() -> None:
    tensor = torch.randint(0, 9, (70, 3, 2), dtype=torch.int32).permute(1, 2, 0)
    agrees(tensor)
    agrees(tensor[:1].expand(2, -1, -1))


@pytest.mark.usefixtures("short")
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
