"""Intervals of integer expressions, from signs and literals alone.

Positions are >= 0, sizes >= 1, `x % a` lies in `[0, a)`. Nothing is known of parameters and look-ups. Real questions
about positions belong to the proofs; this decides only what a simplification rule asks (`abs(q)`, `max(k, 0)`).
"""

from __future__ import annotations

from typing import cast

from attn_dsl.ir import nodes as ir
from attn_dsl.ir.nodes import BinaryOp, Compare, CompareOp, Const, Node, UnaryOp
from attn_dsl.ir.types import Type

Interval = tuple[int | None, int | None]
"""Least and greatest value; None is unbounded."""

ANYTHING: Interval = (None, None)


def interval(node: Node, memo: dict[Node, Interval]) -> Interval:
    """Bounds of an INT expression; `memo` is filled on the way."""
    if node in memo:
        return memo[node]
    for below in ir.post_order(node):
        if below not in memo:
            memo[below] = _interval(below, memo) if below.type is Type.INT else ANYTHING
    return memo[node]


def decide(node: Compare, memo: dict[Node, Interval]) -> bool | None:
    """Whether an integer comparison holds everywhere (True), nowhere (False), or neither is known (None)."""
    if node.x.type is not Type.INT:
        return None
    x, y = interval(node.x, memo), interval(node.y, memo)
    match node.op:
        case CompareOp.LT:
            return _less(x, y, strict=True)
        case CompareOp.LE:
            return _less(x, y, strict=False)
        case CompareOp.GT:
            return _less(y, x, strict=True)
        case CompareOp.GE:
            return _less(y, x, strict=False)
        case CompareOp.EQ | CompareOp.NE:
            apart = _less(x, y, strict=True) or _less(y, x, strict=True)
            return (node.op is CompareOp.NE) if apart else None


def _less(x: Interval, y: Interval, strict: bool) -> bool | None:
    (x_low, x_high), (y_low, y_high) = x, y
    if x_high is not None and y_low is not None and (x_high < y_low or (not strict and x_high == y_low)):
        return True
    if x_low is not None and y_high is not None and (x_low > y_high or (strict and x_low == y_high)):
        return False
    return None


def _interval(node: Node, memo: dict[Node, Interval]) -> Interval:
    match node:
        case Const(value):
            return int(value), int(value)
        case ir.Index():
            return 0, None
        case ir.Size():
            return 1, None
        case ir.Cast():
            return 0, 1
        case ir.Unary(op, x):
            return _unary(op, memo[x])
        case ir.Binary(op, x, y):
            return _binary(op, memo[x], memo[y])
        case ir.Select(_, x, y):
            return _union(memo[x], memo[y])
        case _:
            return ANYTHING


def _unary(op: UnaryOp, x: Interval) -> Interval:
    low, high = x
    match op:
        case UnaryOp.NEG:
            return _negated(x)
        case UnaryOp.ABS:
            if low is not None and low >= 0:
                return x
            return 0, (None if low is None or high is None else max(-low, high))
        case UnaryOp.SIGN:
            return -1 if low is None or low < 0 else min(low, 1), 1 if high is None or high > 0 else max(high, -1)
        case _:
            return ANYTHING


def _binary(op: BinaryOp, x: Interval, y: Interval) -> Interval:
    match op:
        case BinaryOp.ADD:
            return _sum(x, y)
        case BinaryOp.SUB:
            return _sum(x, _negated(y))
        case BinaryOp.MUL:
            return _product(x, y)
        case BinaryOp.FLOORDIV:
            return _quotient(x, y)
        case BinaryOp.MOD:
            return 0, (None if y[1] is None else y[1] - 1)
        case BinaryOp.MIN:
            return _negated(_greater(_negated(x), _negated(y)))
        case BinaryOp.MAX:
            return _greater(x, y)
        case _:
            return ANYTHING


def _negated(x: Interval) -> Interval:
    low, high = x
    return None if high is None else -high, None if low is None else -low


def _sum(x: Interval, y: Interval) -> Interval:
    low, high = (None if a is None or b is None else a + b for a, b in zip(x, y, strict=True))
    return low, high


def _product(x: Interval, y: Interval) -> Interval:
    if None not in (*x, *y):
        corners = [cast(int, a) * cast(int, b) for a in x for b in y]
        return min(corners), max(corners)
    if x[0] is not None and y[0] is not None and x[0] >= 0 and y[0] >= 0:
        return x[0] * y[0], None
    return ANYTHING


def _quotient(x: Interval, y: Interval) -> Interval:
    """A divisor is >= 1, so a quotient lies between 0 and the dividend; a literal divisor says more."""
    low, high = x
    least, greatest = y
    if least is not None and least == greatest and least > 0:
        return None if low is None else low // least, None if high is None else high // least
    return None if low is None else min(low, 0), None if high is None else max(high, 0)


def _greater(x: Interval, y: Interval) -> Interval:
    lows = [low for low in (x[0], y[0]) if low is not None]
    high = None if x[1] is None or y[1] is None else max(x[1], y[1])
    return max(lows, default=None), high


def _union(x: Interval, y: Interval) -> Interval:
    low = None if x[0] is None or y[0] is None else min(x[0], y[0])
    high = None if x[1] is None or y[1] is None else max(x[1], y[1])
    return low, high
