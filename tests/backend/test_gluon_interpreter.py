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
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_dsl.backend.hopper.versions import async_add, async_load, async_store

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
        ("FENCE", Race, "has not called fence_async_shared since"),
        ("STAY", Fault, "the end of program 0 has not waited for the copy from shared memory"),
        ("KNOWN", Race, "the copy to shared memory .* has not called fence_async_shared since"),
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
