"""Constant folding: what an operation on literals gives, in exact integers and in double precision.

Refuses (returns None) where Python would raise or where the answer belongs to the device: division by zero, overflow,
logarithms of negative numbers and the like stay in the program.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from typing_extensions import assert_never

from attn_dsl.ir import nodes as ir
from attn_dsl.ir.nodes import BinaryOp, CompareOp, Const, Node, UnaryOp
from attn_dsl.ir.types import Type

Scalar = bool | int | float
_LARGEST_POWER = 4096  # bits; a larger integer power is left alone


def fold(node: Node) -> Const | None:
    """The literal that a node over literals is equal to, or None."""
    if not node.children or not all(isinstance(child, Const) for child in node.children):
        return None
    try:
        value = _value(node, *(cast(Const, child).value for child in node.children))
    except (ArithmeticError, ValueError):
        return None
    return None if value is None else constant(value, node.type)


def constant(value: Scalar, kind: Type) -> Const:
    """A literal of the given type."""
    match kind:
        case Type.BOOL:
            return Const(bool(value))
        case Type.INT:
            return Const(int(value))
        case Type.FLOAT:
            return Const(float(value))


def folded(node: Node) -> Node:
    """The literal that a node is equal to, or the node."""
    return fold(node) or node


def fold_all(root: Node) -> Node:
    """Fold everywhere under `root`."""
    return ir.rewrite(root, folded)


def numbers(roots: Sequence[Node], known: Mapping[Node, Scalar]) -> list[Scalar | None]:
    """What each expression is with numbers for some nodes, or None where that is not known."""
    values: dict[Node, Scalar] = dict(known)
    for node in ir.post_order(*roots):
        if isinstance(node, Const):
            values[node] = node.value
        elif node not in values and node.children and all(child in values for child in node.children):
            try:
                value = _value(node, *(values[child] for child in node.children))
            except (ArithmeticError, ValueError):
                continue
            if value is not None:
                values[node] = value
    return [values.get(root) for root in roots]


def _value(node: Node, *operands: Any) -> Scalar | None:
    match cast(ir.Expr, node):
        case ir.Unary(op):
            return cast(Scalar, _UNARY[op](*operands))
        case ir.Binary(BinaryOp.POW, _, _) if node.type is Type.INT:
            base, exponent = operands
            fits = exponent >= 0 and abs(base).bit_length() * exponent <= _LARGEST_POWER
            return cast(int, base**exponent) if fits else None
        case ir.Binary(BinaryOp.MOD | BinaryOp.FLOORDIV) if operands[0] == 0 and node.type is Type.FLOAT:
            return None  # the sign of the zero differs between Python and torch
        case ir.Binary(op):
            return cast(Scalar, _BINARY[op](*operands))
        case ir.Compare(op):
            return _COMPARE[op](*operands)
        case ir.Select():
            condition, x, y = operands
            return cast(Scalar, x if condition else y)
        case ir.Cast():
            return cast(Scalar, operands[0])
        case ir.Load() | ir.Reduce():
            return None
        case ir.Const() | ir.Param() | ir.Index() | ir.Size() | ir.Var() | ir.Score():
            return None
        case unreachable:
            assert_never(unreachable)


def _minimum(x: Any, y: Any) -> Any:
    return math.nan if x != x or y != y else min(x, y)


def _maximum(x: Any, y: Any) -> Any:
    return math.nan if x != x or y != y else max(x, y)


def _sign(x: Any) -> Any:
    return type(x)((x > 0) - (x < 0))  # 0 for nan, as in torch


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


_UNARY: dict[UnaryOp, Callable[[Any], Any]] = {
    UnaryOp.NEG: operator.neg,
    UnaryOp.NOT: operator.not_,
    UnaryOp.ABS: abs,
    UnaryOp.SIGN: _sign,
    UnaryOp.FLOOR: math.floor,
    UnaryOp.CEIL: math.ceil,
    UnaryOp.SQRT: math.sqrt,
    UnaryOp.RSQRT: lambda x: 1 / math.sqrt(x),
    UnaryOp.EXP: math.exp,
    UnaryOp.EXP2: lambda x: math.pow(2, x),
    UnaryOp.LOG: math.log,
    UnaryOp.LOG2: math.log2,
    UnaryOp.LOG1P: math.log1p,
    UnaryOp.SIN: math.sin,
    UnaryOp.COS: math.cos,
    UnaryOp.TAN: math.tan,
    UnaryOp.TANH: math.tanh,
    UnaryOp.ERF: math.erf,
    UnaryOp.SIGMOID: _sigmoid,
    UnaryOp.SILU: lambda x: x * _sigmoid(x),
    UnaryOp.RELU: lambda x: _maximum(x, 0.0),
    UnaryOp.GELU: lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)),
}
_BINARY: dict[BinaryOp, Callable[[Any, Any], Any]] = {
    BinaryOp.ADD: operator.add,
    BinaryOp.SUB: operator.sub,
    BinaryOp.MUL: operator.mul,
    BinaryOp.DIV: operator.truediv,
    BinaryOp.FLOORDIV: operator.floordiv,
    BinaryOp.MOD: operator.mod,
    BinaryOp.POW: math.pow,
    BinaryOp.MIN: _minimum,
    BinaryOp.MAX: _maximum,
    BinaryOp.AND: operator.and_,
    BinaryOp.OR: operator.or_,
}
_COMPARE: dict[CompareOp, Callable[[Any, Any], bool]] = {
    CompareOp.EQ: operator.eq,
    CompareOp.NE: operator.ne,
    CompareOp.LT: operator.lt,
    CompareOp.LE: operator.le,
    CompareOp.GT: operator.gt,
    CompareOp.GE: operator.ge,
}
