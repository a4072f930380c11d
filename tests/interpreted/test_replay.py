"""Calls of a kind that was seen: what is remembered is what holds for all of the kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attn_dsl
from attn_dsl.backend import operators
from attn_dsl.backend.execute import Options, portable_call
from attn_dsl.backend.portable import launch
from attn_dsl.backend.replay import Differentiable, Replays

BIAS = """attention bias(reach: int = 3, cap: float = 5.0)
tensor table: float32[H, 2 * reach + 1]
tensor sinks: float32[H]
score = cap * tanh((score + table[h, clamp(k - q, -reach, reach) + reach] - 0.1 * q) / cap)
mask = q >= k
sink = sinks[h]
"""
PORTABLE = Options("portable")


def inputs(seed: int, grad: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, 9, 16), (2, 2, 9, 16), (2, 2, 9, 16), (4, 7), (4,))
    return [torch.randn(shape, generator=generator).requires_grad_(grad) for shape in shapes]


@pytest.fixture(scope="module")
def bias() -> attn_dsl.Attention:
    return attn_dsl.compile(BIAS)


def kind_of(attention: attn_dsl.Attention, q_offset: int | Tensor, *leaves: Tensor) -> tuple[Differentiable, Any]:
    """What repeats calls like one with these tensors, and a function that makes such calls the long way."""
    program = attention._executable

    def bound(*x: Tensor) -> Any:
        query, key, value, table, sinks = x
        return program.binder.bind(query, key, value, None, q_offset, {"table": table, "sinks": sinks})

    call = bound(*leaves)
    forward = launch.Replay.of(program.kernels, portable_call(program, call, PORTABLE))
    repeated = Differentiable.of(program, call, PORTABLE, forward)
    assert repeated is not None
    return repeated, lambda *x: operators.attention(program, bound(*x), PORTABLE)


def run(repeated: Differentiable, leaves: list[Tensor], q_offset: int | Tensor) -> tuple[Tensor, Tensor]:
    query, key, value, *rest = leaves
    return repeated.run(query, key, value, rest, q_offset)


@pytest.mark.parametrize("by_batch", [False, True])
def test_gradients_of_repeated_calls_are_those_of_the_first(bias: attn_dsl.Attention, by_batch: bool) -> None:
    q_offset = torch.tensor([2, 5], dtype=torch.int32) if by_batch else 3
    repeated, usual = kind_of(bias, q_offset, *inputs(0))
    for seed in (1, 2):
        leaves = inputs(seed)
        found = run(repeated, leaves, q_offset)
        expected = usual(*leaves)
        for wanted in (leaves, leaves[:1], [leaves[0], leaves[4]]):
            grads = [
                torch.autograd.grad(out.square().sum() + lse.sin().sum(), wanted, retain_graph=True)
                for out, lse in (found, expected)
            ]
            for a, b in zip(*grads, strict=True):
                torch.testing.assert_close(a, b)


def test_tensors_that_hooks_bring_back_with_other_strides_have_the_same_gradients(bias: attn_dsl.Attention) -> None:
    leaves = inputs(3)
    leaves[0] = leaves[0].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    repeated, _ = kind_of(bias, 0, *leaves)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(repeated, leaves, 0)[0].square().sum(), leaves)

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.tolist(), torch.tensor):
        found = gradients()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("row_term", ["", " - 0.1 * q"])
def test_as_much_is_saved_as_by_the_first_call(row_term: str) -> None:
    """A checkpoint compares what its first pass and its second save."""
    attention = attn_dsl.compile(BIAS.replace(" - 0.1 * q", "").replace("/ cap)\n", f"/ cap){row_term}\n"))
    leaves, offset = inputs(4), torch.tensor([0, 1])
    repeated, usual = kind_of(attention, offset, *leaves)
    saved: list[list[tuple[Any, ...]]] = [[], []]
    for call, found in zip((lambda: usual(*leaves), lambda: run(repeated, leaves, offset)), saved, strict=True):

        def note(x: Tensor, found: Any = found) -> Tensor:
            found.append((x.shape, x.dtype, x.device))
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            call()
    assert saved[0] == saved[1] and len(saved[0]) == 8 + bool(row_term)


def test_what_changes_a_result_makes_another_kind(bias: attn_dsl.Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True))
    kinds, choice = Replays(bias._executable), (None, False, "ieee")
    query, key, value, table, sinks = inputs(0, grad=False)

    def known(
        query: Tensor = query, value: Tensor = value, scale: float | None = None, q_offset: Any = 0, **more: Any
    ) -> Any:
        return kinds.key(query, key, value, scale, q_offset, {"table": table, "sinks": sinks, **more}, choice)

    usual = known()
    assert usual is not None and usual == known(query.clone(), torch.randn_like(value))
    offset = torch.zeros(2, dtype=torch.int64)
    others = [
        known(query[:, :, 1:]),
        known(query.mT.contiguous().mT),
        known(query.bfloat16()),
        known(query.clone().requires_grad_()),
        known(table=table[:, :5]),
        known(scale=1),
        known(scale=1.0),
        known(q_offset=1),
        known(q_offset=offset),
        known(cap=5.0),
        known(cap=5),
        known(reach=3),
    ]
    torch.use_deterministic_algorithms(True)
    try:
        others.append(known(query.clone().requires_grad_()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert None not in others and len({usual, *others}) == len(others) + 1


def test_parameters_in_tensors_and_dtypes_that_autocast_changes_go_the_long_way(
    bias: attn_dsl.Attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True))
    kinds, choice = Replays(bias._executable), (None, False, "ieee")
    query, key, value, table, sinks = inputs(0, grad=False)
    given: dict[str, Any] = {"table": table, "sinks": sinks}
    assert kinds.key(query, key, value, None, 0, {**given, "reach": torch.tensor(3)}, choice) is None
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    low_query, low_key, low_value = (x.bfloat16() for x in (query, key, value))
    assert kinds.key(query, key, value, None, 0, given, choice) is None
    assert kinds.key(low_query, low_key, value, None, 0, given, choice) is None
    assert kinds.key(low_query, low_key, low_value, None, 0, given, choice) is not None
