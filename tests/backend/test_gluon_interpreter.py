"""The interpreter of Gluon finds what is wrong with a kernel, and nothing with one that is right."""

# ruff: noqa: RUF005 (lists as Triton knows them)

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import triton.language as tl
from gluon_interpreter import Deadlock, Fault, Machine, OutOfBounds, Race
from gluon_interpreter.values import Value
from hypothesis import given
from hypothesis import strategies as st
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_dsl.backend.hopper.versions import async_add, async_load, async_store, copy_rows

SEEDS = range(8)
ROWS, COLUMNS, TILES = 64, 64, 5


def descriptor(tensor: torch.Tensor, rows: int = ROWS) -> SimpleNamespace:
    layout = gl.NVMMASharedLayout.get_default_for([rows, COLUMNS], gl.bfloat16)
    return SimpleNamespace(
        base=tensor, shape=tensor.shape, strides=tensor.stride(), block_shape=[rows, COLUMNS], layout=layout
    )


def matrix(rows: int) -> torch.Tensor:
    return torch.randn(rows, COLUMNS).to(torch.bfloat16)


# ---------------------------------------------------------------- a ring of two places


@gluon.jit
def _load(source, ring, full, free, TILES: gl.constexpr, AWAIT: gl.constexpr):
    for n in range(TILES):
        place = n % 2
        if AWAIT:
            mbarrier.wait(free.index(place), (n // 2) & 1 ^ 1)
        mbarrier.expect(full.index(place), source.block_type.nbytes)
        async_load(source, [n * 64, 0], full.index(place), ring.index(place))


@gluon.jit
def _double(target, ring, full, free, staging, TILES: gl.constexpr, WAIT: gl.constexpr, RELEASE: gl.constexpr,
            FENCE: gl.constexpr, READ: gl.constexpr, STAY: gl.constexpr):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for n in range(TILES):
        place = n % 2
        if WAIT:
            mbarrier.wait(full.index(place), (n // 2) & 1)
        x = ring.index(place).load(layout).to(gl.float32)
        if RELEASE:
            mbarrier.arrive(free.index(place), count=1)
        if READ:
            tma.store_wait(0)
        staging.store((x * 2).to(gl.bfloat16))
        if FENCE:
            fence_async_shared()
        async_store(target, [n * 64, 0], staging)
    if STAY:
        tma.store_wait(0)


@gluon.jit
def doubled(source, target, TILES: gl.constexpr, AWAIT: gl.constexpr, WAIT: gl.constexpr, RELEASE: gl.constexpr,
            FENCE: gl.constexpr, READ: gl.constexpr, STAY: gl.constexpr, KNOWN: gl.constexpr):  # fmt: skip
    ring = gl.allocate_shared_memory(source.dtype, [2] + source.block_type.shape, source.layout)
    staging = gl.allocate_shared_memory(source.dtype, source.block_type.shape, source.layout)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    if KNOWN:
        fence_async_shared()
    gl.warp_specialize([
        (_double, (target, ring, full, free, staging, TILES, WAIT, RELEASE, FENCE, READ, STAY)),
        (_load, (source, ring, full, free, TILES, AWAIT)),
    ], [1], [24])  # fmt: skip


def double(seed: int, **ways: bool) -> None:
    source = matrix(TILES * ROWS)
    target = torch.zeros_like(source)
    options = dict.fromkeys(("AWAIT", "WAIT", "RELEASE", "FENCE", "READ", "STAY", "KNOWN"), True) | ways
    Machine(seed).run(doubled, 1, (descriptor(source), descriptor(target)), {"TILES": TILES, **options})
    assert torch.equal(target, 2 * source)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_ring_that_is_right_passes_in_every_order(seed: int) -> None:
    double(seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("way", "fault", "words"),
    [
        ("AWAIT", Race, "the copy to shared memory .* is not ordered after"),
        ("WAIT", Race, "the read of .* is not ordered after the copy|the copy .* is not ordered after the read"),
        ("RELEASE", Deadlock, r"partition 1 \(_load\) waits for parity 0 of shared memory 3"),
        ("FENCE", Race, "knows of nobody that has called fence_async_shared since"),
        ("STAY", Fault, "the end of program 0 has not waited for the copy from shared memory"),
        ("KNOWN", Race, "the copy to shared memory .* knows of nobody that has called fence_async_shared since"),
        ("READ", Race, "the write of .* is not ordered after the copy from shared memory"),
    ],
)
def test_what_is_left_out_is_found_in_every_order(way: str, fault: type[Fault], words: str, seed: int) -> None:
    with pytest.raises(fault, match=words):
        double(seed, **{way: False})


# ---------------------------------------------------------------- products


@gluon.jit
def multiplied(left, right, out, WAIT: gl.constexpr, EARLY: gl.constexpr):
    a = gl.allocate_shared_memory(left.dtype, left.block_type.shape, left.layout)
    b = gl.allocate_shared_memory(right.dtype, right.block_type.shape, right.layout)
    full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(full.index(0), count=1)
    fence_async_shared()
    mbarrier.expect(full.index(0), left.block_type.nbytes + right.block_type.nbytes)
    async_load(left, [0, 0], full.index(0), a)
    async_load(right, [0, 0], full.index(0), b)
    mbarrier.wait(full.index(0), 0)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    acc = gl.zeros([64, 64], gl.float32, layout)
    acc = warpgroup_mma(a, b.permute((1, 0)), acc, use_acc=False, is_async=True)
    if EARLY:
        acc += 1.0
    if WAIT:
        acc = warpgroup_mma_wait(0, deps=[acc])
    a.store(gl.zeros([64, 64], gl.bfloat16, layout))
    acc = warpgroup_mma_wait(0, deps=[acc])
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    gl.store(out + (gl.expand_dims(row, 1) * 64 + gl.expand_dims(column, 0)), acc)


def multiply(seed: int, *, wait: bool = True, early: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    left, right, out = matrix(ROWS), matrix(ROWS), torch.zeros(ROWS, ROWS)
    Machine(seed).run(
        multiplied, 1, (descriptor(left), descriptor(right), out), {"WAIT": wait, "EARLY": early, "num_warps": 4}
    )
    return out, left.float() @ right.float().mT


@pytest.mark.parametrize("seed", SEEDS)
def test_products(seed: int) -> None:
    torch.testing.assert_close(*multiply(seed))
    with pytest.raises(Race, match=r"the write of .* is not ordered after the product|the product .* is not ordered"):
        multiply(seed, wait=False)
    with pytest.raises(Race, match="is used before it was waited for"):
        multiply(seed, early=True)


# ---------------------------------------------------------------- rows that threads copy


@gluon.jit
def _collect(source, rows, count, stride, ring, full, free, copied, TILES: gl.constexpr, AWAIT: gl.constexpr,
             FENCE: gl.constexpr, INCREMENT: gl.constexpr, WARPS: gl.constexpr, PROMISE: gl.constexpr):  # fmt: skip
    """Tiles of rows that `rows` names, zeros from row `count` on; `copied` counts tiles."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    line = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    column = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(0, layout)), 0)
    for n in range(TILES):
        place = n % 2
        inside = n * 64 + line < count
        number = gl.load(rows + n * 64 + line, mask=inside, other=0)
        if AWAIT:
            mbarrier.wait(free.index(place), (n // 2) & 1 ^ 1)
        pointers = gl.multiple_of(source + gl.expand_dims(number, 1) * stride + column, [1, PROMISE])
        copy_rows(ring.index(place), pointers, mask=gl.expand_dims(inside, 1))
        if FENCE == "early":
            fence_async_shared()
        if FENCE == "writer":
            async_copy.commit_group()
            async_copy.wait_group(0)
            fence_async_shared()
        else:
            async_copy.mbarrier_arrive(full.index(place), increment_count=INCREMENT)
        if FENCE == "writer" or INCREMENT:
            mbarrier.arrive(full.index(place), count=1)
        gl.atomic_add(copied, 1)


@gluon.jit
def _add_products(out, left, ring, full, free, TILES: gl.constexpr, WAIT: gl.constexpr, FENCE: gl.constexpr,
                  RELEASE: gl.constexpr, GROUP: gl.constexpr):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    acc = gl.zeros([64, 64], gl.float32, layout)
    for n in range(TILES):
        place = n % 2
        if WAIT:
            mbarrier.wait(full.index(place), (n // 2) & 1)
        if FENCE == "reader" or (FENCE == "one" and GROUP == 0):
            fence_async_shared()
        acc = warpgroup_mma(left, ring.index(place).permute((1, 0)), acc, is_async=True)
        if RELEASE == "early":
            mbarrier.arrive(free.index(place), count=1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        if RELEASE == "late":
            mbarrier.arrive(free.index(place), count=1)
    row = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, layout)), 1)
    column = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(0, layout)), 0)
    gl.store(out + ((GROUP * 64 + row) * 64 + column), acc)


@gluon.jit
def collected(x, source, rows, count, stride, copied, out, TILES: gl.constexpr, AWAIT: gl.constexpr,
              WAIT: gl.constexpr, FENCE: gl.constexpr, RELEASE: gl.constexpr, INCREMENT: gl.constexpr,
              ARRIVALS: gl.constexpr, WARPS: gl.constexpr, PROMISE: gl.constexpr):  # fmt: skip
    """out[g] = x (sum of tiles)^T, by two consumers g and a producer of four warps."""
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    left = gl.allocate_shared_memory(gl.bfloat16, [64, 64], tile)
    ring = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], tile)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=ARRIVALS)
        mbarrier.init(free.index(i), count=2)
    row = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, lines)), 1)
    column = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(0, lines)), 0)
    left.store(gl.load(x + (row * 64 + column)))
    fence_async_shared()
    gl.warp_specialize([
        (_add_products, (out, left, ring, full, free, TILES, WAIT, FENCE, RELEASE, 0)),
        (_add_products, (out, left, ring, full, free, TILES, WAIT, FENCE, RELEASE, 1)),
        (_collect, (source, rows, count, stride, ring, full, free, copied, TILES, AWAIT, FENCE, INCREMENT, WARPS,
                    PROMISE)),
    ], [4, 4], [232, 40])  # fmt: skip


RIGHT = {"AWAIT": True, "WAIT": True, "FENCE": "reader", "RELEASE": "late", "INCREMENT": False, "ARRIVALS": 128}
COLLECTED = {"TILES": TILES, **RIGHT, "WARPS": 4, "PROMISE": 16}


def collect(seed: int, *, beyond: int = 0, **ways: object) -> None:
    """The last rows are masked; `beyond`: a row is named that is not there."""
    count = TILES * 64 - 20
    x, source, out = matrix(64), matrix(100), torch.zeros(2, 64, 64)
    rows = torch.randint(100, (count,), dtype=torch.int32)
    rows[70] += beyond
    copied = torch.zeros(1, dtype=torch.int32)
    Machine(seed).run(collected, 1, (x, source, rows, count, 64, copied, out), COLLECTED | ways)
    picked = source.float()[rows.long()]
    tiles = torch.cat([picked, torch.zeros(20, 64)]).view(TILES, 64, 64)
    expected = x.float() @ tiles.sum(0).mT
    torch.testing.assert_close(out, expected.expand(2, 64, 64), atol=1e-3, rtol=1e-4)
    assert copied == TILES


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ways", [{}, {"INCREMENT": True, "ARRIVALS": 1}, {"FENCE": "writer", "ARRIVALS": 1}], ids=str)
def test_rows_that_threads_copy_are_multiplied(ways: dict[str, object], seed: int) -> None:
    collect(seed, **ways)


UNFENCED = "the product .* reads what was written at .*, and knows of nobody that has called fence_async_shared since"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("ways", "fault", "words"),
    [
        ({"FENCE": None}, Race, UNFENCED),
        ({"FENCE": "early"}, Race, UNFENCED),  # before the copies are there
        ({"FENCE": "one"}, Race, UNFENCED),  # by the one consumer, not by the other
        (
            {"WAIT": False},
            Race,
            "the product .* is not ordered after the asynchronous copy|the asynchronous copy .* after the product",
        ),
        ({"ARRIVALS": 160}, Deadlock, r"partition 1 \(_add_products\) waits for parity 0 of shared memory 2"),
        ({"ARRIVALS": 96}, Fault, "more arrivals than the 96 of its initialization"),
        ({"AWAIT": False}, Race, "the asynchronous copy .* is not ordered after"),
        ({"RELEASE": "early"}, Race, "the asynchronous copy .* is not ordered after the product"),
        ({"RELEASE": "never"}, Deadlock, r"partition 2 \(_collect\) waits for parity 0 of shared memory 3"),
        ({"beyond": 100}, OutOfBounds, "a load of addresses"),
        ({"WARPS": 1}, Fault, r"a layout of 1 warps in .*\(_collect\), which has 4"),
        ({"PROMISE": 256}, Fault, r"the compiler is told that a tensor is multiple of .*256\], and it is not"),
    ],
    ids=str,
)
def test_what_is_wrong_with_copies_of_threads_is_found_in_every_order(
    ways: dict[str, object], fault: type[Fault], words: str, seed: int
) -> None:
    with pytest.raises(fault, match=words):
        collect(seed, **ways)


@gluon.jit
def copied_in_groups(source, out, PENDING: gl.constexpr, ARRIVE: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    tiles = gl.allocate_shared_memory(gl.bfloat16, [3, 64, 64], gl.NVMMASharedLayout(128, 16, rank=2))
    bar = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bar.index(0), count=128)
    row = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, layout)), 1)
    column = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(0, layout)), 0)
    place = row * 64 + column
    for i in gl.static_range(3):
        copy_rows(tiles.index(i), gl.multiple_of(source + (place + i * 64 * 64), [1, 16]))
        if i < 2:
            async_copy.commit_group()
    async_copy.wait_group(PENDING)
    gl.store(out + place, tiles.index(0).load(layout))
    if ARRIVE:
        async_copy.mbarrier_arrive(bar.index(0), increment_count=False)
        mbarrier.wait(bar.index(0), 0)
        gl.store(out + (place + 64 * 64), tiles.index(2).load(layout))


@pytest.mark.parametrize("seed", SEEDS)
def test_groups_of_copies_are_waited_for_in_order(seed: int) -> None:
    source, out = matrix(3 * 64), torch.zeros(2 * 64, 64, dtype=torch.bfloat16)
    Machine(seed).run(copied_in_groups, 1, (source, out), {"PENDING": 1, "ARRIVE": True})
    assert torch.equal(out, torch.cat([source[:64], source[128:]]))
    with pytest.raises(Race, match=r"the read .* is not ordered after the asynchronous copy"):
        Machine(seed).run(copied_in_groups, 1, (source, out), {"PENDING": 2, "ARRIVE": True})
    with pytest.raises(Fault, match="the end of program 0 has not waited for the asynchronous copy"):
        Machine(seed).run(copied_in_groups, 1, (source, out), {"PENDING": 0, "ARRIVE": False})


# ---------------------------------------------------------------- global memory


@gluon.jit
def shifted(x, out, N, BY: gl.constexpr, MASKED: gl.constexpr):
    i = gl.program_id(0) * 128 + gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    if MASKED:
        gl.store(out + i, gl.load(x + i + BY, mask=i + BY < N, other=-1.0), mask=i < N)
    else:
        gl.store(out + i, gl.load(x + i + BY))


def test_loads_stay_within_a_tensor() -> None:
    x = torch.randn(300)[20:276]  # there is more of the storage on both sides
    out = torch.zeros(256)
    Machine().run(shifted, 2, (x, out, 256), {"BY": 1, "MASKED": True})
    assert torch.equal(out, torch.cat([x[1:], torch.tensor([-1.0])]))
    Machine().run(shifted, 2, (x, out, 256), {"BY": 0, "MASKED": False})
    for by in (1, -1):
        with pytest.raises(OutOfBounds):
            Machine().run(shifted, 2, (x, out, 256), {"BY": by, "MASKED": False})


@gluon.jit
def summed(target, rows):
    sums = gl.allocate_shared_memory(target.dtype, target.block_type.shape, target.layout)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    sums.store(gl.full([64, 32], gl.program_id(0) + 1, gl.int32, layout).to(gl.float32))
    fence_async_shared()
    async_add(target, [rows - 10, -8], sums)
    tma.store_wait(0)


def test_blocks_are_cut_at_the_ends_of_a_tensor() -> None:
    rows, programs = 70, 5
    out = torch.zeros(rows, 32)
    target = descriptor(out)
    target.block_shape, target.layout = [64, 32], gl.NVMMASharedLayout(128, 32, rank=2)
    Machine(resident=3).run(summed, programs, (target, rows), {})
    expected = torch.zeros(rows, 32)
    expected[-10:, :24] = sum(range(1, programs + 1))
    assert torch.equal(out, expected)


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (Value(1, tl.int32), 3, tl.int32),
        (Value(1, tl.int32), 0.5, tl.float32),
        (Value(1, tl.bfloat16), 0.5, tl.bfloat16),
        (Value(1, tl.bfloat16), Value(1, tl.float32), tl.float32),
        (Value(1, tl.int32), Value(1, tl.int64), tl.int64),
        (Value(1, tl.int32), Value(1, tl.uint32), tl.uint32),
        (Value(True, tl.int1), Value(1, tl.int32), tl.int32),
    ],
    ids=str,
)
def test_types_are_promoted(x: Value, y: Value | float, expected: tl.dtype) -> None:
    assert (x + y).dtype == (y + x).dtype == expected
    assert (x < y).dtype == tl.int1


def test_literals_must_fit_the_type_of_a_tensor() -> None:
    with pytest.raises(Fault, match="1099511627776 is no int32"):
        Value(1, tl.int32) + 2**40


@given(x=st.integers(-(2**31), 2**31 - 1), y=st.integers(1, 2**31 - 1))
def test_integers_are_divided_toward_zero_and_wrap(x: int, y: int) -> None:
    a, b = Value(x, tl.int32), Value(y, tl.int32)
    quotient = abs(x) // y * (1 if x >= 0 else -1)
    assert int(a // b) == quotient
    assert int(a % b) == x - quotient * y
    assert int(a + b) == (x + y + 2**31) % 2**32 - 2**31


@given(st.floats(width=32, allow_nan=False))
def test_floats_of_16_bits_are_rounded_to_the_nearest(x: float) -> None:
    for dtype, kind in ((tl.bfloat16, torch.bfloat16), (tl.float16, torch.float16)):
        assert Value(x, tl.float32).to(dtype).data.item() == torch.tensor(x).to(kind).item()
