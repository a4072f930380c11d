"""The only place where the checker makes IR nodes: types are reconciled, constants known, limits counted.

`None` is the poison value: an expression with an error is `None`, and so is whatever is made of it, so that one error
gives one message.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import chain, count

from attn_dsl.errors import Diagnostic, Span
from attn_dsl.frontend import limits
from attn_dsl.frontend.tokens import Report
from attn_dsl.ir import nodes as ir
from attn_dsl.ir.nodes import BinaryOp, CompareOp, Node, UnaryOp
from attn_dsl.ir.types import Type

COMPARISONS = {
    "==": CompareOp.EQ,
    "!=": CompareOp.NE,
    "<": CompareOp.LT,
    "<=": CompareOp.LE,
    ">": CompareOp.GT,
    ">=": CompareOp.GE,
}
ARITHMETIC = {
    "+": BinaryOp.ADD,
    "-": BinaryOp.SUB,
    "*": BinaryOp.MUL,
    "/": BinaryOp.DIV,
    "//": BinaryOp.FLOORDIV,
    "%": BinaryOp.MOD,
    "**": BinaryOp.POW,
}
LOGIC = {"and": BinaryOp.AND, "or": BinaryOp.OR}


class LimitReached(Exception):
    """Checking stops: going on could take unbounded time."""

    def __init__(self, diagnostic: Diagnostic) -> None:
        super().__init__(diagnostic.message)
        self.diagnostic = diagnostic


@dataclass(frozen=True, slots=True)
class _Facts:
    depth: int
    tree: int
    value: int | None  # of an INT node without parameters, sizes and indices


class Builder:
    """Makes nodes for one file, and remembers where each was written first."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.locations: dict[Node, Span] = {}
        self.static_parameters: set[Node] = set()
        self.taken: set[str] = set()
        self.depth = 0
        self._facts: dict[Node, _Facts] = {}
        self._variables: dict[tuple[int, Node, Node], ir.Var] = {}
        self._steps = 0

    def error(self, code: str, message: str, span: Span, label: str = "", help: str = "") -> None:
        self.report(Diagnostic(code, message, span, label, help))

    def step(self, span: Span) -> None:
        """Count one visited expression."""
        self._steps += 1
        if self._steps > limits.EXPANSION:
            self._stop(f"more than {limits.EXPANSION} expressions once calls are inlined", span)

    def at(self, node: Node, span: Span) -> Node:
        """Register a node, whose operands are registered."""
        self.locations.setdefault(node, span)
        if node in self._facts:
            return node
        below = [self._facts[child] for child in node.children]
        depth = 1 + max((fact.depth for fact in below), default=0)
        tree = 1 + sum(fact.tree for fact in below)
        if depth > limits.NODE_DEPTH:
            self._stop(f"more than {limits.NODE_DEPTH} operations inside one another", span)
        if tree > limits.TREE_SIZE:
            self._stop(f"an expression of more than {limits.TREE_SIZE} operations once names are inlined", span)
        if len(self._facts) >= limits.NODES:
            self._stop(f"more than {limits.NODES} distinct operations", span)
        self._facts[node] = _Facts(depth, tree, self._evaluate(node, [fact.value for fact in below], span))
        return node

    @contextmanager
    def reporting(self, report: Report) -> Iterator[None]:
        """Send what is found inside to another place."""
        before, self.report = self.report, report
        try:
            yield
        finally:
            self.report = before

    def variable(self, name: str, level: int, low: Node, high: Node) -> ir.Var:
        """The variable of a reduction inside `level` others.

        One name always has one range, and never stands inside itself; equal reductions share it, and are one node.
        """
        key = (level, low, high)
        if key not in self._variables:
            free = chain([name], (f"{name}_{i}" for i in count(2)))
            chosen = next(candidate for candidate in free if candidate not in self.taken)
            self.taken.add(chosen)
            self._variables[key] = ir.Var(chosen)
        return self._variables[key]

    def is_static(self, node: Node) -> bool:
        """Whether only literals and `const` parameters make up an expression."""
        leaves = (n for n in ir.post_order(node) if not n.children)
        return all(isinstance(n, ir.Const) or n in self.static_parameters for n in leaves)

    def constant(self, node: Node) -> int | None:
        """The value of a constant INT expression."""
        return self._facts[node].value

    def _stop(self, message: str, span: Span) -> None:
        raise LimitReached(Diagnostic("E062", message, span, help="this is far more than any attention variant needs"))

    def _evaluate(self, node: Node, values: list[int | None], span: Span) -> int | None:
        if isinstance(node, ir.Const):
            return node.value if type(node.value) is int else None
        if node.type is not Type.INT or not values or any(value is None for value in values):
            return None
        result = _fold(node, [value for value in values if value is not None])
        if result is not None and abs(result) > limits.INTEGER:
            self.error("E063", "the value does not fit 64 bits", span, "at most 2**63 - 1")
            return None
        return result

    # Types. Each returns an operand of the type asked for, or reports and returns None.

    def boolean(self, node: Node | None, span: Span, what: str) -> Node | None:
        if node is None or node.type is Type.BOOL:
            return node
        self.error("E020", f"{what} must be a bool", span, f"this is {a(node.type)}", "write a comparison: `x != 0`")
        return None

    def number(self, node: Node | None, span: Span, what: str) -> Node | None:
        if node is None or node.type is not Type.BOOL:
            return node
        self.error("E020", f"{what} must be a number", span, "this is a bool", "write `1 if condition else 0`")
        return None

    def integer(self, node: Node | None, span: Span, what: str) -> Node | None:
        node = self.number(node, span, what)
        if node is None or node.type is Type.INT:
            return node
        self.error("E021", f"{what} must be an int", span, "this is a float", "`floor(x)` and `ceil(x)` give an int")
        return None

    def floating(self, node: Node | None, span: Span, what: str) -> Node | None:
        node = self.number(node, span, what)
        return None if node is None else self.to_float(node, span)

    def to_float(self, node: Node, span: Span) -> Node:
        """int to float; a literal becomes a float literal."""
        if node.type is Type.FLOAT:
            return node
        if isinstance(node, ir.Const):
            return self.at(ir.Const(float(node.value)), span)
        return self.at(ir.Cast(node, Type.FLOAT), span)

    def common(self, operands: list[Node], spans: list[Span]) -> list[Node]:
        """Numbers of one type: all float if one is."""
        if all(node.type is Type.INT for node in operands):
            return operands
        return [self.to_float(node, span) for node, span in zip(operands, spans, strict=True)]

    # Operations. Operands are not None.

    def unary(self, op: UnaryOp, x: Node, span: Span) -> Node:
        if op is UnaryOp.NEG and isinstance(x, ir.Const):
            return self.at(ir.Const(-x.value), span)
        return self.at(ir.Unary(op, x), span)

    def fold(self, op: BinaryOp, operands: list[Node], spans: list[Span], span: Span) -> Node:
        """`op` over two or more numbers, from the left."""
        operands = self.common(operands, spans)
        return reduce(lambda x, y: self.at(ir.Binary(op, x, y), span), operands)

    def binary(self, op: BinaryOp, x: Node, y: Node, spans: tuple[Span, Span], span: Span) -> Node | None:
        """An arithmetic operation of two numbers."""
        if op is BinaryOp.DIV:
            x, y = self.to_float(x, spans[0]), self.to_float(y, spans[1])
        elif op in (BinaryOp.FLOORDIV, BinaryOp.MOD):
            if not self._positive(y, spans[1]):
                return None
        elif op is BinaryOp.POW and not self._exponent(x, y, spans[1]):
            return None
        return self.fold(op, [x, y], list(spans), span)

    def _positive(self, divisor: Node, span: Span) -> bool:
        value: int | float | None = self._facts[divisor].value
        if isinstance(divisor, ir.Const):
            value = divisor.value
        if value is None or value > 0:
            return True
        self.error("E022", "the divisor must be positive", span, f"this is {value}")
        return False

    def _exponent(self, x: Node, y: Node, span: Span) -> bool:
        """The law of an int power: the exponent is a constant and not negative, so that the power is an int."""
        if x.type is not Type.INT or y.type is not Type.INT:
            return True
        value = self._facts[y].value
        if value is None:
            if self.is_static(y):
                return True
            advice = "a literal or a `const` parameter; for a float power write `float(x) ** y`"
            self.error("E023", "the exponent of an int must be constant", span, "this is not", advice)
            return False
        if value < 0:
            self.error(
                "E023", "the exponent of an int must not be negative", span, f"this is {value}", "write `1 / x ** n`"
            )
            return False
        if value > limits.EXPONENT:
            self.error("E063", "the exponent is too large", span, f"at most {limits.EXPONENT}")
            return False
        return True

    def compare(self, text: str, x: Node, y: Node, spans: tuple[Span, Span], span: Span) -> Node | None:
        if (x.type is Type.BOOL) != (y.type is Type.BOOL):
            label = f"{a(x.type)} and {a(y.type)}"
            self.error("E020", "a bool is compared with a number", span, label, "a bool is not a number")
            return None
        if x.type is Type.BOOL:
            if text not in ("==", "!="):
                self.error("E020", f"`{text}` compares numbers", span, "these are bools", "bools have `==` and `!=`")
                return None
        else:
            x, y = self.common([x, y], list(spans))
        return self.at(ir.Compare(COMPARISONS[text], x, y), span)

    def select(self, condition: Node, x: Node, y: Node, spans: tuple[Span, Span], span: Span) -> Node | None:
        if (x.type is Type.BOOL) != (y.type is Type.BOOL):
            label = f"{a(x.type)} or {a(y.type)}"
            self.error("E020", "the branches of the condition have different types", span, label)
            return None
        if x.type is not Type.BOOL:
            x, y = self.common([x, y], list(spans))
        return self.at(ir.Select(condition, x, y), span)


def _fold(node: Node, values: list[int]) -> int | None:
    """The value of an integer operation on constants."""
    match node:
        case ir.Unary(UnaryOp.NEG):
            return -values[0]
        case ir.Unary(UnaryOp.ABS):
            return abs(values[0])
        case ir.Unary(UnaryOp.SIGN):
            return (values[0] > 0) - (values[0] < 0)
        case ir.Binary(op):
            return _fold_binary(op, *values)
        case _:
            return None


def _fold_binary(op: BinaryOp, x: int, y: int) -> int | None:
    match op:
        case BinaryOp.ADD:
            return x + y
        case BinaryOp.SUB:
            return x - y
        case BinaryOp.MUL:
            return x * y
        case BinaryOp.FLOORDIV:
            return x // y if y > 0 else None
        case BinaryOp.MOD:
            return x % y if y > 0 else None
        case BinaryOp.POW:
            return x**y if 0 <= y <= limits.EXPONENT else None
        case BinaryOp.MIN:
            return min(x, y)
        case BinaryOp.MAX:
            return max(x, y)
        case _:
            return None


def a(kind: Type) -> str:
    """A type with its article."""
    return f"an {kind.value}" if kind is Type.INT else f"a {kind.value}"
