"""Constraints with their derivations, and what is left of a clause on a tile.

A derivation is a tree of the rules of `project`: it is what a certificate is, and `certificate` checks it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from attn_dsl.ir.nodes import Node
from attn_dsl.passes.formula import Fact
from attn_dsl.passes.polynomial import Poly
from attn_dsl.passes.symbolic import Form


@dataclass(frozen=True, eq=False)
class Given:
    """An atom of the clause, a law of a quotient, or a bound of an unknown within the tile; true by itself."""

    origin: Node
    rule: str


@dataclass(frozen=True, eq=False)
class Combined:
    """a * x + b * y, with a, b >= 0."""

    a: Poly
    x: Constraint
    b: Poly
    y: Constraint


@dataclass(frozen=True, eq=False)
class Rounded:
    """x / divisor, its constant rounded down."""

    x: Constraint
    divisor: Poly


@dataclass(frozen=True, eq=False)
class Inverted:
    """What x says of the monotone term it bounds, said of the term's argument."""

    x: Constraint


Derivation = Given | Combined | Rounded | Inverted


@dataclass(eq=False)
class Constraint:
    """`form >= 0` and how it was derived.

    own     False for what holds on every tile, whatever the mask
    rising  for each unknown, whether the constraint bounds it from below (its coefficient is positive) or from above
    """

    form: Form
    why: Derivation
    own: bool
    rising: dict[Node, bool] = field(default_factory=dict)

    @cached_property
    def premises(self) -> frozenset[Constraint]:
        """What it is a nonnegative combination of: given, rounded or inverted constraints."""
        if isinstance(self.why, Combined):
            return self.why.x.premises | self.why.y.premises
        return frozenset({self})

    @cached_property
    def weight(self) -> int:
        """How many given constraints its derivation uses, counted with repetition."""
        match self.why:
            case Given():
                return 1
            case Combined(_, x, _, y):
                return x.weight + y.weight
            case Rounded(x) | Inverted(x):
                return x.weight


def steps(*roots: Constraint) -> Iterator[Constraint]:
    """Every constraint of the derivations, premises first, each once."""
    seen: set[int] = set()
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        constraint, ready = stack.pop()
        if id(constraint) in seen:
            continue
        if ready:
            seen.add(id(constraint))
            yield constraint
            continue
        stack.append((constraint, True))
        match constraint.why:
            case Given():
                pass
            case Combined(_, x, _, y):
                stack += [(y, False), (x, False)]
            case Rounded(x) | Inverted(x):
                stack.append((x, False))


@dataclass
class Projection:
    """A clause seen from a tile: it holds on some pair only if every guard is >= 0 and every fact is as stated.

    `lower` and `upper` bound the kept position (none where both are eliminated): form = c * position + rest.
    """

    guards: list[Constraint] = field(default_factory=list)
    lower: list[Constraint] = field(default_factory=list)
    upper: list[Constraint] = field(default_factory=list)
    facts: tuple[Fact, ...] = ()
    exact: bool = True
    impossible: Constraint | None = None

    @property
    def conclusions(self) -> list[Constraint]:
        """The constraints of which each must be >= 0 for the clause to hold somewhere on the tile."""
        return [self.impossible] if self.impossible is not None else self.guards
