"""Syntax tree to `Variant`: declarations, results, and what each may depend on.

Every statement is checked, whatever came before it. A name whose definition is wrong is known all the same, and its
uses stay silent.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from typing_extensions import assert_never

from attn_dsl.errors import Diagnostic, Source, Span
from attn_dsl.frontend import hints, limits, syntax
from attn_dsl.frontend.builder import Builder, LimitReached, a
from attn_dsl.frontend.calls import check_free
from attn_dsl.frontend.declarations import free_sizes, later_names, read_parameter, read_tensor
from attn_dsl.frontend.expressions import Expressions
from attn_dsl.frontend.library import Imports
from attn_dsl.frontend.parser import parse_recovering
from attn_dsl.frontend.scope import RESERVED, RESULTS, Function, Module, ModuleName, TensorName, Value
from attn_dsl.frontend.tensors import tensor_type
from attn_dsl.frontend.tokens import Report
from attn_dsl.ir import nodes as ir
from attn_dsl.ir.nodes import Node
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import Parameter, Tensor, Variant


def check_source(source: Source, imports: Imports, report: Report) -> Variant | None:
    """The variant that a text describes; None, and at least one report, where it is wrong."""
    checked = _check(source, imports, report)
    return checked.variant() if checked is not None else None


def check_module(path: Path, source: Source, imports: Imports, report: Report) -> Module | None:
    """An imported file, checked by itself."""
    checked = _check(source, imports, report)
    if checked is None:
        return None
    return Module(path, checked.file, tuple(checked.parameters.values()), "sink" in checked.results)


def _check(source: Source, imports: Imports, report: Report) -> Checker | None:
    diagnostics: list[Diagnostic] = []
    checker: Checker | None = None
    try:
        file = parse_recovering(source, diagnostics.append)
        checker = Checker(file, Builder(diagnostics.append), imports)
        checker.run()
    except LimitReached as limit:
        diagnostics.append(limit.diagnostic)
    except RecursionError:  # called with little of the stack left
        message = "expressions are nested too deeply for the stack of the caller"
        diagnostics.append(Diagnostic("E061", message, Span(source, 0, 0)))
    for diagnostic in diagnostics:
        report(diagnostic)
    return None if diagnostics else checker


class Checker:
    """Checks one file: by itself (`run`), or with values for its parameters inside an importing one (`instantiate`)."""

    def __init__(
        self,
        file: syntax.File,
        build: Builder,
        imports: Imports,
        score: Node = ir.SCORE,
        level: int = 0,
        trips: int = 1,
    ) -> None:
        self.file = file
        self.build = build
        self.name = ""
        self.parameters: dict[str, Parameter] = {}
        self.tensors: dict[str, Tensor] = {}
        self.results: dict[str, Node | None] = {}
        self.result_spans: dict[str, Span] = {}
        self.values: dict[str, Node] | None = None
        self.e = Expressions(file, build, imports, self.adopt, score, level, trips)
        self.e.free_sizes = free_sizes(file)
        self.e.later = later_names(file)
        build.taken.update(self.e.later, self.e.free_sizes)

    def run(self) -> None:
        """Check every statement."""
        self._header_first()
        for statement in self.file.statements:
            self.statement(statement)
        if len(self.tensors) > limits.TENSORS:
            message = f"more than {limits.TENSORS} tensors"
            self.build.error("E066", message, Span(self.file.source, 0, 0))

    def instantiate(self, part: str, values: dict[str, Node]) -> Node | None:
        """score, mask or sink with these values of the parameters. The file is known to be sound by itself."""
        self.values = values
        for statement in self.file.statements:
            if not isinstance(statement, syntax.Assignment) or statement.target.text == part:
                self.statement(statement)
        default = {"score": self.e.score, "mask": ir.TRUE}.get(part)
        node = self.results.get(part, default)
        if default is not None and part not in self.results:
            self.build.at(default, Span(self.file.source, 0, 0))
        return node

    def variant(self) -> Variant:
        return Variant(
            name=self.name,
            parameters=tuple(self.parameters.values()),
            tensors=tuple(self.tensors.values()),
            score=self.results.get("score") or ir.SCORE,
            mask=self.results.get("mask") or ir.TRUE,
            sink=self.results.get("sink"),
            doc=self.file.doc,
            source=self.file.source,
            locations=MappingProxyType(self.build.locations),
        )

    def error(self, code: str, message: str, tree: syntax.Tree, label: str = "", help: str = "") -> None:
        self.e.error(code, message, tree, label, help)

    def statement(self, statement: syntax.Statement) -> None:
        match statement:
            case syntax.Header():
                self._header(statement)
            case syntax.Import():
                self._import(statement)
            case syntax.TensorDeclaration():
                self._tensor(statement)
            case syntax.Let():
                self._let(statement.name, statement.value)
            case syntax.Def():
                self._def(statement)
            case syntax.Assignment():
                self._assignment(statement)
            case syntax.Broken():
                self._broken(statement)
            case _:
                assert_never(statement)

    # Declarations

    def _header_first(self) -> None:
        statements = self.file.statements
        headers = [s for s in statements if _is_header(s)]
        form = "a file begins with `attention name(parameter: type = default)`"
        if not headers:
            end = min(statements[0].end, statements[0].start + 60) if statements else 0
            span = Span(self.file.source, statements[0].start if statements else 0, end)
            self.build.error("E006", "the header is missing", span, "", form)
        elif statements[0] is not headers[0]:
            self.error("E006", "the header is not the first statement", headers[0], "", form)
        for other in headers[1:]:
            line = self.file.span(headers[0]).line
            self.error(
                "E006", "a second header", other, "", f"a file is one variant; the first header is on line {line}"
            )

    def _header(self, tree: syntax.Header) -> None:
        if self.name:
            return
        self.name = tree.name.text
        if len(tree.parameters) > limits.PARAMETERS:
            message = f"{len(tree.parameters)} parameters"
            self.error("E066", message, tree.parameters[limits.PARAMETERS], f"at most {limits.PARAMETERS}")
        for declaration in tree.parameters:
            name = declaration.name
            parameter = read_parameter(self.e, declaration)
            if not check_free(self.e, name, "a parameter"):
                continue
            node: Node | None = None
            if parameter is not None:
                self.parameters[name.text] = parameter
                node = ir.Param(name.text, parameter.type)
                if self.values is not None:
                    node = self.values[name.text]
                elif parameter.const:
                    self.build.static_parameters.add(node)
                self.build.at(node, self.file.span(name))
            self.e.scope.names[name.text] = Value(node, "parameter", self.file.span(name))

    def _import(self, tree: syntax.Import) -> None:
        for name in tree.names:
            if not check_free(self.e, name, "an import"):
                continue
            span = self.file.span(name)
            module = self.e.imports.find(name.text, span, self.build.report)
            if module is not None:
                self.build.taken.update(later_names(module.file), free_sizes(module.file))
            self.e.scope.names[name.text] = ModuleName(module, span)

    def _tensor(self, tree: syntax.TensorDeclaration) -> None:
        tensor = read_tensor(self.e, tree)
        if not check_free(self.e, tree.name, "a tensor"):
            return
        self.e.scope.names[tree.name.text] = TensorName(tensor, self.file.span(tree.name))
        if tensor is not None and self.adopt(tensor, self.file.span(tree.name)):
            self.tensors[tensor.name] = tensor

    def adopt(self, tensor: Tensor, span: Span) -> bool:
        """Take over a tensor, of this file or of an imported variant."""
        known = self.tensors.get(tensor.name)
        if known is not None and known != tensor:
            message = f"two different tensors are called `{tensor.name}`"
            label = f"here it is {tensor_type(tensor)}"
            help = f"the other is {tensor_type(known)}; tensors are given by name, so one name is one tensor"
            if tensor_type(known) == tensor_type(tensor):
                help = "they make different promises; tensors are given by name, so one name is one tensor"
            self.build.error("E052", message, span, label, help)
            return False
        sizes = {n.name for extent in tensor.extents for n in ir.post_order(extent) if isinstance(n, ir.Size)}
        clash = next((name for name in (tensor.name, *sorted(sizes)) if name in self.parameters), None)
        clash = clash or next((name for name in sorted(sizes) if name in self.tensors), None)
        clash = clash or (tensor.name if tensor.name in self._sizes() else None)
        if clash is not None:
            message = f"`{clash}` of an imported variant means something else in this file"
            self.build.error("E052", message, span, "", "rename one of them: arguments are given by name")
            return False
        self.tensors[tensor.name] = tensor
        return True

    def _sizes(self) -> set[str]:
        """Names of sizes that the tensors of the variant bind."""
        extents = (extent for tensor in self.tensors.values() for extent in tensor.extents)
        return {node.name for extent in extents for node in ir.post_order(extent) if isinstance(node, ir.Size)}

    def _let(self, name: syntax.Name, value: syntax.Expression) -> None:
        node = self.e.expression(value)
        if check_free(self.e, name, "an expression"):
            self.e.scope.names[name.text] = Value(node, "let", self.file.span(name))

    def _def(self, tree: syntax.Def) -> None:
        """A function. Its body is checked once without types, for what is wrong whatever the arguments are."""
        free = check_free(self.e, tree.name, "a function")
        if len(tree.parameters) > limits.PARAMETERS:
            self.error("E066", f"{len(tree.parameters)} parameters", tree.name, f"at most {limits.PARAMETERS}")
        outer = self.e.scope
        self.e.scope = type(outer)(outer)
        for name in tree.parameters:
            if check_free(self.e, name, "a parameter"):
                self.e.scope.names[name.text] = Value(None, "parameter", self.file.span(name))
        found: list[Diagnostic] = []
        with self.build.reporting(found.append):
            self.e.scope.names.setdefault(tree.name.text, Function(None, self.file.span(tree.name)))
            self.e.expression(tree.body)
        self.e.scope = outer
        if _calls(tree.body, tree.name.text) and free:
            at = _calls(tree.body, tree.name.text) or tree.body
            self.error(
                "E016", f"`{tree.name.text}` calls itself", at, "", "functions are inlined; there is no recursion"
            )
            found.append(Diagnostic("E016", "", self.file.span(at)))
        for diagnostic in found:
            if diagnostic.message:
                self.build.report(diagnostic)
        if free:
            self.e.scope.names[tree.name.text] = Function(None if found else tree, self.file.span(tree.name))

    # Results

    def _assignment(self, tree: syntax.Assignment) -> None:
        target = tree.target.text
        if target not in RESULTS:
            self._no_result(tree)
            return
        if target in self.result_spans:
            where = f"it is set on line {self.result_spans[target].line}"
            self.error("E011", f"`{target}` is already set", tree.target, "", where)
        node = self.e.expression(tree.value)
        node = self._typed(target, node, self.file.span(tree.value))
        if node is not None and not self._depends_well(target, node, tree.value):
            node = None
        if target not in self.result_spans:
            self.results[target] = node
            self.result_spans[target] = self.file.span(tree.target)

    def _typed(self, target: str, node: Node | None, span: Span) -> Node | None:
        if node is None:
            return None
        if target == "mask":
            return self.build.boolean(node, span, "`mask`")
        if node.type is Type.BOOL:
            help = "`mask = ...` drops a pair where it is false" if target == "score" else ""
            self.build.error("E020", f"`{target}` must be a number", span, f"this is {a(node.type)}", help)
            return None
        return self.build.to_float(node, span)

    def _depends_well(self, target: str, node: Node, value: syntax.Expression) -> bool:
        if target == "mask" and "score" in node.depends:
            at = self.e.blame(value, "score")
            help = "what is dropped is decided by positions, parameters and tensors alone"
            self.error("E040", "`mask` depends on `score`", at, "", help)
            return False
        wrong = sorted(node.depends - {"b", "h"}) if target == "sink" else []
        if wrong:
            at = self.e.blame(value, wrong[0])
            help = "a sink is one logit for each batch and head: it may depend on `b` and `h`"
            self.error("E041", f"`sink` depends on `{wrong[0]}`", at, "", help)
            return False
        return True

    def _no_result(self, tree: syntax.Assignment) -> None:
        name = tree.target
        near = hints.nearest(name.text, RESULTS)
        if name.text in RESERVED or self.e.scope.find(name.text) is not None:
            help = "there is no assignment: give the new value a name of its own, `let name = expression`"
        elif near and near not in self.e.later:
            help = f"did you mean `{near}`?"
        else:
            help = f"to name an expression, write `let {name.text} = ...`"
        self.error("E007", f"`{name.text}` cannot be set", name, "expected `score`, `mask` or `sink`", help)
        node = self.e.expression(tree.value)
        if name.text not in RESERVED and self.e.scope.find(name.text) is None:
            self.e.scope.names[name.text] = Value(node, "let", self.file.span(name))

    def _broken(self, tree: syntax.Broken) -> None:
        """Names of a statement that did not parse are known, as wrong."""
        span = Span(self.file.source, tree.start, tree.end)
        for name in tree.names:
            if name in RESULTS:
                self.result_spans.setdefault(name, span)
            elif name not in RESERVED and self.e.scope.find(name) is None:
                self.e.scope.names[name] = _unknown_symbol(tree.keyword, span)


def _unknown_symbol(keyword: str, span: Span) -> Value | TensorName | Function | ModuleName:
    match keyword:
        case "TENSOR":
            return TensorName(None, span)
        case "DEF":
            return Function(None, span)
        case "IMPORT":
            return ModuleName(None, span)
        case _:
            return Value(None, "let", span)


def _is_header(statement: syntax.Statement) -> bool:
    return isinstance(statement, syntax.Header) or (
        isinstance(statement, syntax.Broken) and statement.keyword == "ATTENTION"
    )


def _calls(tree: syntax.Expression, name: str) -> syntax.Name | None:
    """The place where an expression calls `name`; iterative, so depth is no limit."""
    from attn_dsl.frontend.expressions import parts

    stack = [tree]
    while stack:
        here = stack.pop()
        if isinstance(here, syntax.Call) and isinstance(here.callee, syntax.Name) and here.callee.text == name:
            return here.callee
        stack.extend(parts(here))
    return None
