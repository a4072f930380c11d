"""Caches that are filled to a length of their own: `kv_len`, and prompts that come in chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attn_dsl
from attn_dsl.errors import BindingError

ROOM = 64


def inputs(batch: int = 3, tokens: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, 4, tokens, 16), (batch, 2, ROOM, 16), (batch, 2, ROOM, 16)
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


BINDINGS: dict[str, dict[str, Any]] = {
    "noop": {}, "causal": {}, "sliding_window": {"window": 7}, "alibi": {"slope": torch.tensor([0.5, 0.1, 0.2, 0.3])},
    "gpt_oss": {"window": 9, "sinks": torch.tensor([0.5, -0.1, 0.2, 3.0])}, "softcap": {"cap": 2.0},
}  # fmt: skip
CAUSAL = {"noop": "causal", "softcap": "attention c(cap: float)\nscore = cap * tanh(score / cap)\nmask = q >= k\n"}
"""What to take where rows see what is to come."""


@pytest.mark.parametrize("name", BINDINGS)
def test_each_entry_is_a_call_with_its_keys_alone(name: str) -> None:
    attention = attn_dsl.compile(name)
    query, key, value = inputs()
    lengths = torch.tensor([5, ROOM, 33])
    out, lse = attention(
        query, key, value, q_offset=lengths - 5, kv_len=lengths, return_lse=True, **BINDINGS[name]
    )  # fmt: skip
    for i, length in enumerate(lengths.tolist()):
        one = slice(i, i + 1)
        alone, alone_lse = attention(
            query[one], key[one, :, :length], value[one, :, :length], q_offset=length - 5, return_lse=True,
            **BINDINGS[name],
        )  # fmt: skip
        torch.testing.assert_close(out[one], alone)
        torch.testing.assert_close(lse[one], alone_lse)


def test_keys_past_the_length_are_neither_seen_nor_read() -> None:
    attention = attn_dsl.compile("causal")
    query, key, value = inputs()
    expected = attention(query, key, value, q_offset=28, kv_len=33)
    key[:, :, 33:] = value[:, :, 33:] = torch.nan
    torch.testing.assert_close(attention(query, key, value, q_offset=28, kv_len=33), expected)
    torch.testing.assert_close(attention(query, key, value, q_offset=28, kv_len=torch.tensor([33] * 3)), expected)


def test_no_keys_give_zero_and_minus_infinity() -> None:
    out, lse = attn_dsl.compile("noop")(*inputs(), kv_len=0, return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_gradients_reach_the_keys_that_are_there() -> None:
    attention = attn_dsl.compile("causal")
    leaves = [x.requires_grad_() for x in inputs()]
    found = torch.autograd.grad(attention(*leaves, q_offset=28, kv_len=33).sum(), leaves)
    cut = [leaves[0], leaves[1][:, :, :33], leaves[2][:, :, :33]]
    expected = torch.autograd.grad(attention(*cut, q_offset=28).sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", BINDINGS)
@pytest.mark.parametrize("chunk", [1, 13, 32])
def test_chunked_prefill_of_a_long_prompt_equals_the_whole(name: str, chunk: int) -> None:
    """Keys of a chunk enter the cache before its queries run; what the cache held there before does not matter."""
    attention = attn_dsl.compile(CAUSAL.get(name, name))
    query, key, value = inputs(tokens=ROOM)
    whole, whole_lse = attention(query, key, value, return_lse=True, **BINDINGS[name])
    cache_key, cache_value = torch.full_like(key, torch.nan), torch.full_like(value, torch.nan)
    for first in range(0, ROOM, chunk):
        last = min(first + chunk, ROOM)
        cache_key[:, :, first:last], cache_value[:, :, first:last] = key[:, :, first:last], value[:, :, first:last]
        out, lse = attention(
            query[:, :, first:last],
            cache_key,
            cache_value,
            q_offset=first,
            kv_len=last,
            return_lse=True,
            **BINDINGS[name],
        )
        torch.testing.assert_close(out, whole[:, :, first:last])
        torch.testing.assert_close(lse, whole_lse[:, :, first:last])


def test_a_compiled_graph_serves_lengths_that_grow() -> None:
    attention = attn_dsl.compile("causal")
    query, key, value = inputs(tokens=1)
    graph = torch.compile(lambda *x, n: attention(*x, q_offset=n - 1, kv_len=n), fullgraph=True, dynamic=False)
    for length in (1, 20, ROOM):
        lengths = torch.full((3,), length, dtype=torch.int32)
        expected = attention(query, key[:, :, :length], value[:, :, :length], q_offset=length - 1)
        torch.testing.assert_close(graph(query, key, value, n=lengths), expected)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (ROOM + 1, "from 0 to 64"),
        (-1, "got -1"),
        (True, "got True"),
        (2.0, "got 2.0"),
        (torch.ones(3), "dtype float32"),
        (torch.ones(2, dtype=torch.int32), r"shape \[2\]"),
        (torch.tensor([1, 2, 65]), "got 65"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(wrong: object, said: str) -> None:
    with pytest.raises(BindingError, match=f"`kv_len`: expected .*{said}"):
        attn_dsl.compile("causal")(*inputs(), kv_len=wrong)


def test_the_name_is_taken() -> None:
    with pytest.raises(BindingError, match="`kv_len`, which is an argument of every call: rename it"):
        attn_dsl.compile("attention mine(kv_len: int)\nmask = k < kv_len\n")


def test_explain_knows_the_lengths() -> None:
    said = attn_dsl.compile("noop").explain(*inputs(), kv_len=torch.tensor([1, 2, 3]))
    assert "it differs for each batch" in said
