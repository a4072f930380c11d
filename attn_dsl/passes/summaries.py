"""Claims about tiles of a mask that reads tensors: three values, in interval arithmetic over summaries.

    possible  false: the tile is EMPTY          certain  true: the tile is FULL

An expression of one position that reads a tensor there (`t[b, q]`, `table[h, k // 64] % 3`) is summarized: its least
and greatest value in each tile, found by one look at each position. A tensor that is promised to be nondecreasing needs
no look: its first and last element bound the rest. What is left of the mask are comparisons of such intervals, joined
by three-valued logic; what the proofs know of its affine part is added clause by clause.

A tensor that is read at both positions at once, and `==` of summaries that overlap, say nothing about a whole tile.
Such a mask is refined: the same claims, without summaries, about pieces of a tile in which each index `q // c` is one
number or, where an index is a position itself, the mask for each pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from attn_dsl.ir.nodes import (
    FALSE,
    TRUE,
    B,
    Binary,
    BinaryOp,
    Cast,
    Compare,
    CompareOp,
    Const,
    H,
    Index,
    Load,
    Node,
    Select,
    Size,
    Unary,
    UnaryOp,
    Var,
    post_order,
)
from attn_dsl.ir.types import DType, Type
from attn_dsl.ir.variant import InRange, Nondecreasing, Tensor, Variant
from attn_dsl.passes.monotone import CORNERS, POSITIONS, varies
from attn_dsl.passes.prove import Proof, Side, conjunction, disjunction, prove
from attn_dsl.passes.simplify import simplify_node
from attn_dsl.passes.specialize import Saturation
from attn_dsl.passes.unroll import unroll_node

TILES = {"q": Var("q_tile"), "k": Var("k_tile")}
"""The numbers of a query tile and of a kv tile."""
ZERO, ONE = Const(0), Const(1)
MAX_TERMS = 64
"""Reductions of at most so many terms are taken apart."""


@dataclass(frozen=True)
class Summary:
    """The least and the greatest value of an expression of `b`, `h` and one position, in each tile of that axis.

    node: INT (of a BOOL 0 or 1) or FLOAT, of which nan counts as anything. `low` and `high` are the tensors
    [B, H, tiles] that claims read at `b`, `h` and the number of the tile.
    """

    axis: str
    node: Node
    low: Tensor
    high: Tensor

    @property
    def loads(self) -> tuple[Node, Node]:
        """How claims read `low` and `high`."""
        place = (B, H, TILES[self.axis])
        low, high = (Load(tensor.name, place, tensor.dtype.type) for tensor in (self.low, self.high))
        return low, high


@dataclass(frozen=True)
class Refinement:
    """Claims about pieces of tiles; where `elements`, only the mask of each pair decides.

    divisors: for `q` and `k`, what quotients of the position divide by; a piece must not cross a multiple of one.
    piecewise: the mask speaks of positions by such quotients alone, so that it is the same for all pairs of a piece.
    """

    possible: Node
    certain: Node
    divisors: dict[str, tuple[Node, ...]]
    elements: bool
    piecewise: bool


@dataclass(frozen=True)
class Claims:
    """What is known of a tile, over `b h q0 q1 k0 k1 q_tile k_tile`, scalars, tensors and the tensors of summaries.

    uniform  what `certain` must be joined with for a tile that is to use a uniform score (`specialize`)
    refined  how to decide about a tile that is possible and not certain; None where that would find out little more
    depends  which of `b` and `h` the mask varies with
    """

    possible: Node
    certain: Node
    uniform: Node
    summaries: tuple[Summary, ...]
    refined: Refinement | None
    depends: frozenset[str]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the summaries, in the order of the kernels."""
        return tuple(tensor for summary in self.summaries for tensor in (summary.low, summary.high))


def reads_at_positions(mask: Node) -> tuple[str, ...]:
    """The tensors that a mask reads at positions."""
    loads = (node for node in post_order(mask) if isinstance(node, Load) and varies(node))
    return tuple(dict.fromkeys(load.tensor for load in loads))


def derive_claims(variant: Variant, proof: Proof | None = None, saturations: Sequence[Saturation] = ()) -> Claims:
    """Claims about the tiles of any mask.

    saturations: those that the full tiles of a schedule must not see vary (`schedule.derive_schedule`).
    """
    proof = prove(variant) if proof is None else proof
    mask = unroll_node(variant.mask, MAX_TERMS)
    coarse = Intervals(variant)
    possible, certain = _joined(coarse, mask, proof)
    varying = [[prove(replace(variant, mask=c)) for c in saturation.conditions] for saturation in saturations]
    uniform = conjunction([disjunction([one.empty for one in proofs]) for proofs in varying])
    summaries = tuple(coarse.summaries.values())
    refined = _refined(variant, mask, proof) if coarse.undecided else None
    depends = frozenset(variant.mask.depends & {"b", "h"})
    return Claims(simplify_node(possible), simplify_node(certain), uniform, summaries, refined, depends)


def _refined(variant: Variant, mask: Node, proof: Proof) -> Refinement:
    fine = Intervals(variant, summarize=False)
    possible, certain = _joined(fine, mask, proof)
    divisors = {axis: _divisors(mask, axis) for axis in ("q", "k")}
    return Refinement(
        simplify_node(possible), simplify_node(certain), divisors, fine.elements, _is_piecewise(variant.mask)
    )


def _is_piecewise(mask: Node) -> bool:
    """Whether positions occur as what a quotient divides, and nowhere else."""
    for node in post_order(mask):
        divided = isinstance(node, Binary) and node.op is BinaryOp.FLOORDIV and not varies(node.y)
        if not divided and any(isinstance(child, Index) and varies(child) for child in node.children):
            return False
    return True


def _divisors(mask: Node, axis: str) -> tuple[Node, ...]:
    found: dict[Node, None] = {}
    for node in post_order(mask):
        match node:
            case Binary(BinaryOp.FLOORDIV, x, y) if node.type is Type.INT and axis in x.depends and not varies(y):
                found[y] = None
            case _:
                pass
    return tuple(found)


def _joined(intervals: Intervals, mask: Node, proof: Proof) -> tuple[Node, Node]:
    """(possible, certain) by intervals of the whole mask and by each clause of the proof."""
    possible, certain = intervals.truth(mask)
    some = disjunction([_satisfiable(side, intervals) for side in proof.visit])
    none = conjunction([negation(_satisfiable(side, intervals)) for side in proof.masked])
    return conjunction([possible, some]), disjunction([certain, none])


def _satisfiable(side: Side, intervals: Intervals) -> Node:
    """Whether a tile may have a pair that satisfies a clause: neither proved, nor one of its other parts impossible."""
    claim = side.claim
    parts = [negation(claim.condition)]
    for literal in claim.clause.unknowns:
        possible, certain = intervals.truth(literal.node)
        parts.append(negation(certain) if literal.negated else possible)
    return conjunction(parts)


@dataclass(frozen=True)
class Interval:
    """low <= value <= high wherever `known`."""

    low: Node
    high: Node
    known: Node = TRUE

    @property
    def is_point(self) -> Node:
        if self.low is self.high:
            return self.known
        return conjunction([self.known, Compare(CompareOp.EQ, self.low, self.high)])


UNKNOWN = {Type.INT: Interval(ZERO, ZERO, FALSE), Type.FLOAT: Interval(Const(0.0), Const(0.0), FALSE)}
Truth = tuple[Node, Node]
"""(possible, certain)."""


@dataclass
class Intervals:
    """Interval arithmetic over one tile, in IR.

    summarize: expressions of one position that read a tensor there become summaries; otherwise an element is known
    where its index is one number of the tile.
    undecided: something was met about which the intervals of a whole tile say little. elements: an index that is a
    position itself was met, which is one number only in a piece of one row.
    """

    variant: Variant
    summarize: bool = True
    summaries: dict[Node, Summary] = field(default_factory=dict)
    undecided: bool = False
    elements: bool = False
    _numbers: dict[Node, Interval] = field(default_factory=dict)
    _truths: dict[Node, Truth] = field(default_factory=dict)

    # -- conditions ---------------------------------------------------------------------------------------------------

    def truth(self, node: Node) -> Truth:
        """When a BOOL node may be true somewhere in the tile, and when it is true everywhere."""
        if node not in self._truths:
            self._truths[node] = self._truth(node)
        return self._truths[node]

    def _truth(self, node: Node) -> Truth:
        if not varies(node):
            return node, node
        if self._is_summarized(node):
            found = self._summary(node, Cast(node, Type.INT))
            return Compare(CompareOp.GT, found.high, ZERO), Compare(CompareOp.GT, found.low, ZERO)
        match node:
            case Unary(UnaryOp.NOT, x):
                possible, certain = self.truth(x)
                return negation(certain), negation(possible)
            case Binary(BinaryOp.AND | BinaryOp.OR as op, x, y):
                join = conjunction if op is BinaryOp.AND else disjunction
                a, b = self.truth(x), self.truth(y)
                return join([a[0], b[0]]), join([a[1], b[1]])
            case Select(condition, x, y):
                return _choice(self.truth(condition), self.truth(x), self.truth(y))
            case Compare(op, x, y) if x.type is Type.BOOL:
                return _agreement(self.truth(x), self.truth(y), op is CompareOp.EQ)
            case Compare(op, x, y):
                return self._comparison(op, x, y)
            case Load():
                element = self._element(node)
                return (
                    disjunction([negation(element.known), element.high]),
                    conjunction([element.known, element.low]),
                )
            case _:
                self.undecided = True
                return TRUE, FALSE

    def _comparison(self, op: CompareOp, x: Node, y: Node) -> Truth:
        a, b = self.number(x), self.number(y)
        if op in (CompareOp.EQ, CompareOp.NE) and (self._scatters(x) or self._scatters(y)):
            self.undecided = True
        known = conjunction([a.known, b.known])
        match op:
            case CompareOp.EQ | CompareOp.NE:
                same = conjunction([_at_most(a.high, b.low), _at_most(b.high, a.low)])
                meet = conjunction([_at_most(a.low, b.high), _at_most(b.low, a.high)])
                truth = (meet, same) if op is CompareOp.EQ else (negation(same), negation(meet))
            case CompareOp.LT | CompareOp.LE:
                truth = Compare(op, a.low, b.high), Compare(op, a.high, b.low)
            case _:
                truth = Compare(op, a.high, b.low), Compare(op, a.low, b.high)
        return disjunction([negation(known), truth[0]]), conjunction([known, truth[1]])

    def _scatters(self, node: Node) -> bool:
        """Whether values between the least and the greatest of a tile may be missing there."""
        return any(isinstance(inner, Load) and varies(inner) and not self._ordered(inner) for inner in post_order(node))

    # -- numbers ------------------------------------------------------------------------------------------------------

    def number(self, node: Node) -> Interval:
        """The interval of an INT or FLOAT node over the tile."""
        if node not in self._numbers:
            self._numbers[node] = self._number(node)
        return self._numbers[node]

    def _number(self, node: Node) -> Interval:
        if not varies(node):
            return Interval(node, node)
        if self._is_summarized(node):
            return self._summary(node, node)
        match node:
            case Index():
                return Interval(*CORNERS[node])
            case Load():
                return self._promised(node, self._element(node))
            case Cast(x) if x.type is Type.BOOL:
                possible, certain = self.truth(x)
                return Interval(Cast(certain, node.type), Cast(possible, node.type))
            case Cast(x):
                inner = self.number(x)
                return Interval(Cast(inner.low, node.type), Cast(inner.high, node.type), inner.known)
            case Unary(op, x) if x.type is not Type.BOOL:
                return self._unary(op, self.number(x), node)
            case Select(condition, x, y):
                return self._select(self.truth(condition), self.number(x), self.number(y))
            case Binary(op, x, y):
                return self._binary(op, self.number(x), self.number(y), node)
            case _:
                return self._nothing(node)

    def _nothing(self, node: Node) -> Interval:
        self.undecided = True
        self.elements = True
        return UNKNOWN[node.type]

    def _unary(self, op: UnaryOp, x: Interval, node: Node) -> Interval:
        match op:
            case UnaryOp.NEG:
                return Interval(Unary(op, x.high), Unary(op, x.low), x.known)
            case UnaryOp.ABS:
                zero = Const(0) if node.type is Type.INT else Const(0.0)
                negative = Unary(UnaryOp.NEG, x.high)
                low = Binary(BinaryOp.MAX, Binary(BinaryOp.MAX, x.low, negative), zero)
                return Interval(low, Binary(BinaryOp.MAX, x.high, Unary(UnaryOp.NEG, x.low)), x.known)
            case UnaryOp.SIGN | UnaryOp.FLOOR | UnaryOp.CEIL | UnaryOp.RELU:
                return Interval(Unary(op, x.low), Unary(op, x.high), x.known)
            case _:
                return self._nothing(node)

    def _binary(self, op: BinaryOp, x: Interval, y: Interval, node: Node) -> Interval:
        known = conjunction([x.known, y.known])
        match op:
            case _ if node.type is Type.FLOAT:  # rounding may differ from kernel to kernel, and nan is not ordered
                return self._nothing(node)
            case BinaryOp.ADD | BinaryOp.MIN | BinaryOp.MAX:
                return Interval(Binary(op, x.low, y.low), Binary(op, x.high, y.high), known)
            case BinaryOp.SUB:
                return Interval(Binary(op, x.low, y.high), Binary(op, x.high, y.low), known)
            case BinaryOp.MUL:
                ends = {Binary(op, a, b): None for a in (x.low, x.high) for b in (y.low, y.high)}
                return Interval(_least(list(ends)), _greatest(list(ends)), known)
            case BinaryOp.FLOORDIV | BinaryOp.MOD if _is_divisor(y):
                quotients = Binary(BinaryOp.FLOORDIV, x.low, y.low), Binary(BinaryOp.FLOORDIV, x.high, y.low)
                if op is BinaryOp.FLOORDIV:
                    return Interval(*quotients, known)
                same = Compare(CompareOp.EQ, *quotients)
                last = Binary(BinaryOp.SUB, y.low, ONE)
                low, high = Binary(op, x.low, y.low), Binary(op, x.high, y.low)
                return Interval(Select(same, low, ZERO), Select(same, high, last), known)
            case _:
                return self._nothing(node)

    @staticmethod
    def _select(condition: Truth, x: Interval, y: Interval) -> Interval:
        possible, certain = condition

        def end(a: Node, b: Node, either: Node) -> Node:
            return Select(certain, a, Select(possible, either, b))

        known = _choice((possible, certain), (x.known, x.known), (y.known, y.known))[1]
        return Interval(
            end(x.low, y.low, _least([x.low, y.low])), end(x.high, y.high, _greatest([x.high, y.high])), known
        )

    # -- tensors ------------------------------------------------------------------------------------------------------

    def _is_summarized(self, node: Node) -> bool:
        """Whether a node is of one position and reads, there, a tensor of which no order is known."""
        if not self.summarize or len(node.depends & POSITIONS) != 1 or node.depends - {"b", "h", "q", "k"}:
            return False
        return self._scatters(node) and all(_is_exact(x) for x in post_order(node) if x.type is Type.FLOAT)

    def _summary(self, node: Node, value: Node) -> Interval:
        if node not in self.summaries:
            number, kind = len(self.summaries), DType.FLOAT32 if node.type is Type.FLOAT else DType.INT64
            (axis,) = node.depends & POSITIONS
            extents = Size("B"), Size("H"), Size(f"{axis} tiles")
            low, high = (Tensor(f"{which} of {number}", kind, extents) for which in ("low", "high"))
            self.summaries[node] = Summary(axis, value, low, high)
        return Interval(*self.summaries[node].loads)

    def _ordered(self, load: Load) -> frozenset[int]:
        """The axes that a look-up at positions has an order along, if that goes for all of its indices that vary."""
        promised = {p.axis for p in self.variant.tensor(load.tensor).promises if isinstance(p, Nondecreasing)}
        moving = {axis for axis, index in enumerate(load.indices) if varies(index)}
        return frozenset(promised) if moving <= promised else frozenset()

    def _element(self, load: Load) -> Interval:
        """The elements that a look-up finds in the tile: along an axis in order those between two, else one."""
        declared = self.variant.tensor(load.tensor)
        promised = {p.axis for p in declared.promises if isinstance(p, Nondecreasing)}
        known: list[Node] = []
        lows, highs = [], []
        for axis, (index, extent) in enumerate(zip(load.indices, declared.extents, strict=True)):
            found = self.number(index)
            if not varies(index):
                pass
            elif axis in promised:
                known.append(found.known)
                found = Interval(_clamped(found.low, extent), _clamped(found.high, extent))
            else:
                known.append(found.is_point)
                self.undecided = True
                self.elements |= not _is_quotient(index)
            lows.append(found.low)
            highs.append(found.high)
        low, high = (Load(load.tensor, tuple(ends), load.type) for ends in (lows, highs))
        return Interval(low, high, conjunction(known))

    def _promised(self, load: Load, found: Interval) -> Interval:
        """What a promised range says where nothing else is known."""
        for promise in self.variant.tensor(load.tensor).promises:
            if isinstance(promise, InRange) and found.known is not TRUE:
                last = Binary(BinaryOp.SUB, promise.high, ONE)
                return Interval(Select(found.known, found.low, promise.low), Select(found.known, found.high, last))
        return found


def _is_exact(node: Node) -> bool:
    """Whether a FLOAT operation rounds nothing, so that each kernel finds the same."""
    match node:
        case Load() | Cast() | Select() | Unary(UnaryOp.NEG | UnaryOp.ABS) | Binary(BinaryOp.MIN | BinaryOp.MAX):
            return True
        case _:
            return not node.children


def _is_divisor(y: Interval) -> bool:
    """Whether it is one number, which the call has checked to be positive (`logic.divisors`)."""
    return y.low is y.high and not any(isinstance(node, Load) for node in post_order(y.low))


def _is_quotient(index: Node) -> bool:
    """Whether an index is one number in pieces of a tile that cross no multiple of a divisor."""
    match index:
        case Binary(BinaryOp.FLOORDIV, Index(), y):
            return not varies(y)
        case Binary(BinaryOp.ADD | BinaryOp.SUB | BinaryOp.MIN | BinaryOp.MAX | BinaryOp.MUL, x, y):
            return all(not varies(part) or _is_quotient(part) for part in (x, y))
        case _:
            return False


def _clamped(index: Node, extent: Node) -> Node:
    """An index moved into the tensor: what is read beyond it is never used."""
    last = Binary(BinaryOp.SUB, extent, ONE)
    return Binary(BinaryOp.MAX, Binary(BinaryOp.MIN, index, last), ZERO)


def _at_most(x: Node, y: Node) -> Node:
    return Compare(CompareOp.LE, x, y)


def _least(nodes: list[Node]) -> Node:
    return _folded(BinaryOp.MIN, nodes)


def _greatest(nodes: list[Node]) -> Node:
    return _folded(BinaryOp.MAX, nodes)


def _folded(op: BinaryOp, nodes: list[Node]) -> Node:
    total, *rest = dict.fromkeys(nodes)
    for node in rest:
        total = Binary(op, total, node)
    return total


def _choice(condition: Truth, x: Truth, y: Truth) -> Truth:
    """`x if condition else y`."""
    possible, certain = condition
    neither = negation(possible)
    return (
        disjunction([conjunction([possible, x[0]]), conjunction([negation(certain), y[0]])]),
        disjunction([conjunction([certain, x[1]]), conjunction([neither, y[1]]), conjunction([x[1], y[1]])]),
    )


def _agreement(x: Truth, y: Truth, equal: bool) -> Truth:
    """`x == y` of conditions, or `x != y`."""
    same = disjunction([conjunction([x[1], y[1]]), conjunction([negation(x[0]), negation(y[0])])])
    other = disjunction([conjunction([x[1], negation(y[0])]), conjunction([negation(x[0]), y[1]])])
    return (negation(other), same) if equal else (negation(same), other)


def negation(node: Node) -> Node:
    match node:
        case Const(value):
            return Const(not value)
        case Unary(UnaryOp.NOT, x):
            return x
        case _:
            return Unary(UnaryOp.NOT, node)
