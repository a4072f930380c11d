"""A mask as an integer that is not negative where it keeps a pair, and what of it one position alone decides.

    q >= k and doc[b, q] == doc[b, k]     ->     min(q - k, -abs(doc[b, q] - doc[b, k]))

Integers of 16 bits are added and compared by their thousands in the time that torch takes for a few hundred Booleans.
The *sides* of an expression are its largest parts that see no more than one of the two positions: they are evaluated
once for every row and for every key, whatever the tiles.
"""

from __future__ import annotations

from typing import NamedTuple, cast

from attn_dsl.backend.cpu.relative import PAIR, minus
from attn_dsl.ir.nodes import (
    Binary,
    BinaryOp,
    Cast,
    Compare,
    CompareOp,
    Const,
    Expr,
    Node,
    Select,
    Unary,
    UnaryOp,
    post_order,
)
from attn_dsl.ir.types import Type
from attn_dsl.passes.fold import folded

ONE = Const(1)


class Sides(NamedTuple):
    """The largest subexpressions that see no key position, and those that see keys but no query position."""

    rows: tuple[Node, ...]
    keys: tuple[Node, ...]


def margin(mask: Node, *, subtract: bool) -> Node:
    """An integer expression `m` with `mask` true exactly where `m >= 0`; it sees what the mask sees.

    Integers are compared by subtraction if `subtract`: to be had where no difference leaves 64 bits.
    """
    found: dict[Node, Node] = {}
    for node in post_order(mask):
        if node.type is Type.BOOL:
            found[node] = folded(_margin(cast(Expr, node), found, subtract))
    return found[mask]


def _margin(node: Expr, found: dict[Node, Node], subtract: bool) -> Node:
    match node:
        case Const(value):
            return Const(0 if value else -1)
        case Binary(BinaryOp.AND, x, y):
            return Binary(BinaryOp.MIN, found[x], found[y])
        case Binary(BinaryOp.OR, x, y):
            return Binary(BinaryOp.MAX, found[x], found[y])
        case Unary(UnaryOp.NOT, x):
            return Binary(BinaryOp.SUB, Const(-1), found[x])
        case Select(condition, x, y):
            return Select(condition, found[x], found[y])
        case Compare(op, x, y) if subtract and x.type is Type.INT:
            return _difference(op, x, y)
        case _:
            return Binary(BinaryOp.SUB, Cast(node, Type.INT), ONE)


def sides(root: Node) -> Sides:
    """The sides of an expression. Numbers that depend on no index are none."""
    rows: dict[Node, None] = {}
    keys: dict[Node, None] = {}
    seen: set[Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if not node.depends:
            continue
        if node.depends >= PAIR:
            stack.extend(node.children)
        else:
            (keys if "k" in node.depends else rows)[node] = None
    return Sides(tuple(rows), tuple(keys))


def _difference(op: CompareOp, x: Node, y: Node) -> Node:
    match op:
        case CompareOp.LE:
            return minus(y, x)
        case CompareOp.GE:
            return minus(x, y)
        case CompareOp.LT:
            return minus(minus(y, ONE), x)
        case CompareOp.GT:
            return minus(minus(x, ONE), y)
        case CompareOp.EQ:
            return Unary(UnaryOp.NEG, Unary(UnaryOp.ABS, minus(x, y)))
        case CompareOp.NE:
            return Binary(BinaryOp.SUB, Unary(UnaryOp.ABS, minus(x, y)), ONE)
