"""`a.mask(...)`, `a.score(...)`, `a.sink(...)`: parts of imported variants, inlined; and what else has a dot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attn_dsl.errors import Diagnostic, Span
from attn_dsl.frontend import hints, syntax
from attn_dsl.frontend.arguments import arguments, bind, explain_inside, short
from attn_dsl.frontend.foreign import foreign_function
from attn_dsl.frontend.functions import FUNCTION_NAMES
from attn_dsl.frontend.scope import RESULTS, Module, ModuleName, unknown_name_help
from attn_dsl.frontend.syntax import Name
from attn_dsl.ir import nodes as ir
from attn_dsl.ir.nodes import Node
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import Parameter

if TYPE_CHECKING:
    from attn_dsl.frontend.expressions import Expressions


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


def member_call(e: Expressions, tree: syntax.Call, callee: syntax.Member, span: Span) -> Node | None:
    base = callee.base
    symbol = e.scope.find(base.text) if isinstance(base, Name) else None
    if isinstance(base, Name) and isinstance(symbol, ModuleName):
        return _imported(e, tree, callee, base, symbol, span)
    arguments(e, tree)
    root = _root(base)
    name = callee.name.text
    if isinstance(root, Name) and root.text in hints.NAMESPACES and e.scope.find(root.text) is None:
        if not foreign_function(e, tree, callee, name):
            help = hints.did_you_mean(name, FUNCTION_NAMES)
            e.error("E015", f"unknown function `{e.file.span(callee).text[:60]}`", callee, "", help)
        return None
    if name not in RESULTS and e.scope.find(root.text if isinstance(root, Name) else "") is not None:
        text = short(e.file.span(base).text)
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
    bound = bind(e, tree, what, [p.name for p in module.parameters], required)
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
    explain_inside(e, problems, callee, f"`{at.text}`")
    if node is None or problems:
        return None
    loads = [load.tensor for load in ir.post_order(node) if isinstance(load, ir.Load)]
    # Tensors of this file may come in with the arguments; the others are new to it.
    fresh = [inner.tensors[name] for name in dict.fromkeys(loads) if name in inner.tensors]
    return node if all(e.adopt(tensor, at) for tensor in fresh) else None
