"""Read the printed form of the IR back: the inverse of `printer`.

The result has the same nodes (equality is identity) but no source and no locations, which the text only mentions in
comments. Refuses, with an `IRError` that names the line, what is not the printed form or not well typed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedInput

from attn_dsl.errors import AttnError
from attn_dsl.ir import nodes as ir
from attn_dsl.ir.nodes import BinaryOp, CompareOp, Node, ReduceOp, UnaryOp
from attn_dsl.ir.types import DType, Type
from attn_dsl.ir.variant import InRange, Nondecreasing, Parameter, Promise, Tensor, Variant


class IRError(AttnError, ValueError):
    """A text that is not the printed form of well-typed IR."""


def parse_ir(text: str) -> Variant:
    """The variant that `print_ir` printed."""
    reader = _Reader(text)
    if reader.name is None:
        raise IRError("line 1: expected `variant NAME`")
    roots = reader.roots
    if not {"score", "mask"} <= roots.keys() <= {"score", "mask", "sink"}:
        raise IRError(f"expected `score`, `mask` and perhaps `sink`, found {', '.join(roots) or 'nothing'}")
    return Variant(
        reader.name,
        tuple(reader.parameters),
        tuple(reader.tensors),
        roots["score"],
        roots["mask"],
        roots.get("sink"),
        "\n".join(reader.doc),
    )


def parse_nodes(text: str) -> dict[str, Node]:
    """The named expressions that `print_nodes` printed."""
    return _Reader(text).roots


@functools.cache
def _grammar() -> Lark:
    return Lark(Path(__file__).with_name("ir.lark").read_text(), parser="lalr", propagate_positions=True)


class _Reader:
    """One pass over the lines of a text; each kind of line has a method."""

    def __init__(self, text: str) -> None:
        self.name: str | None = None
        self.doc: list[str] = []
        self.parameters: list[Parameter] = []
        self.tensors: list[Tensor] = []
        self.roots: dict[str, Node] = {}
        self.registers: dict[str, Node] = {}
        try:
            lines = _grammar().parse(text).children
        except UnexpectedInput as error:
            raise IRError(f"line {error.line}: not the printed form of IR\n{error.get_context(text)}") from None
        for line in lines:
            try:
                getattr(self, f"_{line.data}")(*line.children)
            except KeyError as error:
                raise IRError(f"line {line.meta.line}: {error.args[0]} is not defined") from error
            except (AssertionError, ValueError, TypeError) as error:
                raise IRError(f"line {line.meta.line}: ill-formed {line.data}: {error}") from error

    def _header(self, name: Token) -> None:
        self.name = str(name)

    def _doc(self, line: Token) -> None:
        self.doc.append(json.loads(line))

    def _parameter(self, *parts: Any) -> None:
        const = parts[0].type == "CONST"
        name, kind, *default = parts[1:] if const else parts
        value = _literal(default[0], Type(kind)) if default else None
        self.parameters.append(Parameter(str(name), Type(kind), value, const))

    def _tensor(self, name: Token, dtype: Token, *rest: Any) -> None:
        extents = tuple(self.registers[r] for r in rest if isinstance(r, Token))
        promises = tuple(self._promise(p) for p in rest if isinstance(p, Tree))
        self.tensors.append(Tensor(str(name), DType(dtype), extents, promises))

    def _promise(self, tree: Any) -> Promise:
        if tree.data == "nondecreasing":
            return Nondecreasing(int(tree.children[0]))
        low, high = tree.children
        return InRange(self.registers[low], self.registers[high])

    def _root(self, name: Token, register: Token) -> None:
        self.roots[str(name)] = self.registers[register]

    def _node(self, register: Token, operation: Any, kind: Token) -> None:
        node = self._operation(operation, Type(kind))
        assert node.type is Type(kind), f"the type is {node.type.value}"
        assert register not in self.registers, f"{register} is defined twice"
        self.registers[str(register)] = node

    def _operation(self, tree: Any, kind: Type) -> Node:
        parts = [self.registers[str(p)] if _is_register(p) else p for p in tree.children if p is not None]
        builders: dict[str, Callable[..., Node]] = {
            "constant": lambda value: ir.Const(_literal(value, kind)),
            "param": lambda name: ir.Param(str(name), kind),
            "index": lambda name: ir.Index(str(name)),
            "size": lambda name: ir.Size(str(name)),
            "var": lambda name: ir.Var(str(name)),
            "score": ir.Score,
            "load": lambda tensor, *indices: ir.Load(str(tensor), indices, kind),
            "select": ir.Select,
            "cast": lambda x: ir.Cast(x, kind),
            "reduce": lambda op, var, *rest: ir.Reduce(ReduceOp(op), ir.Var(str(var)), *rest),
            "unary": lambda op, x: ir.Unary(UnaryOp(op), x),
            "binary": lambda op, x, y: (
                ir.Compare(CompareOp(op), x, y) if op in _COMPARISONS else ir.Binary(BinaryOp(op), x, y)
            ),
        }
        return builders[tree.data](*parts)


_COMPARISONS = frozenset(op.value for op in CompareOp)


def _is_register(part: Any) -> bool:
    return isinstance(part, Token) and part.type == "REGISTER"


def _literal(tree: Any, kind: Type) -> bool | int | float:
    text = "".join(map(str, tree.children))
    match kind:
        case Type.BOOL:
            return {"true": True, "false": False}[text]
        case Type.INT:
            return int(text)
        case Type.FLOAT:
            return float(text)
