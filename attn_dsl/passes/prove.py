"""Prove which tiles of the score matrix are EMPTY and which are FULL, in closed form over the tile's positions.

    EMPTY: the mask is false on every pair of the tile. It is an `or` of clauses; each clause must be unsatisfiable.
    FULL:  the mask is true on every pair; each clause of its negation must be unsatisfiable.

What is neither proved EMPTY nor proved FULL is UNKNOWN, and is visited with the mask. No dense mask is ever built, and
nothing here depends on the lengths: they are symbols like the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from attn_dsl.errors import Span
from attn_dsl.ir.nodes import FALSE, TRUE, Binary, BinaryOp, Const, Index, K, Load, Node, Q, Unary, UnaryOp, post_order
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import InRange, Variant
from attn_dsl.passes.certificate import Checker
from attn_dsl.passes.derivation import Combined, Constraint, Given, Inverted, Projection, Rounded, steps
from attn_dsl.passes.formula import Atom, Clause, Fact, Literal, Unknown, residues
from attn_dsl.passes.logic import clauses, divisors
from attn_dsl.passes.project import Projector
from attn_dsl.passes.symbolic import Opaque, Space


@dataclass(frozen=True)
class Claim:
    """A clause of the mask (kind "empty") or of its negation ("full"), and when a tile has no pair that satisfies it.

    condition  BOOL over `q0 q1 k0 k1`, lengths and parameters; where it holds, no pair of the tile satisfies the clause
    exact      whether the converse holds as well (iff), or the condition is only sufficient (if)
    rule       the rules of the derivation, the weightiest first
    reasons    what stopped the proof, where something did
    tiles      the clause projected onto the tile, perhaps in several cases: the tile is empty where all of them are
    """

    kind: str
    clause: Clause
    tiles: tuple[Projection, ...]
    space: Space
    spans: tuple[Span, ...]

    @cached_property
    def condition(self) -> Node:
        return conjunction([never(tile, self.space) for tile in self.tiles])

    @property
    def exact(self) -> bool:
        return all(tile.exact for tile in self.tiles)

    @property
    def known(self) -> bool:
        """Whether the proof says anything: a condition, or (exactly) that every tile has a pair of the clause."""
        return self.condition is not FALSE or self.exact

    @property
    def reasons(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(literal.reason for literal in self.clause.unknowns))

    @cached_property
    def rule(self) -> str:
        used = {name for tile in self.tiles for constraint in tile.conclusions for name in _rules(constraint)}
        order = ("interval intersection", "mixed radix", "rounding", "monotone", "inverse", "corner", "constant")
        return ", ".join(name for name in order if name in used) or "three-valued logic"

    @cached_property
    def clause_node(self) -> Node:
        """The clause as a BOOL node, without the laws of quotients and without what the proof could not read."""
        parts = [self._literal(x) for x in self.clause.literals if not (isinstance(x, Atom) and x.definition)]
        return conjunction(parts)

    def _literal(self, literal: Literal) -> Node:
        match literal:
            case Atom(form):
                return self.space.holds(form)
            case Fact(node, negated) | Unknown(node, negated):
                return Unary(UnaryOp.NOT, node) if negated else node


@dataclass(frozen=True)
class Side:
    """A clause with its projections: onto the whole tile, onto k (for a q tile) and onto q (for a kv tile)."""

    claim: Claim
    kv: Projection
    q: Projection


@dataclass(frozen=True)
class Proof:
    """All claims about a mask. `visit` are the clauses of the mask, `masked` those of its negation."""

    variant: Variant
    space: Space
    visit: tuple[Side, ...]
    masked: tuple[Side, ...]

    @property
    def claims(self) -> tuple[Claim, ...]:
        return tuple(side.claim for side in (*self.visit, *self.masked))

    @cached_property
    def empty(self) -> Node:
        """Where this BOOL holds, the tile is EMPTY."""
        return conjunction([side.claim.condition for side in self.visit])

    @cached_property
    def full(self) -> Node:
        """Where this BOOL holds, the tile is FULL."""
        return conjunction([side.claim.condition for side in self.masked])

    @property
    def exact(self) -> bool:
        """Whether a tile that is not proved EMPTY or FULL really is neither."""
        return all(claim.exact for claim in self.claims)

    def check(self) -> None:
        """Verify every derivation by other means than those that found it. Raises `ProofError`."""
        checker = Checker(self.space, self.variant.mask)
        for sides, negated in ((self.visit, False), (self.masked, True)):
            for side in sides:
                checker.add(side.claim.clause_node, [side.claim.tiles, (side.kv,), (side.q,)], negated=negated)
        checker.check()


def prove(variant: Variant) -> Proof:
    """Derive and check every claim about the mask of a variant. Time and memory do not depend on any length."""
    space = Space(frozenset((*divisors(variant.mask), *_promised(variant))))
    projector = Projector(space)
    proof = Proof(
        variant,
        space,
        tuple(_sides(variant, projector, negated=False)),
        tuple(_sides(variant, projector, negated=True)),
    )
    proof.check()
    return proof


def _promised(variant: Variant) -> Iterator[Load]:
    """Elements of tensors that are promised to be at least 1, such as the width of each image of a batch."""
    for node in post_order(variant.mask):
        if isinstance(node, Load) and node.type is Type.INT:
            for promise in variant.tensor(node.tensor).promises:
                if isinstance(promise, InRange) and isinstance(promise.low, Const) and promise.low.value >= 1:
                    yield node


def _sides(variant: Variant, projector: Projector, *, negated: bool) -> Iterator[Side]:
    for clause in clauses(variant.mask, projector.space, negated=negated):
        spans = tuple(dict.fromkeys(_spans(clause, variant.locations)))
        kind = "full" if negated else "empty"
        claim = Claim(kind, clause, _tiles(clause, projector), projector.space, spans)
        yield Side(claim, _project(clause, projector, K), _project(clause, projector, Q))


def _tiles(clause: Clause, projector: Projector) -> tuple[Projection, ...]:
    whole = _project(clause, projector, None)
    if whole.exact or clause.unknowns or clause.relaxed:
        return (whole,)
    cases = tuple(_project(case, projector, None) for case in residues(clause, projector.space))
    return cases if cases and all(case.exact for case in cases) else (whole,)


def _project(clause: Clause, projector: Projector, keep: Index | None) -> Projection:
    try:
        return projector.project(clause, keep)
    except Opaque:
        return Projection(exact=False)


def _spans(clause: Clause, locations: Mapping[Node, Span]) -> Iterator[Span]:
    for literal in clause.literals:
        node = literal.origin if isinstance(literal, Atom) else literal.node
        if node in locations:
            yield locations[node]


# -- conditions as expressions ----------------------------------------------------------------------------------------


def never(projection: Projection, space: Space) -> Node:
    """When no pair satisfies the clause: a guard is negative, or a fact is not as stated."""
    if projection.impossible is not None:
        return TRUE
    facts = [fact.node if fact.negated else Unary(UnaryOp.NOT, fact.node) for fact in projection.facts]
    return disjunction([*facts, *(space.fails(guard.form) for guard in projection.guards)])


def conjunction(parts: list[Node]) -> Node:
    return _joined(BinaryOp.AND, parts, TRUE)


def disjunction(parts: list[Node]) -> Node:
    return _joined(BinaryOp.OR, parts, FALSE)


def _joined(op: BinaryOp, parts: list[Node], unit: Node) -> Node:
    total = unit
    zero = FALSE if unit is TRUE else TRUE
    for part in dict.fromkeys(parts):
        if part is zero:
            return zero
        if part is not unit:
            total = part if total is unit else Binary(op, total, part)
    return total


def _rules(constraint: Constraint) -> Iterator[str]:
    premises = [step.why for step in steps(constraint)]
    origins = {why.origin for why in premises if isinstance(why, Given) and why.rule == "comparison"}
    laws = any(isinstance(why, Given) and why.rule == "quotient" for why in premises)
    if len(origins) > 1:
        yield "interval intersection"
    if laws:
        yield "mixed radix"
    for why in premises:
        match why:
            case Given(origin, "corner"):
                yield "corner" if isinstance(origin, Index) else "monotone"
            case Rounded() if not laws:
                yield "rounding"
            case Inverted():
                yield "inverse"
            case Given() | Combined() | Rounded():
                pass
