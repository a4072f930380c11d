"""Where values are computed, and that computing them there gives the same."""

import strategies
from hypothesis import given, settings

from attn_dsl.ir import nodes as ir
from attn_dsl.ir.evaluate import evaluate
from attn_dsl.ir.nodes import (
    SCORE,
    Binary,
    BinaryOp,
    Cast,
    Compare,
    CompareOp,
    Const,
    H,
    K,
    Load,
    Param,
    Q,
    Unary,
    UnaryOp,
)
from attn_dsl.ir.types import Type
from attn_dsl.passes.hoist import Level, hoist, level_of


def row_and_column():
    slope = Unary(UnaryOp.EXP, Load("slope", (H,), Type.FLOAT))
    row = Binary(BinaryOp.MUL, slope, Cast(Q, Type.FLOAT))
    column = Binary(BinaryOp.MUL, slope, Cast(K, Type.FLOAT))
    return Binary(BinaryOp.ADD, Binary(BinaryOp.ADD, SCORE, row), column)


def test_each_value_stands_at_its_outermost_level():
    text = hoist({"score": row_and_column()}).text()
    assert text.splitlines() == [
        "head     head0 = exp(slope[h])",
        "row      row0 = head0 * q",
        "column   column0 = head0 * k",
        "element  score = score + row0 + column0",
    ]


def test_an_element_value_is_named_where_it_is_used_twice():
    tanh = Unary(UnaryOp.TANH, SCORE)
    levels = hoist({"score": tanh, "d_score": Binary(BinaryOp.SUB, Const(1.0), Binary(BinaryOp.MUL, tanh, tanh))})
    assert [value.node for value in levels.at(Level.ELEMENT)] == [tanh]


def test_leaves_are_not_values_but_lookups_are():
    window = Param("window", Type.INT)
    doc = Load("doc", (Q,), Type.INT)
    levels = hoist({"mask": Compare(CompareOp.LT, Binary(BinaryOp.ADD, doc, window), K)})
    assert [value.level for value in levels.values] == [Level.ROW]


def test_nothing_leaves_a_reduction_whose_variable_it_reads():
    d = ir.Var("d")
    body = Binary(BinaryOp.MUL, Load("x", (Q, d), Type.FLOAT), Load("x", (K, d), Type.FLOAT))
    total = ir.Reduce(ir.ReduceOp.SUM, d, Const(0), Const(40), body)
    assert hoist({"score": total}).values == ()


@settings(max_examples=100, deadline=None)
@given(strategies.variants())
def test_values_come_before_their_users_and_vary_with_their_level_only(variant):
    levels = hoist(dict(zip(("score", "mask", "sink"), variant.roots, strict=False)))
    seen = set()
    allowed = {
        Level.LAUNCH: set(),
        Level.HEAD: {"b", "h"},
        Level.ROW: {"b", "h", "q"},
        Level.COLUMN: {"b", "h", "k"},
        Level.ELEMENT: {"b", "h", "q", "k", "score"},
    }
    env = strategies.environment()
    for value in levels.values:
        assert value.node.depends <= allowed[value.level] and level_of(value.node) is value.level
        inside = {n for n in ir.post_order(value.node) if n is not value.node} & {v.node for v in levels.values}
        assert inside <= seen
        seen.add(value.node)
        evaluate(value.node, env)
    assert len({value.name for value in levels.values}) == len(levels.values)
