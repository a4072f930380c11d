"""The Hopper kernels compiled ahead of time, without a GPU: what the assembler makes of the shipped table."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import ask, compilations, fake_gpu
from portable_support import program_of

from attn_dsl.backend import order
from attn_dsl.backend.build import Request, build
from attn_dsl.backend.execute import Program
from attn_dsl.backend.hopper import check, launch
from attn_dsl.backend.hopper.configs import candidates
from attn_dsl.backend.portable.launch import Call
from attn_dsl.ir.nodes import Q


def call(of: Program, dim: int, *, length: int = 256, heads: int = 4, batch: int = 1, **more: Any) -> Call:
    query = torch.empty(batch, heads, length, dim, dtype=torch.bfloat16, device="meta")
    tensors = tuple(torch.empty(heads, device="meta") for _ in of.variant.tensors)
    parameters = tuple({"cap": 20.0, "window": 1024}[p.name] for p in of.variant.parameters)
    return Call(query, query, query, parameters, tensors, (), 0.1, **more)


def loops(sass: str) -> list[list[str]]:
    """The instructions of the innermost loops that multiply on the tensor cores."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]*);", sass)]
    places = {at: i for i, (at, _) in enumerate(code)}
    jumps = [(places[int(to, 16)], i) for i, (_, text) in enumerate(code) for to in re.findall(r"BRA.* 0x(\w+)", text)]
    found = [(first, last) for first, last in jumps if first < last]
    bodies = [[text for _, text in code[first : last + 1]] for first, last in found if last - first < LONGEST]
    return [body for body in bodies if sum("HGMMA" in text for text in body) in PRODUCTS]


LONGEST, PRODUCTS = 750, (12, 13, 14, 16, 20)
"""Instructions of a step of the shipped kernels, and its products: of logits, and of weights and values."""


@pytest.mark.parametrize(
    ("name", "dim"),
    [*itertools.product(["noop", "causal"], [64, 128, 256]), ("alibi", 128), ("softcap", 128), ("sliding_window", 128)],
)
def test_the_preferred_configuration_is_sound(name: str, dim: int) -> None:
    of = program_of(name)
    kernels, bound = launch.Kernels(of.kernels), call(of, dim)
    choice = kernels.choice(bound, launch.compile_ahead)
    assert choice.config == kernels.candidates(bound)[0], choice.rejected
    assert choice.config.frozen == (name != "softcap")
    assert choice.build is not None and not choice.build.notes and not choice.build.missing
    assert choice.build.spilled <= check.SPILLS
    steps = loops(check.sass(launch.build(kernels, bound).asm["ptx"]))
    assert len(steps) >= choice.config.groups
    spills = [sum(bool(re.search(r"\b(LDL|STL)\b", text)) for text in step) for step in steps]
    assert max(spills) <= 2, "a step spills more than a scalar or two"


@pytest.mark.parametrize("dim", [64, 128, 192])
def test_rows_are_copied_from_and_to_where_they_are_16_bytes_at_a_time(dim: int) -> None:
    outer = program_of("hash_buckets")
    of = order.sorted_program(outer, next(iter(outer.orders)), Q)
    shapes = {torch.int32: (1, 4, 1), torch.uint8: (1, 4, 256)}
    dtypes = [getattr(torch, tensor.dtype.value) for tensor in of.variant.tensors]
    tensors = tuple(torch.empty(*shapes[dtype], dtype=dtype, device="meta") for dtype in dtypes)
    rows = torch.empty(1, 4, 256, dtype=torch.int16, device="meta")
    kernels, bound = launch.Kernels(of.kernels), replace(call(of, dim), tensors=tensors, rows=(rows, rows))
    choice = kernels.choice(bound, launch.compile_ahead)
    assert choice.build is not None and choice.build.spilled <= check.SPILLS, choice.rejected
    ptx = launch.build(kernels, bound).asm["ptx"]
    config, block = choice.config, launch.padded(dim)
    assert config is not None
    written = re.findall(r"st\.global\.(v4)?", ptx)
    assert written.count("v4") == config.rows * dim // (128 * 8)
    copied = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, 0x(\w+),[^;]*;", ptx)
    assert set(copied) == {"10"}
    places = config.rows + (2 + 2) * config.keys  # keys and values: of the first tile, in the loop, and of the last
    assert len(copied) % (block // 64) == 0 and len(copied) * 128 * 8 >= places * block, len(copied)


@pytest.mark.parametrize(("dim", "products"), [(80, 5 + 8), (96, 6 + 8), (192, 12 + 2 * 4)])
def test_head_dimensions_between_powers_of_two_are_not_multiplied_as_the_next_one(dim: int, products: int) -> None:
    """Of each warpgroup a loop for masked tiles, one for full ones, and one that leaves the maximum where that pays."""
    of = program_of("causal")
    kernels, bound = launch.Kernels(of.kernels), call(of, dim)
    steps = loops(check.sass(launch.build(kernels, bound).asm["ptx"]))
    counts = [sum("HGMMA" in text for text in step) for step in steps]
    assert counts.count(products) == (6 if kernels.candidates(bound)[0].hold else 4), counts


def test_steps_of_full_tiles_neither_look_for_a_maximum_nor_rescale() -> None:
    of = program_of("causal")
    kernels, bound = launch.Kernels(of.kernels), call(of, 128)
    steps = loops(check.sass(launch.build(kernels, bound).asm["ptx"]))
    shortest = min(steps, key=len)
    assert len(shortest) < 370, len(shortest)
    assert not any(re.search(r"\b(FMNMX|FMUL|SHFL)\b", text) for text in shortest)


@pytest.mark.parametrize(
    ("text", "dtype", "expected"),
    [
        ("attention a\nmask = q >= k\n", torch.bfloat16, True),
        ("attention b\nmask = q >= k\n", torch.float16, False),  # weights may be as large as 2 ** 32
        ("attention c\nscore = score - 0.5 * abs(q - k)\n", torch.bfloat16, False),  # it grows along the keys
    ],
)
def test_where_the_maximum_of_some_tiles_may_do_for_all(text: str, dtype: torch.dtype, expected: bool) -> None:
    of = program_of(text)
    query = torch.empty(1, 4, 256, 128, dtype=dtype, device="meta")
    assert launch.Kernels(of.kernels).may_freeze(Call(query, query, query, (), (), (), 0.1)) == expected


def test_a_launch_finds_what_was_compiled_ahead_whatever_the_lengths() -> None:
    of = program_of("causal")
    kernels = launch.Kernels(of.kernels)
    config = candidates(64, 64)[0]
    launch.build(kernels, call(of, 64), config)
    with fake_gpu(), compilations() as cached:
        for length, heads, batch in ((1, 1, 1), (300, 4, 2), (128, 64, 3), (5000, 3, 1)):
            query = torch.empty(batch, heads, length, 64, dtype=torch.bfloat16)
            bound = Call(query, query, query, (), (), (), 1 / length, q_offset=length % 7)
            launch.forward(kernels, bound, ask, config)
    assert cached == [True]


def test_building_for_hopper_builds_what_calls_will_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_DSL_CACHE_DIR", str(tmp_path))
    of = program_of("noop")
    built = list(build(of, Request("sm_90", head_dim=64, backward=False)))
    assert [kernel.name for kernel in built] == ["attention_forward"]
    bound = call(of, 64, length=77, capability=(9, 0))
    config = of.hopper.choice(bound).config
    with fake_gpu(), compilations() as cached:
        query = torch.empty(1, 2, 77, 64, dtype=torch.bfloat16)
        launch.forward(of.hopper, Call(query, query, query, (), (), (), 0.1), ask, config)
    assert cached == [True]


@pytest.mark.parametrize(
    ("text", "dtype", "expected"),
    [
        ("20.0 * tanh(score / 20.0)", torch.bfloat16, True),
        ("cap * tanh(score / cap)", torch.bfloat16, True),
        ("cap * tanh(score / cap)", torch.float16, False),  # weights of 2 ** -58 are none there
        ("50.0 * tanh(score / 50.0)", torch.bfloat16, False),  # weights of 2 ** -144 are none anywhere
        ("20.0 * tanh(score / 20.0) + 0.1 * k", torch.bfloat16, False),
        ("score", torch.bfloat16, False),
    ],
)
def test_logits_that_are_known_to_be_small_need_no_maximum(text: str, dtype: torch.dtype, expected: bool) -> None:
    of = program_of(f"attention a(cap: float = 20.0)\nscore = {text}\n")
    query = torch.empty(1, 2, 256, 64, dtype=dtype, device="meta")
    bound = Call(query, query, query, (20.0,), (), (), 0.1)
    assert (launch.Kernels(of.kernels).functions(bound)["PEAK"] is not None) == expected
