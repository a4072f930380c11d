"""Masks as clauses: a disjunction of conjunctions of integer inequalities `form >= 0`.

    mask = C1 or C2 or ...        each Ci = L1 and L2 and ...

Comparisons become affine forms over unknowns. What is not affine becomes so by an identity that holds for all integers:

    e + c*max(a, b) >= 0   iff   e + c*a >= 0  or  e + c*b >= 0      (c > 0; `and` where c < 0; min is dual)
    |x| = max(x, -x)
    e + c*(x if p else y)  iff   (p and e + c*x >= 0) or (not p and e + c*y >= 0)
    y = x // W             adds  0 <= x - W*y <= W - 1               (W >= 1 is checked at the call)
    x % W                  is    x - W*(x // W)

`min` and `max` of one side only (of q alone or of k alone) stay whole: they are monotone, see `project`.
A part that cannot be read this way becomes an `Unknown` literal, with the reason; it is never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from attn_dsl.ir.nodes import (
    Binary,
    BinaryOp,
    Cast,
    Compare,
    CompareOp,
    Const,
    Index,
    Load,
    Node,
    Reduce,
    ReduceOp,
    Select,
    Unary,
    UnaryOp,
    post_order,
    substitute,
)
from attn_dsl.ir.types import Type
from attn_dsl.passes.formula import NO, YES, And, Atom, Clause, Fact, Formula, Or, Unknown, disjuncts
from attn_dsl.passes.monotone import POSITIONS, interval, varies
from attn_dsl.passes.polynomial import Poly
from attn_dsl.passes.symbolic import Form, Opaque, Space, constant, ratio, unknown

MAX_CLAUSES = 32
MAX_UNROLL = 64
MAX_CASES = 2000
"""Steps that a mask may take to come apart into affine comparisons; each nested `abs` doubles them."""
TOO_MANY = "it falls into too many cases"


Split = Callable[[Form, Poly, Node, frozenset[Node]], Formula]


def divisors(root: Node) -> tuple[Node, ...]:
    """The divisors of `//` and `%` that a call checks to be at least 1: parameters, sizes and what is made of them."""
    found: dict[Node, None] = {}
    for node in post_order(root):
        match node:
            case Binary(BinaryOp.FLOORDIV | BinaryOp.MOD, _, y) if y.type is Type.INT and not isinstance(y, Const):
                if not y.depends and not any(isinstance(n, Load) for n in post_order(y)):
                    found[y] = None
            case _:
                pass
    return tuple(found)


def clauses(mask: Node, space: Space, *, negated: bool = False) -> tuple[Clause, ...]:
    """The clauses of a mask, or of its negation. No clause means false; a clause without literals means true."""
    return Lowering(space).clauses(mask, negated=negated)


@dataclass
class Lowering:
    space: Space
    cases: int = 0
    _forms: dict[Node, Form] = field(default_factory=dict)

    def clauses(self, mask: Node, *, negated: bool) -> tuple[Clause, ...]:
        return tuple(disjuncts(self.formula(mask, not negated), MAX_CLAUSES))

    def formula(self, node: Node, wanted: bool) -> Formula:
        """The condition under which a BOOL node has the wanted value, negations pushed down to the literals."""
        self.cases += 1
        if self.cases > MAX_CASES:
            return Unknown(node, not wanted, TOO_MANY)
        match node:
            case Const(value):
                return YES if value == wanted else NO
            case Unary(UnaryOp.NOT, x):
                return self.formula(x, not wanted)
            case Binary(BinaryOp.AND | BinaryOp.OR as op, x, y):
                parts = (self.formula(x, wanted), self.formula(y, wanted))
                return And(parts) if (op is BinaryOp.AND) == wanted else Or(parts)
            case Select(condition, x, y):
                return self._choice(condition, lambda taken: self.formula(x if taken else y, wanted))
            case Reduce():
                return self._reduction(node, wanted)
            case Compare(op, x, y) if x.type is Type.BOOL:
                return self._choice(x, lambda value: self.formula(y, wanted == (value == (op is CompareOp.EQ))))
            case Compare(op, x, y) if x.type is Type.INT and varies(node):
                return self._comparison(node, op, x, y, wanted)
            case _ if not varies(node):
                return self._constant(node, wanted)
            case Compare():
                return Unknown(node, not wanted, "it compares floating-point numbers")
            case _:
                return Unknown(node, not wanted, self._reason(node))

    def _choice(self, condition: Node, then: Callable[[bool], Formula]) -> Formula:
        return Or(tuple(And((self.formula(condition, value), then(value))) for value in (True, False)))

    def _reduction(self, node: Reduce, wanted: bool) -> Formula:
        bodies = self._unrolled(node)
        if bodies is None:
            return Unknown(node, not wanted, f"its bounds are not constants at most {MAX_UNROLL} apart")
        parts = tuple(self.formula(body, wanted) for body in bodies)
        return And(parts) if (node.op is ReduceOp.ALL) == wanted else Or(parts)

    @staticmethod
    def _unrolled(node: Reduce) -> list[Node] | None:
        if not (isinstance(node.low, Const) and isinstance(node.high, Const)):
            return None
        low, high = int(node.low.value), int(node.high.value)
        if high - low > MAX_UNROLL:
            return None
        return [substitute(node.body, {node.var: Const(value)}) for value in range(low, high)]

    def _constant(self, node: Node, wanted: bool) -> Formula:
        match node:
            case Compare(op, x, y) if x.type is Type.INT:
                return self._comparison(node, op, x, y, wanted)
            case _:
                return Fact(node, not wanted)

    def _comparison(self, node: Node, op: CompareOp, x: Node, y: Node, wanted: bool) -> Formula:
        try:
            difference = self.form(x) - self.form(y)
        except Opaque as why:
            return Unknown(node, not wanted, str(why))
        at_least, at_most = difference, -difference
        match op, wanted:
            case (CompareOp.GE, True) | (CompareOp.LT, False):
                return self._atom(at_least, node, wanted)
            case (CompareOp.LE, True) | (CompareOp.GT, False):
                return self._atom(at_most, node, wanted)
            case (CompareOp.GT, True) | (CompareOp.LE, False):
                return self._atom(at_least - constant(1), node, wanted)
            case (CompareOp.LT, True) | (CompareOp.GE, False):
                return self._atom(at_most - constant(1), node, wanted)
            case (CompareOp.EQ, True) | (CompareOp.NE, False):
                return And((self._atom(at_least, node, wanted), self._atom(at_most, node, wanted)))
            case _:
                return Or(
                    (self._atom(at_least - constant(1), node, wanted), self._atom(at_most - constant(1), node, wanted))
                )

    # -- integer expressions ------------------------------------------------------------------------------------------

    def form(self, node: Node) -> Form:
        """An INT node as an affine form; what is not affine in it stays as an unknown."""
        if node not in self._forms:
            self._forms[node] = self._form(node) if varies(node) else constant(self.space.poly(node))
        return self._forms[node]

    def _form(self, node: Node) -> Form:
        match node:
            case Unary(UnaryOp.NEG, x):
                return -self.form(x)
            case Binary(BinaryOp.ADD, x, y):
                return self.form(x) + self.form(y)
            case Binary(BinaryOp.SUB, x, y):
                return self.form(x) - self.form(y)
            case Binary(BinaryOp.MUL, x, y) if not (varies(x) and varies(y)):
                factor, varying = (y, x) if varies(x) else (x, y)
                return self._product(node, self.space.poly(factor), varying)
            case Binary(BinaryOp.FLOORDIV, x, y):
                return unknown(self._quotient(x, y))
            case Binary(BinaryOp.MOD, x, y):
                return self.form(x) - unknown(self._quotient(x, y)).times(self.space.poly(y))
            case Reduce(ReduceOp.SUM):
                return self._sum(node)
            case Index() | Binary(BinaryOp.MIN | BinaryOp.MAX) | Unary(UnaryOp.ABS | UnaryOp.SIGN) | Select() | Cast():
                return unknown(node)
            case _:
                raise Opaque(self._reason(node))

    def _product(self, node: Node, factor: Poly, varying: Node) -> Form:
        if self.space.nonnegative(factor) is not None or self.space.nonnegative(-factor) is not None:
            return self.form(varying).times(factor)
        if interval(node) is not None:
            return unknown(node)
        raise Opaque("the sign of a factor of a position is not known")

    def _quotient(self, x: Node, y: Node) -> Node:
        """`x // y` under one name: (x // a) // b is x // (a * b)."""
        if varies(y):
            raise Opaque("it divides by what varies within a tile")
        divisor = self.space.poly(y)
        if self.space.nonnegative(divisor - 1) is not True:
            raise Opaque("it divides by what is not known to be positive")
        while isinstance(x, Binary) and x.op is BinaryOp.FLOORDIV and not varies(x.y):
            divisor, x = divisor * self.space.poly(x.y), x.x
        self.form(x)
        return Binary(BinaryOp.FLOORDIV, x, self.space.node(divisor))

    def _sum(self, node: Reduce) -> Form:
        bodies = self._unrolled(node)
        if bodies is None:
            raise Opaque(f"its bounds are not constants at most {MAX_UNROLL} apart")
        total = constant(0)
        for body in bodies:
            total = total + self.form(body)
        return total

    @staticmethod
    def _reason(node: Node) -> str:
        for inner in post_order(node):
            if isinstance(inner, Load) and varies(inner):
                return f"it reads tensor `{inner.tensor}` at positions of the tile"
        return "it is not linear in the positions"

    # -- atoms --------------------------------------------------------------------------------------------------------

    def _atom(self, form: Form, origin: Node, wanted: bool) -> Formula:
        try:
            return self._expanded(form, origin)
        except Opaque as why:
            return Unknown(origin, not wanted, str(why))

    def _expanded(self, form: Form, origin: Node, defined: frozenset[Node] = frozenset(), law: bool = False) -> Formula:
        """The atom `form >= 0`, its non-affine unknowns replaced by cases, its quotients joined by their laws.

        `defined` are the quotients whose laws stand already. A `law` holds everywhere, but no longer once it is split
        into cases, which hold each under its condition.
        """
        self.cases += 1
        if self.cases > MAX_CASES:
            raise Opaque(TOO_MANY)
        for term, coefficient in form.terms.items():
            cases = self._cases(term)
            if cases is not None:
                rest = form - unknown(term).times(coefficient)
                return cases(rest, coefficient, origin, defined)
        if not form.terms and self.space.nonnegative(form.const) is not None:
            return YES if self.space.nonnegative(form.const) else NO
        quotients = [term for term in form.terms if is_quotient(term) and term not in defined]
        known = defined | set(quotients)
        laws = [
            self._expanded(definition, quotient, known, law=True)
            for quotient in quotients
            for definition in self.laws(quotient, form.terms)
        ]
        return And((Atom(form, origin, law), *laws))

    def laws(self, quotient: Node, beside: Iterable[Node]) -> Iterator[Form]:
        """0 <= x - W*y <= W - 1 for y = x // W, and 0 <= z - V*y <= V - 1 where z = x // (W/V) stands beside it."""
        assert isinstance(quotient, Binary)
        divisor = self.space.poly(quotient.y)
        yield from self._remainder(self.form(quotient.x), quotient, divisor)
        for finer in beside:
            if finer is not quotient and is_quotient(finer) and isinstance(finer, Binary) and finer.x is quotient.x:
                coarser = ratio(divisor, self.space.poly(finer.y))
                if coarser is not None:
                    yield from self._remainder(unknown(finer), quotient, coarser)

    @staticmethod
    def _remainder(x: Form, quotient: Node, divisor: Poly) -> Iterator[Form]:
        remainder = x - unknown(quotient).times(divisor)
        yield remainder
        yield constant(divisor - 1) - remainder

    def _cases(self, node: Node) -> Split | None:
        """How to split an atom on an node, or None where the node stays."""
        match node:
            case Binary(BinaryOp.MIN | BinaryOp.MAX as op, x, y):
                if len(node.depends & POSITIONS) == 1 and interval(node) is not None:
                    return None
                return self._extremum(op is BinaryOp.MAX, self.form(x), self.form(y))
            case Unary(UnaryOp.ABS, x):
                return self._extremum(True, self.form(x), -self.form(x))
            case Unary(UnaryOp.SIGN, x):
                zero, one = Const(0), Const(1)
                sign = Select(Compare(CompareOp.LT, x, zero), Const(-1), zero)
                return self._selection(Select(Compare(CompareOp.GT, x, zero), one, sign))
            case Cast(x) if x.type is Type.BOOL:
                return self._selection(Select(x, Const(1), Const(0)))
            case Select():
                return self._selection(node)
            case _:
                return None

    def _extremum(self, is_max: bool, x: Form, y: Form) -> Split:
        def split(rest: Form, coefficient: Poly, origin: Node, defined: frozenset[Node]) -> Formula:
            rising = self.space.nonnegative(coefficient)
            parts = tuple(self._expanded(rest + side.times(coefficient), origin, defined) for side in (x, y))
            return Or(parts) if is_max == rising else And(parts)

        return split

    def _selection(self, node: Select) -> Split:
        def split(rest: Form, coefficient: Poly, origin: Node, defined: frozenset[Node]) -> Formula:
            def taken(value: bool) -> Formula:
                branch = self.form(node.x if value else node.y)
                return self._expanded(rest + branch.times(coefficient), origin, defined)

            return self._choice(node.condition, taken)

        return split


def is_quotient(node: Node) -> bool:
    return isinstance(node, Binary) and node.op is BinaryOp.FLOORDIV
