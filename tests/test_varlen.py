"""Packed sequences beside the loop over them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attn_dsl
from attn_dsl.errors import BindingError

SELF = [5, 1, 40, 0, 17]
CROSS = [9, 33, 0, 2, 17]
TEXTS: dict[str, dict[str, Any]] = {
    "noop": {},
    "causal": {},
    "sliding_window": {"window": 6},
    "alibi": {"slope": torch.tensor([0.5, 0.1, 0.2, 0.3])},
    "gpt_oss": {"window": 9, "sinks": torch.tensor([0.5, -0.1, 0.2, 3.0])},
    "t5_bias": {"reach": 4, "table": torch.linspace(-1, 1, 36).view(4, 9)},
}


def ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(torch.int32)


def packed(queries: list[int], keys: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = (sum(queries), 4, 16), (sum(keys), 2, 16), (sum(keys), 2, 8)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def loop(
    attention: attn_dsl.Attention, inputs: list[Tensor], queries: list[int], keys: list[int], bindings: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """One call for each sequence; a row without keys gives what a row that sees nothing gives."""
    outs, lses = [], []
    for query, key, value in zip(
        inputs[0].split(queries), inputs[1].split(keys), inputs[2].split(keys), strict=True
    ):  # fmt: skip
        if query.shape[0] == 0:
            continue
        one = [x.transpose(0, 1)[None] for x in (query, key, value)]
        if key.shape[0] == 0:
            one[1:] = [x.new_zeros(1, 2, 1, x.shape[3]) for x in one[1:]]
            out, lse = attention(*one, kv_len=0, return_lse=True, **bindings)
        else:
            out, lse = attention(*one, return_lse=True, **bindings)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("keys", [SELF, CROSS], ids=["self", "cross"])
def test_packed_sequences_equal_the_loop_forward_and_backward(name: str, keys: list[int]) -> None:
    attention, inputs = attn_dsl.compile(name), packed(SELF, keys)
    bindings = {
        n: x.clone().requires_grad_() if isinstance(x, Tensor) else x for n, x in TEXTS[name].items()
    }  # fmt: skip
    leaves = [*inputs, *(x for x in bindings.values() if isinstance(x, Tensor))]
    found = attention.varlen(*inputs, ends(SELF), ends(keys), return_lse=True, **bindings)
    expected = loop(attention, inputs, SELF, keys, bindings)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    upstream = torch.randn(found[0].shape, generator=torch.Generator().manual_seed(4))
    grads = [torch.autograd.grad(out, leaves, upstream, retain_graph=True) for out, _ in (found, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_lengths_of_the_queries_are_those_of_the_keys_unless_given() -> None:
    attention, inputs = attn_dsl.compile("causal"), packed(SELF, SELF)
    expected = attention.varlen(*inputs, ends(SELF), ends(SELF))
    assert torch.equal(attention.varlen(*inputs, ends(SELF)), expected)
    torch.testing.assert_close(attention.varlen(*inputs, ends(SELF), longest_query=64, longest_key=50), expected)


def test_what_one_sequence_holds_never_reaches_another() -> None:
    attention, inputs = attn_dsl.compile("noop"), [x.detach() for x in packed(SELF, SELF)]
    expected = attention.varlen(*inputs, ends(SELF))
    for x in inputs[1:]:
        x[6:46] = torch.nan  # the third sequence
    found = attention.varlen(*inputs, ends(SELF))
    torch.testing.assert_close(found[:6], expected[:6])
    torch.testing.assert_close(found[46:], expected[46:])


def test_a_traced_graph_serves_other_lengths() -> None:
    attention = attn_dsl.compile("causal")
    inputs = [x.detach() for x in packed(SELF, SELF)]
    graph = torch.compile(
        lambda *x: attention.varlen(*x, longest_query=40, longest_key=40), fullgraph=True, dynamic=False
    )  # fmt: skip
    for lengths in (SELF, [20, 3, 0, 0, 40], [40, 0, 23, 0, 0]):
        torch.testing.assert_close(graph(*inputs, ends(lengths)), attention.varlen(*inputs, ends(lengths)))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"query_ends": torch.tensor([0, 5, 62])}, r"ends of `query`: expected .*from 0 to 63"),
        ({"query_ends": torch.tensor([0, 50, 40, 63])}, r"ends of `query`: expected .*got \[0, 50, 40, 63\]"),
        ({"query_ends": torch.tensor([0.0, 63.0])}, r"ends of `query`: expected int"),
        ({"key_ends": torch.tensor([0, 63])}, r"as many sequences as those of `query`, got 5 and 1"),
        ({"longest_query": 39}, r"longest sequence of `query`: expected 40, got 39"),
        ({"longest_query": 0}, r"longest sequence of `query`: expected an int of at least 1"),
        ({"query": torch.zeros(63, 64)}, r"`query`: expected 3 axes"),
        ({"value": torch.zeros(62, 2, 8)}, r"`value`: expected 63 rows"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, Any], said: str) -> None:
    query, key, value = packed(SELF, SELF)
    given = {"query": query, "key": key, "value": value, "query_ends": ends(SELF), **wrong}
    with pytest.raises(BindingError, match=said):
        attn_dsl.compile("causal").varlen(**given)
