"""Calls: built-in functions; `def`s and parts of imported variants, which are inlined; functions of other languages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attn_dsl.errors import Diagnostic, Span
from attn_dsl.frontend import hints, syntax
from attn_dsl.frontend.functions import FUNCTION_NAMES, FUNCTIONS, REDUCTIONS
from attn_dsl.frontend.scope import (
    BUILT_IN,
    RESERVED,
    RESULTS,
    Function,
    Module,
    ModuleName,
    Scope,
    TensorName,
    Value,
    unknown_name_help,
)
from attn_dsl.frontend.syntax import Argument, Name
from attn_dsl.ir import nodes as ir
from attn_dsl.ir.nodes import Node
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import Parameter

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
        return _member_call(e, tree, callee, span)
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


def arguments(e: Expressions, tree: syntax.Call) -> list[Node] | None:
    return e.expressions([argument.value for argument in tree.arguments])


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
    elif not _foreign_function(e, tree, callee, callee.text):
        known = [*FUNCTION_NAMES, *e.scope.visible()]
        e.error("E015", f"unknown function `{callee.text}`", callee, "", hints.did_you_mean(callee.text, known))


def _foreign_function(e: Expressions, tree: syntax.Call, shown: syntax.Tree, name: str) -> bool:
    """Answer a function of torch, numpy or flex_attention."""
    text = e.file.span(shown).text[:60]
    given = [e.file.span(x.value).text for x in tree.arguments]
    if name == "where" and len(given) == 3 and sum(map(len, given)) < 80:
        help = f"write `{given[1]} if {given[0]} else {given[2]}`"
    elif name == "where":
        help = "write `x if condition else y`"
    elif name in FUNCTION_NAMES:
        help = f"write `{name}(...)`"
    elif name in hints.FUNCTIONS:
        other = hints.FUNCTIONS[name]
        help = f"write `{other}(...)`" if other in FUNCTION_NAMES else f"write `{other}`"
    elif name in ("round", "trunc"):
        help = "write `floor(x + 0.5)`"
    elif name in ("full", "tensor", "zeros", "ones", "arange"):
        help = "a captured tensor is declared: `tensor name: dtype[extents]`"
    else:
        return False
    e.error("E015", f"unknown function `{text}`", shown, "", help)
    return True


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
    bound = _bind(e, tree, definition.name.text, names, frozenset(names))
    if bound is None or nodes is None:
        return None
    values = [nodes[bound[name]] for name in names]
    key = (definition.start, tuple(values), e.level, e.trips)
    if key not in e.inlined:
        e.inlined[key] = _body(e, definition, values, tree, span)
    return e.inlined[key]


def _body(e: Expressions, definition: syntax.Def, values: list[Node], tree: syntax.Call, span: Span) -> Node | None:
    problems: list[Diagnostic] = []
    pairs = zip(definition.parameters, values, strict=True)
    names = {name.text: Value(node, "argument", e.file.span(name)) for name, node in pairs}
    outer, e.scope = e.scope, Scope(_file_scope(e.scope), dict(names))
    try:
        with e.build.reporting(problems.append):
            node = e.expression(definition.body)
    finally:
        e.scope = outer
    _explain_inside(e, problems, tree.callee, f"`{definition.name.text}`")
    return node


def _file_scope(scope: Scope) -> Scope:
    while scope.outer is not None:
        scope = scope.outer
    return scope


def _explain_inside(e: Expressions, problems: Sequence[Diagnostic], at: syntax.Tree, what: str) -> None:
    """Report at a call what went wrong in the body that it inlines."""
    if problems:
        first = problems[0]
        about = f"`{_short(first.span.text)}` at {first.span}"
        e.error(first.code, f"in {what}: {first.message}", at, first.label and f"there: {first.label}", about)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 48 else text[:47] + "…"


def _bind(
    e: Expressions, tree: syntax.Call, what: str, order: Sequence[str], required: frozenset[str]
) -> dict[str, int] | None:
    """Which argument goes to which parameter; `score` is only ever given by name."""
    bound: dict[str, int] = {}
    sound = True
    seen_named = False
    for i, argument in enumerate(tree.arguments):
        name = _parameter_of(e, argument, i, what, order, seen_named)
        seen_named = seen_named or argument.name is not None
        if name is None:
            sound = False
        elif name in bound:
            e.error("E014", f"`{name}` of `{what}` is given twice", argument)
            sound = False
        else:
            bound[name] = i
    missing = [name for name in order if name in required and name not in bound]
    if missing and sound:
        names = ", ".join(f"`{name}`" for name in missing)
        e.error("E014", f"`{what}` needs {names}", tree, help=f"it is `{what}({', '.join(order)})`")
        sound = False
    return bound if sound else None


def _parameter_of(
    e: Expressions, argument: Argument, i: int, what: str, order: Sequence[str], seen_named: bool
) -> str | None:
    if argument.name is not None:
        name = argument.name.text
        if name in order or (name == "score" and what.endswith(".score")):
            return name
        help = hints.did_you_mean(name, order) or f"it is `{what}({', '.join(order)})`"
        e.error("E014", f"`{what}` has no parameter `{name}`", argument.name, "", help)
        return None
    if seen_named:
        e.error("E014", "an argument without a name follows one with a name", argument)
        return None
    if i >= len(order):
        if i == len(order):
            e.error("E014", f"too many arguments for `{what}`", argument, "", f"it is `{what}({', '.join(order)})`")
        return None
    return order[i]


# Imported variants


def refuse_member(e: Expressions, tree: syntax.Member) -> None:
    """`a.b` that is not called."""
    base = tree.base
    if isinstance(base, Name):
        symbol = e.scope.find(base.text)
        if isinstance(symbol, ModuleName):
            if symbol.module is not None:
                help = f"write `{base.text}.{tree.name.text if tree.name.text in RESULTS else 'mask'}(...)`"
                e.error("E053", f"`{base.text}.{tree.name.text}` is not a value", tree, "", help)
            return
        if symbol is None and base.text in hints.NAMESPACES:
            help = hints.ADVICE.get(tree.name.text, "functions stand bare: `tanh(x)`")
            e.error("E010", f"unknown name `{base.text}`", base, "not defined", help)
            return
        if symbol is None and base.text not in e.known():
            _unknown_module(e, base)
            return
    if e.expression(base) is not None:
        e.error("E053", f"a value has no `.{tree.name.text}`", tree.name, "", "only imported variants have parts")


def _unknown_module(e: Expressions, base: Name) -> None:
    from attn_dsl.frontend.library import shipped

    if base.text in shipped():
        e.error("E010", f"unknown name `{base.text}`", base, "not imported", f"add `import {base.text}`")
    else:
        e.error("E010", f"unknown name `{base.text}`", base, "not defined", unknown_name_help(base.text, e.known()))


def _root(tree: syntax.Expression) -> syntax.Expression:
    while isinstance(tree, syntax.Member):
        tree = tree.base
    return tree


def _member_call(e: Expressions, tree: syntax.Call, callee: syntax.Member, span: Span) -> Node | None:
    base = callee.base
    symbol = e.scope.find(base.text) if isinstance(base, Name) else None
    if isinstance(base, Name) and isinstance(symbol, ModuleName):
        return _imported(e, tree, callee, base, symbol, span)
    arguments(e, tree)
    root = _root(base)
    name = callee.name.text
    if isinstance(root, Name) and root.text in hints.NAMESPACES and e.scope.find(root.text) is None:
        if not _foreign_function(e, tree, callee, name):
            help = hints.did_you_mean(name, FUNCTION_NAMES)
            e.error("E015", f"unknown function `{e.file.span(callee).text[:60]}`", callee, "", help)
        return None
    if name not in RESULTS and e.scope.find(root.text if isinstance(root, Name) else "") is not None:
        text = _short(e.file.span(base).text)
        help = f"write `{name}({text})`" if name in FUNCTION_NAMES else "functions stand bare: `tanh(x)`"
        e.error("E053", f"a value has no function `.{name}`", callee.name, "", help)
        return None
    refuse_member(e, callee)
    return None


def _imported(
    e: Expressions, tree: syntax.Call, callee: syntax.Member, base: Name, symbol: ModuleName, span: Span
) -> Node | None:
    nodes = arguments(e, tree)
    module, part = symbol.module, callee.name.text
    if module is None:
        return None
    if part not in RESULTS or (part == "sink" and not module.has_sink):
        help = "it has no sink" if part == "sink" else "an imported variant has `score()`, `mask()` and `sink()`"
        e.error("E053", f"`{base.text}` has no `{part}`", callee.name, "", help)
        return None
    what = f"{base.text}.{part}"
    required = frozenset(p.name for p in module.parameters if p.default is None)
    bound = _bind(e, tree, what, [p.name for p in module.parameters], required)
    if bound is None or nodes is None:
        return None
    values = [_value(e, p, tree, nodes, bound, span) for p in module.parameters]
    score = e.score
    if "score" in bound:
        given = e.build.floating(nodes[bound["score"]], e.file.span(tree.arguments[bound["score"]]), "`score`")
        if given is None:
            return None
        score = given
    sound = [node for node in values if node is not None]
    if len(sound) != len(values):
        return None
    key = (base.text, part, tuple(sound), score, e.level, e.trips)
    if key not in e.inlined:
        e.inlined[key] = _instance(e, module, part, sound, score, callee)
    return e.inlined[key]


def _value(
    e: Expressions, p: Parameter, tree: syntax.Call, nodes: list[Node], bound: dict[str, int], span: Span
) -> Node | None:
    if p.name not in bound:
        assert p.default is not None
        return e.build.at(ir.Const(p.default), span)
    node, at = nodes[bound[p.name]], e.file.span(tree.arguments[bound[p.name]].value)
    what = f"`{p.name}`"
    if p.type is Type.BOOL:
        return e.build.boolean(node, at, what)
    return e.build.integer(node, at, what) if p.type is Type.INT else e.build.floating(node, at, what)


def _instance(
    e: Expressions, module: Module, part: str, values: list[Node], score: Node, callee: syntax.Member
) -> Node | None:
    """A part of an imported variant with its parameters replaced; its tensors become tensors of this variant."""
    from attn_dsl.frontend.checker import Checker

    problems: list[Diagnostic] = []
    inner = Checker(module.file, e.build, e.imports.inside(module), score, e.level, e.trips)
    with e.build.reporting(problems.append):
        node = inner.instantiate(part, dict(zip((p.name for p in module.parameters), values, strict=True)))
    at = e.file.span(callee)
    _explain_inside(e, problems, callee, f"`{at.text}`")
    if node is None or problems:
        return None
    loads = [load.tensor for load in ir.post_order(node) if isinstance(load, ir.Load)]
    # Tensors of this file may come in with the arguments; the others are new to it.
    fresh = [inner.tensors[name] for name in dict.fromkeys(loads) if name in inner.tensors]
    return node if all(e.adopt(tensor, at) for tensor in fresh) else None
