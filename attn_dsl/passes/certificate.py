"""Check derivations by other means than those that found them: evaluate every step on plain integers.

A step of a derivation is an identity or an implication between integer expressions, for all values of its leaves:

    given       a corner bound or a quotient's law is >= 0 whenever q0 <= q <= q1 and k0 <= k <= k1;
                the comparisons of a clause are >= 0 whenever the clause holds (those of one of its cases)
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
from attn_dsl.passes.derivation import Combined, Constraint, Given, Inverted, Projection, Rounded, steps
from attn_dsl.passes.monotone import K0, K1, Q0, Q1
from attn_dsl.passes.symbolic import Form, Monomial, Poly, Space

SAMPLES = 6
Values = dict[Node, int]


@dataclass
class Checker:
    """Evaluates the derivations of a mask's clauses at `SAMPLES` points; the same points every time."""

    space: Space
    mask: Node
    clauses: dict[bool, list[Node]] = field(default_factory=lambda: {False: [], True: []})
    derived: list[Constraint] = field(default_factory=list)
    premises: list[tuple[Node, list[list[Constraint]]]] = field(default_factory=list)
    _monomials: dict[int, list[Monomial]] = field(default_factory=dict)

    def add(self, clause: Node, projections: Iterable[Sequence[Projection]], *, negated: bool) -> None:
        """A clause of the mask (or of its negation), and its projections, each perhaps in several cases."""
        self.clauses[negated].append(clause)
        for cases in projections:
            found = [[*p.conclusions, *p.lower, *p.upper] for p in cases]
            self.derived += [constraint for case in found for constraint in case]
            self.premises.append((clause, [_comparisons(case) for case in found]))

    def check(self) -> None:
        """Raise `ProofError` where a step, or the list of clauses, does not hold."""
        order = list(steps(*self.derived))
        atoms = {node for clauses in self.clauses.values() for clause in clauses for node in post_order(clause)}
        roots = list(dict.fromkeys([self.mask, *self.clauses[False], *self.clauses[True], *self._nodes(order)]))
        leaves = [node for node in post_order(*roots) if _is_leaf(node, atoms)]
        for seed in range(SAMPLES):
            values = evaluate_all(roots, self.sample(random.Random(seed), leaves))
            at = self.check_steps(order, values)
            self.check_clauses(values, at)

    def _nodes(self, order: Iterable[Constraint]) -> Iterator[Node]:
        """Every unknown and every symbol of the steps."""
        for step in order:
            yield from step.form.terms
            for poly in _polys(step):
                for _, factors in self._terms(poly):
                    yield from (node for node, _ in factors)

    def _terms(self, poly: Poly) -> list[Monomial]:
        found = self._monomials.get(id(poly))
        if found is None:
            found = self._monomials[id(poly)] = self.space.symbols(poly)
        return found

    # -- points -------------------------------------------------------------------------------------------------------

    def sample(self, rng: random.Random, leaves: Iterable[Node]) -> Values:
        """Values for the leaves: a tile, a pair in it, lengths and parameters of about its size."""
        scale = rng.choice((4, 12, 60))
        values: Values = {}
        for first, position, last in ((Q0, Q, Q1), (K0, K, K1)):
            values[first] = rng.randrange(scale)
            values[last] = values[first] + rng.randrange(scale)
            values[position] = rng.randint(values[first], values[last])
        divisors = {node for divisor in self.space.positive for node in post_order(divisor)}
        for node in leaves:
            match node:
                case _ if node in values:
                    pass
                case _ if node.type is Type.BOOL:
                    values[node] = rng.random() < 0.5
                case Size():
                    values[node] = rng.randint(1, 2 * scale)
                case Index() | Var():
                    values[node] = rng.randrange(4)
                case _:
                    values[node] = rng.randint(1 if node in divisors else -2, scale)
        return values

    # -- checks -------------------------------------------------------------------------------------------------------

    def check_steps(self, order: Sequence[Constraint], values: Values) -> dict[int, int]:
        """The value of every step's form, by identity."""
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
                rule = type(step.why).__name__.lower()
                raise ProofError(f"a step does not check: {rule}, {infix(self.space.holds(step.form))}")
        return at

    def check_clauses(self, values: Values, at: dict[int, int]) -> None:
        if not any(values[clause] for clause in self.clauses[not values[self.mask]]):
            raise ProofError("the clauses do not cover the mask")
        for clause, cases in self.premises:
            if values[clause] and not any(all(at[id(x)] >= 0 for x in case) for case in cases):
                raise ProofError(f"a derivation assumes what its clause does not say: {infix(clause)}")

    def form_value(self, form: Form, values: Values) -> int:
        total = self.value(form.const, values)
        for node, coefficient in form.terms.items():
            total += self.value(coefficient, values) * values[node]
        return total

    def value(self, poly: Poly, values: Values) -> int:
        total = 0
        for coefficient, factors in self._terms(poly):
            for node, exponent in factors:
                coefficient *= values[node] ** exponent
            total += coefficient
        return total


def _comparisons(derived: Sequence[Constraint]) -> list[Constraint]:
    return [x for x in steps(*derived) if isinstance(x.why, Given) and x.why.rule == "comparison"]


def _polys(step: Constraint) -> Iterator[Poly]:
    yield step.form.const
    yield from step.form.terms.values()
    match step.why:
        case Combined(a, _, b, _):
            yield from (a, b)
        case Rounded(_, divisor):
            yield divisor
        case Given() | Inverted():
            pass


def _is_leaf(node: Node, atoms: set[Node]) -> bool:
    """What gets a value of its own: positions, sizes, parameters, tensor elements, and the truth of what clauses take
    as it is (a comparison of floats, a bool element, a long reduction)."""
    if node.type is Type.FLOAT:
        return False
    if node.type is Type.INT:
        return isinstance(node, (Param, Size, Index, Var, Load))
    floats = any(child.type is Type.FLOAT for child in node.children)
    return isinstance(node, (Param, Load)) or (floats and not isinstance(node, Unary)) or _is_long(node, atoms)


def _is_long(node: Node, atoms: set[Node]) -> bool:
    return isinstance(node, Reduce) and node in atoms
