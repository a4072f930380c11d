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
from math import prod

from attn_dsl.errors import BindingError, ProofError
from attn_dsl.ir.infix import infix
from attn_dsl.ir.nodes import Index, K, Load, Node, Param, Q, Reduce, Size, Unary, Var, post_order
from attn_dsl.ir.types import Type
from attn_dsl.passes.concrete import evaluate_in_order
from attn_dsl.passes.derivation import Combined, Constraint, Given, Inverted, Projection, Rounded, steps
from attn_dsl.passes.monotone import K0, K1, Q0, Q1
from attn_dsl.passes.polynomial import Monomial, Poly
from attn_dsl.passes.symbolic import Form, Space

SAMPLES, TRIES = 6, 120
Values = dict[Node, int]
Powers = dict[Monomial, int]


@dataclass
class Checker:
    """Evaluates the derivations of a mask's clauses at `SAMPLES` points; the same points every time."""

    space: Space
    mask: Node
    clauses: dict[bool, list[Node]] = field(default_factory=lambda: {False: [], True: []})
    derived: list[Constraint] = field(default_factory=list)
    premises: list[tuple[Node, list[list[Constraint]]]] = field(default_factory=list)

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
        monomials = {m: self.space.factors(m) for step in order for poly in _polys(step) for m in poly.terms}
        terms = {term: None for step in order for term in step.form.terms}
        factors = {factor: None for found in monomials.values() for factor in found}
        clauses = [*self.clauses[False], *self.clauses[True]]
        nodes = list(post_order(self.mask, *clauses, *terms, *factors))
        atoms = set(post_order(*clauses))
        leaves = [node for node in nodes if _is_leaf(node, atoms)]
        for values in self.points(nodes, leaves):
            powers = {m: prod(values[factor] for factor in found) for m, found in monomials.items()}
            at = self.check_steps(order, values, powers)
            self.check_clauses(values, at)

    # -- points -------------------------------------------------------------------------------------------------------

    def points(self, nodes: Sequence[Node], leaves: Iterable[Node]) -> Iterator[Values]:
        """`SAMPLES` points at which the divisors that a call checks are positive, as it does; larger and larger ones
        are tried until they are. Raises BindingError where none are found."""
        found = 0
        for seed in range(TRIES):
            values = evaluate_in_order(nodes, self.sample(random.Random(seed), leaves, 1 << seed // SAMPLES))
            if all(values.get(divisor, 1) >= 1 for divisor in self.space.positive):
                yield values
                found += 1
            if found == SAMPLES:
                return
        names = ", ".join(sorted(f"`{infix(divisor)}`" for divisor in self.space.positive))
        raise BindingError(f"a divisor of `//` or `%` must be positive; no numbers were found that make it so: {names}")

    def sample(self, rng: random.Random, leaves: Iterable[Node], scale: int) -> Values:
        """Values for the leaves: a tile, a pair in it, lengths and parameters of about its size."""
        scale *= rng.choice((4, 12, 60))
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

    def check_steps(self, order: Sequence[Constraint], values: Values, powers: Powers) -> dict[int, int]:
        """The value of every step's form, by identity."""
        at: dict[int, int] = {}
        for step in order:
            here = at[id(step)] = _form_value(step.form, values, powers)
            match step.why:
                case Given(_, rule):
                    ok = rule == "comparison" or here >= 0
                case Combined(a, x, b, y):
                    weights = _value(a, powers), _value(b, powers)
                    ok = min(weights) >= 0 and here == weights[0] * at[id(x)] + weights[1] * at[id(y)]
                case Rounded(x, divisor):
                    by = _value(divisor, powers)
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


def _form_value(form: Form, values: Values, powers: Powers) -> int:
    total = _value(form.const, powers)
    for node, coefficient in form.terms.items():
        total += _value(coefficient, powers) * values[node]
    return total


def _value(poly: Poly, powers: Powers) -> int:
    total = 0
    for monomial, coefficient in poly.terms.items():
        total += coefficient * powers[monomial]
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
    """What gets a value of its own: positions, sizes, parameters, tensor elements, `floor` of a float, and the truth of
    what clauses take as it is (a comparison of floats, a bool element, a long reduction)."""
    if node.type is Type.FLOAT:
        return False
    floats = any(child.type is Type.FLOAT for child in node.children)
    if node.type is Type.INT:
        return floats or isinstance(node, (Param, Size, Index, Var, Load))
    return isinstance(node, (Param, Load)) or (floats and not isinstance(node, Unary)) or _is_long(node, atoms)


def _is_long(node: Node, atoms: set[Node]) -> bool:
    return isinstance(node, Reduce) and node in atoms
