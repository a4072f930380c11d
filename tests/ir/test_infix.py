import pytest
import strategies
from hypothesis import given

from attn_dsl.ir import nodes as ir
from attn_dsl.ir.infix import LONGEST, infix
from attn_dsl.ir.nodes import TRUE, Binary, BinaryOp, Compare, CompareOp, Const, K, Node, Q, Unary, UnaryOp


def binary(op: str, x: Node, y: Node) -> Node:
    return Binary(BinaryOp(op), x, y)


LESS = Compare(CompareOp.LT, Q, K)


@pytest.mark.parametrize(
    ("node", "text"),
    [
        (binary("mul", binary("sub", Q, K), Const(2)), "(q - k) * 2"),
        (binary("sub", Q, binary("sub", K, Const(2))), "q - (k - 2)"),
        (binary("add", Q, binary("add", K, Const(-2))), "q + k + -2"),
        (binary("floordiv", Q, binary("mod", K, Const(2))), "q // (k % 2)"),
        (binary("pow", binary("pow", Q, Const(2)), Const(3)), "(q ** 2) ** 3"),
        (Unary(UnaryOp.NEG, binary("min", Q, K)), "-min(q, k)"),
        (Unary(UnaryOp.NOT, binary("and", LESS, TRUE)), "not (q < k and true)"),
        (ir.Select(LESS, ir.Select(TRUE, Q, K), K), "(q if true else k) if q < k else k"),
        (ir.Reduce(ir.ReduceOp.SUM, ir.Var("d"), Const(0), Const(3), ir.Var("d")), "sum(d in 0..3: d)"),
    ],
)
def test_the_spelling_keeps_the_meaning(node, text):
    assert infix(node) == text


@given(strategies.scores())
def test_any_expression_is_spelt_within_bounds(node):
    assert 0 < len(infix(node)) <= LONGEST
