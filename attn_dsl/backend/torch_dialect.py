"""IR in the spelling of torch, for tiles on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from attn_dsl.backend.printer import Dialect, Level, Operand, Text, call
from attn_dsl.backend.python_dialect import PythonDialect, may_vanish, or_one, within
from attn_dsl.ir.nodes import Binary, BinaryOp, Cast, Expr, Index, Load, Node, Score, Select, Unary, UnaryOp
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import Tensor

NOT_IEEE = (BinaryOp.DIV, BinaryOp.FLOORDIV, BinaryOp.MOD, BinaryOp.POW)
"""Operations of floats for which Python raises where IEEE 754 has an answer."""


class TorchDialect(Dialect):
    """Torch operations over tiles of axes `[b, h, q, k]`, broadcast against each other; `number` marks Python numbers.

    The emitted text refers to `torch`, to `FLOAT` (the dtype of the call's arithmetic) and to `clip`, `nonzero`, `tanh`
    and `tanh_` of `cpu/elementary.py`. `real` is the dtype in which floats are computed. A load moves its indices into
    range: it must not fail under the mask, where its value is never used. Values that depend on sizes and parameters
    alone are Python numbers for as long as Python computes them as IEEE 754 does. An operation overwrites an operand
    that no one else needs, of its own shape:
    `tanh_(s.div_(p_cap)).mul_(p_cap)`.
    """

    def __init__(self, real: str = "FLOAT") -> None:
        self.real = real

    def number(self, node: Node) -> bool:
        """Whether the value is a Python number rather than a tensor."""
        match cast(Expr, node):
            case Index() | Score() | Load():
                return False
            case Binary(op) if node.type is Type.FLOAT and op in NOT_IEEE:
                return False
            case Unary(op) if op not in (UnaryOp.NEG, UnaryOp.NOT, UnaryOp.ABS, UnaryOp.SIGN):
                return False
            case _:
                return all(self.number(child) for child in node.children)

    def axes(self, node: Node) -> frozenset[str]:
        return frozenset("bhqk") if "score" in node.depends else node.depends & frozenset("bhqk")

    def fresh(self, node: Node) -> bool:
        return isinstance(node, Unary | Binary | Cast) and not self.number(node)

    def _overwrites(self, node: Node, x: Operand, *others: Operand) -> bool:
        mine = self.axes(x.node)
        same = x.node.type is node.type and not self.number(x.node)
        return x.dead and same and all(self.axes(other.node) <= mine for other in others)

    def _tensor(self, x: Operand) -> str:
        """The operand as a tensor, whatever it is, as the object of a method call."""
        if not self.number(x.node):
            return x.at(Level.ATOM)
        kind = {Type.FLOAT: self.real, Type.INT: "torch.int64", Type.BOOL: "torch.bool"}[x.node.type]
        return f"torch.tensor({x.at()}, dtype={kind})"

    def unary(self, node: Unary, x: Operand) -> Text:
        if self.number(node):
            return PythonDialect().unary(node, x)
        tensor = self._tensor(x)
        suffix = "_" if self._overwrites(node, x) else ""
        match node.op:
            case UnaryOp.NOT:
                return Text(f"~{x.at(Level.SIGN)}", Level.SIGN)
            case UnaryOp.NEG if not suffix:
                return Text(f"-{x.at(Level.SIGN)}", Level.SIGN)
            case UnaryOp.FLOOR | UnaryOp.CEIL:
                return Text(f"{tensor}.{node.op.value}().to(torch.int64)")
            case UnaryOp.TANH:
                return Text(f"tanh{suffix}({tensor})")
            case UnaryOp.SILU | UnaryOp.GELU:
                return Text(f"torch.nn.functional.{node.op.value}({tensor})")
            case _:
                return Text(f"{tensor}.{node.op.value}{suffix}()")

    def binary(self, node: Binary, x: Operand, y: Operand) -> Text:
        if self.number(node):
            return PythonDialect().binary(node, x, y)
        if may_vanish(node):
            y = Operand(y.node, or_one(y) if self.number(y.node) else call("nonzero", y))
        if self.number(x.node) and self.number(y.node):  # a quotient or power of numbers: IEEE 754 as a tensor
            return super().binary(node, Operand(x.node, Text(self._tensor(x))), y)
        method = {BinaryOp.ADD: "add_", BinaryOp.SUB: "sub_", BinaryOp.MUL: "mul_", BinaryOp.DIV: "div_"}.get(node.op)
        if method and self._overwrites(node, x, y):
            return Text(f"{x.at(Level.ATOM)}.{method}({y.at()})")
        if node.op in (BinaryOp.ADD, BinaryOp.MUL) and self._overwrites(node, y, x):
            return Text(f"{y.at(Level.ATOM)}.{method}({x.at()})")
        return super().binary(node, x, y)

    def minimum_maximum(self, node: Binary, x: Operand, y: Operand) -> Text:
        bound = "max" if node.op is BinaryOp.MIN else "min"
        for one, other in ((x, y), (y, x)):
            if self.number(other.node):
                suffix = "_" if self._overwrites(node, one) else ""
                return Text(f"{one.at(Level.ATOM)}.clamp{suffix}({bound}={other.at()})")
        return call(f"torch.{node.op.value}imum", x, y)

    def select(self, node: Select, condition: Operand, x: Operand, y: Operand) -> Text:
        if self.number(node):
            return PythonDialect().select(node, condition, x, y)
        if self.number(condition.node):  # in the shape of both branches, whichever is taken
            condition = Operand(condition.node, Text(self._tensor(condition)))
        if node.type is Type.FLOAT and self.number(x.node) and self.number(y.node):  # else in torch's default dtype
            return Text(f"torch.where({condition.at()}, {self._tensor(x)}, {y.at()})")
        return call("torch.where", condition, x, y)

    def cast(self, node: Cast, x: Operand) -> Text:
        if self.number(node):
            return PythonDialect().cast(node, x)
        return Text(f"{x.at(Level.ATOM)}.to({self.real if node.type is Type.FLOAT else 'torch.int64'})")

    def load(self, node: Load, tensor: str, declared: Tensor, indices: Sequence[Operand]) -> Text:
        inside = (
            index.at() if within(index.node, extent) else f"clip({index.at()}, {tensor}.shape[{axis}])"
            for axis, (index, extent) in enumerate(zip(indices, declared.extents, strict=True))
        )
        kind = {Type.FLOAT: f".to({self.real})", Type.INT: ".to(torch.int64)", Type.BOOL: ""}[node.type]
        return Text(f"{tensor}[{', '.join(inside)}]{kind}")
