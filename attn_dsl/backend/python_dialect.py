"""IR in the spelling of Python numbers: for checks of a call, for the schedule on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

from attn_dsl.backend.printer import GROUP, Dialect, Level, Operand, Text, call, infix
from attn_dsl.ir.nodes import (
    Binary,
    BinaryOp,
    Cast,
    Const,
    Index,
    Load,
    Node,
    Param,
    Select,
    Size,
    Unary,
    UnaryOp,
    Var,
)
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import Tensor


class PythonDialect(Dialect):
    """Python numbers. Captured tensors come as nested lists; needs `import math`."""

    library = "math"
    """The module of the functions."""

    def unary(self, node: Unary, x: Operand) -> Text:
        match node.op:
            case UnaryOp.NEG:
                return Text(f"-{x.at(Level.SIGN)}", Level.SIGN)
            case UnaryOp.NOT:
                return Text(f"not {x.at(Level.NOT)}", Level.NOT)
            case UnaryOp.ABS:
                return call("abs", x)
            case UnaryOp.SIGN:
                operand = x.at(Level.BIT_OR)
                return Text(f"({operand} > 0) * 1 - ({operand} < 0) * 1", Level.SUM)  # a bool or a bool tensor
            case UnaryOp.FLOOR | UnaryOp.CEIL:
                return call(f"{self.library}.{node.op.value}", x)
            case UnaryOp.RSQRT:
                return Text(f"1.0 / math.sqrt({x.at()})", Level.PRODUCT)
            case UnaryOp.EXP2:
                return Text(f"{self.library}.pow(2.0, {x.at()})")
            case UnaryOp.SIGMOID:
                return Text(f"0.5 + 0.5 * math.tanh(0.5 * {x.at(Level.SIGN)})", Level.SUM)
            case UnaryOp.SILU:
                return Text(f"{x.at(Level.SIGN)} * (0.5 + 0.5 * math.tanh(0.5 * {x.at(Level.SIGN)}))", Level.PRODUCT)
            case UnaryOp.RELU:
                return Text(f"max({x.at()}, 0.0)")
            case UnaryOp.GELU:
                erf = f"math.erf({x.at(Level.SIGN)} * {math.sqrt(0.5)!r})"
                return Text(f"0.5 * {x.at(Level.SIGN)} * (1.0 + {erf})", Level.PRODUCT)
            case _:
                return call(f"{self.library}.{node.op.value}", x)

    def binary(self, node: Binary, x: Operand, y: Operand) -> Text:
        if may_vanish(node):  # in a branch that is not taken, say, which straight-line code computes all the same
            return super().binary(node, x, Operand(y.node, or_one(y)))
        return super().binary(node, x, y)

    def minimum_maximum(self, node: Binary, x: Operand, y: Operand) -> Text:
        return call(node.op.value, x, y)

    def logical(self, node: Binary, x: Operand, y: Operand) -> Text:
        return infix(node.op.value, Level.AND if node.op is BinaryOp.AND else Level.OR, x, y)

    def select(self, node: Select, condition: Operand, x: Operand, y: Operand) -> Text:
        above = Level.OR
        return Text(f"{x.at(above)} if {condition.at(above)} else {y.at(Level.CONDITIONAL)}", Level.CONDITIONAL)

    def cast(self, node: Cast, x: Operand) -> Text:
        return call("float" if node.type is Type.FLOAT else "int", x)

    def load(self, node: Load, tensor: str, declared: Tensor, indices: Sequence[Operand]) -> Text:
        return Text(tensor + "".join(f"[{index.at()}]" for index in indices))


TOTAL = {
    BinaryOp.DIV: "divide",
    BinaryOp.FLOORDIV: "divide_down",
    BinaryOp.MOD: "remainder",
    BinaryOp.POW: "pow",
}
"""What `cpu/total.py` calls the operations of floats that Python has no answer to everywhere."""


class TotalDialect(PythonDialect):
    """Python numbers for functions that must not fail, whatever their arguments are: the schedule's.

    Needs `from attn_dsl.backend.cpu import total` besides `import math`.
    """

    library = "total"

    def unary(self, node: Unary, x: Operand) -> Text:
        if node.op is UnaryOp.RSQRT:
            return Text(f"total.divide(1.0, total.sqrt({x.at()}))")
        return super().unary(node, x)

    def binary(self, node: Binary, x: Operand, y: Operand) -> Text:
        function = TOTAL.get(node.op) if node.type is Type.FLOAT else None
        return super().binary(node, x, y) if function is None else call(f"total.{function}", x, y)

    def load(self, node: Load, tensor: str, declared: Tensor, indices: Sequence[Operand]) -> Text:
        if all(within(index.node, extent) for index, extent in zip(indices, declared.extents, strict=True)):
            return super().load(node, tensor, declared, indices)
        return Text(f"total.element({', '.join([tensor, *(index.at() for index in indices)])})")


def may_vanish(node: Binary) -> bool:
    """Whether an integer division has a divisor that is not known to be positive."""
    divides = node.op in (BinaryOp.FLOORDIV, BinaryOp.MOD) and node.type is Type.INT
    return divides and node.y is not GROUP and not isinstance(node.y, Const | Param | Size | Var)


def or_one(divisor: Operand) -> Text:
    """A number that stands for such a divisor where it is 0."""
    return Text(f"{divisor.at(Level.AND)} or 1", Level.OR)


def within(index: Node, extent: Node) -> bool:
    """Whether the index is in range whatever the mask says."""
    if isinstance(index, Const) and isinstance(extent, Const):
        return 0 <= index.value < extent.value
    own = {"b": "B", "h": "H", "hk": "HK", "k": "KV"}
    return isinstance(index, Index) and isinstance(extent, Size) and own.get(index.name) == extent.name
