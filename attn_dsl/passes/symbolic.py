"""The door between the IR and SymPy, and the only module that imports SymPy.

Inside, an integer expression is an affine form over *unknowns* (nodes that vary within a tile) whose coefficients are
polynomials over *symbols* (nodes that a tile sees as constants: lengths, parameters, positions of the tile, tensors of
`b` and `h` alone). What is no polynomial (`min`, `//` of constants, a tensor element) is one opaque symbol.

The polynomials are elements of SymPy's sparse ring Z[s0, s1, ...], whose arithmetic is exact and takes microseconds;
`sympy.simplify` and the assumption system take milliseconds for the same questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import gcd
from typing import Any, TypeAlias

from sympy.polys.domains import ZZ
from sympy.polys.rings import PolyRing

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
from attn_dsl.passes.monotone import DOWN, K0, K1, Q0, Q1, Q_OFFSET, UP, direction

Poly: TypeAlias = Any
"""An element of the ring: a polynomial with integer coefficients over the symbols of a `Space`."""

MAX_SYMBOLS = 96


class Opaque(Exception):
    """An expression cannot be read as integers, or not cheaply; carries the reason."""


@lru_cache(maxsize=1)
def _ring() -> Any:
    return PolyRing([f"s{i}" for i in range(MAX_SYMBOLS)], ZZ)


def number(value: int) -> Poly:
    return _ring().ground_new(value)


def as_integer(poly: Poly) -> int | None:
    """The value of a constant polynomial, else None."""
    return constant_term(poly) if poly.is_ground else None


def constant_term(poly: Poly) -> int:
    return int(poly.get(_ring().zero_monom, 0))


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
        if factor == 1:
            return self
        return Form({u: c * factor for u, c in self.terms.items()}, self.const * factor)

    @property
    def key(self) -> tuple[frozenset[tuple[Node, Poly]], Poly]:
        return frozenset(self.terms.items()), self.const


def unknown(node: Node) -> Form:
    """The form that is one unknown."""
    return Form({node: number(1)}, number(0))


def constant(poly: Poly | int) -> Form:
    """The form that is a constant within the tile."""
    return Form({}, number(poly) if isinstance(poly, int) else poly)


Monomial = tuple[int, list[tuple[Node, int]]]


@dataclass
class Space:
    """The symbols of one proof: each stands for a node, and carries what is known of its sign.

    `positive` are the nodes that a call has checked to be at least 1 (the divisors of `//` and `%`).
    """

    positive: frozenset[Node] = frozenset()
    _nodes: list[Node] = field(default_factory=list)
    _symbols: dict[Node, Poly] = field(default_factory=dict)
    _least: list[int | None] = field(default_factory=list)
    _shift: dict[int, Poly] = field(default_factory=dict)
    _related: set[int] = field(default_factory=set)
    _free: set[int] = field(default_factory=set)
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
        if node not in self._symbols:
            if len(self._nodes) == MAX_SYMBOLS:
                raise Opaque(f"it needs more than {MAX_SYMBOLS} symbols")
            position = len(self._nodes)
            self._symbols[node] = _ring().gens[position]
            self._nodes.append(node)
            self._least.append(None)
            self._least[position] = self._lower_bound(node)
            if self._least[position] is None:
                self._free.add(position)
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
        at_first = substitute(node, {Q1: Q0, K1: K0})
        first = self.symbol(at_first)
        slack = self.symbol(Var(f"slack{position}"))
        self._shift[position] = first + slack if moved == UP else first - slack
        self._related |= {position, self._nodes.index(at_first)}

    # -- questions ----------------------------------------------------------------------------------------------------

    def nonnegative(self, poly: Poly) -> bool | None:
        """Whether `poly >= 0` for all values of its symbols: True, False (always negative), or None: don't know."""
        if poly not in self._signs:
            self._signs[poly] = None if self._is_free(poly) else self._sign(self._shifted(poly))
        return self._signs[poly]

    def _is_free(self, poly: Poly) -> bool:
        """Whether a symbol of unknown sign occurs that nothing can cancel."""
        free = self._free - self._related
        return any(exponents[p] for exponents in poly for p in free)

    def _sign(self, poly: Poly) -> bool | None:
        least = self._minimum(poly)
        if least is not None and least >= 0:
            return True
        greatest = self._minimum(-poly)
        return False if greatest is not None and greatest > 0 else None

    def _minimum(self, poly: Poly) -> int | None:
        """A constant that the polynomial is never below: each monomial's, by the lower bounds of its symbols."""
        total = 0
        for exponents, coefficient in poly.items():
            bound = int(coefficient)
            for least, exponent in zip(self._least, exponents, strict=False):
                if exponent:
                    if least is None or coefficient < 0:
                        return None
                    bound *= least**exponent
            total += bound
        return total

    def _shifted(self, poly: Poly) -> Poly:
        """The polynomial in terms of first positions and slacks."""
        if not any(exponents[p] for exponents in poly for p in self._shift):
            return poly
        total = number(0)
        for exponents, coefficient in poly.items():
            moved = [p for p in self._shift if exponents[p]]
            rest = tuple(0 if p in moved else e for p, e in enumerate(exponents)) if moved else exponents
            term = _ring().term_new(rest, coefficient)
            for p in moved:
                term *= self._shift[p] ** exponents[p]
            total += term
        return total

    def common_factor(self, form: Form) -> Poly:
        """A positive divisor of every coefficient of a form's unknowns: their integer content, or the one they share.

        For a form without unknowns, the integer content of its constant.
        """
        if not form.terms:
            return number(max(1, int(form.const.content())))
        coefficients = list(form.terms.values())
        if all(c.is_ground for c in coefficients):
            return number(gcd(*map(constant_term, coefficients)))
        first = coefficients[0] if self.nonnegative(coefficients[0]) else -coefficients[0]
        shared = all(c in (first, -first) for c in coefficients)
        return first if shared and self.nonnegative(first - 1) else number(1)

    def divide(self, form: Form, divisor: Poly) -> Form:
        """form / divisor, the constant rounded down; the divisor is positive and divides the other coefficients."""
        return Form({u: ratio(c, divisor) for u, c in form.terms.items()}, self.floor(form.const, divisor))

    def floor(self, poly: Poly, divisor: Poly) -> Poly:
        """floor(poly / divisor): what divides comes out of the floor, the rest is one symbol.

        floor(-x / d) = -1 - floor((x - 1) / d) keeps one spelling for both signs.
        """
        if as_integer(divisor) == 1:
            return poly
        whole, rest = poly.div(divisor)
        fixed, scale = as_integer(rest), as_integer(divisor)
        if fixed is not None and scale is not None:
            return whole + fixed // scale
        if not rest:
            return whole
        if _leads_negative(rest):
            return whole - 1 - self._quotient(-rest - 1, divisor)
        return whole + self._quotient(rest, divisor)

    def _quotient(self, poly: Poly, divisor: Poly) -> Poly:
        return self.symbol(Binary(BinaryOp.FLOORDIV, self.node(poly), self.node(divisor))) if poly else number(0)

    # -- polynomials to IR --------------------------------------------------------------------------------------------

    def node(self, poly: Poly) -> Node:
        """A polynomial as an INT node, positive terms first, numbers last."""
        return _sum(self._monomials(poly))

    def form_node(self, form: Form) -> Node:
        """An affine form as an INT node over its unknowns and symbols."""
        return _sum(self._form_monomials(form))

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
        rest = constant_term(form.const)
        monomials = list(self._form_monomials(Form(form.terms, form.const - rest)))
        more = _sum((c, factors) for c, factors in monomials if c > 0)
        less = _sum((-c, factors) for c, factors in monomials if c < 0)
        return more, less, rest

    def symbols(self, poly: Poly) -> list[Monomial]:
        """The monomials of a polynomial, in no particular order: (coefficient, [(node, exponent)])."""
        return [
            (int(coefficient), [(node, e) for node, e in zip(self._nodes, exponents, strict=False) if e])
            for exponents, coefficient in poly.items()
        ]

    def _form_monomials(self, form: Form) -> Iterator[Monomial]:
        for node, coefficient in form.terms.items():
            for number_, factors in self._monomials(coefficient):
                yield number_, [*factors, (node, 1)]
        yield from self._monomials(form.const)

    def _monomials(self, poly: Poly) -> Iterator[Monomial]:
        for exponents, coefficient in poly.terms():
            yield int(coefficient), [(node, e) for node, e in zip(self._nodes, exponents, strict=False) if e]


def ratio(poly: Poly, divisor: Poly) -> Poly | None:
    """poly / divisor where the division is exact, else None."""
    quotient, rest = poly.div(divisor)
    return None if rest else quotient


def _leads_negative(poly: Poly) -> bool:
    """Whether the first monomial, numbers last, has a negative coefficient."""
    return bool(poly.LC < 0)


def _sum(monomials: Iterable[Monomial]) -> Node:
    ordered = sorted(monomials, key=lambda m: not m[1])
    leader = next((m for m in ordered if m[0] > 0), None)
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


def _product(magnitude: int, factors: list[tuple[Node, int]]) -> Node:
    term: Node | None = None if magnitude == 1 and factors else Const(magnitude)
    for factor, exponent in factors:
        for _ in range(exponent):
            term = factor if term is None else Binary(BinaryOp.MUL, term, factor)
    assert term is not None
    return term
