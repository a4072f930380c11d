"""Reductions written out."""

import pytest
import strategies
import torch
from hypothesis import given, settings

from attn_dsl.ir import nodes as ir
from attn_dsl.ir.evaluate import evaluate
from attn_dsl.ir.nodes import FALSE, TRUE, Binary, BinaryOp, Const, Q, Reduce, ReduceOp, Var
from attn_dsl.ir.variant import Variant
from attn_dsl.passes.unroll import unroll, unroll_node

D = Var("d")


def reduction(op: ReduceOp, high: int, body: ir.Node = D) -> Reduce:
    return Reduce(op, D, Const(0), Const(high), body)


def test_each_turn_gets_its_literal():
    terms = [Binary(BinaryOp.MUL, Q, Const(i)) for i in range(3)]
    expected = Binary(BinaryOp.ADD, Binary(BinaryOp.ADD, terms[0], terms[1]), terms[2])
    assert unroll_node(reduction(ReduceOp.SUM, 3, Binary(BinaryOp.MUL, Q, D))) is expected


@pytest.mark.parametrize(("op", "body", "value"), [("sum", D, Const(0)), ("any", TRUE, FALSE), ("all", FALSE, TRUE)])
def test_nothing_to_reduce_gives_the_neutral_element(op, body, value):
    assert unroll_node(reduction(ReduceOp(op), 0, body)) is value


def test_long_reductions_stay_loops():
    long = reduction(ReduceOp.SUM, 100)
    variant = Variant("v", (), (), ir.Cast(long, ir.SCORE.type), TRUE)
    assert unroll(variant) == variant
    assert not any(isinstance(n, Reduce) for n in ir.post_order(unroll(variant, limit=100).score))


@settings(max_examples=100, deadline=None)
@given(strategies.scores())
def test_writing_out_changes_no_value(score):
    env = strategies.environment()
    x, y = torch.broadcast_tensors(evaluate(score, env), evaluate(unroll_node(score), env))
    torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
