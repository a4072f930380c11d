"""Interval arithmetic over an expression, for many tiles at a time: between what the values of each lie.

Intervals are pairs of float64 tensors, in which integers up to 2^53 are exact; Booleans are 0 and 1. Where nothing is
known (overflow, division by what may be zero, functions without a rule, nan) there is no interval, and a comparison of
it may go either way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor

from attn_dsl.ir.nodes import (
    Binary,
    BinaryOp,
    Cast,
    Compare,
    CompareOp,
    Const,
    Expr,
    Load,
    Node,
    Select,
    Unary,
    UnaryOp,
    post_order,
)
from attn_dsl.ir.types import Type

EXACT = 2.0**53
"""Integers beyond it are not told apart."""


class Interval(NamedTuple):
    """Every value is at least `low` and at most `high`."""

    low: Tensor
    high: Tensor

    def covers(self, other: Interval) -> Interval:
        """The smallest interval around both."""
        return Interval(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))


UNKNOWN_BOOL = Interval(*torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu"))
Known = dict[Node, Interval | None]


def number(value: float) -> Interval | None:
    """The interval of one number."""
    x = torch.tensor(float(value), dtype=torch.float64)
    return _checked(Interval(x, x), isinstance(value, int))


def evaluate(root: Node, given: Mapping[Node, Interval | None], tensors: Mapping[str, Tensor]) -> Known:
    """The interval of every node under `root` down to those that are `given`: parameters, sizes, positions, sides."""
    known: Known = dict(given)
    for node in _below(root, given):
        interval = _interval(cast(Expr, node), known, tensors)
        if node.type is Type.BOOL:
            known[node] = interval or UNKNOWN_BOOL
        else:
            known[node] = interval and _checked(interval, node.type is Type.INT)
    return known


def _below(root: Node, given: Mapping[Node, Interval | None]) -> list[Node]:
    """The nodes that are not given, operands first, without what is below given ones only."""
    needed: set[Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node not in needed and node not in given:
            needed.add(node)
            stack.extend(node.children)
    return [node for node in post_order(root) if node in needed]


def _checked(interval: Interval, integer: bool) -> Interval | None:
    """None where an end is no finite number, or an integer that is not told from its neighbours."""
    bound = EXACT if integer else math.inf
    return interval if interval.low.amin() > -bound and interval.high.amax() < bound else None


def _interval(node: Expr, known: Known, tensors: Mapping[str, Tensor]) -> Interval | None:
    operands = [known[child] for child in node.children]
    match node:
        case Const(value):
            return number(value)
        case Load(tensor):
            return _look_up(tensors[tensor], operands)
        case Select():
            condition, one, other = operands
            if condition is None or one is None or other is None:
                return None
            hull = one.covers(other)
            sure, never = condition.low > 0, condition.high < 1
            pick = [torch.where(sure, a, torch.where(never, b, c)) for a, b, c in zip(one, other, hull, strict=True)]
            return Interval(*pick)
        case Compare(op):
            return _compare(op, *operands)
        case Unary(op):
            return _unary(op, operands[0])
        case Binary(BinaryOp.FLOORDIV | BinaryOp.MOD) if node.type is Type.FLOAT:
            return None  # which way they round is the library's
        case Binary(op):
            return _binary(op, *operands)
        case Cast():
            return operands[0]
        case _:
            return None


def _unary(op: UnaryOp, x: Interval | None) -> Interval | None:
    if x is None:
        return None
    match op:
        case UnaryOp.NEG:
            return Interval(-x.high, -x.low)
        case UnaryOp.NOT:
            return Interval(1 - x.high, 1 - x.low)
        case UnaryOp.ABS:
            return Interval(torch.maximum(x.low, -x.high).clamp(min=0), torch.maximum(-x.low, x.high))
        case UnaryOp.FLOOR | UnaryOp.CEIL | UnaryOp.SIGN | UnaryOp.RELU:
            function = getattr(torch, op.value)
            return Interval(function(x.low), function(x.high))
        case _:
            return None


def _binary(op: BinaryOp, x: Interval | None, y: Interval | None) -> Interval | None:
    if x is None or y is None:
        return None
    match op:
        case BinaryOp.ADD:
            return Interval(x.low + y.low, x.high + y.high)
        case BinaryOp.SUB:
            return Interval(x.low - y.high, x.high - y.low)
        case BinaryOp.MUL:
            return _hull([a * b for a in x for b in y])
        case BinaryOp.MIN | BinaryOp.AND:
            return Interval(torch.minimum(x.low, y.low), torch.minimum(x.high, y.high))
        case BinaryOp.MAX | BinaryOp.OR:
            return Interval(torch.maximum(x.low, y.low), torch.maximum(x.high, y.high))
        case BinaryOp.DIV if bool((y.low > 0).all()):
            return _hull([a / b for a in x for b in y])
        case BinaryOp.FLOORDIV if bool((y.low > 0).all()):
            return _hull([torch.div(a, b, rounding_mode="floor") for a in x for b in y])
        case BinaryOp.MOD if bool((y.low > 0).all()):
            first, last = (torch.div(end, y.low, rounding_mode="floor") for end in x)
            inside = (first == last) & (y.low == y.high)  # no multiple of the divisor between
            whole = torch.zeros_like(y.high), y.high
            return Interval(
                torch.where(inside, x.low - first * y.low, whole[0]),
                torch.where(inside, x.high - first * y.low, whole[1]),
            )
        case _:
            return None


def _compare(op: CompareOp, x: Interval | None, y: Interval | None) -> Interval | None:
    if x is None or y is None:
        return None
    match op:
        case CompareOp.LT:
            sure, possible = x.high < y.low, x.low < y.high
        case CompareOp.LE:
            sure, possible = x.high <= y.low, x.low <= y.high
        case CompareOp.GT | CompareOp.GE:
            return _compare(CompareOp.LT if op is CompareOp.GT else CompareOp.LE, y, x)
        case CompareOp.EQ:
            sure = (x.low == y.high) & (y.low == x.high)
            possible = (x.low <= y.high) & (y.low <= x.high)
        case CompareOp.NE:
            equal = _compare(CompareOp.EQ, x, y)
            return None if equal is None else Interval(1 - equal.high, 1 - equal.low)
    return Interval(sure.double(), possible.double())


def _look_up(tensor: Tensor, indices: list[Interval | None]) -> Interval | None:
    """One element where every index is one number, else whatever the tensor holds."""
    lowest, highest = tensor.amin().double(), tensor.amax().double()
    if any(index is None for index in indices):
        return Interval(lowest, highest)
    known = [index for index in indices if index is not None]
    one = functools.reduce(torch.logical_and, (index.low == index.high for index in known))
    places = (index.low.long().clamp(0, extent - 1) for index, extent in zip(known, tensor.shape, strict=True))
    value = tensor[tuple(places)].double()
    return Interval(torch.where(one, value, lowest), torch.where(one, value, highest))


def _hull(ends: list[Tensor]) -> Interval:
    return Interval(functools.reduce(torch.minimum, ends), functools.reduce(torch.maximum, ends))
