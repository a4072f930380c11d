"""Calls in another order of positions on the CPU, and under `torch.compile`."""

from __future__ import annotations

import pytest
import torch
from portable_support import Problem, assert_close, differentiated, program_of
from torch import Tensor

import attn_dsl
from attn_dsl.backend import operators, order
from attn_dsl.backend.execute import CPU, Options


def tensor(heads: int, rows: int, rows_first: bool) -> Tensor:
    x = torch.randn(2, rows, heads, 16).transpose(1, 2) if rows_first else torch.randn(2, heads, rows, 16)
    return x.requires_grad_()


@pytest.mark.parametrize("rows_first", [False, True])
@pytest.mark.parametrize(("length", "kv_heads"), [(700, 2), (701, 2), (701, 4)])
def test_a_dilated_window_on_the_cpu(length: int, kv_heads: int, rows_first: bool) -> None:
    program = program_of("dilated_window")
    inputs = tensor(4, length, rows_first), tensor(kv_heads, length, rows_first), tensor(kv_heads, length, rows_first)
    problem = Problem(program, *inputs, {"window": 300, "dilation": 4})
    call = program.binder.bind(*inputs, None, 0, problem.bindings)
    assert order.ordered(program, call, Options(CPU)) is not None
    upstream = problem.upstream()
    leaves, bindings = problem.leaves()
    call = program.binder.bind(leaves["query"], leaves["key"], leaves["value"], None, 0, bindings)
    out, lse = operators.attention(program, call, Options(CPU))
    assert_close(differentiated(out, lse, leaves, upstream), problem.truth(upstream), 1e-5)


def test_hash_buckets_on_the_cpu() -> None:
    program = program_of("hash_buckets")
    inputs = (tensor(2, 600, False) for _ in range(3))
    bucket = torch.randint(0, 9, (2, 2, 600), dtype=torch.int32)
    problem = Problem(program, *inputs, {"bucket": bucket})
    upstream = problem.upstream()
    leaves, bindings = problem.leaves()
    call = program.binder.bind(leaves["query"], leaves["key"], leaves["value"], None, 0, bindings)
    assert order.ordered(program, call, Options(CPU)) is not None
    out, lse = operators.attention(program, call, Options(CPU))
    assert_close(differentiated(out, lse, leaves, upstream), problem.truth(upstream), 1e-5)


@pytest.mark.parametrize(("length", "rows_first"), [(700, True), (701, False)])
def test_what_is_traced_has_the_strides_that_were_foretold(length: int, rows_first: bool) -> None:
    attention = attn_dsl.compile("dilated_window", window=300)
    inputs = [tensor(2, length, rows_first) for _ in range(3)]
    run = torch.compile(lambda q, k, v: attention(q, k, v) * 2, backend="aot_eager", fullgraph=True)
    out, plain = run(*inputs), attention(*inputs) * 2
    assert torch.equal(out, plain)
    grads = (torch.autograd.grad(x.square().sum(), inputs) for x in (out, plain))
    for traced, eager in zip(*grads, strict=True):
        assert torch.allclose(traced, eager, atol=1e-6)
