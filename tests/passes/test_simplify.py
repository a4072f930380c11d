"""Every rule against brute force and a solver; the pass against the evaluator."""

import itertools
import math

import pytest
import strategies
import torch
import z3
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_dsl.errors import Source, Span
from attn_dsl.ir import nodes as ir
from attn_dsl.ir.evaluate import Environment, evaluate
from attn_dsl.ir.nodes import (
    SCORE,
    TRUE,
    Binary,
    BinaryOp,
    Compare,
    CompareOp,
    Const,
    K,
    Node,
    Param,
    Q,
    Unary,
    UnaryOp,
)
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import Variant
from attn_dsl.passes.fold import fold
from attn_dsl.passes.ranges import decide, interval
from attn_dsl.passes.rules import BOOL, COMPARE, EXACT, FAST, FLOAT, INT, SELECT
from attn_dsl.passes.simplify import simplify, simplify_node

INTS = range(-6, 7)
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -3.7, 1e-310, 1e300, math.pi, math.inf, -math.inf, math.nan]
POOLS = {Type.INT: list(INTS), Type.FLOAT: SPECIAL, Type.BOOL: [False, True]}


def parameters(*roots: Node) -> list[Param]:
    return sorted({n for n in ir.post_order(*roots) if isinstance(n, Param)}, key=lambda p: p.name)


def table(letters: list[Param], dtype: torch.dtype) -> Environment:
    """Every combination of small values of the letters, one a row."""
    rows = list(itertools.product(*(POOLS[p.type] for p in letters)))
    columns = {p.name: torch.tensor([row[i] for row in rows]) for i, p in enumerate(letters)}
    kinds = {Type.INT: torch.int64, Type.FLOAT: dtype, Type.BOOL: torch.bool}
    return Environment(parameters={p.name: columns[p.name].to(kinds[p.type]) for p in letters}, dtype=dtype)


def same(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Equal bit for bit, any nan being one."""
    equal = (x == y) | ((x != x) & (y != y))
    return equal & (torch.signbit(x) == torch.signbit(y)) | ((x != x) & (y != y)) if x.is_floating_point() else equal


@pytest.mark.parametrize("rule", EXACT, ids=lambda rule: rule.pattern)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_rule_is_exact_on_all_small_values(rule, dtype):
    for pattern, result, condition in rule.nodes():
        letters = parameters(pattern, result, condition)
        if dtype is torch.float32 and not any(p.type is Type.FLOAT for p in letters):
            continue
        env = table(letters, dtype)
        holds = evaluate(condition, env, active=torch.tensor(False)) & torch.ones(
            len(next(iter(env.parameters.values()))), dtype=torch.bool
        )
        left, right = (evaluate(side, env, active=holds).expand(holds.shape) for side in (pattern, result))
        wrong = holds & ~same(left, right)
        example = {name: value[wrong][:1].tolist() for name, value in env.parameters.items()}
        assert holds.any() and not wrong.any(), (
            f"{rule} fails at {example}: {left[wrong][:1]} is not {right[wrong][:1]}"
        )


@pytest.mark.parametrize("rule", [*INT, *COMPARE, *BOOL, *SELECT], ids=lambda rule: rule.pattern)
def test_no_rule_over_integers_is_refuted_by_z3(rule):
    for pattern, result, condition in rule.nodes():
        if any(p.type is Type.FLOAT for p in parameters(pattern)) or "**" in rule.pattern:
            continue
        solver = z3.Solver()
        solver.set("timeout", 300)
        solver.add(solve(condition), solve(pattern) != solve(result))
        assert solver.check() != z3.sat, solver.model()


def solve(node: Node) -> z3.ExprRef:
    """The node over unbounded integers. z3's `div` and `mod` floor for positive divisors, the only ones there are."""
    x = [solve(child) for child in node.children]
    match node:
        case Const(value):
            return z3.BoolVal(value) if node.type is Type.BOOL else z3.IntVal(value)
        case Param(name):
            return z3.Bool(name) if node.type is Type.BOOL else z3.Int(name)
        case ir.Select():
            return z3.If(*x)
        case Unary(op):
            sign = z3.If(x[0] > 0, 1, z3.If(x[0] < 0, -1, 0)) if op is UnaryOp.SIGN else None
            return {UnaryOp.NOT: z3.Not, UnaryOp.NEG: lambda v: -v, UnaryOp.ABS: z3.Abs}.get(op, lambda v: sign)(x[0])
        case Binary(op):
            match op:
                case BinaryOp.AND | BinaryOp.OR:
                    return (z3.And if op is BinaryOp.AND else z3.Or)(*x)
                case BinaryOp.MIN | BinaryOp.MAX:
                    return z3.If(x[0] < x[1] if op is BinaryOp.MIN else x[0] > x[1], x[0], x[1])
                case BinaryOp.FLOORDIV:
                    return x[0] / x[1]
            return {"add": x[0] + x[1], "sub": x[0] - x[1], "mul": x[0] * x[1]}.get(op.value, x[0] % x[1])
        case Compare(op):
            if op in (CompareOp.EQ, CompareOp.NE):
                return x[0] == x[1] if op is CompareOp.EQ else x[0] != x[1]
            return {"lt": x[0] < x[1], "le": x[0] <= x[1], "gt": x[0] > x[1], "ge": x[0] >= x[1]}[op.value]
    raise AssertionError(node)


@pytest.mark.parametrize("rule", FAST, ids=lambda rule: rule.pattern)
def test_fast_rules_hold_for_moderate_reals_and_are_not_applied_unasked(rule):
    for pattern, result, condition in rule.nodes():
        letters = parameters(pattern, result, condition)
        rows = (
            torch.randn(50, len(letters), generator=torch.Generator().manual_seed(0), dtype=torch.float64).abs() + 0.1
        )
        env = Environment(parameters={p.name: rows[:, i] for i, p in enumerate(letters)})
        expected, got = (evaluate(side, env).expand(50) for side in (pattern, result))
        torch.testing.assert_close(got, expected)
        literals = {p: Const(3.0 + i) for i, p in enumerate(letters) if p.name.isupper()}
        instance = ir.substitute(pattern, literals)
        assert simplify_node(instance, fast=True) is not instance
        if not any(shared.pattern == rule.pattern for shared in FLOAT):
            assert simplify_node(instance) is instance


@settings(max_examples=150, deadline=None)
@given(strategies.variants(), st.integers(0, 3))
def test_simplifying_changes_no_value(variant, seed):
    env = strategies.environment(seed)
    simple = simplify(variant)
    for before, after in zip(variant.roots, simple.roots, strict=True):
        x, y = (evaluate(root, env) for root in (before, after))
        # Literals are folded by Python's functions, which may differ from torch's in the last bit.
        torch.testing.assert_close(*torch.broadcast_tensors(y, x), rtol=1e-12, atol=1e-12, equal_nan=True)
    assert simplify(simple) == simple


@settings(max_examples=150, deadline=None)
@given(strategies.integers(depth=4))
def test_intervals_contain_every_value(node):
    memo = {}
    low, high = interval(node, memo)
    values = evaluate(node, strategies.environment(0))
    assert (low is None or values.min() >= low) and (high is None or values.max() <= high)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(CompareOp), strategies.integers(), strategies.integers())
def test_a_decided_comparison_is_right(op, x, y):
    node = Compare(op, x, y)
    verdict = decide(node, {})
    if verdict is not None:
        assert (evaluate(node, strategies.environment(0)) == verdict).all()


@pytest.mark.parametrize("op", [op for op in UnaryOp if op is not UnaryOp.NOT], ids=lambda op: op.value)
@pytest.mark.parametrize("value", [0.0, -0.0, 0.75, -2.5, 3.0, math.inf, math.nan])
def test_folding_agrees_with_the_evaluator(op, value):
    node = Unary(op, Const(value))
    folded = fold(node)
    if folded is not None:
        torch.testing.assert_close(
            torch.tensor(folded.value, dtype=torch.float64), evaluate(node, Environment()).double(), equal_nan=True
        )


def test_folding_leaves_what_belongs_to_the_device():
    for node in (
        Binary(BinaryOp.DIV, Const(1.0), Const(0.0)),
        Unary(UnaryOp.LOG, Const(-1.0)),
        Unary(UnaryOp.EXP, Const(1e4)),
        Binary(BinaryOp.POW, Const(2), Const(1 << 20)),
    ):
        assert fold(node) is None


def i(value: int) -> Const:
    return Const(value)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Unary(UnaryOp.ABS, Q), Q),
        (Binary(BinaryOp.MAX, K, i(0)), K),
        (Compare(CompareOp.GE, K, i(0)), TRUE),
        (Compare(CompareOp.LE, i(0), Binary(BinaryOp.SUB, Q, K)), Compare(CompareOp.LE, K, Q)),
        (Binary(BinaryOp.FLOORDIV, Binary(BinaryOp.FLOORDIV, Q, i(4)), i(8)), Binary(BinaryOp.FLOORDIV, Q, i(32))),
        (Binary(BinaryOp.MOD, Binary(BinaryOp.MOD, Q, i(4)), i(7)), Binary(BinaryOp.MOD, Q, i(4))),
        (ir.Select(Compare(CompareOp.LT, Q, i(0)), i(1), K), K),
    ],
)
def test_positions_are_known_not_to_be_negative(before, after):
    assert simplify_node(before) is after


def test_locations_follow_their_nodes():
    source = Source("v.attn", "attention v\nmask = q >= k\n")
    mask = Compare(CompareOp.GE, Q, K)
    variant = Variant("v", (), (), SCORE, mask, source=source, locations={mask: Span(source, 19, 25)})
    simple = simplify(variant)
    assert simple.locations[simple.mask].text == "q >= k"
