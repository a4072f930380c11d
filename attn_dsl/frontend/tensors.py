"""How messages show a tensor: its declaration, and the index that fits it."""

from __future__ import annotations

from collections.abc import Sequence

from attn_dsl.errors import Span
from attn_dsl.ir import nodes as ir
from attn_dsl.ir.nodes import BinaryOp, Node, UnaryOp
from attn_dsl.ir.variant import Tensor

_CANONICAL = {"B": "b", "H": "h", "HK": "hk", "Q": "q", "KV": "k"}
_OPERATORS = {BinaryOp.ADD: "+", BinaryOp.SUB: "-", BinaryOp.MUL: "*", BinaryOp.FLOORDIV: "//", BinaryOp.MOD: "%"}


def extent_text(node: Node, nested: bool = False) -> str:
    """An extent as one would write it."""
    match node:
        case ir.Const():
            return str(node.value)
        case ir.Size() | ir.Param():
            return node.name
        case ir.Binary(op, x, y) if op in _OPERATORS:
            text = f"{extent_text(x, True)} {_OPERATORS[op]} {extent_text(y, True)}"
            return f"({text})" if nested else text
        case ir.Binary(op, x, y):
            return f"{op.value}({extent_text(x)}, {extent_text(y)})"
        case ir.Unary(UnaryOp.NEG, x):
            return f"-{extent_text(x, True)}"
        case _:
            return "..."


def tensor_type(tensor: Tensor) -> str:
    return f"{tensor.dtype.value}[{', '.join(extent_text(extent) for extent in tensor.extents)}]"


def declaration(tensor: Tensor, at: Span) -> str:
    return f"`{tensor.name}` is declared {tensor_type(tensor)} on line {at.line}"


def expected_index(tensor: Tensor, given: Sequence[str]) -> str:
    """The index that was probably meant: what was given, with the missing axes by the names of their extents."""
    usual = [_CANONICAL.get(e.name, "i") if isinstance(e, ir.Size) else "i" for e in tensor.extents]
    missing = len(usual) - len(given)
    if missing < 0:
        shown = list(given[: len(usual)])
        return f"{tensor.name}[{', '.join(shown)}]"
    absent = [i for i, name in enumerate(usual) if name not in given and name != "i"]
    others = [i for i in range(len(usual)) if i not in absent]
    fill = set((absent + others)[:missing])
    rest = iter(given)
    shown = [usual[i] if i in fill else next(rest) for i in range(len(usual))]
    return f"{tensor.name}[{', '.join(shown)}]"
