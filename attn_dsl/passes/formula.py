"""Conditions in negation normal form, and their clauses: a disjunction of conjunctions of literals.

A literal is an integer inequality (`Atom`), a truth value that a whole tile shares (`Fact`), or a part that the proofs
do not read (`Unknown`). `clauses` of a mask are made in `logic`; here is what does not need to know how.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import lcm

from attn_dsl.ir.nodes import Binary, BinaryOp, Const, K, Node, Q
from attn_dsl.passes.monotone import Q0, Q1
from attn_dsl.passes.polynomial import number
from attn_dsl.passes.symbolic import Form, Space, constant, unknown

MAX_RESIDUES = 16


@dataclass(frozen=True, eq=False)
class Atom:
    """`form >= 0`.

    `origin` is the comparison it came from; `definition` marks the law of a quotient, which is true everywhere.
    """

    form: Form
    origin: Node
    definition: bool = False


@dataclass(frozen=True)
class Fact:
    """A truth value that is the same for the whole tile: a bool parameter, a comparison of floats of `b`, `h`."""

    node: Node
    negated: bool


@dataclass(frozen=True)
class Unknown:
    """A part of the mask about which the proofs say nothing, and why."""

    node: Node
    negated: bool
    reason: str


Literal = Atom | Fact | Unknown


@dataclass(frozen=True)
class And:
    parts: tuple[Formula, ...]


@dataclass(frozen=True)
class Or:
    parts: tuple[Formula, ...]


Formula = Literal | And | Or

YES, NO = And(()), Or(())


@dataclass(frozen=True)
class Clause:
    """A conjunction. `relaxed` says that literals were left out to keep the number of clauses small."""

    literals: tuple[Literal, ...]
    relaxed: bool = False

    @property
    def unknowns(self) -> tuple[Unknown, ...]:
        return tuple(x for x in self.literals if isinstance(x, Unknown))


def disjuncts(formula: Formula, limit: int) -> Iterator[Clause]:
    """The clauses of a formula, without those that contradict themselves.

    Where more than `limit` would come, parts of a conjunction are left out, the widest first: the clauses then hold
    on a superset, which is sound for "whatever is not proved empty is visited".
    """
    seen: set[frozenset[object]] = set()
    for literals, relaxed in _dnf(formula, limit):
        unique = {_identity(x): x for x in literals}
        names = frozenset(unique)
        if names in seen or any(_opposite(x) in names for x in unique.values() if not isinstance(x, Atom)):
            continue
        seen.add(names)
        yield Clause(tuple(unique.values()), relaxed)


def _identity(literal: Literal) -> object:
    match literal:
        case Atom(form):
            return form.key
        case Fact(node, negated) | Unknown(node, negated):
            return (node, negated)


def _opposite(literal: Fact | Unknown) -> object:
    return (literal.node, not literal.negated)


Conjunction = tuple[tuple[Literal, ...], bool]


def _dnf(formula: Formula, limit: int) -> list[Conjunction]:
    match formula:
        case And(parts):
            choices = sorted((_dnf(part, limit) for part in parts), key=len)
            relaxed = False
            while _size(choices) > limit:
                choices.pop()
                relaxed = True
            return [
                (tuple(x for literals, _ in chosen for x in literals), relaxed or any(flag for _, flag in chosen))
                for chosen in product(*choices)
            ]
        case Or(parts):
            found = [conjunction for part in parts for conjunction in _dnf(part, limit)]
            return found if len(found) <= limit else [((), True)]
        case _:
            return [((formula,), False)]


def _size(choices: list[list[Conjunction]]) -> int:
    total = 1
    for choice in choices:
        total *= len(choice)
    return total


def residues(clause: Clause, space: Space) -> tuple[Clause, ...]:
    """An affine clause over q and k as one clause for each residue of q: q = L*y + r, L the lcm of k's coefficients.

    Then L*y is a multiple of every coefficient of k, each inequality can be rounded to a bound of k with coefficient
    1, and elimination is exact. None where that is not the form of the clause, or where L is large.
    """
    forms = [x.form for x in clause.literals if isinstance(x, Atom)]
    if any(node not in (Q, K) or c.integer is None for form in forms for node, c in form.terms.items()):
        return ()
    period = lcm(*(abs(form.terms[K].integer or 1) for form in forms if K in form.terms))
    if period > MAX_RESIDUES:
        return ()
    quotient = unknown(Binary(BinaryOp.FLOORDIV, Q, Const(period))).times(number(period))
    first, last = constant(space.poly(Q0)), constant(space.poly(Q1))
    found = []
    for residue in range(period):
        q = quotient + constant(residue)
        bounds = (Atom(form, quotient_origin) for form in (q - first, last - q) for quotient_origin in quotient.terms)
        literals = (_replaced(x, q) if isinstance(x, Atom) else x for x in clause.literals)
        found.append(Clause((*literals, *bounds), clause.relaxed))
    return tuple(found)


def _replaced(atom: Atom, q: Form) -> Atom:
    coefficient = atom.form.terms.get(Q)
    if coefficient is None:
        return atom
    return Atom(atom.form - unknown(Q).times(coefficient) + q.times(coefficient), atom.origin, atom.definition)
