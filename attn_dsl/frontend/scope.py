"""What a name stands for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from attn_dsl.errors import Span
from attn_dsl.frontend import hints, syntax
from attn_dsl.frontend.functions import FUNCTION_NAMES
from attn_dsl.frontend.syntax_errors import KEYWORDS
from attn_dsl.ir import nodes as ir
from attn_dsl.ir.nodes import Node
from attn_dsl.ir.variant import Parameter, Tensor

BUILT_IN: dict[str, Node] = {
    **{name: ir.Index(name) for name in ir.INDEX_NAMES},
    **{name: ir.Size(name) for name in ir.SIZE_NAMES},
    "score": ir.SCORE,
}
RESULTS = ("score", "mask", "sink")
RESERVED = KEYWORDS | FUNCTION_NAMES | frozenset(BUILT_IN) | frozenset(RESULTS) | {"bool"}
"""Names that no declaration may take."""


@dataclass(frozen=True)
class Value:
    """A parameter, a `let`, an argument, the variable of a reduction; `node` is None where its definition is wrong."""

    node: Node | None
    kind: str
    span: Span


@dataclass(frozen=True)
class TensorName:
    """A captured tensor; None where its declaration is wrong."""

    tensor: Tensor | None
    span: Span
    kind: str = "tensor"


@dataclass(frozen=True)
class Function:
    """A `def`; None where its body is wrong whatever its arguments are."""

    tree: syntax.Def | None
    span: Span
    kind: str = "function"


@dataclass(frozen=True)
class Module:
    """An imported variant that checks by itself, and the file that it stands in."""

    path: Path
    file: syntax.File
    parameters: tuple[Parameter, ...]
    has_sink: bool


@dataclass(frozen=True)
class ModuleName:
    """An imported variant; None where it is missing or wrong."""

    module: Module | None
    span: Span
    kind: str = "import"


Symbol = Value | TensorName | Function | ModuleName


@dataclass
class Scope:
    """Names of a file, or those of a function or a reduction inside it."""

    outer: Scope | None = None
    names: dict[str, Symbol] = field(default_factory=dict)

    def find(self, name: str) -> Symbol | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.outer
        return None

    def visible(self) -> Iterator[str]:
        scope: Scope | None = self
        while scope is not None:
            yield from scope.names
            scope = scope.outer


def unknown_name_help(name: str, known: list[str]) -> str:
    """What was meant by a name that nothing declares."""
    if name in hints.NAMES and (hints.NAMES[name] in RESERVED):
        return f"it is spelled `{hints.NAMES[name]}` here"
    if name in hints.ADVICE:
        return hints.ADVICE[name]
    return hints.did_you_mean(name, known)
