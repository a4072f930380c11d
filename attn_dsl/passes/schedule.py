"""From proved claims to the tiles that a kernel visits: a few ranges in closed form, no table.

Seen from a q tile, each clause of the mask allows one interval of k; the tiles that these intervals touch must be
visited. Each clause of the negation forbids pairs in one interval of k; a visited tile that such an interval touches
needs the mask, the others are FULL. Intervals are cut so that no tile comes twice:

    visited   [0, head)  [middle ...)  [tail, tiles)       a clause without a lower bound makes a head, without an
    masked    [0, head)  [middle ...)  [tail, tiles)       upper bound a tail; two middles are sorted and cut

and every visited piece meets every masked piece and every gap between masked pieces. The transpose, for a kv tile, is
the same with q and k exchanged. All bounds are IR expressions; a backend prints them as integer arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise

from attn_dsl.ir.infix import infix
from attn_dsl.ir.nodes import (
    FALSE,
    TRUE,
    Binary,
    BinaryOp,
    Compare,
    CompareOp,
    Const,
    Node,
    Select,
    Size,
    Unary,
    UnaryOp,
    Var,
)
from attn_dsl.ir.variant import Variant
from attn_dsl.passes.derivation import Constraint, Projection
from attn_dsl.passes.monotone import K1, Q1, Q_OFFSET
from attn_dsl.passes.polynomial import Poly
from attn_dsl.passes.project import FAR
from attn_dsl.passes.prove import Proof, Side, conjunction, disjunction, prove
from attn_dsl.passes.specialize import Saturation
from attn_dsl.passes.symbolic import Form, Space

MAX_MIDDLES = 2
"""More intervals than these are joined to one, and the tiles between them are told apart by `skip` and `full`."""

BLOCK = Var("block")
ZERO, ONE = Const(0), Const(1)


@dataclass(frozen=True)
class Segment:
    """The tiles `[begin, end)` of the visited axis; none where end <= begin."""

    begin: Node
    end: Node
    masked: bool


@dataclass(frozen=True)
class TileRanges:
    """What one tile visits along the other axis.

    segments  disjoint ranges; no tile is visited twice
    skip      BOOL over `q0 q1 k0 k1`: a tile inside a segment that is proved EMPTY all the same
    full      BOOL over `q0 q1 k0 k1`: a tile inside a masked segment that is proved FULL all the same
    """

    segments: tuple[Segment, ...]
    skip: Node = FALSE
    full: Node = FALSE

    def text(self) -> str:
        lines = [f"  {'masked' if s.masked else 'full':7}[{infix(s.begin)}, {infix(s.end)})" for s in self.segments]
        lines += [f"  {name:7}where {infix(n)}" for name, n in (("skip", self.skip), ("full", self.full)) if n != FALSE]
        return "\n".join(lines) or "  nothing"


@dataclass(frozen=True)
class Schedule:
    """kv  the kv tiles of a q tile, over `q0 q1 block`
    q   the q tiles of a kv tile, over `k0 k1 block q_offset`
    """

    kv: TileRanges
    q: TileRanges

    def text(self) -> str:
        return f"kv tiles of a q tile\n{self.kv.text()}\nq tiles of a kv tile\n{self.q.text()}"


@dataclass(frozen=True)
class Axis:
    """The visited axis: `length` positions from `first` on, cut into tiles of `block`."""

    first: Node
    length: Node

    @property
    def last(self) -> Node:
        """The last position."""
        return add(self.first, subtract(self.length, ONE))

    @property
    def tiles(self) -> Node:
        """How many tiles there are, the last one perhaps ragged."""
        return divide(add(self.length, subtract(BLOCK, ONE)), BLOCK)

    def tile(self, position: Node) -> Node:
        """The number of the tile that holds a position."""
        return divide(subtract(position, self.first), BLOCK)


@dataclass(frozen=True)
class Piece:
    """Tiles `[begin, end)`. None stands for the first tile, or for the end of the axis."""

    begin: Node | None
    end: Node | None


@dataclass(frozen=True)
class Cover:
    """Disjoint, ascending pieces that are all the tiles of several intervals, and the gaps before, between, behind."""

    pieces: tuple[Piece, ...]
    gaps: tuple[Piece, ...]
    joined: bool = False


def derive_schedule(
    variant: Variant,
    proof: Proof | None = None,
    *,
    padded: bool = False,
    saturations: Sequence[Saturation] = (),
) -> Schedule:
    """The schedule of a variant, from claims whose certificates check.

    padded=False: tiles are clipped to the lengths, `k1 <= KV - 1` and `q1 <= q_offset + Q - 1`.
    padded=True:  tiles are whole, and what lies past the length of the visited axis counts as masked.
    saturations:  a tile where one of these nodes may vary counts as masked, so that the others may use the uniform
                  score of `specialize`.
    """
    proof = prove(variant) if proof is None else proof
    varying = [[prove(replace(variant, mask=c)) for c in saturation.conditions] for saturation in saturations]
    return Schedule(
        kv=_ranges(proof, varying, Axis(ZERO, Size("KV")), lambda side: side.kv, padded),
        q=_ranges(proof, varying, Axis(Q_OFFSET, Size("Q")), lambda side: side.q, padded),
    )


def _ranges(
    proof: Proof,
    varying: Sequence[Sequence[Proof]],
    axis: Axis,
    view: Callable[[Side], Projection],
    padded: bool,
) -> TileRanges:
    visit, masked = [view(side) for side in proof.visit], [view(side) for side in proof.masked]
    visit_pieces = [p for x in visit if (p := piece(x, axis, proof.space)) is not None]
    masked_pieces = [p for x in masked if (p := piece(x, axis, proof.space)) is not None]
    if padded:
        masked_pieces.append(Piece(divide(axis.length, BLOCK), None))
    masked_pieces += [_where_all(proofs, axis, view) for proofs in varying]
    visited, partial = cover(visit_pieces), cover(masked_pieces)
    segments = [
        Segment(begin, end, is_masked)
        for here in visited.pieces
        for is_masked, there in sorted(
            [(True, p) for p in partial.pieces] + [(False, p) for p in partial.gaps], key=lambda x: x[0]
        )
        for begin, end in [meet(here, there, axis)]
    ]
    return TileRanges(
        tuple(segments),
        skip=proof.empty if visited.joined or not all(x.exact for x in visit) else FALSE,
        full=_full(proof, varying, axis, padded) if partial.joined or not all(x.exact for x in masked) else FALSE,
    )


def _where_all(proofs: Sequence[Proof], axis: Axis, view: Callable[[Side], Projection]) -> Piece:
    """Tiles that hold a pair of each of several conditions, or more than those."""
    found = Piece(None, None)
    for proof in proofs:
        whole = cover([p for side in proof.visit if (p := piece(view(side), axis, proof.space)) is not None])
        if not whole.pieces:
            return Piece(ZERO, ZERO)
        first, last = whole.pieces[0], whole.pieces[-1]
        begins = [b for b in (found.begin, first.begin) if b is not None]
        ends = [e for e in (found.end, last.end) if e is not None]
        found = Piece(maximum_of(begins) if begins else None, minimum_of(ends) if ends else None)
    return found


def _full(proof: Proof, varying: Sequence[Sequence[Proof]], axis: Axis, padded: bool) -> Node:
    """Where a tile of a masked segment is FULL, and uniform; a tile that sticks out over the length never is."""
    uniform = [disjunction([condition.empty for condition in proofs]) for proofs in varying]
    end = K1 if axis.first is ZERO else Q1
    inside = [Compare(CompareOp.LE, end, axis.last)] if padded else []
    return conjunction([proof.full, *uniform, *inside])


def piece(projection: Projection, axis: Axis, space: Space) -> Piece | None:
    """The tiles of a clause's interval of positions; None where the clause never holds.

    A clause that holds under a condition only (a guard) has its tiles under that condition.
    """
    if projection.impossible is not None:
        return None
    alive = [space.holds(guard.form) for guard in projection.guards]
    alive += [Unary(UnaryOp.NOT, f.node) if f.negated else f.node for f in projection.facts]
    lows, highs = ([Bound.of(x, space) for x in bounds] for bounds in (projection.lower, projection.upper))
    begin = end = None
    last = minimum_of([axis.last, *(high.node for high in highs)])
    if highs:
        end = add(axis.tile(last), ONE)
        if not all(high.is_at_least(axis.first, space) for high in highs):
            end = maximum(end, ZERO)
    if lows:
        low = maximum_of([low.node for low in lows])
        alive.append(Compare(CompareOp.LE, low, last))
        if not any(low.is_at_least(axis.first, space) for low in lows):
            low = maximum(low, axis.first)
        begin = axis.tile(low)
    return _under(conjunction(alive), begin, end, axis)


def _under(alive: Node, begin: Node | None, end: Node | None, axis: Axis) -> Piece:
    """The piece where `alive` holds, else no tile, without losing that it starts at the first or ends at the last."""
    if alive is TRUE:
        return Piece(begin, end)
    if end is None and begin is not None:
        return Piece(Select(alive, begin, axis.tiles), None)
    end = Select(alive, axis.tiles if end is None else end, ZERO)
    return Piece(None if begin is None else Select(alive, begin, ZERO), end)


@dataclass(frozen=True)
class Bound:
    """A bound of the visited position; `poly` is None where the bound is no polynomial."""

    node: Node
    poly: Poly | None

    @classmethod
    def of(cls, constraint: Constraint, space: Space) -> Bound:
        """c*x + r >= 0: x >= ceil(-r / c) = -floor(r / c), or x <= floor(r / -c) for negative c.

        Where c may be zero, that case bounds nothing if r >= 0, and holds for no x otherwise.
        """
        ((_, coefficient),) = constraint.form.terms.items()
        rest = constraint.form.const
        is_lower = bool(space.nonnegative(coefficient))
        divisor = coefficient if is_lower else -coefficient
        if divisor.integer == 1:
            poly = -rest if is_lower else rest
            return cls(space.node(poly), poly)
        positive = bool(space.nonnegative(divisor - 1))
        safe = space.node(divisor) if positive else maximum(space.node(divisor), ONE)  # 0 must not be divided by
        quotient = Binary(BinaryOp.FLOORDIV, space.node(rest), safe)
        bound: Node = Unary(UnaryOp.NEG, quotient) if is_lower else quotient
        if not positive:
            everything, nothing = (Const(-FAR), Const(FAR)) if is_lower else (Const(FAR), Const(-FAR))
            holds = space.nonnegative(rest)
            either = Select(space.holds(Form({}, rest)), everything, nothing)
            constant = either if holds is None else everything if holds else nothing
            bound = Select(Compare(CompareOp.GE, space.node(divisor), ONE), bound, constant)
        return cls(bound, None)

    def is_at_least(self, first: Node, space: Space) -> bool:
        return self.poly is not None and bool(space.nonnegative(self.poly - space.poly(first)))


def cover(pieces: Sequence[Piece]) -> Cover:
    """Cut pieces so that they are disjoint and ascending."""
    heads = [p.end for p in pieces if p.begin is None and p.end is not None]
    tails = [p.begin for p in pieces if p.end is None and p.begin is not None]
    middles = [(p.begin, p.end) for p in pieces if p.begin is not None and p.end is not None]
    if any(p.begin is None and p.end is None for p in pieces):
        return Cover((Piece(None, None),), (), joined=len(pieces) > 1)
    head = maximum_of(heads) if heads else None
    tail = minimum_of(tails) if tails else None
    joined = len(middles) > MAX_MIDDLES
    if joined:
        middles = [(minimum_of([b for b, _ in middles]), maximum_of([e for _, e in middles]))]
    found: list[Piece] = []
    if head is not None:
        found.append(Piece(None, _clipped(head, tail)))
    for begin, end in _sorted(middles):
        begin = _clipped(maximum(begin, _end(found)) if found else begin, tail)
        found.append(Piece(begin, maximum(begin, _clipped(end, tail))))
    if tail is not None:
        found.append(Piece(tail, None))
    return Cover(tuple(found), tuple(_gaps(found)), joined)


def _clipped(tile: Node, tail: Node | None) -> Node:
    return tile if tail is None else minimum(tile, tail)


def _end(pieces: Sequence[Piece]) -> Node:
    end = pieces[-1].end
    assert end is not None
    return end


def _sorted(middles: list[tuple[Node, Node]]) -> list[tuple[Node, Node]]:
    """Two intervals in ascending order of their begins, by one compare and exchange."""
    if len(middles) < 2:
        return middles
    (a, a_end), (b, b_end) = middles
    ordered = Compare(CompareOp.LE, a, b)
    first = minimum(a, b), Select(ordered, a_end, b_end)
    second = maximum(a, b), Select(ordered, b_end, a_end)
    return [first, second]


def _gaps(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """What lies before, between and behind ascending pieces."""
    if not pieces:
        yield Piece(None, None)
        return
    if pieces[0].begin is not None:
        yield Piece(None, pieces[0].begin)
    for left, right in pairwise(pieces):
        yield Piece(left.end, right.begin)
    if pieces[-1].end is not None:
        yield Piece(pieces[-1].end, None)


def meet(x: Piece, y: Piece, axis: Axis) -> tuple[Node, Node]:
    """The tiles that two pieces share."""
    begins = [b for b in (x.begin, y.begin) if b is not None]
    ends = [e for e in (x.end, y.end) if e is not None]
    return (maximum_of(begins) if begins else ZERO), (minimum_of(ends) if ends else axis.tiles)


# -- arithmetic that keeps expressions short --------------------------------------------------------------------------


def add(x: Node, y: Node) -> Node:
    match x, y:
        case Const(a), Const(b):
            return Const(int(a) + int(b))
        case (Const(0), other) | (other, Const(0)):
            return other
        case other, Const(b) if b < 0:
            return Binary(BinaryOp.SUB, other, Const(-b))
        case Binary(BinaryOp.SUB, inner, Const(a)), Const(b):
            return add(inner, Const(int(b) - int(a)))
        case _, Binary(BinaryOp.SUB, inner, Const() as offset):
            return Binary(BinaryOp.SUB, add(x, inner), offset)
        case _:
            return Binary(BinaryOp.ADD, x, y)


def subtract(x: Node, y: Node) -> Node:
    match x, y:
        case _ if x is y:
            return ZERO
        case _, Const(b):
            return add(x, Const(-int(b)))
        case Binary(BinaryOp.ADD, a, b), _ if y in (a, b):
            return b if y is a else a
        case _:
            return Binary(BinaryOp.SUB, x, y)


def divide(x: Node, y: Node) -> Node:
    return ZERO if x is ZERO else Binary(BinaryOp.FLOORDIV, x, y)


def minimum(x: Node, y: Node) -> Node:
    return minimum_of([x, y])


def maximum(x: Node, y: Node) -> Node:
    return maximum_of([x, y])


def minimum_of(nodes: Sequence[Node]) -> Node:
    return reduce(lambda x, y: Binary(BinaryOp.MIN, x, y), dict.fromkeys(nodes))


def maximum_of(nodes: Sequence[Node]) -> Node:
    return reduce(lambda x, y: Binary(BinaryOp.MAX, x, y), dict.fromkeys(nodes))
