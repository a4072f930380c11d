"""IR in the spelling of `triton.language`, for tiles in which `q` and `k` are vectors along different axes.

Emitted text refers to `tl` and to the functions of `portable/device.py`. Floats are float32, in masks as in schedules,
so that both find a tie on the same side; integers are int32, or int64 where positions, scalars or a captured tensor
are. A load is masked unless its index is known to lie in the tensor: what is under the mask of the variant may point
anywhere, and is never used.
"""

from __future__ import annotations

from collections.abc import Sequence

from attn_dsl.backend.portable.bounds import within
from attn_dsl.backend.printer import Dialect, Level, Operand, Text, call
from attn_dsl.ir.nodes import Binary, BinaryOp, Cast, Const, Index, Load, Node, Select, Size, Unary, UnaryOp
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import Tensor
from attn_dsl.passes.ranges import Interval, interval

_FUNCTIONS = {
    UnaryOp.ABS: "tl.abs",
    UnaryOp.SQRT: "tl.sqrt",
    UnaryOp.RSQRT: "tl.rsqrt",
    UnaryOp.EXP: "tl.exp",
    UnaryOp.EXP2: "tl.exp2",
    UnaryOp.LOG: "tl.log",
    UnaryOp.LOG2: "tl.log2",
    UnaryOp.SIN: "tl.sin",
    UnaryOp.COS: "tl.cos",
    UnaryOp.ERF: "tl.erf",
    UnaryOp.SIGMOID: "tl.sigmoid",
    UnaryOp.SIGN: "sign",
    UnaryOp.LOG1P: "log1p",
    UnaryOp.TAN: "tan",
    UnaryOp.TANH: "tanh",
    UnaryOp.SILU: "silu",
    UnaryOp.GELU: "gelu",
}
_TILE = frozenset({"q", "k", "score"})
_OWN_EXTENT = {"b": "B", "h": "H", "hk": "HK"}


class TritonDialect(Dialect):
    """`fast_tanh` takes the hardware's tanh; `tiles` is false for functions of scalars, which have no `inside`.

    `wide` makes integers int64, for a schedule whose bounds may lie beyond every number of 32 bits. `varying` are the
    indices and variables that are no scalars.
    """

    def __init__(
        self, *, fast_tanh: bool = False, tiles: bool = True, wide: bool = False, varying: frozenset[str] = _TILE
    ) -> None:
        self.fast_tanh = fast_tanh
        self.varying = varying
        self.tiles = tiles
        self.integer = "int64" if wide else "int32"
        self.intervals: dict[Node, Interval] = {}

    def unary(self, node: Unary, x: Operand) -> Text:
        match node.op:
            case UnaryOp.NEG:
                return Text(f"-{x.at(Level.SIGN)}", Level.SIGN)
            case UnaryOp.NOT:
                return Text(f"{x.at(Level.BIT_OR)} == 0", Level.COMPARE)
            case UnaryOp.FLOOR | UnaryOp.CEIL:
                return Text(f"tl.{node.op.value}({x.at()}).to(tl.{self.integer})")
            case UnaryOp.RELU:
                return Text(f"tl.maximum({x.at()}, 0.0)")
            case UnaryOp.TANH if self.fast_tanh:
                return call("tanh_approx", x)
            case _:
                return call(_FUNCTIONS[node.op], x)

    def binary(self, node: Binary, x: Operand, y: Operand) -> Text:
        if node.op not in (BinaryOp.FLOORDIV, BinaryOp.MOD):
            return super().binary(node, x, y)
        if node.type is Type.FLOAT:
            return call("float_floor_divide" if node.op is BinaryOp.FLOORDIV else "float_modulo", x, y)
        if self._nonnegative(node.x):  # truncation is flooring
            return super().binary(node, x, y)
        return call("floor_divide" if node.op is BinaryOp.FLOORDIV else "floor_modulo", x, y)

    def _nonnegative(self, node: Node) -> bool:
        low, _ = interval(node, self.intervals)
        return low is not None and low >= 0

    def minimum_maximum(self, node: Binary, x: Operand, y: Operand) -> Text:
        return call(f"tl.{node.op.value}imum", x, y)

    def power(self, node: Binary, x: Operand, y: Operand) -> Text:
        if isinstance(node.y, Const) and float(node.y.value).is_integer() and 0 <= node.y.value <= 64:
            return Text(f"whole_power({x.at()}, {int(node.y.value)})")
        return call("power", x, y)

    def logical(self, node: Binary, x: Operand, y: Operand) -> Text:
        """A choice where one operand is a scalar: the interpreter takes a scalar comparison for a number."""
        for scalar, tile in ((x, y), (y, x)):
            if not scalar.node.depends & self.varying and tile.node.depends & self.varying:
                branches = f"{tile.at()}, False" if node.op is BinaryOp.AND else f"True, {tile.at()}"
                return Text(f"tl.where({scalar.at()}, {branches})")
        return super().logical(node, x, y)

    def select(self, node: Select, condition: Operand, x: Operand, y: Operand) -> Text:
        if node.type is Type.BOOL and node.depends & self.varying:
            branches = ", ".join(self._truth(branch) for branch in (x, y))
            return Text(f"tl.where({condition.at()}, {branches})")
        return call("tl.where", condition, x, y)

    def _truth(self, x: Operand) -> str:
        """A branch of a choice by tiles: the interpreter takes a scalar comparison for a number, but not a choice."""
        scalar = not x.node.depends & self.varying and not isinstance(x.node, Const)
        return f"tl.where({x.at()}, True, False)" if scalar else x.at()

    def cast(self, node: Cast, x: Operand) -> Text:
        return Text(f"{x.at(Level.ATOM)}.to(tl.{'float32' if node.type is Type.FLOAT else self.integer})")

    def loop(self, variable: str, low: Operand, high: Operand) -> str:
        """Unrolled, since what it accumulates grows from a literal to a tile."""
        return f"for {variable} in tl.static_range({low.at()}, {high.at()}):"

    def load(self, node: Load, tensor: str, declared: Tensor, indices: Sequence[Operand]) -> Text:
        place = "".join(f"{index.at()}, " for index in indices)
        arguments = f"{tensor}, ({place.rstrip() if len(indices) == 1 else place.rstrip(', ')})"
        text = f"element({arguments}, {varying(node)}, {self.checked(node, declared)})"
        match node.type:
            case Type.FLOAT:
                return Text(f"{text}.to(tl.float32)")
            case Type.INT if declared.dtype.value != "int64":
                return Text(f"{text}.to(tl.{self.integer})")
            case _:
                return Text(text)

    def checked(self, node: Load, declared: Tensor) -> str:
        """The axes whose index must be compared with the extent: in a ragged tile, and in one that is inside."""
        ragged = always = 0
        for axis, (index, extent) in enumerate(zip(node.indices, declared.extents, strict=True)):
            if _own(index, extent) or within(index, extent):
                continue
            ragged |= 1 << axis
            if not (isinstance(index, Index) and index.name == "k" and extent is Size("KV")):
                always |= 1 << axis
        return str(ragged) if ragged == always or not self.tiles else f"{always} if inside else {ragged}"


def varying(node: Load) -> int:
    """The axes whose index is not the same for a whole tile, one bit each."""
    return sum(1 << axis for axis, index in enumerate(node.indices) if index.depends & _TILE)


def _own(index: Node, extent: Node) -> bool:
    return isinstance(index, Index) and isinstance(extent, Size) and _OWN_EXTENT.get(index.name) == extent.name
