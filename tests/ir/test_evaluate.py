"""The dense evaluator against plain torch, and the laws of its docstring."""

import math

import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_dsl.errors import BindingError
from attn_dsl.ir import nodes as ir
from attn_dsl.ir.evaluate import Environment, attention, environment, evaluate
from attn_dsl.ir.nodes import (
    SCORE,
    TRUE,
    B,
    Binary,
    BinaryOp,
    Compare,
    CompareOp,
    Const,
    H,
    K,
    Load,
    Q,
    Select,
    Unary,
    UnaryOp,
)
from attn_dsl.ir.types import DType, Type
from attn_dsl.ir.variant import Parameter, Tensor, Variant


def variant(score=SCORE, mask=TRUE, sink=None, parameters=(), tensors=()):
    return Variant("v", tuple(parameters), tuple(tensors), score, mask, sink)


def qkv(batch=2, heads=4, kv_heads=2, q_len=5, kv_len=7, dim=3, v_dim=2):
    make = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, q_len, dim), (batch, kv_heads, kv_len, dim), (batch, kv_heads, kv_len, v_dim)]
    return [torch.randn(s, generator=make, dtype=torch.float64, requires_grad=True) for s in shapes]


def compare(op, x, y):
    return Compare(CompareOp[op], x, y)


def binary(op, x, y):
    return Binary(BinaryOp[op], x, y)


CAUSAL = compare("GE", Q, K)


def test_plain_attention_agrees_with_sdpa_for_grouped_heads():
    q, k, v = qkv()
    out, lse = attention(variant(), q, k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    scores = q @ k.repeat_interleave(2, 1).mT / math.sqrt(3)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_hidden_rows_give_zero_and_minus_infinity_and_finite_gradients():
    q, k, v = qkv()
    out, lse = attention(variant(mask=compare("GT", Q, K)), q, k, v)
    assert (out[:, :, 0] == 0).all() and (lse[:, :, 0] == -math.inf).all()
    (out.sum() + lse[:, :, 1:].sum()).backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


def test_a_sink_joins_the_denominator_only():
    q, k, v = qkv()
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    sunk = variant(
        mask=compare("GT", Q, K),
        sink=Load("sinks", (H,), Type.FLOAT),
        tensors=[Tensor("sinks", DType.FLOAT32, (ir.Size("H"),))],
    )
    out, lse = attention(sunk, q, k, v, bindings={"sinks": sinks})
    plain, plain_lse = attention(variant(mask=compare("GT", Q, K)), q, k, v)
    column = sinks.view(1, -1, 1)
    torch.testing.assert_close(lse, torch.logaddexp(plain_lse, column))
    torch.testing.assert_close(out, plain * torch.exp(plain_lse - lse).unsqueeze(-1))
    out.sum().backward()
    assert sinks.grad.isfinite().all() and (sinks.grad != 0).any()


def test_q_offset_moves_the_rows_of_each_batch():
    q, k, v = qkv()
    offsets = torch.tensor([0, 2])
    out, _ = attention(variant(mask=CAUSAL), q, k, v, q_offset=offsets)
    for b, offset in enumerate(offsets.tolist()):
        alone, _ = attention(variant(mask=CAUSAL), q[b : b + 1], k[b : b + 1], v[b : b + 1], q_offset=offset)
        torch.testing.assert_close(out[b : b + 1], alone)


def test_nan_and_inf_under_the_mask_never_show():
    q, k, v = qkv(batch=1, heads=2, kv_heads=2, q_len=3, kv_len=3)
    with torch.no_grad():
        k[:, :, 2], v[:, :, 2] = math.nan, math.inf
    length = compare("LT", K, Const(2))
    bias = torch.tensor([1.0, 2.0, math.nan], dtype=torch.float64, requires_grad=True)
    score = binary("MUL", SCORE, Load("bias", (K,), Type.FLOAT))
    out, lse = attention(
        variant(score, length, tensors=[Tensor("bias", DType.FLOAT32, (ir.Size("KV"),))]),
        q,
        k,
        v,
        bindings={"bias": bias},
    )
    (out.sum() + lse.sum()).backward()
    assert out.isfinite().all() and lse.isfinite().all()
    assert all(t.grad.isfinite().all() for t in (q, k, v, bias))
    assert bias.grad[2] == 0


def test_the_branch_not_taken_has_no_effect_on_the_gradient():
    x = torch.tensor([-1.0, 0.0, 4.0], dtype=torch.float64, requires_grad=True)
    safe = Select(compare("GT", SCORE, Const(0.0)), Unary(UnaryOp.SQRT, SCORE), Const(0.0))
    evaluate(safe, Environment(score=x)).sum().backward()
    assert x.grad.tolist() == [0.0, 0.0, 0.25]


def test_an_index_out_of_range_is_an_error_only_where_it_is_used():
    q, k, v = qkv(batch=1)
    table = torch.zeros(5)
    lookup = Load("table", (binary("SUB", Q, K),), Type.FLOAT)
    biased = variant(binary("ADD", SCORE, lookup), CAUSAL, tensors=[Tensor("table", DType.FLOAT32, (ir.Size("N"),))])
    attention(biased, q, k, v, bindings={"table": table})
    with pytest.raises(IndexError, match=r"index 4 is out of range for axis 0 of `table` \(size 4\) at q=4, k=0"):
        attention(biased, q, k, v, bindings={"table": table[:4]})


def test_and_or_hide_lookups_that_they_have_decided():
    doc = Load("doc", (binary("SUB", K, Const(1)),), Type.INT)
    guarded = binary("OR", compare("EQ", K, Const(0)), compare("EQ", doc, Const(3)))
    q, k, v = qkv(batch=1)
    tensors = [Tensor("doc", DType.INT32, (ir.Size("KV"),))]
    attention(variant(mask=guarded, tensors=tensors), q, k, v, bindings={"doc": torch.full((7,), 3)})


@pytest.mark.parametrize("kind", [int, float])
def test_floor_division_and_modulo_round_as_python_does(kind):
    values = [kind(x) for x in range(-7, 8)]
    x, y = ir.Param("x", Const(values[0]).type), ir.Param("y", Const(values[0]).type)
    for a in values:
        for b in (v for v in values if v):
            env = Environment(parameters={"x": a, "y": b})
            assert evaluate(binary("FLOORDIV", x, y), env).item() == a // b
            assert evaluate(binary("MOD", x, y), env).item() == a % b


def test_reductions_nest_and_are_differentiable():
    d, e = ir.Var("d"), ir.Var("e")
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    inner = ir.Reduce(ir.ReduceOp.MAX, e, Const(0), Const(3), Load("x", (d, e), Type.FLOAT))
    total = ir.Reduce(ir.ReduceOp.SUM, d, Const(0), Const(2), inner)
    result = evaluate(total, Environment(tensors={"x": x}))
    torch.testing.assert_close(result, x.amax(1).sum())
    (grad,) = torch.autograd.grad(result, x)
    assert grad.sum() == 2


def test_gradcheck_through_score_mask_sink_and_parameters():
    q, k, v = qkv(batch=1, heads=2, kv_heads=1, q_len=3, kv_len=4)
    cap = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    table = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    p = ir.Param("cap", Type.FLOAT)
    capped = binary("MUL", p, Unary(UnaryOp.TANH, binary("DIV", SCORE, p)))
    v1 = variant(
        binary("ADD", capped, Load("table", (H, K), Type.FLOAT)),
        CAUSAL,
        Load("table", (H, Const(0)), Type.FLOAT),
        [Parameter("cap", Type.FLOAT)],
        [Tensor("table", DType.FLOAT32, (ir.Size("H"), ir.Size("KV")))],
    )

    def run(q, k, v, cap, table):
        return attention(v1, q, k, v, bindings={"cap": cap, "table": table})

    assert torch.autograd.gradcheck(run, (q, k, v, cap, table))


def test_half_precision_rounds_every_operation():
    q, k, v = qkv()
    out, lse = attention(variant(), q, k, v, dtype=torch.bfloat16)
    exact, _ = attention(variant(), q, k, v)
    assert out.dtype == lse.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, atol=0.05, rtol=0.05)
    assert (out.double() != exact).any()


def test_an_integer_divided_by_zero_is_an_error_where_it_is_used():
    q, k, v = qkv(batch=1, heads=1, kv_heads=1, q_len=3, kv_len=3)
    for op in ("FLOORDIV", "MOD"):
        by_key = ir.Cast(binary(op, Q, K), Type.FLOAT)
        with pytest.raises(ZeroDivisionError, match=r"divides by `k`, which is 0 at .*k=0"):
            attention(variant(binary("ADD", SCORE, by_key)), q, k, v)
        attention(variant(binary("ADD", SCORE, by_key), compare("GT", K, Const(0))), q, k, v)
    floats = ir.Cast(Q, Type.FLOAT), ir.Cast(K, Type.FLOAT)
    attention(variant(binary("ADD", SCORE, binary("DIV", *floats))), q, k, v)


def test_wrong_arguments_are_named():
    q, k, v = qkv()
    table = Tensor("t", DType.FLOAT32, (ir.Size("H"),))
    loads = variant(binary("ADD", SCORE, Load("t", (H,), Type.FLOAT)), tensors=[table])
    with pytest.raises(BindingError, match="`t` is not bound"):
        attention(loads, q, k, v)
    with pytest.raises(BindingError, match="no parameter or tensor `s`"):
        attention(loads, q, k, v, bindings={"t": torch.zeros(4), "s": 1})
    with pytest.raises(BindingError, match="axis 0 of tensor `t` has 3 elements, expected 4"):
        attention(loads, q, k, v, bindings={"t": torch.zeros(3)})


def test_kv_heads_are_shared_by_groups_of_query_heads():
    q, k, v = qkv(batch=1, heads=4, kv_heads=2)
    seen = evaluate(ir.Index("hk"), _env(q, k, v))
    assert seen.flatten().tolist() == [0, 0, 1, 1]
    assert evaluate(binary("ADD", B, H), _env(q, k, v)).shape == (1, 4, 1, 1)


def _env(q, k, v):
    return environment(variant(), q, k, v)


@settings(max_examples=60, deadline=None)
@given(strategies.variants(), st.integers(0, 3))
def test_no_random_variant_gives_nan_forward_or_backward(random, seed):
    sizes = strategies.SIZES
    q, k, v = qkv(sizes["B"], sizes["H"], sizes["HK"], sizes["Q"], sizes["KV"])
    bound = strategies.bindings(seed)
    out, lse = attention(random, q, k, v, bindings=bound)
    assert out.isfinite().all() and not lse.isnan().any()
    seen = lse > -math.inf
    (out.sum() + lse[seen].sum() + 0 * (q.sum() + k.sum() + v.sum())).backward()
    leaves = [q, k, v, *(t for t in bound.values() if isinstance(t, torch.Tensor) and t.requires_grad)]
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves)
    assert (out[~seen] == 0).all()


def test_a_float_parameter_keeps_all_its_digits():
    found = evaluate(ir.Param("cap", Type.FLOAT), Environment(parameters={"cap": 0.7}))
    assert found.dtype is torch.float64 and found.item() == 0.7
