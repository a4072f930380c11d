"""The built-in functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from attn_dsl.errors import Span
from attn_dsl.frontend.builder import Builder
from attn_dsl.ir import nodes as ir
from attn_dsl.ir.nodes import BinaryOp, Node, ReduceOp, UnaryOp
from attn_dsl.ir.types import Type

Apply = Callable[[Builder, str, list[Node], list[Span], Span], Node | None]


@dataclass(frozen=True)
class Function:
    """A built-in: its parameter names as messages show them, and how it makes nodes of its arguments.

    The last parameter of a `variadic` function may be repeated.
    """

    parameters: tuple[str, ...]
    apply: Apply
    variadic: bool = False

    def accepts(self, count: int) -> bool:
        return count >= len(self.parameters) if self.variadic else count == len(self.parameters)


def _numbers(build: Builder, name: str, arguments: list[Node], spans: list[Span]) -> bool:
    what = f"an argument of `{name}`"
    kept = [build.number(x, span, what) for x, span in zip(arguments, spans, strict=True)]
    return None not in kept


def _float_function(
    op: UnaryOp, build: Builder, name: str, arguments: list[Node], spans: list[Span], span: Span
) -> Node | None:
    x = build.floating(arguments[0], spans[0], f"the argument of `{name}`")
    return None if x is None else build.unary(op, x, span)


def _keeps_type(
    op: UnaryOp, build: Builder, name: str, arguments: list[Node], spans: list[Span], span: Span
) -> Node | None:
    return build.unary(op, arguments[0], span) if _numbers(build, name, arguments, spans) else None


def _rounds(
    op: UnaryOp, build: Builder, name: str, arguments: list[Node], spans: list[Span], span: Span
) -> Node | None:
    """floor and ceil: an int is its own floor."""
    if not _numbers(build, name, arguments, spans):
        return None
    return arguments[0] if arguments[0].type is Type.INT else build.unary(op, arguments[0], span)


def _extremum(
    op: BinaryOp, build: Builder, name: str, arguments: list[Node], spans: list[Span], span: Span
) -> Node | None:
    return build.fold(op, arguments, spans, span) if _numbers(build, name, arguments, spans) else None


def _clamp(build: Builder, name: str, arguments: list[Node], spans: list[Span], span: Span) -> Node | None:
    """clamp(x, low, high) = min(max(x, low), high)."""
    if not _numbers(build, name, arguments, spans):
        return None
    x, low, high = build.common(arguments, spans)
    return build.fold(BinaryOp.MIN, [build.fold(BinaryOp.MAX, [x, low], spans[:2], span), high], [span, spans[2]], span)


def _power(build: Builder, name: str, arguments: list[Node], spans: list[Span], span: Span) -> Node | None:
    if not _numbers(build, name, arguments, spans):
        return None
    return build.binary(BinaryOp.POW, arguments[0], arguments[1], (spans[0], spans[1]), span)


def _to_float(build: Builder, name: str, arguments: list[Node], spans: list[Span], span: Span) -> Node | None:
    x = arguments[0]
    if x.type is Type.BOOL:
        x = build.at(ir.Cast(x, Type.INT), span)
    return build.to_float(x, span)


def _to_int(build: Builder, name: str, arguments: list[Node], spans: list[Span], span: Span) -> Node | None:
    x = arguments[0]
    if x.type is Type.BOOL:
        return build.at(ir.Cast(x, Type.INT), span)
    return build.integer(x, spans[0], "the argument of `int`")


_FLOAT = "sqrt rsqrt exp exp2 log log2 log1p sin cos tan tanh erf sigmoid silu relu gelu"

FUNCTIONS: dict[str, Function] = {
    **{name: Function(("x",), partial(_float_function, UnaryOp(name))) for name in _FLOAT.split()},
    **{name: Function(("x",), partial(_keeps_type, UnaryOp(name))) for name in ("abs", "sign")},
    **{name: Function(("x",), partial(_rounds, UnaryOp(name))) for name in ("floor", "ceil")},
    **{name: Function(("x", "y"), partial(_extremum, BinaryOp(name)), variadic=True) for name in ("min", "max")},
    "clamp": Function(("x", "low", "high"), _clamp),
    "pow": Function(("x", "y"), _power),
    "float": Function(("x",), _to_float),
    "int": Function(("x",), _to_int),
}

REDUCTIONS = {op.value: op for op in ReduceOp}
"""`sum min max any all` over a static range."""

FUNCTION_NAMES = frozenset(FUNCTIONS) | frozenset(REDUCTIONS)
