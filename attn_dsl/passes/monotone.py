"""Which way an integer expression moves within a tile, and the least and greatest value it takes there."""

from __future__ import annotations

import functools

from attn_dsl.ir.nodes import (
    Binary,
    BinaryOp,
    Compare,
    CompareOp,
    Const,
    Index,
    K,
    Node,
    Q,
    Select,
    Unary,
    UnaryOp,
    Var,
    substitute,
)

POSITIONS = frozenset({"q", "k"})
Q0, Q1, K0, K1 = Var("q0"), Var("q1"), Var("k0"), Var("k1")
"""First and last absolute position of a query tile and of a key/value tile."""
Q_OFFSET = Var("q_offset")
"""Absolute position of the first query."""


def varies(node: Node) -> bool:
    """Whether a node may differ between two pairs of one tile."""
    return bool(node.depends & POSITIONS)


CORNERS: dict[Index, tuple[Node, Node]] = {Q: (Q0, Q1), K: (K0, K1)}
Interval = tuple[Node, Node]
KNOWN = 4096
"""So many answers are kept: what a node says of its parts is asked once, however often they are shared."""


@functools.lru_cache(maxsize=KNOWN)
def interval(node: Node) -> Interval | None:
    """The least and greatest value of an INT node of one position over a tile, in closed form; None for "don't know".

    A monotone node takes its extremes at the first and last position. `x % W` covers `[0, W)`, unless the tile stays
    inside one period.
    """
    if not varies(node):
        return node, node
    moved = direction(node)
    if moved is not None and len(node.depends & POSITIONS) == 1:
        return corner_values(node, moved)
    match node:
        case Binary(BinaryOp.MIN | BinaryOp.MAX | BinaryOp.ADD as op, x, y):
            pairs = interval(x), interval(y)
            if pairs[0] is None or pairs[1] is None:
                return None
            return Binary(op, pairs[0][0], pairs[1][0]), Binary(op, pairs[0][1], pairs[1][1])
        case Binary(BinaryOp.MOD, x, y) if not varies(y) and (inner := interval(x)) is not None:
            low, high = inner
            periods = [Binary(BinaryOp.FLOORDIV, end, y) for end in inner]
            same = Compare(CompareOp.EQ, *periods)
            last = Binary(BinaryOp.SUB, y, Const(1))
            return (
                Select(same, Binary(BinaryOp.MOD, low, y), Const(0)),
                Select(same, Binary(BinaryOp.MOD, high, y), last),
            )
        case _:
            return None


def corner_values(node: Node, moved: int) -> Interval:
    position = next(p for p in CORNERS if p.depends <= node.depends)
    first, last = (substitute(node, {position: corner}) for corner in CORNERS[position])
    if moved == EITHER:
        return Binary(BinaryOp.MIN, first, last), Binary(BinaryOp.MAX, first, last)
    return (first, last) if moved == UP else (last, first)


UP, DOWN, FLAT, EITHER = 1, -1, 0, 2


@functools.lru_cache(maxsize=KNOWN)
def direction(node: Node) -> int | None:
    """How an INT node moves with the tile: UP, DOWN, FLAT, EITHER of UP and DOWN, or None for "don't know".

    Moving with the tile means: with q and k, and with the last positions q1 and k1 while the first ones stay.
    """
    match node:
        case Index("q" | "k") | Var("q1" | "k1"):
            return UP
        case _ if not node.children:
            return FLAT
        case Unary(UnaryOp.NEG, x):
            return _reversed(direction(x))
        case Binary(BinaryOp.ADD | BinaryOp.MIN | BinaryOp.MAX, x, y):
            return _joined(direction(x), direction(y))
        case Binary(BinaryOp.SUB, x, y):
            return _joined(direction(x), _reversed(direction(y)))
        case Binary(BinaryOp.FLOORDIV, x, y) if direction(y) == FLAT:
            return direction(x)
        case Binary(BinaryOp.MUL, x, y) if FLAT in (direction(x), direction(y)):
            factor, varying = (x, y) if direction(x) == FLAT else (y, x)
            moved = direction(varying)
            if moved == FLAT or moved is None:
                return moved
            if not isinstance(factor, Const):
                return EITHER
            return moved if factor.value > 0 else _reversed(moved)
        case _:
            return FLAT if all(direction(child) == FLAT for child in node.children) else None


def _reversed(direction: int | None) -> int | None:
    return direction if direction in (None, EITHER) else -direction


def _joined(x: int | None, y: int | None) -> int | None:
    if FLAT in (x, y):
        return y if x == FLAT else x
    return x if x == y and x != EITHER else None
