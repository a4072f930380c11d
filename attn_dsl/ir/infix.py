"""An expression in the language's own spelling, for messages: `slope[h] * (k - q)`.

Not an inverse of anything (`printer` has that): casts are left out, and a part longer than `LONGEST` becomes `...`,
since what is shared in the graph is repeated in the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from typing_extensions import assert_never

from attn_dsl.ir import nodes as ir
from attn_dsl.ir.nodes import BinaryOp, CompareOp, Node, UnaryOp
from attn_dsl.ir.printer import literal

LONGEST = 400
_NO_NAMES: Mapping[Node, str] = {}

_SELECT, _OR, _AND, _NOT, _COMPARE, _SUM, _PRODUCT, _SIGN, _POWER, _ATOM = range(10)
_BINARY = {
    BinaryOp.OR: ("or", _OR),
    BinaryOp.AND: ("and", _AND),
    BinaryOp.ADD: ("+", _SUM),
    BinaryOp.SUB: ("-", _SUM),
    BinaryOp.MUL: ("*", _PRODUCT),
    BinaryOp.DIV: ("/", _PRODUCT),
    BinaryOp.FLOORDIV: ("//", _PRODUCT),
    BinaryOp.MOD: ("%", _PRODUCT),
    BinaryOp.POW: ("**", _POWER),
}
_COMPARISON = {
    CompareOp.EQ: "==",
    CompareOp.NE: "!=",
    CompareOp.LT: "<",
    CompareOp.LE: "<=",
    CompareOp.GT: ">",
    CompareOp.GE: ">=",
}


def infix(root: Node, names: Mapping[Node, str] = _NO_NAMES, *, longest: int = LONGEST) -> str:
    """The expression as a `.attn` file would say it; a named part below the root is spelt by its name.

    A part of more than `longest` characters becomes `...`.
    """
    texts: dict[Node, tuple[str, int]] = {}
    for node in ir.post_order(root):
        text, strength = (names[node], _ATOM) if node in names and node is not root else _spell(node, texts)
        texts[node] = (text, strength) if len(text) <= longest else ("...", _ATOM)
    return texts[root][0]


def _spell(node: Node, texts: dict[Node, tuple[str, int]]) -> tuple[str, int]:
    """Text of a node and how strongly its operator binds."""

    def operand(child: Node, least: int) -> str:
        text, strength = texts[child]
        return text if strength >= least else f"({text})"

    match cast(ir.Expr, node):
        case ir.Const(value):
            return literal(value), _SUM if isinstance(value, int | float) and value < 0 else _ATOM
        case ir.Param(name) | ir.Index(name) | ir.Size(name) | ir.Var(name):
            return name, _ATOM
        case ir.Score():
            return "score", _ATOM
        case ir.Load(tensor, indices):
            return f"{tensor}[{', '.join(operand(i, _SELECT) for i in indices)}]", _ATOM
        case ir.Unary(UnaryOp.NEG, x):
            return f"-{operand(x, _SIGN)}", _SIGN
        case ir.Unary(UnaryOp.NOT, x):
            return f"not {operand(x, _NOT)}", _NOT
        case ir.Unary(op, x):
            return f"{op.value}({operand(x, _SELECT)})", _ATOM
        case ir.Binary(BinaryOp.MIN | BinaryOp.MAX as op, x, y):
            return f"{op.value}({operand(x, _SELECT)}, {operand(y, _SELECT)})", _ATOM
        case ir.Binary(BinaryOp.POW, x, y):
            return f"{operand(x, _ATOM)} ** {operand(y, _POWER)}", _POWER
        case ir.Binary(op, x, y):
            symbol, strength = _BINARY[op]
            right = strength if op in (BinaryOp.ADD, BinaryOp.AND, BinaryOp.OR) else strength + 1
            return f"{operand(x, strength)} {symbol} {operand(y, right)}", strength
        case ir.Compare(op, x, y):
            return f"{operand(x, _SUM)} {_COMPARISON[op]} {operand(y, _SUM)}", _COMPARE
        case ir.Select(condition, x, y):
            return f"{operand(x, _OR)} if {operand(condition, _OR)} else {operand(y, _SELECT)}", _SELECT
        case ir.Cast(x):
            return texts[x]
        case ir.Reduce(op, var, low, high, body):
            span = f"{operand(low, _SUM)}..{operand(high, _SUM)}"
            return f"{op.value}({var.name} in {span}: {operand(body, _SELECT)})", _ATOM
        case unreachable:
            assert_never(unreachable)
