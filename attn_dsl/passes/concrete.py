"""Integer and boolean expressions on plain Python numbers.

Certificates are checked, and tiles are counted, with this evaluator; the rules that find a proof never use it. What
is divided by 0 is 0: the language gives it no value, and a branch that is not taken may ask for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import cast

from attn_dsl.ir.nodes import (
    Binary,
    BinaryOp,
    Cast,
    Compare,
    CompareOp,
    Const,
    Node,
    Reduce,
    ReduceOp,
    Select,
    Unary,
    UnaryOp,
    post_order,
    substitute,
)
from attn_dsl.ir.types import Type

_BINARY: dict[BinaryOp, Callable[[int, int], int]] = {
    BinaryOp.ADD: lambda x, y: x + y,
    BinaryOp.SUB: lambda x, y: x - y,
    BinaryOp.MUL: lambda x, y: x * y,
    BinaryOp.FLOORDIV: lambda x, y: x // y if y else 0,
    BinaryOp.MOD: lambda x, y: x % y if y else 0,
    BinaryOp.POW: lambda x, y: cast(int, x**y),
    BinaryOp.MIN: min,
    BinaryOp.MAX: max,
    BinaryOp.AND: lambda x, y: x and y,
    BinaryOp.OR: lambda x, y: x or y,
}
_COMPARE: dict[CompareOp, Callable[[int, int], bool]] = {
    CompareOp.EQ: lambda x, y: x == y,
    CompareOp.NE: lambda x, y: x != y,
    CompareOp.LT: lambda x, y: x < y,
    CompareOp.LE: lambda x, y: x <= y,
    CompareOp.GT: lambda x, y: x > y,
    CompareOp.GE: lambda x, y: x >= y,
}
_UNARY: dict[UnaryOp, Callable[[int], int]] = {
    UnaryOp.NEG: lambda x: -x,
    UnaryOp.ABS: abs,
    UnaryOp.NOT: lambda x: not x,
    UnaryOp.SIGN: lambda x: (x > 0) - (x < 0),
}
_REDUCE: dict[ReduceOp, Callable[[list[int]], int]] = {
    ReduceOp.SUM: sum,
    ReduceOp.MIN: min,
    ReduceOp.MAX: max,
    ReduceOp.ANY: any,
    ReduceOp.ALL: all,
}


def evaluate(root: Node, values: Mapping[Node, int]) -> int:
    """The value of an INT or BOOL node. `values` gives every leaf that is no constant, and any inner node it likes.

    Raises KeyError for a leaf without a value.
    """
    return evaluate_all((root,), values)[root]


def evaluate_all(roots: Iterable[Node], values: Mapping[Node, int]) -> dict[Node, int]:
    """The values of several nodes and their operands. What rests on a leaf without a value, or on floats, has none."""
    return evaluate_in_order(post_order(*roots), values)


def evaluate_in_order(order: Iterable[Node], values: Mapping[Node, int]) -> dict[Node, int]:
    """The same for nodes that come operands first."""
    known: dict[Node, int] = dict(values)
    for node in order:
        if node not in known and node.type is not Type.FLOAT and (isinstance(node, Const) or _is_ready(node, known)):
            known[node] = _step(node, known)
    return known


def _is_ready(node: Node, known: Mapping[Node, int]) -> bool:
    needed = (node.low, node.high) if isinstance(node, Reduce) else node.children
    return bool(needed) and all(child in known for child in needed)


def _step(node: Node, known: dict[Node, int]) -> int:
    match node:
        case Const(value):
            return cast(int, value)
        case Unary(op, x):
            return _UNARY[op](known[x])
        case Binary(op, x, y):
            return _BINARY[op](known[x], known[y])
        case Compare(op, x, y):
            return _COMPARE[op](known[x], known[y])
        case Select(condition, x, y):
            return known[x] if known[condition] else known[y]
        case Cast(x):
            return int(known[x])
        case Reduce(op, var, low, high, body):
            bodies = [substitute(body, {var: Const(i)}) for i in range(known[low], known[high])]
            return _REDUCE[op]([evaluate(b, known) for b in bodies])
        case _:
            raise KeyError(node)
