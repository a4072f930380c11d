"""Symbolic derivatives against autograd through the evaluator."""

import math
from dataclasses import replace

import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_dsl.ir import nodes as ir
from attn_dsl.ir.evaluate import Environment, evaluate
from attn_dsl.ir.nodes import (
    SCORE,
    Binary,
    BinaryOp,
    Compare,
    CompareOp,
    Const,
    H,
    K,
    Load,
    Node,
    Q,
    Select,
    Unary,
    UnaryOp,
)
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import Variant
from attn_dsl.passes.differentiate import Gradient, differentiate, gradient

SLOPE = Load("slope", (H,), Type.FLOAT)


def autograd(root: Node, env: Environment, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    leaves = {"score": env.score, **env.tensors, **env.parameters}
    leaves = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, torch.Tensor) and leaf.requires_grad}
    total = (evaluate(root, env) * upstream).sum()
    if not total.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


@torch.no_grad()
def symbolic(found: Gradient, env: Environment, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a backward kernel does with the partial derivatives."""
    result = {"score": upstream * evaluate(found.d_score, env)}
    for item in found.loads:
        into = result.setdefault(item.load.tensor, torch.zeros_like(env.tensors[item.load.tensor]))
        at = [
            evaluate(index, env).clamp(0, size - 1) for index, size in zip(item.load.indices, into.shape, strict=True)
        ]
        at = [index.expand(upstream.shape) for index in at]
        into.index_put_(tuple(at), upstream * evaluate(item.partial, env), accumulate=True)
    for param in found.parameters:
        result[param.parameter.name] = (upstream * evaluate(param.partial, env)).sum()
    return result


def check(root: Node, env: Environment) -> None:
    upstream = torch.randn(env.score.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    expected = autograd(root, env, upstream)
    actual = symbolic(gradient(root), env, upstream)
    for name, value in expected.items():
        torch.testing.assert_close(actual.get(name, torch.zeros_like(value)), value, rtol=1e-8, atol=1e-8, msg=name)


@settings(max_examples=150, deadline=None)
@given(strategies.scores(depth=4), st.integers(0, 3))
def test_random_scores_agree_with_autograd(root, seed):
    check(root, strategies.environment(seed))


FUNCTIONS = [op for op in UnaryOp if op not in (UnaryOp.NOT, UnaryOp.FLOOR, UnaryOp.CEIL)]
POSITIVE = {UnaryOp.SQRT, UnaryOp.RSQRT, UnaryOp.LOG, UnaryOp.LOG2, UnaryOp.LOG1P}


@pytest.mark.parametrize("op", FUNCTIONS, ids=lambda op: op.value)
def test_every_function(op):
    points = [0.25, 1.0, 3.0] if op in POSITIVE else [-30.0, -2.0, -0.25, 0.0, 0.25, 2.0, 30.0]
    env = Environment(score=torch.tensor(points, dtype=torch.float64, requires_grad=True))
    check(Unary(op, SCORE), env)


@pytest.mark.parametrize(
    "op", [op for op in BinaryOp if op not in (BinaryOp.AND, BinaryOp.OR)], ids=lambda op: op.value
)
def test_every_operator_on_both_sides(op):
    points = torch.tensor([0.0, 0.5, 1.0, 2.5], dtype=torch.float64)
    x = points.view(-1, 1).expand(4, 4).clone().requires_grad_()
    if op in (BinaryOp.DIV, BinaryOp.FLOORDIV, BinaryOp.MOD):
        points = points + 0.75
    table = points.clone().requires_grad_()
    root = Binary(op, SCORE, Load("table", (K,), Type.FLOAT))
    check(root, Environment(score=x, tensors={"table": table}, indices={"k": torch.arange(4).view(1, 4)}))


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0, 3.0, -1.0])
def test_constant_powers(exponent):
    points = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    check(Binary(BinaryOp.POW, SCORE, Const(exponent)), Environment(score=points))


def test_ties_split_evenly():
    clamp = Binary(BinaryOp.MIN, Binary(BinaryOp.MAX, SCORE, Const(-1.0)), Const(1.0))
    env = Environment(score=torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64, requires_grad=True))
    assert evaluate(gradient(clamp).d_score, env).tolist() == [0.0, 0.5, 1.0, 0.5, 0.0]


def test_a_branch_not_taken_gives_no_nan():
    root = Select(Compare(CompareOp.GT, SCORE, Const(0.0)), Unary(UnaryOp.SQRT, SCORE), Const(0.0))
    env = Environment(score=torch.tensor([-1.0, 0.0, 4.0], dtype=torch.float64, requires_grad=True))
    assert evaluate(gradient(root).d_score, env).tolist() == [0.0, 0.0, 0.25]
    check(root, env)


def test_both_branches_of_a_select_give_one_select():
    condition = Compare(CompareOp.GE, Q, K)
    found = gradient(Select(condition, Unary(UnaryOp.EXP, SCORE), Binary(BinaryOp.MUL, SCORE, SLOPE)))
    assert found.d_score is Select(condition, Unary(UnaryOp.EXP, SCORE), SLOPE)


def test_reductions_are_written_out():
    d = ir.Var("d")
    body = Binary(BinaryOp.MUL, Load("table", (H, d), Type.FLOAT), SCORE)
    found = gradient(ir.Reduce(ir.ReduceOp.SUM, d, Const(0), Const(3), body))
    assert [item.load.indices[1] for item in found.loads] == [Const(0), Const(1), Const(2)]
    for op in (ir.ReduceOp.SUM, ir.ReduceOp.MIN, ir.ReduceOp.MAX):
        check(ir.Reduce(op, d, Const(0), Const(3), body), strategies.environment())


def test_indices_and_conditions_get_no_gradient():
    row = ir.Load("lengths", (ir.B,), Type.INT)
    table = Load("table", (H, row), Type.FLOAT)
    found = gradient(Select(Compare(CompareOp.GT, SLOPE, Const(0.0)), table, Const(0.0)))
    assert [item.load for item in found.loads] == [table]
    assert found.d_score is Const(0.0) and found.parameters == ()


def test_score_and_sink_are_differentiated_apart():
    variant = Variant("v", strategies.PARAMETERS, strategies.TENSORS, SCORE, ir.TRUE, sink=SLOPE)
    both = differentiate(variant)
    assert both.score == Gradient(Const(1.0), (), ())
    assert both.sink is not None and both.sink.loads[0].partial is Const(1.0)
    assert differentiate(replace(variant, sink=None)).sink is None


def test_a_soft_cap_costs_no_division_backward():
    cap = ir.Param("cap", Type.FLOAT)
    tanh = Unary(UnaryOp.TANH, Binary(BinaryOp.DIV, SCORE, cap))
    slope = Binary(BinaryOp.SUB, Const(1.0), Binary(BinaryOp.MUL, tanh, tanh))
    assert gradient(Binary(BinaryOp.MUL, cap, tanh)).d_score is slope


def test_tanh_soft_cap_reuses_the_forward_value():
    cap = ir.Param("cap", Type.FLOAT)
    tanh = Unary(UnaryOp.TANH, Binary(BinaryOp.DIV, SCORE, cap))
    nodes = set(ir.post_order(gradient(Binary(BinaryOp.MUL, cap, tanh)).d_score))
    assert tanh in nodes and sum(isinstance(n, Unary) for n in nodes) == 1
    assert math.isclose(
        evaluate(tanh, Environment(parameters={"cap": 2.0}, score=torch.tensor(2.0))).item(), math.tanh(1)
    )
