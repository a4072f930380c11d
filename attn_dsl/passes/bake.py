"""Bind constants: `const` parameters become literals, values for the others become the defaults of the call.

Afterwards no `const` parameter is left and the bounds of every reduction are literals. Refuses, with a BindingError
that names the argument, what was expected and what came: a missing `const`, an unknown name, a value of the wrong type,
a divisor that is not positive, a `min` or `max` over nothing.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import SupportsFloat, SupportsIndex

from attn_dsl.errors import BindingError
from attn_dsl.ir import nodes as ir
from attn_dsl.ir.nodes import BinaryOp, Const, Node, ReduceOp
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import Parameter, Variant, rewrite_variant
from attn_dsl.passes.fold import Scalar, folded

_NO_CONSTANTS: Mapping[str, Scalar] = {}


def bake(variant: Variant, constants: Mapping[str, object] = _NO_CONSTANTS) -> Variant:
    """The variant with every `const` parameter replaced by its value (given here, or its default) and folded.

    `constants` may also name run-time parameters: the value becomes the default of the call, and nothing is baked.
    """
    parameters = {p.name: p for p in variant.parameters}
    for name, given in constants.items():
        if name not in parameters:
            raise BindingError(_unknown(variant, name))
        parameters[name] = replace(parameters[name], default=coerce(parameters[name], given))
    if missing := [p.name for p in parameters.values() if p.const and p.default is None]:
        names = ", ".join(f"`{name}`" for name in missing)
        raise BindingError(f"`{variant.name}` needs a value for const {names} when it is compiled")

    baked = {p.name: Const(p.default) for p in parameters.values() if p.const and p.default is not None}
    context = ", ".join(f"{name}={node.value}" for name, node in baked.items())

    def bind(node: Node) -> Node:
        if isinstance(node, ir.Param) and node.name in baked:
            return baked[node.name]
        _check(node, variant.name, context)
        return folded(node)

    run_time = tuple(p for p in parameters.values() if not p.const)
    return replace(rewrite_variant(variant, bind), parameters=run_time)


def coerce(parameter: Parameter, value: object) -> Scalar:
    """A value for a parameter in the Python type of its declaration; an int does for a float, nothing else differs."""
    got = f"{value!r} ({type(value).__name__})"
    error = BindingError(f"`{parameter.name}` is declared {parameter.type.value} but got {got}")
    match parameter.type:
        case Type.BOOL:
            if not isinstance(value, bool):
                raise error
            return value
        case Type.INT:
            if isinstance(value, bool | float) or not isinstance(value, SupportsIndex):
                raise error
            try:
                return operator.index(value)
            except TypeError:
                raise error from None
        case Type.FLOAT:
            if isinstance(value, bool) or not isinstance(value, SupportsFloat | SupportsIndex):
                raise error
            try:
                return float(value)
            except OverflowError:
                raise error from None


def _unknown(variant: Variant, name: str) -> str:
    names = [p.name for p in variant.parameters]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"it has {', '.join(f'`{n}`' for n in names) or 'none'}"
    return f"`{variant.name}` has no parameter `{name}`: {hint}"


def _check(node: Node, name: str, context: str) -> None:
    """Refuse what literals make wrong; the operands of `node` are already bound."""
    where = f" (with {context})" if context else ""
    match node:
        case ir.Binary(BinaryOp.FLOORDIV | BinaryOp.MOD, _, Const(divisor)) if node.type is Type.INT and divisor <= 0:
            raise BindingError(f"`{name}` divides by {divisor}: a divisor of `//` or `%` must be positive{where}")
        case ir.Reduce(op, var, low, high):
            if not (isinstance(low, Const) and isinstance(high, Const)):
                raise BindingError(f"`{name}`: the bounds of `{op.value}` over `{var.name}` must be constant{where}")
            if op in (ReduceOp.MIN, ReduceOp.MAX) and low.value >= high.value:
                raise BindingError(f"`{name}`: `{op.value}` over the empty range {low.value}..{high.value}{where}")
