"""Orders of positions in which a scattered mask is dense: found from the mask, applied by rewriting the variant.

    mask implies (q - k) % d == 0       residue classes: q = d*q' + r and k = d*k' + r, each class a sequence of its own

A reordered variant is a variant like any other, over the new positions `q'` and `k'`, so that every later pass (proofs,
schedule, derivatives) and every kernel takes it as it is. Score and mask read the true positions, as expressions; what
the residue decides is divided out: (q - k) % d == 0 is true, q - k < window is q' - k' <= (window - 1) // d.

The residue takes the place of a batch or head index, see `Place`. Tensors are laid out so by strides alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache

from attn_dsl.ir.nodes import (
    HK,
    B,
    Binary,
    BinaryOp,
    Compare,
    CompareOp,
    Const,
    H,
    Index,
    K,
    Load,
    Node,
    Param,
    Q,
    Size,
    Unary,
    UnaryOp,
    conjuncts,
    post_order,
    rewrite,
)
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import Parameter, Variant, rewrite_variant
from attn_dsl.passes.monotone import varies
from attn_dsl.passes.polynomial import Poly
from attn_dsl.passes.simplify import simplify, simplify_node
from attn_dsl.passes.symbolic import Form, Opaque, Space, divided


class Place(Enum):
    """Where the residue r of a position stands among the axes [B, H, S, D] of the reordered tensors.

    BATCH  [d, H, S / d, D], batch r: a view, for one batch entry
    HEAD   [B, d * H, S / d, D], head r*H + h, a view of what lies in memory as [B, S, H, D]
    PAIR   [B * H, d, S / d, D], batch b*H + h, head r: without grouped heads, a view of what lies as [B, H, S, D]
    """

    BATCH = "batch"
    HEAD = "head"
    PAIR = "pair"


@dataclass(frozen=True)
class Residues:
    """The mask of a variant keeps only pairs with (q - k) % modulus == 0."""

    variant: Variant
    modulus: Node

    def reordered(self, place: Place, *, ragged: bool) -> Variant:
        """The variant over positions within a class.

        ragged: classes are not all as long as the longest, and keys past the end are masked. Sizes of the call that
        the variant reads are parameters, `sizes` says which.
        """
        renamed = {name: Param(self.size_name(name), Type.INT) for name in ("B", "H", "HK", "Q", "KV")}
        return _Residue(self.modulus, place, renamed).rewritten(self.variant, ragged)

    def size_name(self, size: str) -> str:
        """The name of the parameter that stands for a size of the call, unlike any other of the variant."""
        names = {p.name for p in self.variant.parameters} | {t.name for t in self.variant.tensors}
        name = f"call_{size}"
        while name in names:
            name += "_"
        return name


def residues(variant: Variant) -> Iterator[Residues]:
    """The classes that the conjuncts of the mask speak of; those of a smaller modulus are in none of another."""
    found: dict[Node, None] = {}
    for part in conjuncts(variant.mask):
        if isinstance(part, Compare) and part.op is CompareOp.EQ and part.x.type is Type.INT:
            for modulus in _moduli(part):
                if _is_congruence(part, modulus):
                    found[modulus] = None
    for modulus in found:
        yield Residues(variant, modulus)


def _moduli(part: Compare) -> Iterator[Node]:
    for side in (part.x, part.y):
        for node in post_order(side):
            match node:
                case Binary(BinaryOp.MOD, x, y) if varies(x) and _is_number(y):
                    yield y


def _is_number(node: Node) -> bool:
    """Whether literals and parameters alone make it."""
    return not node.depends and not any(isinstance(part, (Load, Size)) for part in post_order(node))


def _is_congruence(part: Compare, modulus: Node) -> bool:
    """Whether x == y implies that `modulus` divides q - k: x - y is q - k or k - q, but for multiples of it.

    e % modulus differs from e by a multiple.
    """
    space = Space(frozenset((modulus,)))

    def without(node: Node) -> Node:
        match node:
            case Binary(BinaryOp.MOD, x, y) if y is modulus:
                return without(x)
            case Binary(BinaryOp.ADD | BinaryOp.SUB as op, x, y):
                return Binary(op, without(x), without(y))
            case _:
                return node

    try:
        difference = space.poly(without(part.x)) - space.poly(without(part.y))
        rest = divided(difference, space.poly(modulus))[1]
        distance = space.poly(Q) - space.poly(K)
    except Opaque:
        return False
    return rest in (distance, -distance)


@dataclass
class _Residue:
    """Rewrites what a variant says of positions into what it says of positions within a class."""

    modulus: Node
    place: Place
    sizes: dict[str, Param]
    space: Space = field(init=False)

    def __post_init__(self) -> None:
        self.space = Space(frozenset((self.modulus, self.sizes["H"], self.sizes["HK"])))
        self.indices, self.residue = self._placed()
        for position in (Q, K):
            first = Binary(BinaryOp.MUL, position, self.modulus)
            self.indices[position] = Binary(BinaryOp.ADD, first, self.residue)

    def _placed(self) -> tuple[dict[Node, Node], Node]:
        """Batch and heads of the call, and the residue, by the indices of the reordered tensors."""
        heads, kv_heads = self.sizes["H"], self.sizes["HK"]
        match self.place:
            case Place.BATCH:
                return {B: Const(0), H: H, HK: HK}, B
            case Place.HEAD:
                return {B: B, H: _rest(H, heads), HK: _rest(HK, kv_heads)}, _over(H, heads)
            case Place.PAIR:
                return {B: _over(B, heads), H: _rest(B, heads), HK: _rest(B, heads)}, H

    def rewritten(self, variant: Variant, ragged: bool) -> Variant:
        if ragged:
            here = Compare(CompareOp.LT, K, Size("KV"))
            variant = replace(variant, mask=Binary(BinaryOp.AND, variant.mask, here))
        made = simplify(rewrite_variant(variant, self._rewritten))
        nodes = set(post_order(*made.roots, *(extent for tensor in made.tensors for extent in tensor.extents)))
        used = tuple(Parameter(x.name, Type.INT) for x in self.sizes.values() if x in nodes)
        return replace(made, parameters=(*made.parameters, *used))

    def _rewritten(self, node: Node) -> Node:
        """The equal, over the new indices, of a node whose operands are such."""
        match node:
            case Index():
                return self.indices[node]
            case Size(name) if name in self.sizes:
                return self.sizes[name]
            case Compare(op, x, y) if x.type is Type.INT and varies(node):
                return self._comparison(op, x, y) or node
            case Binary(BinaryOp.FLOORDIV | BinaryOp.MOD as op, x, y) if varies(x) and not varies(y):
                return self._quotient(op, x, y) or node
            case Binary(BinaryOp.SUB) | Unary(UnaryOp.ABS) if node.type is Type.INT and varies(node):
                return self._distance(node) or node
            case _:
                return node

    def _comparison(self, op: CompareOp, x: Node, y: Node) -> Node | None:
        """`x op y`, divided by the modulus: d*a + e >= 0 is a + e // d >= 0, where a holds the positions."""
        if op in (CompareOp.LT, CompareOp.LE):
            return self._comparison(CompareOp.GT if op is CompareOp.LT else CompareOp.GE, y, x)
        try:
            difference, modulus = self.space.poly(x) - self.space.poly(y), self.space.poly(self.modulus)
            if op is CompareOp.GT:
                difference -= 1
            whole, rest = divided(difference, modulus)
            if not self._varies(whole) or self._varies(rest):
                return None
            if op is CompareOp.GE or op is CompareOp.GT:
                return self.space.holds(Form({}, whole + self.space.floor(rest, modulus)))
        except Opaque:
            return None
        if rest:
            return None
        return Compare(op, self.space.node(whole), Const(0))

    def _quotient(self, op: BinaryOp, x: Node, y: Node) -> Node | None:
        """(y*a + e) // y is a + e // y, and (y*a + e) % y is e % y; with e the residue, that is a, and e."""
        try:
            divisor = self.space.poly(y)
            whole, rest = divided(self.space.poly(x), divisor)
        except Opaque:
            return None
        if not whole:
            return None
        is_residue = y is self.modulus and rest == self.space.poly(self.residue)
        inner = self.space.node(rest)
        if op is BinaryOp.MOD:
            return inner if is_residue or not rest else Binary(BinaryOp.MOD, inner, y)
        if is_residue or not rest:
            return self.space.node(whole)
        return Binary(BinaryOp.ADD, self.space.node(whole), Binary(BinaryOp.FLOORDIV, inner, y))

    def _distance(self, node: Node) -> Node | None:
        """What is a multiple of the modulus, as such: residues cancel in a difference, and abs(d*a) is d * abs(a)."""
        try:
            inner = self.space.poly(node.x if isinstance(node, Unary) else node)
            whole, rest = divided(inner, self.space.poly(self.modulus))
        except Opaque:
            return None
        if rest or not whole:
            return None
        distance = self.space.node(whole)
        if isinstance(node, Unary):
            distance = Unary(UnaryOp.ABS, distance)
        return Binary(BinaryOp.MUL, distance, self.modulus)

    def _varies(self, poly: Poly) -> bool:
        return any(varies(node) for _, factors in self.space.terms(poly) for node in factors)


def _over(x: Node, y: Node) -> Node:
    return Binary(BinaryOp.FLOORDIV, x, y)


def _rest(x: Node, y: Node) -> Node:
    return Binary(BinaryOp.MOD, x, y)


def number(node: Node, parameters: Mapping[str, object]) -> int | None:
    """The INT that an expression is with these parameters; None where one of them is no number."""
    return _number(node, tuple((name, x) for name, x in parameters.items() if isinstance(x, int)))


@lru_cache(maxsize=4096)
def _number(node: Node, parameters: tuple[tuple[str, int], ...]) -> int | None:
    known = dict(parameters)

    def bound(part: Node) -> Node:
        return Const(known[part.name]) if isinstance(part, Param) and part.name in known else part

    found = simplify_node(rewrite(node, bound))
    return int(found.value) if isinstance(found, Const) else None
