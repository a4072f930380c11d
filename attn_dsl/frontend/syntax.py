"""The syntax tree: what the text says, before names and types.

Positions are character offsets into the text of the file; `File.span` makes them a `Span`.
"""

from __future__ import annotations

from dataclasses import dataclass

from attn_dsl.errors import Source, Span


@dataclass(frozen=True, slots=True)
class Tree:
    """Base of all trees: the half-open character range `[start, end)`."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Literal(Tree):
    value: bool | int | float


@dataclass(frozen=True, slots=True)
class Name(Tree):
    text: str


@dataclass(frozen=True, slots=True)
class Unary(Tree):
    """`-x`, `+x`, `not x`."""

    operator: str
    operand: Expression


@dataclass(frozen=True, slots=True)
class Chain(Tree):
    """Operators of one precedence, applied from the left: `a + b - c`; `**` has two operands."""

    operands: tuple[Expression, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Comparison(Tree):
    """`a < b <= c`, which means `a < b and b <= c`."""

    operands: tuple[Expression, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Conditional(Tree):
    """`value if condition else otherwise`."""

    value: Expression
    condition: Expression
    otherwise: Expression


@dataclass(frozen=True, slots=True)
class Argument(Tree):
    name: Name | None
    value: Expression


@dataclass(frozen=True, slots=True)
class Call(Tree):
    callee: Expression
    arguments: tuple[Argument, ...]


@dataclass(frozen=True, slots=True)
class Subscript(Tree):
    base: Expression
    indices: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Member(Tree):
    base: Expression
    name: Name


@dataclass(frozen=True, slots=True)
class Reduction(Tree):
    """`sum(variable in low..high: body)`."""

    callee: Expression
    variable: Name
    low: Expression
    high: Expression
    body: Expression


Expression = Literal | Name | Unary | Chain | Comparison | Conditional | Call | Subscript | Member | Reduction


@dataclass(frozen=True, slots=True)
class ParameterDeclaration(Tree):
    name: Name
    type: Name
    default: Expression | None
    const: bool


@dataclass(frozen=True, slots=True)
class Header(Tree):
    name: Name
    parameters: tuple[ParameterDeclaration, ...]


@dataclass(frozen=True, slots=True)
class Import(Tree):
    names: tuple[Name, ...]


@dataclass(frozen=True, slots=True)
class NondecreasingPromise(Tree):
    """`nondecreasing over AXIS`; the axis is named by its extent or by its number."""

    axis: Name | Literal


@dataclass(frozen=True, slots=True)
class RangePromise(Tree):
    """`in [low, high)`."""

    low: Expression
    high: Expression


@dataclass(frozen=True, slots=True)
class TensorDeclaration(Tree):
    name: Name
    dtype: Name
    extents: tuple[Expression, ...]
    promises: tuple[NondecreasingPromise | RangePromise, ...]


@dataclass(frozen=True, slots=True)
class Let(Tree):
    name: Name
    value: Expression


@dataclass(frozen=True, slots=True)
class Def(Tree):
    name: Name
    parameters: tuple[Name, ...]
    body: Expression


@dataclass(frozen=True, slots=True)
class Assignment(Tree):
    """`score = ...`, `mask = ...`, `sink = ...`; any other target is an error of the checker."""

    target: Name
    value: Expression


@dataclass(frozen=True, slots=True)
class Broken(Tree):
    """A statement that did not parse; the names that it seems to declare are known, so that their uses stay silent."""

    keyword: str
    names: tuple[str, ...]


Statement = Header | Import | TensorDeclaration | Let | Def | Assignment | Broken


@dataclass(frozen=True, slots=True)
class File:
    """A parsed file. `doc` is the comment block at its top, without the `#`."""

    source: Source
    statements: tuple[Statement, ...]
    doc: str

    def span(self, tree: Tree) -> Span:
        return Span(self.source, tree.start, tree.end)
