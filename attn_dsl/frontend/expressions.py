"""Typing of expressions: syntax tree in, IR node out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from typing_extensions import assert_never

from attn_dsl.errors import Diagnostic, Span
from attn_dsl.frontend import calls, hints, imported, limits, syntax
from attn_dsl.frontend.builder import ARITHMETIC, LOGIC, Builder, LimitReached
from attn_dsl.frontend.functions import FUNCTION_NAMES, REDUCTIONS
from attn_dsl.frontend.library import Imports
from attn_dsl.frontend.scope import BUILT_IN, RESULTS, Scope, TensorName, Value, unknown_name_help
from attn_dsl.frontend.syntax import Expression, Name
from attn_dsl.frontend.tensors import declaration, expected_index
from attn_dsl.ir import nodes as ir
from attn_dsl.ir.nodes import BinaryOp, Node, ReduceOp, UnaryOp
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import Tensor


class Expressions:
    """Expressions of one file.

    `adopt` takes over a tensor of an imported variant; `score` is what the incoming score stands for; `level` counts
    the reductions around the expression and `trips` is the product of their lengths.
    """

    def __init__(
        self,
        file: syntax.File,
        build: Builder,
        imports: Imports,
        adopt: Callable[[Tensor, Span], bool],
        score: Node = ir.SCORE,
        level: int = 0,
        trips: int = 1,
    ) -> None:
        self.file = file
        self.build = build
        self.score = score
        self.level = level
        self.trips = trips
        self.scope = Scope()
        self.free_sizes: dict[str, Node] = {}
        self.later: dict[str, Span] = {}
        self.imports = imports
        self.adopt = adopt
        self.inlined: dict[tuple[object, ...], Node | None] = {}
        self._results: dict[int, Node | None] = {}

    def error(self, code: str, message: str, tree: syntax.Tree, label: str = "", help: str = "") -> None:
        self.build.error(code, message, self.file.span(tree), label, help)

    def expression(self, tree: Expression) -> Node | None:
        """The node of an expression, or None where an error was reported."""
        span = self.file.span(tree)
        build = self.build
        build.step(span)
        if build.depth >= limits.CHECK_DEPTH:
            message = f"expressions are nested more than {limits.CHECK_DEPTH} deep"
            raise LimitReached(Diagnostic("E061", message, span, help="name parts of it with `let`"))
        build.depth += 1
        try:
            node = self._dispatch(tree, span)
        finally:
            build.depth -= 1
        if node is not None:
            build.at(node, span)
        self._results[id(tree)] = node
        return node

    def expressions(self, trees: Sequence[Expression]) -> list[Node] | None:
        """All of them, or None where one has an error."""
        nodes = [self.expression(tree) for tree in trees]
        sound = [node for node in nodes if node is not None]
        return sound if len(sound) == len(nodes) else None

    def blame(self, tree: Expression, name: str) -> Expression:
        """The smallest part of a checked expression that depends on `name`."""
        for child in parts(tree):
            node = self._results.get(id(child))
            if node is not None and name in node.depends:
                return self.blame(child, name)
        return tree

    def _dispatch(self, tree: Expression, span: Span) -> Node | None:
        match tree:
            case syntax.Literal():
                return self.build.at(ir.Const(tree.value), span)
            case syntax.Name():
                return self._name(tree)
            case syntax.Chain():
                return self._chain(tree)
            case syntax.Comparison():
                return self._comparison(tree, span)
            case syntax.Unary():
                return self._unary(tree, span)
            case syntax.Conditional():
                return self._conditional(tree, span)
            case syntax.Call():
                return calls.call(self, tree, span)
            case syntax.Subscript():
                return self._subscript(tree)
            case syntax.Member():
                imported.refuse_member(self, tree)
                return None
            case syntax.Reduction():
                return self._reduction(tree, span)
            case _:
                assert_never(tree)

    # Names

    def _name(self, tree: Name) -> Node | None:
        symbol = self.scope.find(tree.text)
        match symbol:
            case Value(node):
                return node
            case TensorName(tensor):
                if tensor is not None:
                    help = declaration(tensor, symbol.span)
                    self.error(
                        "E013", f"`{tree.text}` is a tensor", tree, f"expected {expected_index(tensor, [])}", help
                    )
                return None
            case None:
                return self._built_in(tree)
            case _:
                form = f"`{tree.text}.mask()`" if symbol.kind == "import" else f"`{tree.text}(...)`"
                article = "an" if symbol.kind == "import" else "a"
                self.error("E013", f"`{tree.text}` is {article} {symbol.kind}, not a value", tree, f"expected {form}")
                return None

    def _built_in(self, tree: Name) -> Node | None:
        name = tree.text
        if name == "score":
            return self.score
        node = BUILT_IN.get(name) or self.free_sizes.get(name)
        if node is not None:
            return node
        if name in FUNCTION_NAMES:
            self.error("E013", f"`{name}` is a function, not a value", tree, help=f"call it: `{name}(...)`")
        elif name in RESULTS:
            self.error("E010", f"`{name}` has no value here", tree, help="only `score` stands for what comes in")
        elif name in self.later:
            where = f"it is defined on line {self.later[name].line}: move that above this line"
            self.error("E016", f"`{name}` is used before its definition", tree, "not defined yet", where)
        else:
            self.unknown(tree)
        return None

    def unknown(self, tree: Name, code: str = "E010", what: str = "name", extra: Sequence[str] = ()) -> None:
        help = unknown_name_help(tree.text, [*self.known(), *extra])
        self.error(code, f"unknown {what} `{tree.text}`", tree, "not defined", help)

    def known(self) -> list[str]:
        return [*self.scope.visible(), *self.free_sizes, *BUILT_IN]

    # Operators

    def _chain(self, tree: syntax.Chain) -> Node | None:
        nodes = self.expressions(tree.operands)
        if any(op not in ARITHMETIC and op not in LOGIC for op in tree.operators):
            return None  # an operator of another language, reported by the lexer
        logical = tree.operators[0] in LOGIC
        kind = self.build.boolean if logical else self.build.number
        what = f"an operand of `{tree.operators[0]}`"
        operands = [self._results[id(x)] for x in tree.operands]
        kept = [kind(node, self.file.span(x), what) for node, x in zip(operands, tree.operands, strict=True)]
        if nodes is None or any(node is None for node in kept):
            return None
        result, start = nodes[0], tree.start
        for op, operand, node in zip(tree.operators, tree.operands[1:], nodes[1:], strict=True):
            span = Span(self.file.source, start, operand.end)
            if logical:
                result = self.build.at(ir.Binary(LOGIC[op], result, node), span)
                continue
            left = Span(self.file.source, start, operand.start)
            next_result = self.build.binary(ARITHMETIC[op], result, node, (left, self.file.span(operand)), span)
            if next_result is None:
                return None
            result = next_result
        return result

    def _comparison(self, tree: syntax.Comparison, span: Span) -> Node | None:
        nodes = self.expressions(tree.operands)
        if nodes is None or any(op in hints.OPERATORS or op in hints.CHARACTERS for op in tree.operators):
            return None
        result: Node | None = None
        spans = [self.file.span(x) for x in tree.operands]
        for i, op in enumerate(tree.operators):
            pair = Span(self.file.source, spans[i].start, spans[i + 1].end)
            one = self.build.compare(op, nodes[i], nodes[i + 1], (spans[i], spans[i + 1]), pair)
            if one is None:
                return None
            result = one if result is None else self.build.at(ir.Binary(BinaryOp.AND, result, one), span)
        return result

    def _unary(self, tree: syntax.Unary, span: Span) -> Node | None:
        x = self.expression(tree.operand)
        at = self.file.span(tree.operand)
        if tree.operator == "not":
            x = self.build.boolean(x, at, "the operand of `not`")
            return None if x is None else self.build.unary(UnaryOp.NOT, x, span)
        if tree.operator not in ("+", "-"):
            return None
        x = self.build.number(x, at, f"the operand of `{tree.operator}`")
        if x is None or tree.operator == "+":
            return x
        return self.build.unary(UnaryOp.NEG, x, span)

    def _conditional(self, tree: syntax.Conditional, span: Span) -> Node | None:
        x = self.expression(tree.value)
        condition = self.expression(tree.condition)
        y = self.expression(tree.otherwise)
        condition = self.build.boolean(condition, self.file.span(tree.condition), "the condition")
        if x is None or condition is None or y is None:
            return None
        return self.build.select(condition, x, y, (self.file.span(tree.value), self.file.span(tree.otherwise)), span)

    # Tensors

    def _subscript(self, tree: syntax.Subscript) -> Node | None:
        base = tree.base
        nodes = self.expressions(tree.indices)
        if isinstance(base, syntax.Subscript):
            if self._subscript(base) is not None:
                self.error(
                    "E013", "an element of a tensor has no axes", tree, help="all indices stand in one pair: `t[b, q]`"
                )
            return None
        symbol = self.scope.find(base.text) if isinstance(base, Name) else None
        if isinstance(symbol, TensorName):
            return None if symbol.tensor is None else self._load(tree, symbol.tensor, symbol.span, nodes)
        if symbol is None and isinstance(base, Name) and base.text not in self.known():
            self._built_in(base)
            return None
        node = self.expression(base)
        if node is not None:
            what = f"`{base.text}`" if isinstance(base, Name) else "this"
            self.error("E013", f"{what} is {_article(node)}, not a tensor", base, help="only a tensor is indexed")
        return None

    def _load(self, tree: syntax.Subscript, tensor: Tensor, at: Span, nodes: list[Node] | None) -> Node | None:
        axes = len(tensor.extents)
        if axes != len(tree.indices):
            given = [self.file.span(index).text for index in tree.indices]
            message = (
                f"`{tensor.name}` has {axes} {'axis' if axes == 1 else 'axes'} but is indexed with {len(tree.indices)}"
            )
            label = f"expected {expected_index(tensor, given)}"
            self.error("E012", message, tree, label, declaration(tensor, at))
            return None
        if nodes is None:
            return None
        spans = [self.file.span(index) for index in tree.indices]
        kept = [self.build.integer(x, span, "an index") for x, span in zip(nodes, spans, strict=True)]
        inside = [self._inside(tensor, i, x, span) for i, (x, span) in enumerate(zip(nodes, spans, strict=True))]
        if not all(inside) or any(x is None for x in kept):
            return None
        return self.build.at(ir.Load(tensor.name, tuple(nodes), tensor.dtype.type), self.file.span(tree))

    def _inside(self, tensor: Tensor, axis: int, index: Node, span: Span) -> bool:
        """Whether a constant index can lie in its axis."""
        value = self.build.constant(index)
        extent = tensor.extents[axis]
        if value is None:
            return True
        if value < 0:
            self.build.error(
                "E025", f"index {value} is negative", span, "", "indices count from 0, from the front only"
            )
            return False
        if isinstance(extent, ir.Const) and value >= extent.value:
            label = f"axis {axis} of `{tensor.name}` has extent {extent.value}"
            self.build.error("E025", f"index {value} is out of range", span, label)
            return False
        return True

    # Reductions

    def _reduction(self, tree: syntax.Reduction, span: Span) -> Node | None:
        op = REDUCTIONS.get(tree.callee.text) if isinstance(tree.callee, Name) else None
        if op is None:
            text = self.file.span(tree.callee).text
            help = "a reduction is one of `sum min max any all`"
            self.error("E015", f"`{text[:40]}` is not a reduction", tree.callee, help=help)
        low, high = self._bound(tree.low), self._bound(tree.high)
        trips = self._trips(tree, op, low, high)
        variable = None
        if low is not None and high is not None and trips is not None:
            variable = self.build.variable(tree.variable.text, self.level, low, high)
            self.build.at(variable, self.file.span(tree.variable))
        body = self._body(tree, variable, trips or 1)
        if body is None or op is None or variable is None or low is None or high is None:
            return None
        at = self.file.span(tree.body)
        kept = self.build.boolean if op in (ReduceOp.ANY, ReduceOp.ALL) else self.build.number
        if kept(body, at, f"the body of `{op.value}`") is None:
            return None
        return self.build.at(ir.Reduce(op, variable, low, high, body), span)

    def _bound(self, tree: Expression) -> Node | None:
        bound = self.build.integer(self.expression(tree), self.file.span(tree), "a bound of a reduction")
        if bound is not None and not self.build.is_static(bound):
            help = "bounds are literals and `const` parameters, so that the reduction can be unrolled"
            self.error("E034", "a bound of a reduction must be constant", tree, "this is not", help)
            return None
        return bound

    def _trips(self, tree: syntax.Reduction, op: ReduceOp | None, low: Node | None, high: Node | None) -> int | None:
        """The number of terms, with those of the reductions around; a bound that is a `const` parameter counts as 1."""
        if low is None or high is None:
            return None
        first, last = self.build.constant(low), self.build.constant(high)
        if first is None or last is None:
            return self.trips
        where = Span(self.file.source, tree.low.start, tree.high.end)
        if last < first or (last == first and op in (ReduceOp.MIN, ReduceOp.MAX)):
            self.build.error("E034", "the range is empty", where, "", "ranges are half open: `0..3` is 0, 1, 2")
            return None
        trips = self.trips * max(1, last - first)
        if trips > limits.TRIPS:
            self.build.error("E064", "the reduction has too many terms", where, f"{trips}; at most {limits.TRIPS}")
            return None
        return trips

    def _body(self, tree: syntax.Reduction, variable: Node | None, trips: int) -> Node | None:
        name = tree.variable
        calls.check_free(self, name, "the variable of a reduction")
        outer_scope, outer_trips = self.scope, self.trips
        self.scope = Scope(outer_scope, {name.text: Value(variable, "variable", self.file.span(name))})
        self.level, self.trips = self.level + 1, trips
        try:
            return self.expression(tree.body)
        finally:
            self.scope, self.trips = outer_scope, outer_trips
            self.level -= 1


def parts(tree: Expression) -> Iterator[Expression]:
    """The expressions directly inside an expression."""
    match tree:
        case syntax.Chain() | syntax.Comparison():
            yield from tree.operands
        case syntax.Unary():
            yield tree.operand
        case syntax.Conditional():
            yield from (tree.value, tree.condition, tree.otherwise)
        case syntax.Call():
            yield from (argument.value for argument in tree.arguments)
        case syntax.Subscript():
            yield from tree.indices
        case syntax.Reduction():
            yield from (tree.low, tree.high, tree.body)
        case syntax.Literal() | syntax.Name() | syntax.Member():
            return


def _article(node: Node) -> str:
    match node:
        case ir.Index():
            return "an index"
        case ir.Param():
            return "a parameter"
        case ir.Size():
            return "a size"
        case ir.Score():
            return "the score"
        case _:
            return "an int" if node.type is Type.INT else f"a {node.type.value}"
