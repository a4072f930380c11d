"""Caches in pages and packed sequences by the Hopper forward kernel, compiled ahead of time, without a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from hopper_support import GOOD, HOPPER, compiler, tensor
from portable_support import compiled
from test_hopper_build import loops

from attn_dsl.backend import gpu
from attn_dsl.backend.execute import Program
from attn_dsl.backend.hopper import check, launch
from attn_dsl.backend.hopper.configs import candidates
from attn_dsl.backend.portable.launch import Call, outputs
from attn_dsl.frontend import load
from attn_dsl.passes.lengths import with_lengths, with_packing, with_pages, with_scales

ROOM, HEADS = 1024, 8
MASKED = 8
"""So much of a masked step may be spilled: it also looks where the sequence ends. Most steps are full."""


def cache(name: str, page: int, dim: int = 128, *, scaled: bool = False) -> tuple[Program, Call]:
    """A variant over a cache in pages, or in one piece where `page` is 0, and a call of 300 queries."""
    variant = with_lengths(load(name))
    variant = with_scales(variant) if scaled else variant
    of = compiled(with_pages(variant) if page else variant)
    sizes = {"B": 2, "H": HEADS, "HK": 2, "pages_of_a_sequence": ROOM // (page or ROOM), "slabs_of_the_cache": 50}
    key = tensor(50, 2, page, dim) if page else tensor(2, 2, ROOM, dim)
    tensors = tuple(
        tensor(*(sizes[size.name] for size in declared.extents), dtype=getattr(torch, declared.dtype.value))
        for declared in of.variant.tensors
    )
    extents = tuple(sizes[extent.name] for extent in of.kernels.extents)
    offsets, parameters = tensor(2, dtype=torch.int64), tuple(1024 for _ in of.variant.parameters)
    dims = (2, HEADS, 2, 300, ROOM, dim)
    return of, Call(tensor(2, HEADS, 300, dim), key, key, parameters, tensors, extents, 0.1, offsets, dims=dims)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "page", "dim"), [
    ("causal", 0, 128), ("causal", 16, 128), ("causal", 64, 128), ("causal", 128, 128), ("causal", 256, 128),
    ("causal", 16, 64), ("causal", 32, 256), ("causal", 256, 256), ("noop", 16, 128), ("alibi", 16, 128),
    ("sliding_window", 32, 128), ("gpt_oss", 16, 64),
])  # fmt: skip
def test_lengths_and_pages_cost_no_step_a_register(name: str, page: int, dim: int) -> None:
    of, call = cache(name, page, dim)
    kernels = launch.Kernels(of.kernels)
    assert launch.refusal(of.kernels, call) is None
    choice = kernels.choice(call, launch.compile_ahead)
    assert choice.config is not None and choice.config.keys == candidates(dim, dim)[0].keys, choice.rejected
    text = check.sass(launch.build(kernels, call).asm["ptx"])
    steps = loops(text)
    assert len(steps) >= choice.config.groups
    assert max(sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in step) for step in steps) <= MASKED


def test_pages_go_to_the_hopper_kernel_and_8_bits_do_not(says: Callable[..., None]) -> None:
    says(*[GOOD] * 9)
    for page in (16, 64, 256):
        of, call = cache("causal", page)
        found = gpu.route(of, call, HOPPER, compiler()[1])
        assert found.backend == "hopper", found.reason
        assert gpu.backward_route(of, call, capability=HOPPER).backend == "portable"
    of, call = cache("causal", 64, scaled=True)
    found = gpu.route(of, call, HOPPER, compiler()[1])
    assert found.backend == "portable" and "pages of 8 bits" in str(found.reason)


def test_each_page_size_has_its_own_kernel(says: Callable[..., None]) -> None:
    says(*[GOOD] * 9)
    of, _ = cache("causal", 16)
    made, compile = compiler()
    kernels = launch.Kernels(of.kernels)
    for page in (16, 64, 16, 128, 64):
        kernels.choice(cache("causal", page)[1], compile)
    assert len(made) == 3


def packed(name: str, dim: int, rows: int = 5000) -> tuple[Program, Call]:
    """A variant over seven packed sequences, and a call of it."""
    of = compiled(with_packing(load(name)))
    query, key, ends = tensor(1, HEADS, rows, dim), tensor(1, 2, rows, dim), tensor(8, dtype=torch.int32)
    tensors = (ends, ends, *(tensor(HEADS, dtype=torch.float32) for _ in of.variant.tensors[2:]))
    parameters = tuple(1024 for _ in of.variant.parameters)
    dims = (7, HEADS, 2, 1024, 1024, dim)
    return of, Call(query, key, key, parameters, tensors, (), 0.1, dims=dims)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dim"), [
    ("causal", 64), ("causal", 128), ("causal", 256), ("noop", 128), ("alibi", 128), ("sliding_window", 128),
])  # fmt: skip
def test_packed_sequences_cost_no_step_a_register(name: str, dim: int) -> None:
    of, call = packed(name, dim)
    kernels = launch.Kernels(of.kernels)
    assert launch.refusal(of.kernels, call) is None
    choice = kernels.choice(call, launch.compile_ahead)
    assert choice.config is not None, choice.rejected
    steps = loops(check.sass(launch.build(kernels, call).asm["ptx"]))
    assert len(steps) >= choice.config.groups
    assert max(sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in step) for step in steps) <= MASKED


def test_packed_sequences_go_to_the_hopper_kernel_row_by_row(says: Callable[..., None]) -> None:
    says(*[GOOD] * 9)
    of, call = packed("causal", 128)
    assert gpu.route(of, call, HOPPER, compiler()[1]).backend == "hopper"
    assert gpu.backward_route(of, call, capability=HOPPER).backend == "portable"
    launched: list[int] = []
    config = candidates(128, 128)[0]
    results = launch.forward(of.hopper, call, lambda _, programs, *rest: launched.append(programs), config)
    for found, expected in zip(results, outputs(call, packed=True), strict=False):
        assert found.stride() == expected.stride() and found.shape == expected.shape
    tiles = 5000 // config.rows + 7  # enough for sequences that end anywhere
    assert launched == [min(132, HEADS * tiles)]
    assert "no element" in str(launch.refusal(of.kernels, packed("causal", 128, rows=0)[1]))
