"""Polynomials with integer coefficients, of the few monomials and low degrees that masks are made of.

A monomial is the ascending tuple of its symbols' numbers, each as often as its exponent says: `s0**2 * s3` is
`(0, 0, 3)`, a constant is `()`. Sums and products of polynomials of two or three monomials take about a microsecond.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd

Monomial = tuple[int, ...]

UNIT: Monomial = ()
_LAST = (1 << 30,)


def precedence(monomial: Monomial) -> Monomial:
    """The key that sorts monomials in lexicographic order, the greatest power of the first symbol first."""
    return monomial + _LAST


def quotient(monomial: Monomial, divisor: Monomial) -> Monomial | None:
    """monomial / divisor, or None where it is no monomial."""
    rest = list(monomial)
    for symbol in divisor:
        if symbol not in rest:
            return None
        rest.remove(symbol)
    return tuple(rest)


class Poly:
    """An immutable polynomial; `terms` maps its monomials to coefficients, none of them zero."""

    __slots__ = ("_hash", "terms")

    terms: Mapping[Monomial, int]

    def __init__(self, terms: Mapping[Monomial, int]) -> None:
        self.terms = terms
        self._hash: int | None = None

    def __bool__(self) -> bool:
        return bool(self.terms)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Poly) and self.terms == other.terms)

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(frozenset(self.terms.items()))
        return self._hash

    def __repr__(self) -> str:
        return f"Poly({dict(self.ordered())})"

    def __add__(self, other: Poly | int) -> Poly:
        return self._plus(other, 1)

    def __neg__(self) -> Poly:
        return Poly({monomial: -coefficient for monomial, coefficient in self.terms.items()})

    def __sub__(self, other: Poly | int) -> Poly:
        return self._plus(other, -1)

    def _plus(self, other: Poly | int, sign: int) -> Poly:
        added = other.terms if isinstance(other, Poly) else {UNIT: other} if other else {}
        if not added:
            return self
        terms = dict(self.terms)
        for monomial, coefficient in added.items():
            total = terms.get(monomial, 0) + sign * coefficient
            if total:
                terms[monomial] = total
            else:
                del terms[monomial]
        return Poly(terms)

    def __mul__(self, other: Poly) -> Poly:
        terms: dict[Monomial, int] = {}
        for x, a in self.terms.items():
            for y, b in other.terms.items():
                monomial = tuple(sorted(x + y)) if x and y else x or y
                terms[monomial] = terms.get(monomial, 0) + a * b
        return Poly({monomial: coefficient for monomial, coefficient in terms.items() if coefficient})

    @property
    def constant(self) -> int:
        """The coefficient of 1."""
        return self.terms.get(UNIT, 0)

    @property
    def integer(self) -> int | None:
        """The value of a constant polynomial, else None."""
        terms = self.terms
        return terms[UNIT] if len(terms) == 1 and UNIT in terms else None if terms else 0

    @property
    def content(self) -> int:
        """The greatest common divisor of the coefficients; 0 for the zero polynomial."""
        return gcd(*self.terms.values())

    def ordered(self) -> list[tuple[Monomial, int]]:
        """The terms in lexicographic order, the constant last."""
        return sorted(self.terms.items(), key=lambda term: precedence(term[0]))


_small = {value: Poly({UNIT: value} if value else {}) for value in range(-8, 9)}


def number(value: int) -> Poly:
    """The constant polynomial."""
    small = _small.get(value)
    return Poly({UNIT: value}) if small is None else small


def symbol(position: int) -> Poly:
    """The polynomial that is one symbol."""
    return Poly({(position,): 1})


ZERO, ONE, MINUS_ONE = number(0), number(1), number(-1)
