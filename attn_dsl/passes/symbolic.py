"""The door between the IR and SymPy, and the only module that imports SymPy.

Inside, an integer expression is an affine form over *unknowns* (nodes that vary within a tile) whose coefficients are
polynomials over *symbols* (nodes that a tile sees as constants: lengths, parameters, positions of the tile, tensors of
`b` and `h` alone). What is no polynomial (`min`, `//` of constants, a tensor element) is one opaque symbol.

SymPy divides polynomials by polynomials, and is loaded when a divisor has more than one monomial: a question to its
ring takes tens of microseconds, one to `sympy.simplify` or the assumption system milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import gcd
from typing import Any

from attn_dsl.ir.nodes import (
    Binary,
    BinaryOp,
    Compare,
    CompareOp,
    Const,
    Index,
    Node,
    Size,
    Unary,
    UnaryOp,
    Var,
    substitute,
)
from attn_dsl.passes import polynomial
from attn_dsl.passes.monotone import DOWN, K0, K1, Q0, Q1, Q_OFFSET, UP, direction
from attn_dsl.passes.polynomial import ONE, ZERO, Monomial, Poly, number, quotient

MAX_SYMBOLS = 96


class Opaque(Exception):
    """An expression cannot be read as integers, or not cheaply; carries the reason."""


@dataclass(frozen=True)
class Form:
    """`sum(coefficient * unknown) + const`, an affine form with polynomial coefficients, none of them zero."""

    terms: Mapping[Node, Poly]
    const: Poly

    def __add__(self, other: Form) -> Form:
        terms = dict(self.terms)
        for unknown, coefficient in other.terms.items():
            total = terms[unknown] + coefficient if unknown in terms else coefficient
            if total:
                terms[unknown] = total
            else:
                del terms[unknown]
        return Form(terms, self.const + other.const)

    def __sub__(self, other: Form) -> Form:
        return self + -other

    def __neg__(self) -> Form:
        return Form({u: -c for u, c in self.terms.items()}, -self.const)

    def times(self, factor: Poly) -> Form:
        if not factor:
            return Form({}, factor)
        if factor == ONE:
            return self
        return Form({u: c * factor for u, c in self.terms.items()}, self.const * factor)

    @property
    def key(self) -> tuple[frozenset[tuple[Node, Poly]], Poly]:
        return frozenset(self.terms.items()), self.const


def unknown(node: Node) -> Form:
    """The form that is one unknown."""
    return Form({node: ONE}, ZERO)


def constant(poly: Poly | int) -> Form:
    """The form that is a constant within the tile."""
    return Form({}, number(poly) if isinstance(poly, int) else poly)


Term = tuple[int, tuple[Node, ...]]
"""A coefficient and the nodes that it multiplies."""


@dataclass
class Space:
    """The symbols of one proof: each stands for a node, and carries what is known of its sign.

    `positive` are the nodes that a call has checked to be at least 1 (the divisors of `//` and `%`), and the elements
    of tensors that are promised to be.
    """

    positive: frozenset[Node] = frozenset()
    _nodes: list[Node] = field(default_factory=list)
    _symbols: dict[Node, int] = field(default_factory=dict)
    _least: list[int | None] = field(default_factory=list)
    _shift: dict[int, Poly] = field(default_factory=dict)
    _loose: set[int] = field(default_factory=set)
    _signs: dict[Poly, bool | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in (Q0, Q1, K0, K1, Q_OFFSET):
            self.symbol(node)

    # -- IR to polynomials --------------------------------------------------------------------------------------------

    def poly(self, node: Node) -> Poly:
        """An INT node that does not vary within a tile, as a polynomial over symbols."""
        match node:
            case Const(value):
                return number(int(value))
            case Unary(UnaryOp.NEG, x):
                return -self.poly(x)
            case Binary(BinaryOp.ADD, x, y):
                return self.poly(x) + self.poly(y)
            case Binary(BinaryOp.SUB, x, y):
                return self.poly(x) - self.poly(y)
            case Binary(BinaryOp.MUL, x, y):
                return self.poly(x) * self.poly(y)
            case _:
                return self.symbol(node)

    def symbol(self, node: Node) -> Poly:
        return polynomial.symbol(self._position(node))

    def _position(self, node: Node) -> int:
        """The number of a symbol; a new one is placed behind the others."""
        if node not in self._symbols:
            if len(self._nodes) == MAX_SYMBOLS:
                raise Opaque(f"it needs more than {MAX_SYMBOLS} symbols")
            position = self._symbols[node] = len(self._nodes)
            self._nodes.append(node)
            self._least.append(None)
            self._least[position] = self._lower_bound(node)
            if self._least[position] is None:
                self._loose.add(position)
            self._relate(node, position)
        return self._symbols[node]

    def _lower_bound(self, node: Node) -> int | None:
        """A constant that the node is never below: 1 for sizes and checked divisors, 0 for positions."""
        if isinstance(node, Size) or node in self.positive:
            return 1
        if isinstance(node, (Index, Var)):
            return 0
        if isinstance(node, Binary) and node.op is BinaryOp.FLOORDIV:
            return 0 if self.nonnegative(self.poly(node.x)) and self.nonnegative(self.poly(node.y)) else None
        return None

    def _relate(self, node: Node, position: int) -> None:
        """What moves up with the tile is at least its value at the tile's first position: x(q1) = x(q0) + slack."""
        moved = direction(node)
        if moved not in (UP, DOWN):
            return
        first = self._position(substitute(node, {Q1: Q0, K1: K0}))
        slack = self.symbol(Var(f"slack{position}"))
        here = polynomial.symbol(first)
        self._shift[position] = here + slack if moved == UP else here - slack
        self._loose -= {position, first}

    # -- questions ----------------------------------------------------------------------------------------------------

    def nonnegative(self, poly: Poly) -> bool | None:
        """Whether `poly >= 0` for all values of its symbols: True, False (always negative), or None: don't know."""
        value = poly.integer
        if value is not None:
            return value >= 0
        if poly not in self._signs:
            self._signs[poly] = None if self._is_free(poly) else self._sign(self._shifted(poly))
        return self._signs[poly]

    def _is_free(self, poly: Poly) -> bool:
        """Whether a symbol of unknown sign occurs that nothing can cancel."""
        return not all(map(self._loose.isdisjoint, poly.terms))

    def _sign(self, poly: Poly) -> bool | None:
        least = self._minimum(poly)
        if least is not None and least >= 0:
            return True
        greatest = self._minimum(-poly)
        return False if greatest is not None and greatest > 0 else None

    def _minimum(self, poly: Poly) -> int | None:
        """A constant that the polynomial is never below: each monomial's, by the lower bounds of its symbols."""
        total = 0
        for monomial, coefficient in poly.terms.items():
            bound = coefficient
            for position in monomial:
                least = self._least[position]
                if least is None or coefficient < 0:
                    return None
                bound *= least
            total += bound
        return total

    def _shifted(self, poly: Poly) -> Poly:
        """The polynomial in terms of first positions and slacks."""
        if all(map(self._shift.keys().isdisjoint, poly.terms)):
            return poly
        total = ZERO
        for monomial, coefficient in poly.terms.items():
            term = number(coefficient)
            for position in monomial:
                term *= self._shift.get(position) or polynomial.symbol(position)
            total += term
        return total

    def common_factor(self, form: Form) -> Poly:
        """A positive divisor of every coefficient of a form's unknowns: their integer content, or the one they share.

        For a form without unknowns, the integer content of its constant.
        """
        if not form.terms:
            return number(max(1, form.const.content))
        coefficients = list(form.terms.values())
        integers = [value for c in coefficients if (value := c.integer) is not None]
        if 1 in integers or -1 in integers:
            return ONE
        if len(integers) == len(coefficients):
            return number(gcd(*integers))
        first = coefficients[0] if self.nonnegative(coefficients[0]) else -coefficients[0]
        shared = all(c in (first, -first) for c in coefficients)
        return first if shared and self.nonnegative(first - 1) else ONE

    def divide(self, form: Form, divisor: Poly) -> Form:
        """form / divisor, the constant rounded down; the divisor is positive and divides the other coefficients."""
        return Form({u: divided(c, divisor)[0] for u, c in form.terms.items()}, self.floor(form.const, divisor))

    def floor(self, poly: Poly, divisor: Poly) -> Poly:
        """floor(poly / divisor): what divides comes out of the floor, the rest is one symbol.

        floor(-x / d) = -1 - floor((x - 1) / d) keeps one spelling for both signs.
        """
        if divisor == ONE:
            return poly
        whole, rest = divided(poly, divisor)
        fixed, scale = rest.integer, divisor.integer
        if fixed is not None and scale is not None:
            return whole + fixed // scale
        if not rest:
            return whole
        if _leads_negative(rest):
            return whole - 1 - self._quotient(-rest - 1, divisor)
        return whole + self._quotient(rest, divisor)

    def _quotient(self, poly: Poly, divisor: Poly) -> Poly:
        return self.symbol(Binary(BinaryOp.FLOORDIV, self.node(poly), self.node(divisor))) if poly else ZERO

    # -- polynomials to IR --------------------------------------------------------------------------------------------

    def node(self, poly: Poly) -> Node:
        """A polynomial as an INT node, positive terms first, numbers last."""
        return _sum(self.terms(poly))

    def holds(self, form: Form) -> Node:
        """`form >= 0` as a comparison, with what is subtracted on the other side."""
        more, less, rest = self._split(form)
        if rest == -1:
            return Compare(CompareOp.GT, more, less)
        return Compare(CompareOp.GE, _shift(more, max(rest, 0)), _shift(less, max(-rest, 0)))

    def fails(self, form: Form) -> Node:
        """`form < 0` as a comparison, with what is subtracted on the other side."""
        more, less, rest = self._split(form)
        if rest == -1:
            return Compare(CompareOp.GE, less, more)
        return Compare(CompareOp.GT, _shift(less, max(-rest, 0)), _shift(more, max(rest, 0)))

    def _split(self, form: Form) -> tuple[Node, Node, int]:
        """form = more - less + rest."""
        rest = form.const.constant
        terms = list(self._form_terms(Form(form.terms, form.const - rest)))
        more = _sum((c, factors) for c, factors in terms if c > 0)
        less = _sum((-c, factors) for c, factors in terms if c < 0)
        return more, less, rest

    def terms(self, poly: Poly) -> list[Term]:
        """The terms of a polynomial, numbers last."""
        return [(coefficient, self.factors(monomial)) for monomial, coefficient in poly.ordered()]

    def factors(self, monomial: Monomial) -> tuple[Node, ...]:
        """The nodes whose product a monomial is."""
        return tuple(self._nodes[position] for position in monomial)

    def _form_terms(self, form: Form) -> Iterator[Term]:
        for node, coefficient in form.terms.items():
            for number_, factors in self.terms(coefficient):
                yield number_, (*factors, node)
        yield from self.terms(form.const)


def ratio(poly: Poly, divisor: Poly) -> Poly | None:
    """poly / divisor where the division is exact, else None."""
    whole, rest = divided(poly, divisor)
    return None if rest else whole


def divided(poly: Poly, divisor: Poly) -> tuple[Poly, Poly]:
    """The whole part and the rest, poly = whole * divisor + rest; no term of the rest is a multiple of the divisor's
    first term."""
    if poly == divisor:
        return ONE, ZERO
    if len(divisor.terms) > 1:
        return _divided_by_ring(poly, divisor)
    ((by, scale),) = divisor.terms.items()
    whole: dict[Monomial, int] = {}
    rest: dict[Monomial, int] = {}
    for monomial, coefficient in poly.terms.items():
        over = None if coefficient % scale else quotient(monomial, by)
        if over is None:
            rest[monomial] = coefficient
        else:
            whole[over] = coefficient // scale
    return Poly(whole), Poly(rest)


def _divided_by_ring(poly: Poly, divisor: Poly) -> tuple[Poly, Poly]:
    positions = sorted({p for operand in (poly, divisor) for monomial in operand.terms for p in monomial})
    ring = _ring(len(positions))

    def element(operand: Poly) -> Any:
        return ring.from_dict({tuple(map(monomial.count, positions)): c for monomial, c in operand.terms.items()})

    def back(result: Any) -> Poly:
        return Poly(
            {
                tuple(p for p, exponent in zip(positions, exponents, strict=True) for _ in range(exponent)): int(c)
                for exponents, c in result.items()
            }
        )

    whole, rest = element(poly).div(element(divisor))
    return back(whole), back(rest)


@lru_cache
def _ring(symbols: int) -> Any:
    """SymPy's sparse ring Z[s0, s1, ...] with its monomials in lexicographic order."""
    from sympy.polys.domains import ZZ
    from sympy.polys.rings import PolyRing

    return PolyRing([f"s{i}" for i in range(symbols)], ZZ)


def _leads_negative(poly: Poly) -> bool:
    """Whether the first monomial, numbers last, has a negative coefficient."""
    return bool(poly) and poly.ordered()[0][1] < 0


def _sum(terms: Iterable[Term]) -> Node:
    ordered = sorted(terms, key=lambda term: not term[1])
    leader = next((term for term in ordered if term[0] > 0), None)
    if leader is not None:
        ordered.remove(leader)
        ordered.insert(0, leader)
    total: Node | None = None
    for coefficient, factors in ordered:
        term = _product(abs(coefficient), factors)
        if total is not None:
            total = Binary(BinaryOp.ADD if coefficient > 0 else BinaryOp.SUB, total, term)
        elif coefficient > 0:
            total = term
        else:
            total = Unary(UnaryOp.NEG, term) if factors else Const(coefficient)
    return Const(0) if total is None else total


def _shift(node: Node, amount: int) -> Node:
    """node + amount, for an amount that is not negative."""
    if amount == 0:
        return node
    if isinstance(node, Const):
        return Const(int(node.value) + amount)
    return Binary(BinaryOp.ADD, node, Const(amount))


def _product(magnitude: int, factors: tuple[Node, ...]) -> Node:
    term: Node | None = None if magnitude == 1 and factors else Const(magnitude)
    for factor in factors:
        term = factor if term is None else Binary(BinaryOp.MUL, term, factor)
    assert term is not None
    return term
