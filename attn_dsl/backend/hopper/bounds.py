"""Masks as intervals of keys: a row that sees the keys `low <= k <= high` compares columns with numbers of its own.

    q >= k and q - k < window       low = q - window + 1, high = q, once a row
    q >= k or k < prefix            high = max(q, prefix - 1)
    abs(q - k) <= reach or k < n    low = q - reach, high = q + reach, head = n - 1, an interval and all before it
    ... or q < n                    low = 0 and high = KV - 1 in the rows where that is so

and, where keys are boxes of a grid, likewise with a key's column: left <= k % columns <= right. Each element then pays
one comparison or two, whatever the mask. What is no interval stays a mask of pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

from attn_dsl.ir.nodes import (
    TRUE,
    Binary,
    BinaryOp,
    Compare,
    CompareOp,
    Const,
    K,
    Load,
    Node,
    Q,
    Select,
    Size,
    Unary,
    UnaryOp,
    conjuncts,
    post_order,
    substitute,
)
from attn_dsl.ir.types import Type
from attn_dsl.passes.schedule import add, maximum, minimum, subtract

ZERO, ONE = Const(0), Const(1)
_MIRRORED = {
    CompareOp.LT: CompareOp.GT, CompareOp.LE: CompareOp.GE, CompareOp.GT: CompareOp.LT, CompareOp.GE: CompareOp.LE,
    CompareOp.EQ: CompareOp.EQ,
}  # fmt: skip


@dataclass(frozen=True)
class Bounds:
    """The keys `low <= k <= high`, or k <= head, of a row; None where the mask has no such bound, INT and free of k."""

    low: Node | None = None
    high: Node | None = None
    head: Node | None = None

    def __and__(self, other: Bounds) -> Bounds | None:
        """Those of both; None where that is more than an interval and a head."""
        if self.head is not None and other.head is None:
            self, other = other, self
        if other.head is not None and (self.low is not None or self.head is not None):
            return None
        lows = [x for x in (self.low, other.low) if x is not None]
        highs = [x for x in (self.high, other.high) if x is not None]
        head = other.head if other.head is None or self.high is None else minimum(other.head, self.high)
        return Bounds(reduce(maximum, lows) if lows else None, reduce(minimum, highs) if highs else None, head)


def bounds(mask: Node) -> tuple[Bounds, Node]:
    """(bounds, rest): the mask is `(low <= k <= high or k <= head) and rest`."""
    found = Bounds()
    rest: Node = TRUE
    for part in conjuncts(mask):
        interval = _interval(part)
        both = None if interval is None else found & interval
        if both is not None:
            found = both
        else:
            rest = part if rest is TRUE else Binary(BinaryOp.AND, rest, part)
    return found, rest


def column_bounds(mask: Node, columns: int) -> tuple[tuple[Node, Node] | None, Node]:
    """((left, right), rest): the mask is `left <= k % columns <= right and rest`; None where it says no such thing."""
    column = Binary(BinaryOp.MOD, K, Const(columns))
    found = Bounds()
    rest: Node = TRUE
    for part in conjuncts(mask):
        interval = None
        if column in part.children and not _has_key(substitute(part, {column: ZERO})):
            interval = _interval(substitute(part, {column: K}))
        both = None if interval is None else found & interval
        if both is not None and both.head is None:
            found = both
        else:
            rest = part if rest is TRUE else Binary(BinaryOp.AND, rest, part)
    if found == Bounds():
        return None, mask
    return (found.low or ZERO, found.high or Const(columns - 1)), rest


@dataclass(frozen=True)
class BoxBounds:
    """The queries that a key sees in boxes of some columns: `low <= q <= high` and `left <= q % columns <= right`."""

    low: Node
    high: Node
    left: Node
    right: Node


def box_bounds(mask: Node, columns: int) -> tuple[BoxBounds, Node]:
    """(bounds, rest): the mask is that a query is within the bounds, and rest. Positions are below 2 ** 30.

    The row or column of a query, q // columns or q % columns, may stand under minima and maxima: the neighborhood of a
    query at the border shifts inside.
    """
    most = 2**30 // columns - 1
    row, column = (Binary(op, Q, Const(columns)) for op in (BinaryOp.FLOORDIV, BinaryOp.MOD))
    limits: dict[Node, tuple[int, int]] = {row: (0, most), column: (0, columns - 1), Q: (0, 2**30 - 1)}
    lows: dict[Node, Node] = {axis: Const(least) for axis, (least, _) in limits.items()}
    highs: dict[Node, Node] = {axis: Const(greatest) for axis, (_, greatest) in limits.items()}
    rest: Node = TRUE
    alone: list[Node] = []
    for part in (half for whole in conjuncts(mask) for half in _halves(whole)):
        if "q" not in part.depends:
            alone.append(part)
            continue
        for axis in limits:
            solved = _bound_of(part, axis, limits[axis])
            if solved is not None:
                is_low, bound = solved
                of, join = (lows, maximum) if is_low else (highs, minimum)
                of[axis] = join(of[axis], bound)
                break
        else:
            rest = part if rest is TRUE else Binary(BinaryOp.AND, rest, part)
    first = Binary(BinaryOp.MUL, minimum(lows[row], Const(most)), Const(columns))
    last = add(Binary(BinaryOp.MUL, maximum(highs[row], Const(-1)), Const(columns)), Const(columns - 1))
    low, high = maximum(lows[Q], first), minimum(highs[Q], last)
    for condition in alone:  # keys that no query sees
        high = Select(condition, high, Const(-1))
    return BoxBounds(low, high, lows[column], highs[column]), rest


def _halves(part: Node) -> Iterator[Node]:
    """`abs(x) <= y` as two comparisons."""
    match part:
        case Compare(CompareOp.LE | CompareOp.LT as op, Unary(UnaryOp.ABS, x), y) if x.type is Type.INT:
            yield Compare(op, x, y)
            yield Compare(op, Unary(UnaryOp.NEG, x), y)
        case _:
            yield part


def _bound_of(part: Node, axis: Node, limits: tuple[int, int]) -> tuple[bool, Node] | None:
    """(is_low, bound): the comparison holds iff `axis`, an expression of q between `limits`, is at least, or at most,
    `bound`, which is free of q."""
    if not isinstance(part, Compare) or part.op not in _MIRRORED or part.op is CompareOp.EQ:
        return None
    if part.x.type is not Type.INT or "q" in substitute(part, {axis: ZERO}).depends:
        return None
    op: CompareOp = part.op
    x, y = part.x, part.y
    if "q" in y.depends:
        op, x, y = _MIRRORED[op], y, x
    if "q" in y.depends or "q" not in x.depends:
        return None
    if op in (CompareOp.LT, CompareOp.GT):
        y = subtract(y, ONE) if op is CompareOp.LT else add(y, ONE)
    return _unwrapped(op in (CompareOp.GE, CompareOp.GT), x, y, axis, limits)


def _unwrapped(at_least: bool, x: Node, y: Node, axis: Node, limits: tuple[int, int]) -> tuple[bool, Node] | None:
    """x >= y, or x <= y, for `axis`, as `_bound_of`."""
    match x:
        case _ if x is axis:
            return at_least, y
        case Binary(BinaryOp.SUB, a, b) if "q" not in a.depends:
            return _unwrapped(not at_least, b, _minus(a, y), axis, limits)
        case Binary(BinaryOp.SUB, a, b) if "q" not in b.depends:
            return _unwrapped(at_least, a, add(y, b), axis, limits)
        case Unary(UnaryOp.NEG, a):
            return _unwrapped(not at_least, a, Unary(UnaryOp.NEG, y), axis, limits)
        case Binary(BinaryOp.ADD | BinaryOp.MIN | BinaryOp.MAX as op, a, b) if ("q" in a.depends) != ("q" in b.depends):
            inner, other = (a, b) if "q" in a.depends else (b, a)
            if op is BinaryOp.ADD:
                return _unwrapped(at_least, inner, _minus(y, other), axis, limits)
            found = _unwrapped(at_least, inner, y, axis, limits)
            if found is None:
                return None
            (is_low, bound), (least, most) = found, limits
            holds = Compare(CompareOp.GE if at_least else CompareOp.LE, other, y)
            if (op is BinaryOp.MIN) is at_least:  # both must hold
                return is_low, Select(holds, bound, Const(most + 1 if is_low else least - 1))
            return is_low, Select(holds, Const(least if is_low else most), bound)
        case _:
            return None


def _interval(mask: Node) -> Bounds | None:
    """The mask as an interval, or None."""
    match mask:
        case Compare(op, x, y) if op in _MIRRORED and x.type is y.type is Type.INT:
            if _has_key(x) and not _has_key(y):
                return _solved(op, x, y)
            if _has_key(y) and not _has_key(x):
                return _solved(_MIRRORED[op], y, x)
        case Binary(BinaryOp.AND, x, y):
            first, second = _interval(x), _interval(y)
            return None if first is None or second is None else first & second
        case Binary(BinaryOp.OR, x, y) if _has_key(x) and _has_key(y):
            return _either(_interval(x), _interval(y))
        case Binary(BinaryOp.OR, x, y) if _has_key(x) or _has_key(y):
            return _or_all(*((x, y) if _has_key(x) else (y, x)))
    return None


def _or_all(mask: Node, rows: Node) -> Bounds | None:
    """The mask in some rows, all keys in the others, of which `rows` holds."""
    found = _interval(mask)
    if found is None or any(isinstance(node, Load) for node in post_order(rows)):
        return None
    low = None if found.low is None else Select(rows, ZERO, found.low)
    high = None if found.high is None else Select(rows, subtract(Size("KV"), ONE), found.high)
    return Bounds(low, high, found.head)


def _either(x: Bounds | None, y: Bounds | None) -> Bounds | None:
    """The union: of two that are open on the same side, or of an interval and a head."""
    if x is None or y is None:
        return None
    for one, other in ((x, y), (y, x)):
        if one.low is None is one.head and one.high is not None and other.low is not None and other.high is not None:
            head = one.high if other.head is None else maximum(one.high, other.head)
            return Bounds(other.low, other.high, head)
    if x.head is not None or y.head is not None:
        return None
    if x.low is None is y.low and x.high is not None and y.high is not None:
        return Bounds(high=maximum(x.high, y.high))
    if x.high is None is y.high and x.low is not None and y.low is not None:
        return Bounds(low=minimum(x.low, y.low))
    return None


def _solved(op: CompareOp, x: Node, y: Node) -> Bounds | None:
    """`x op y`, with k in x alone, for k."""
    match x:
        case _ if x is K:
            match op:
                case CompareOp.LE | CompareOp.LT:
                    return Bounds(high=y if op is CompareOp.LE else subtract(y, ONE))
                case CompareOp.GE | CompareOp.GT:
                    return Bounds(low=y if op is CompareOp.GE else add(y, ONE))
                case _:
                    return Bounds(y, y)
        case Binary(BinaryOp.ADD, a, b) if _has_key(a) != _has_key(b):
            inner, other = (a, b) if _has_key(a) else (b, a)
            return _solved(op, inner, _minus(y, other))
        case Binary(BinaryOp.SUB, a, b) if not _has_key(b):
            return _solved(op, a, add(y, b))
        case Binary(BinaryOp.SUB, a, b) if not _has_key(a):
            return _solved(_MIRRORED[op], b, _minus(a, y))
        case Unary(UnaryOp.NEG, a):
            return _solved(_MIRRORED[op], a, Unary(UnaryOp.NEG, y))
        case Unary(UnaryOp.ABS, a) if op in (CompareOp.LE, CompareOp.LT):
            upper, lower = _solved(op, a, y), _solved(_MIRRORED[op], a, Unary(UnaryOp.NEG, y))
            return None if upper is None or lower is None else upper & lower
    return None


def _minus(x: Node, y: Node) -> Node:
    match y:
        case Unary(UnaryOp.NEG, z):
            return add(x, z)
        case _:
            return subtract(x, y)


def _has_key(node: Node) -> bool:
    return "k" in node.depends
