"""Whether an index lies in its extent wherever the tile is, by linear bounds: `clamp(k - q, -r, r) + r` in `2 * r + 1`.

Refuses everything that it cannot see at once; the price of a refusal is a comparison in the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping

from attn_dsl.ir.nodes import Binary, BinaryOp, Const, Node, Param, Size, Unary, UnaryOp

Linear = Mapping[Node | None, int]
"""Coefficients of parameters and sizes; None is the constant term."""


def within(index: Node, extent: Node) -> bool:
    """Whether 0 <= index < extent follows from extent >= 1 (tensors are not empty) and sizes >= 1."""
    size = _exact(extent)
    if size is None:
        return False
    slack = _plus(size, {None: -1})
    lows, highs = _bounds(index, -1), _bounds(index, 1)
    return (
        lows is not None
        and highs is not None
        and all(_nonnegative(low, slack) for low in lows)
        and all(_nonnegative(_plus(slack, _times(high, -1)), slack) for high in highs)
    )


def _nonnegative(form: Linear, slack: Linear) -> bool:
    """Whether form >= 0, given slack >= 0: form less some multiple of slack has no negative part."""
    return any(_trivial(_plus(_times(form, 2), _times(slack, -times))) for times in (0, 1, 2))


def _trivial(form: Linear) -> bool:
    constant = form.get(None, 0)
    for node, factor in form.items():
        if node is None or factor == 0:
            continue
        if not isinstance(node, Size) or factor < 0:
            return False
        constant += factor
    return constant >= 0


def _bounds(node: Node, side: int) -> list[Linear] | None:
    """Forms whose greatest (side 1) is an upper bound, or whose least (side -1) a lower bound, of the expression."""
    exact = _exact(node)
    if exact is not None:
        return [exact]
    match node:
        case Binary(BinaryOp.ADD, x, y):
            return _sums(_bounds(x, side), _bounds(y, side))
        case Binary(BinaryOp.SUB, x, y):
            opposite = _bounds(y, -side)
            return _sums(_bounds(x, side), None if opposite is None else [_times(form, -1) for form in opposite])
        case Binary(BinaryOp.MIN | BinaryOp.MAX as op, x, y):
            left, right = _bounds(x, side), _bounds(y, side)
            if (op is BinaryOp.MAX) == (side == 1):  # both operands count
                return None if left is None or right is None else left + right
            return right if left is None else left  # either operand will do
        case _:
            return None


def _sums(x: list[Linear] | None, y: list[Linear] | None) -> list[Linear] | None:
    return None if x is None or y is None else [_plus(a, b) for a in x for b in y]


def _exact(node: Node) -> Linear | None:
    match node:
        case Const(value):
            return {None: int(value)}
        case Param() | Size():
            return {node: 1}
        case Unary(UnaryOp.NEG, x):
            inner = _exact(x)
            return None if inner is None else _times(inner, -1)
        case Binary(BinaryOp.ADD | BinaryOp.SUB as op, x, y):
            left, right = _exact(x), _exact(y)
            if left is None or right is None:
                return None
            return _plus(left, _times(right, 1 if op is BinaryOp.ADD else -1))
        case Binary(BinaryOp.MUL, Const(factor), x) | Binary(BinaryOp.MUL, x, Const(factor)):
            inner = _exact(x)
            return None if inner is None else _times(inner, int(factor))
        case _:
            return None


def _plus(x: Linear, y: Linear) -> Linear:
    return {node: x.get(node, 0) + y.get(node, 0) for node in {**x, **y}}


def _times(x: Linear, factor: int) -> Linear:
    return {node: value * factor for node, value in x.items()}
