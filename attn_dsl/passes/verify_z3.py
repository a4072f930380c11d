"""Ask z3 whether a BOOL expression can hold: all integers at once, parameters, lengths and tile positions symbolic.

Floats are not modelled: a comparison of floats is a truth value of its own, a float made an integer an integer of its
own. Tensors are functions of their indices, bounded by what their declarations promise. That gives the expression more
ways to hold than it has, so that "never" is a proof, and a way to hold is an answer once plain integers confirm it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import z3

from attn_dsl.ir.nodes import (
    Binary,
    BinaryOp,
    Cast,
    Compare,
    CompareOp,
    Const,
    Load,
    Node,
    Select,
    Unary,
    UnaryOp,
    post_order,
)
from attn_dsl.ir.types import Type

SMALL = (16, 256, 4096)
"""Bounds that are tried, in turn, for the numbers of a counterexample: small ones are easier to follow."""

_BINARY: dict[BinaryOp, Callable[[Any, Any], Any]] = {
    BinaryOp.ADD: lambda x, y: x + y,
    BinaryOp.SUB: lambda x, y: x - y,
    BinaryOp.MUL: lambda x, y: x * y,
    BinaryOp.MIN: lambda x, y: z3.If(x <= y, x, y),
    BinaryOp.MAX: lambda x, y: z3.If(x >= y, x, y),
    BinaryOp.AND: lambda x, y: z3.And(x, y),
    BinaryOp.OR: lambda x, y: z3.Or(x, y),
}
_COMPARE: dict[CompareOp, Callable[[Any, Any], Any]] = {
    CompareOp.EQ: lambda x, y: x == y,
    CompareOp.NE: lambda x, y: x != y,
    CompareOp.LT: lambda x, y: x < y,
    CompareOp.LE: lambda x, y: x <= y,
    CompareOp.GT: lambda x, y: x > y,
    CompareOp.GE: lambda x, y: x >= y,
}


@dataclass
class Z3:
    """One question to z3: whether all of `conditions` can hold at once.

    `leaves` are nodes that are not looked into; the conditions say of `positive` nodes that they are at least 1.
    """

    conditions: Sequence[Node]
    leaves: frozenset[Node]
    positive: frozenset[Node]
    terms: dict[Node, Any] = field(default_factory=dict)

    def find(self, timeout: float) -> dict[Node, int] | str | None:
        """Values of the leaves at which the conditions hold; None where there are none; or why that is not known.

        `timeout` is in seconds.
        """
        solver = z3.Solver()
        solver.set("timeout", int(timeout * 1000))
        self._translate(*self.conditions)
        solver.add(*(self.terms[condition] for condition in self.conditions))
        answer = solver.check()
        if answer == z3.unsat:
            return None
        if answer != z3.sat:
            return f"no answer in {timeout:g} s ({solver.reason_unknown()})"
        return self._values(self._small_model(solver))

    def _small_model(self, solver: Any) -> Any:
        model = solver.model()
        numbers = [self.terms[node] for node in self.terms if node in self.leaves and node.type is Type.INT]
        for bound in SMALL:
            solver.push()
            solver.add(*(z3.And(-bound <= x, x <= bound) for x in numbers))
            if solver.check() == z3.sat:
                return solver.model()
            solver.pop()
        return model

    def _values(self, model: Any) -> dict[Node, int]:
        values: dict[Node, int] = {}
        for node, term in self.terms.items():
            if node in self.leaves:
                value = model.eval(term, model_completion=True)
                values[node] = z3.is_true(value) if node.type is Type.BOOL else int(value.as_long())
        return values

    # -- translation --------------------------------------------------------------------------------------------------

    def _translate(self, *roots: Node) -> None:
        for node in post_order(*roots):
            if node not in self.terms and node.type is not Type.FLOAT and self._is_visible(node):
                self.terms[node] = self._term(node)

    def _is_visible(self, node: Node) -> bool:
        """Whether a node is a leaf or has its operands; the inside of a leaf may hold floats."""
        needed = node.indices if isinstance(node, Load) else () if node in self.leaves else node.children
        return all(child in self.terms for child in needed)

    def _term(self, node: Node) -> Any:
        match node:
            case Load(tensor, indices):
                sort = z3.BoolSort() if node.type is Type.BOOL else z3.IntSort()
                return z3.Function(tensor, *[z3.IntSort()] * len(indices), sort)(*(self.terms[i] for i in indices))
            case _ if node in self.leaves or not (node.children or isinstance(node, Const)):
                name = str(len(self.terms))
                return z3.Bool(name) if node.type is Type.BOOL else z3.Int(name)
            case Const(value):
                return z3.BoolVal(value) if node.type is Type.BOOL else z3.IntVal(value)
            case Unary(op, x):
                return _unary(op, self.terms[x])
            case Binary(BinaryOp.FLOORDIV | BinaryOp.MOD as op, x, y):
                return self._division(op, self.terms[x], y)
            case Binary(BinaryOp.POW, x, Const(exponent)):
                return reduce(lambda total, factor: total * factor, [self.terms[x]] * int(exponent), z3.IntVal(1))
            case Binary(op, x, y):
                return _BINARY[op](self.terms[x], self.terms[y])
            case Compare(op, x, y):
                return _COMPARE[op](self.terms[x], self.terms[y])
            case Select(condition, x, y):
                return z3.If(self.terms[condition], self.terms[x], self.terms[y])
            case Cast(x):
                return z3.If(self.terms[x], z3.IntVal(1), z3.IntVal(0))
            case _:
                raise AssertionError(node)

    def _division(self, op: BinaryOp, x: Any, divisor: Node) -> Any:
        """z3 rounds so that the remainder is >= 0, which is the floor where the divisor is positive."""
        y = self.terms[divisor]
        is_positive = divisor in self.positive or (isinstance(divisor, Const) and divisor.value > 0)
        quotient = x / y if is_positive else z3.If(y > 0, x / y, (-x) / (-y))
        return quotient if op is BinaryOp.FLOORDIV else x - y * quotient


def _unary(op: UnaryOp, x: Any) -> Any:
    match op:
        case UnaryOp.NEG:
            return -x
        case UnaryOp.NOT:
            return z3.Not(x)
        case UnaryOp.ABS:
            return z3.If(x >= 0, x, -x)
        case _:
            assert op is UnaryOp.SIGN, op
            return z3.If(x > 0, z3.IntVal(1), z3.If(x < 0, z3.IntVal(-1), z3.IntVal(0)))
