"""Calls of built-in functions and of `def`s, which are inlined."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attn_dsl.errors import Diagnostic, Span
from attn_dsl.frontend import hints, syntax
from attn_dsl.frontend.arguments import arguments, bind, explain_inside
from attn_dsl.frontend.foreign import foreign_function
from attn_dsl.frontend.functions import FUNCTION_NAMES, FUNCTIONS, REDUCTIONS
from attn_dsl.frontend.imported import member_call
from attn_dsl.frontend.scope import (
    BUILT_IN,
    RESERVED,
    RESULTS,
    Function,
    ModuleName,
    Scope,
    TensorName,
    Value,
)
from attn_dsl.frontend.syntax import Name
from attn_dsl.ir.nodes import Node

if TYPE_CHECKING:
    from attn_dsl.frontend.expressions import Expressions


def check_free(e: Expressions, name: Name, what: str) -> bool:
    """Whether a name may be declared here; reports where it is reserved or taken."""
    if name.text in RESERVED:
        e.error("E008", f"`{name.text}` is a reserved word", name, f"it cannot name {what}", "choose another name")
        return False
    other = e.scope.find(name.text)
    if other is not None:
        where = f"the {other.kind} `{name.text}` is declared on line {other.span.line}"
        e.error("E011", f"`{name.text}` is already defined", name, "", where)
        return False
    if name.text in e.free_sizes:
        e.error("E011", f"`{name.text}` is already defined", name, "", "it is a size, by the extents of a tensor")
        return False
    return True


def call(e: Expressions, tree: syntax.Call, span: Span) -> Node | None:
    callee = tree.callee
    if isinstance(callee, syntax.Member):
        return member_call(e, tree, callee, span)
    if not isinstance(callee, Name):
        arguments(e, tree)
        if e.expression(callee) is not None:
            e.error("E013", "this is a value, not a function", callee)
        return None
    symbol = e.scope.find(callee.text)
    if isinstance(symbol, Function):
        return _inline(e, tree, symbol, span)
    nodes = arguments(e, tree)
    if symbol is None and callee.text in FUNCTION_NAMES:
        return _built_in(e, tree, callee.text, nodes, span)
    _not_a_function(e, tree, callee)
    return None


def _not_a_function(e: Expressions, tree: syntax.Call, callee: Name) -> None:
    symbol = e.scope.find(callee.text)
    if isinstance(symbol, TensorName):
        inside = ", ".join(e.file.span(x).text for x in tree.arguments)
        e.error("E013", f"`{callee.text}` is a tensor", callee, f"write {callee.text}[{inside[:60]}]")
    elif isinstance(symbol, ModuleName):
        e.error("E013", f"`{callee.text}` is an import", callee, help=f"write `{callee.text}.mask(...)`")
    elif symbol is not None or callee.text in BUILT_IN or callee.text in e.free_sizes:
        e.error("E013", f"`{callee.text}` is a value, not a function", callee, help="a product needs its `*`")
    elif callee.text in RESULTS:
        e.error("E013", f"`{callee.text}` is not a function", callee, help="an imported one is `name.mask(...)`")
    elif callee.text in e.later:
        where = f"it is defined on line {e.later[callee.text].line}: move that above this line"
        e.error("E016", f"`{callee.text}` is used before its definition", callee, "not defined yet", where)
    elif not foreign_function(e, tree, callee, callee.text):
        known = [*FUNCTION_NAMES, *e.scope.visible()]
        e.error("E015", f"unknown function `{callee.text}`", callee, "", hints.did_you_mean(callee.text, known))


def _built_in(e: Expressions, tree: syntax.Call, name: str, nodes: list[Node] | None, span: Span) -> Node | None:
    named = next((x.name for x in tree.arguments if x.name is not None), None)
    if named is not None:
        e.error("E014", f"arguments of `{name}` have no names", named, help="they are given by position")
        return None
    function = FUNCTIONS.get(name)
    count = len(tree.arguments)
    if function is None or not function.accepts(count):
        if name in REDUCTIONS and count <= 1:
            form = f"`{name}(d in 0..n: expression)`"
            form = f"`{name}(x, y)` or {form}" if function else form
        else:
            form = f"`{name}({', '.join(function.parameters if function else ())})`"
        e.error("E014", f"`{name}` does not take {_count(count)}", tree, f"expected {form}")
        return None
    if nodes is None:
        return None
    return function.apply(e.build, name, nodes, [e.file.span(x.value) for x in tree.arguments], span)


def _count(count: int) -> str:
    return f"{count} argument{'' if count == 1 else 's'}"


# Functions of the file


def _inline(e: Expressions, tree: syntax.Call, function: Function, span: Span) -> Node | None:
    nodes = arguments(e, tree)
    definition = function.tree
    if definition is None:
        return None
    names = [name.text for name in definition.parameters]
    bound = bind(e, tree, definition.name.text, names, frozenset(names))
    if bound is None or nodes is None:
        return None
    values = [nodes[bound[name]] for name in names]
    key = (definition.start, tuple(values), e.level, e.trips)
    if key not in e.inlined:
        e.inlined[key] = _body(e, definition, values, tree)
    return e.inlined[key]


def _body(e: Expressions, definition: syntax.Def, values: list[Node], tree: syntax.Call) -> Node | None:
    problems: list[Diagnostic] = []
    pairs = zip(definition.parameters, values, strict=True)
    names = {name.text: Value(node, "argument", e.file.span(name)) for name, node in pairs}
    outer, e.scope = e.scope, Scope(_file_scope(e.scope), dict(names))
    try:
        with e.build.reporting(problems.append):
            node = e.expression(definition.body)
    finally:
        e.scope = outer
    explain_inside(e, problems, tree.callee, f"`{definition.name.text}`")
    return node


def _file_scope(scope: Scope) -> Scope:
    while scope.outer is not None:
        scope = scope.outer
    return scope
