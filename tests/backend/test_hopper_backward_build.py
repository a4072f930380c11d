"""The Hopper backward kernel compiled ahead of time, without a GPU: what the assembler makes of it."""

from __future__ import annotations

import pytest
import torch
from fake_gpu import ask, compilations, fake_gpu
from portable_support import program_of

from attn_dsl.backend.execute import Program
from attn_dsl.backend.hopper import check, launch_backward
from attn_dsl.backend.hopper.configs_backward import candidates
from attn_dsl.backend.hopper.launch import compile_ahead
from attn_dsl.backend.portable.launch import Call


def call(of: Program, dim: int, length: int = 256, heads: int = 4, device: str = "meta") -> Call:
    query = torch.empty(1, heads, length, dim, dtype=torch.bfloat16, device=device)
    tensors = tuple(torch.empty((heads, 257)[: len(x.extents)], device=device) for x in of.variant.tensors)
    known = {"cap": 20.0, "window": 100, "reach": 128}
    return Call(query, query, query, tuple(known[p.name] for p in of.variant.parameters), tensors, (), 0.1)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", ["noop", "causal", "sliding_window"])
def test_the_preferred_configuration_is_sound(name: str, dim: int) -> None:
    of = program_of(name)
    kernels = launch_backward.Kernels(of.kernels)
    choice = kernels.choice(call(of, dim), compile=compile_ahead)
    assert choice.config == kernels.candidates(call(of, dim))[0], choice.rejected
    assert choice.build is not None and choice.build.spilled <= check.SPILLS
    assert not choice.build.notes and not choice.build.missing


@pytest.mark.parametrize("name", ["alibi", "softcap"])
def test_scores_leave_the_preferred_configuration_sound(name: str) -> None:
    of = program_of(name)
    choice = launch_backward.Kernels(of.kernels).choice(call(of, 128), compile=compile_ahead)
    assert choice.config == candidates(128, 128)[0], choice.rejected


@pytest.mark.parametrize(("name", "captured"), [("softcap", "cap"), ("t5_bias", "table")])
def test_sums_on_the_way_leave_some_configuration_sound(name: str, captured: str) -> None:
    of = program_of(name)
    kernels = launch_backward.Kernels(of.kernels)
    assert kernels.fusable(frozenset({captured})) == {captured}
    choice = kernels.choice(call(of, 128), compile=compile_ahead, fused=frozenset({captured}))
    assert choice.build is not None and choice.build.spilled <= launch_backward.SPILLS, choice.rejected


def test_an_order_leaves_some_configuration_sound() -> None:
    of = program_of("causal")
    choice = launch_backward.Kernels(of.kernels).choice(call(of, 128), True, compile_ahead)
    assert choice.config == candidates(128, 128)[0], choice.rejected


def test_a_launch_finds_what_was_compiled_ahead_whatever_the_lengths() -> None:
    of = program_of("noop")
    kernels, config = launch_backward.Kernels(of.kernels), candidates(64, 64)[0]
    for length in (256, 300):  # of whole tiles of keys, and ragged
        launch_backward.build(kernels, call(of, 64, length), config)

    def run(kernel: object, *rest: object) -> None:
        if kernel is launch_backward.attention_backward:
            ask(kernel, *rest)  # type: ignore[arg-type]

    with fake_gpu(), compilations() as cached:
        for length, heads in ((128, 1), (1280, 3), (500, 4), (1, 1)):
            bound = call(of, 64, length, heads, "cpu")
            out = torch.empty(1, heads, length, 64, dtype=torch.bfloat16)
            launch_backward.backward(kernels, bound, out, out[..., 0].float(), out, None, config, run=run)
    assert cached == [True, True]
