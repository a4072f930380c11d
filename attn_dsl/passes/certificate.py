"""Check derivations by other means than those that found them: evaluate every step on plain integers.

A step of a derivation is an identity or an implication between integer expressions, for all values of its leaves:

    given       a corner bound or a quotient's law is >= 0 whenever q0 <= q <= q1 and k0 <= k <= k1
    combined    c = a*x + b*y with a, b >= 0
    rounded     c = floor(x / d) with d >= 1
    inverted    x >= 0 implies c >= 0

and the clauses say what the mask says. Each is evaluated at pseudo-random values of the leaves, the nodes as they stand
in the IR, without polynomials. A wrong identity between polynomials of small degree agrees on few points, so that it
does not survive (Schwartz-Zippel); nothing is trusted because a rule said so. `verify` asks solvers, for all values.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from attn_dsl.errors import ProofError
from attn_dsl.ir.infix import infix
from attn_dsl.ir.nodes import Index, K, Load, Node, Param, Q, Reduce, Size, Unary, Var, post_order
from attn_dsl.ir.types import Type
from attn_dsl.passes.concrete import evaluate_all
from attn_dsl.passes.monotone import K0, K1, Q0, Q1
from attn_dsl.passes.project import Combined, Constraint, Given, Inverted, Rounded, steps
from attn_dsl.passes.symbolic import Form, Monomial, Poly, Space

SAMPLES = 12


@dataclass
class Checker:
    """Evaluates derivations over a mask at `SAMPLES` points; the same points every time."""

    space: Space
    mask: Node
    _monomials: dict[Poly, list[Monomial]] = field(default_factory=dict)

    def check(self, derived: Iterable[Constraint], visit: Sequence[Node], masked: Sequence[Node]) -> None:
        """Raise `ProofError` where a step, or the list of clauses, does not hold."""
        order = list(steps(*derived))
        atoms = {node for clause in (*visit, *masked) for node in post_order(clause)}
        roots = {self.mask, *visit, *masked, *self._nodes(order)}
        for seed in range(SAMPLES):
            values = evaluate_all(roots, self.sample(random.Random(seed), roots, atoms))
            self.check_steps(order, values)
            self.check_cover(values, visit, masked)

    def _nodes(self, order: Iterable[Constraint]) -> Iterator[Node]:
        """Every unknown and every symbol of the steps."""
        for step in order:
            polys = [step.form.const, *step.form.terms.values()]
            match step.why:
                case Combined(a, _, b, _):
                    polys += [a, b]
                case Rounded(_, divisor):
                    polys.append(divisor)
                case Given() | Inverted():
                    pass
            yield from step.form.terms
            for poly in polys:
                for _, factors in self._terms(poly):
                    yield from (node for node, _ in factors)

    def _terms(self, poly: Poly) -> list[Monomial]:
        if poly not in self._monomials:
            self._monomials[poly] = self.space.symbols(poly)
        return self._monomials[poly]

    # -- points -------------------------------------------------------------------------------------------------------

    def sample(self, rng: random.Random, roots: Iterable[Node], atoms: set[Node]) -> dict[Node, int]:
        """Values for the leaves: a tile, a pair in it, lengths and parameters of about its size."""
        scale = rng.choice((4, 12, 60))
        values: dict[Node, int] = {}
        for first, position, last in ((Q0, Q, Q1), (K0, K, K1)):
            values[first] = rng.randrange(scale)
            values[last] = values[first] + rng.randrange(scale)
            values[position] = rng.randint(values[first], values[last])
        divisors = {node for divisor in self.space.positive for node in post_order(divisor)}
        for node in post_order(*roots):
            if node in values:
                continue
            match node:
                case Param() if node.type is Type.INT:
                    values[node] = rng.randint(1 if node in divisors else -2, scale)
                case Size():
                    values[node] = rng.randint(1, 2 * scale)
                case Index() | Var():
                    values[node] = rng.randrange(4)
                case _ if node.type is Type.BOOL and (node in atoms and _is_leaf(node)):
                    values[node] = rng.random() < 0.5
                case Load() | Param():
                    values[node] = rng.randint(-2, scale)
                case _:
                    pass
        return values

    # -- checks -------------------------------------------------------------------------------------------------------

    def check_steps(self, order: Sequence[Constraint], values: dict[Node, int]) -> None:
        at: dict[int, int] = {}
        for step in order:
            here = at[id(step)] = self.form_value(step.form, values)
            match step.why:
                case Given(_, rule):
                    ok = rule == "comparison" or here >= 0
                case Combined(a, x, b, y):
                    weights = self.value(a, values), self.value(b, values)
                    ok = min(weights) >= 0 and here == weights[0] * at[id(x)] + weights[1] * at[id(y)]
                case Rounded(x, divisor):
                    by = self.value(divisor, values)
                    ok = by >= 1 and here == at[id(x)] // by
                case Inverted(x):
                    ok = at[id(x)] < 0 or here >= 0
            if not ok:
                raise ProofError(
                    f"a step does not check: {type(step.why).__name__.lower()}, {infix(self.space.holds(step.form))}"
                )

    def check_cover(self, values: dict[Node, int], visit: Sequence[Node], masked: Sequence[Node]) -> None:
        clauses = visit if values[self.mask] else masked
        if not any(values[clause] for clause in clauses):
            raise ProofError("the clauses do not cover the mask")

    def form_value(self, form: Form, values: dict[Node, int]) -> int:
        return self.value(form.const, values) + sum(
            self.value(coefficient, values) * values[node] for node, coefficient in form.terms.items()
        )

    def value(self, poly: Poly, values: dict[Node, int]) -> int:
        total = 0
        for coefficient, factors in self._terms(poly):
            for node, exponent in factors:
                coefficient *= values[node] ** exponent
            total += coefficient
        return total


def _is_leaf(node: Node) -> bool:
    """Whether a BOOL part of a clause is taken as it is: a comparison of floats, a bool tensor, a long reduction."""
    return isinstance(node, (Load, Param, Reduce)) or (
        not isinstance(node, Unary) and any(child.type is Type.FLOAT for child in node.children)
    )
