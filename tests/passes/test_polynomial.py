"""Polynomials against SymPy's ring, which finds the same sums, products, quotients and order by other means."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from sympy.polys.domains import ZZ
from sympy.polys.rings import PolyRing

from attn_dsl.passes.polynomial import ZERO, Poly, number, symbol
from attn_dsl.passes.symbolic import divided

SYMBOLS = 4
RING = PolyRing([f"s{i}" for i in range(SYMBOLS)], ZZ)

monomials = st.lists(st.integers(0, SYMBOLS - 1), max_size=3).map(lambda symbols: tuple(sorted(symbols)))
coefficients = st.integers(-6, 6).filter(bool)
polynomials = st.dictionaries(monomials, coefficients, max_size=4).map(Poly)
divisors = polynomials.filter(bool)


def element(poly: Poly) -> Any:
    return RING.from_dict({tuple(map(m.count, range(SYMBOLS))): c for m, c in poly.terms.items()})


@given(polynomials, polynomials)
def test_sums_differences_and_products_are_those_of_the_ring(x: Poly, y: Poly) -> None:
    assert element(x + y) == element(x) + element(y)
    assert element(x - y) == element(x) - element(y)
    assert element(x * y) == element(x) * element(y)
    assert all((x + y).terms.values()) and all((x * y).terms.values())


@given(polynomials)
def test_terms_come_in_lexicographic_order_the_constant_last(x: Poly) -> None:
    assert [tuple(map(m.count, range(SYMBOLS))) for m, _ in x.ordered()] == [m for m, _ in element(x).terms()]


@given(polynomials, divisors)
def test_division_is_that_of_the_ring(x: Poly, y: Poly) -> None:
    whole, rest = divided(x, y)
    assert whole * y + rest == x
    assert (element(whole), element(rest)) == element(x).div(element(y))


@given(polynomials, st.integers(-20, 20))
def test_a_number_is_a_constant_polynomial(x: Poly, value: int) -> None:
    assert x + value == x + number(value) and x - value == x - number(value)
    assert (x + value).constant == x.constant + value
    assert number(value).integer == value and symbol(0).integer is None and ZERO.integer == 0
    assert hash(x + value - value) == hash(x)
    assert x.content == int(element(x).content())
