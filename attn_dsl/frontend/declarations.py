"""Parameters and tensors: types, defaults, extents, promises."""

from __future__ import annotations

from collections.abc import Iterator

from attn_dsl.errors import Span
from attn_dsl.frontend import hints, limits, syntax
from attn_dsl.frontend.builder import a
from attn_dsl.frontend.expressions import Expressions
from attn_dsl.frontend.scope import RESERVED
from attn_dsl.ir import nodes as ir
from attn_dsl.ir.nodes import Node
from attn_dsl.ir.types import DType, Type
from attn_dsl.ir.variant import InRange, Nondecreasing, Parameter, Promise, Tensor

_TYPES = {kind.value: kind for kind in Type}
_DTYPES = {dtype.value: dtype for dtype in DType}


def later_names(file: syntax.File) -> dict[str, Span]:
    """Every name that a statement of the file declares, and where."""
    names: dict[str, Span] = {}
    for statement in file.statements:
        for name in _declared(statement):
            names.setdefault(name.text, file.span(name))
    return names


def _declared(statement: syntax.Statement) -> Iterator[syntax.Name]:
    match statement:
        case syntax.Header():
            yield from (parameter.name for parameter in statement.parameters)
        case syntax.Import():
            yield from statement.names
        case syntax.TensorDeclaration() | syntax.Let() | syntax.Def():
            yield statement.name
        case syntax.Assignment() | syntax.Broken():
            return


def free_sizes(file: syntax.File) -> dict[str, Node]:
    """Names that stand alone in an extent and that nothing declares: sizes that the call binds."""
    declared = set(later_names(file)) | RESERVED
    for statement in file.statements:
        if isinstance(statement, syntax.Broken):
            declared.update(statement.names)
    extents = (extent for s in file.statements if isinstance(s, syntax.TensorDeclaration) for extent in s.extents)
    names = (extent.text for extent in extents if isinstance(extent, syntax.Name))
    return {name: ir.Size(name) for name in names if name not in declared}


def read_parameter(e: Expressions, tree: syntax.ParameterDeclaration) -> Parameter | None:
    kind = _TYPES.get(tree.type.text)
    if kind is None:
        help = hints.PARAMETER_TYPES.get(tree.type.text) or hints.nearest(tree.type.text, _TYPES)
        if tree.type.text in _DTYPES and help is None:
            help = _DTYPES[tree.type.text].type.value
        help = f"did you mean `{help}`?" if help else "a captured tensor is declared `tensor name: dtype[extents]`"
        e.error("E030", f"unknown type `{tree.type.text}`", tree.type, "expected `int`, `float` or `bool`", help)
    if tree.default is None:
        return None if kind is None else Parameter(tree.name.text, kind, None, tree.const)
    default = e.expression(tree.default)
    if kind is None or default is None:
        return None
    value = _default(e, tree.default, default, kind)
    return None if value is None else Parameter(tree.name.text, kind, value, tree.const)


def _default(e: Expressions, tree: syntax.Expression, node: Node, kind: Type) -> bool | int | float | None:
    value: bool | int | float | None = e.build.constant(node)
    if isinstance(node, ir.Const):
        value = node.value
    if value is None:
        e.error("E033", "a default must be constant", tree, "this is not", "write a literal")
        return None
    if kind is Type.FLOAT and node.type is Type.INT:
        return float(value)
    if node.type is not kind:
        help = "write the parameter as `float`" if node.type is Type.FLOAT and kind is Type.INT else ""
        e.error("E033", f"the default of {a(kind)} parameter", tree, f"this is {a(node.type)}", help)
        return None
    return value


def read_tensor(e: Expressions, tree: syntax.TensorDeclaration) -> Tensor | None:
    dtype = _DTYPES.get(tree.dtype.text)
    if dtype is None:
        word = tree.dtype.text
        near = hints.DTYPES.get(word) or hints.nearest(word, _DTYPES)
        help = f"did you mean `{near}`?" if near else f"dtypes are {', '.join(_DTYPES)}"
        e.error("E030", f"unknown dtype `{word}`", tree.dtype, "", help)
    if len(tree.extents) > limits.AXES:
        e.error("E066", f"{len(tree.extents)} axes", tree, f"at most {limits.AXES}")
        return None
    if not tree.extents:
        e.error("E031", "a tensor has at least one axis", tree, "", "a number for all is a parameter of the header")
        return None
    extents = [_extent(e, extent, "an extent") for extent in tree.extents]
    promises = [_promise(e, tree, promise, extents) for promise in tree.promises]
    sound = tuple(extent for extent in extents if extent is not None)
    kept = tuple(promise for promise in promises if promise is not None)
    if dtype is None or len(sound) != len(extents) or len(kept) != len(promises):
        return None
    for promise, written in zip(kept, tree.promises, strict=True):
        numeric = dtype.type is Type.INT or (dtype.type is Type.FLOAT and isinstance(promise, Nondecreasing))
        if not numeric:
            e.error(
                "E032", f"a promise about a {dtype.value} tensor", written, "", "ranges are for tensors of integers"
            )
            return None
    return Tensor(tree.name.text, dtype, sound, kept)


def _extent(e: Expressions, tree: syntax.Expression, what: str) -> Node | None:
    node = e.build.integer(e.expression(tree), e.file.span(tree), what)
    if node is None:
        return None
    loads = any(isinstance(n, ir.Load) for n in ir.post_order(node))
    if node.depends or loads:
        name = min(node.depends, default="a tensor")
        at = e.blame(tree, name) if node.depends else tree
        help = f"{what} is made of sizes (B H HK Q KV D, or a new name) and parameters"
        upper = {"b": "B", "h": "H", "hk": "HK", "q": "Q", "k": "KV"}.get(name)
        if upper and what == "an extent":
            help = f"the size of this axis is `{upper}`"
        e.error("E031", f"{what} depends on `{name}`" if node.depends else f"{what} reads a tensor", at, "", help)
        return None
    value = e.build.constant(node)
    if value is not None and value < 1 and what == "an extent":
        e.error("E031", "an extent must be positive", tree, f"this is {value}")
        return None
    return node


def _promise(
    e: Expressions,
    tree: syntax.TensorDeclaration,
    promise: syntax.NondecreasingPromise | syntax.RangePromise,
    extents: list[Node | None],
) -> Promise | None:
    if isinstance(promise, syntax.NondecreasingPromise):
        return _nondecreasing(e, tree, promise, extents)
    low, high = _extent(e, promise.low, "a bound"), _extent(e, promise.high, "a bound")
    if low is None or high is None:
        return None
    first, last = e.build.constant(low), e.build.constant(high)
    if first is not None and last is not None and last <= first:
        e.error("E032", "the range is empty", promise, "", "`in [low, high)` contains low and not high")
        return None
    return InRange(low, high)


def _nondecreasing(
    e: Expressions, tree: syntax.TensorDeclaration, promise: syntax.NondecreasingPromise, extents: list[Node | None]
) -> Promise | None:
    axis = promise.axis
    if isinstance(axis, syntax.Literal):
        if axis.value < len(extents):
            return Nondecreasing(int(axis.value))
        e.error("E032", f"`{tree.name.text}` has no axis {axis.value}", axis, "", "axes count from 0")
        return None
    places = [i for i, x in enumerate(tree.extents) if isinstance(x, syntax.Name) and x.text == axis.text]
    if len(places) == 1:
        return Nondecreasing(places[0])
    if places:
        help = "write its number: " + " or ".join(f"`nondecreasing over {i}`" for i in places)
        e.error("E032", f"more than one axis is `{axis.text}`", axis, "", help)
        return None
    names = [x.text for x in tree.extents if isinstance(x, syntax.Name)]
    index = {"b": "B", "h": "H", "hk": "HK", "q": "Q", "k": "KV"}.get(axis.text)
    help = f"write `{index}`" if index in names else hints.did_you_mean(axis.text, names)
    help = help or "name the axis by its extent, or by its number"
    e.error("E032", f"no axis of `{tree.name.text}` is `{axis.text}`", axis, "", help)
    return None
