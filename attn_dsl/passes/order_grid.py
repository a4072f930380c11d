"""Positions of a grid, cut into strips of columns: where a mask speaks of rows and columns, y = q // W and x = q % W.

A strip holds QUERY_COLUMNS columns of queries, and the `columns` columns of keys from the first one that they see; both
are sequences, row by row, so that a tile of 128 keys is a box of 128 // columns rows:

    q' = QUERY_COLUMNS * y + x - x0          x0 = QUERY_COLUMNS * strip
    k' = columns * (y + lead) + x - x1       x1 = the first column that a query of the strip sees

`x1` is a bound that the proofs derive from what the mask says of columns alone; a call checks that the last one lies
within the strip. `lead` rows before the first let tiles of keys begin where those that a tile of queries sees begin.

For the backward pass, whose programs own keys, the same with queries and keys exchanged (`Strips.exchanged`): strips of
QUERY_COLUMNS columns of keys, and boxes of the queries that see them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from attn_dsl.ir.nodes import (
    HK,
    SCORE,
    TRUE,
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
    Var,
    conjuncts,
    post_order,
    rewrite,
    substitute,
)
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import Parameter, Variant, rewrite_variant
from attn_dsl.passes.monotone import Q0, Q1, Q_OFFSET
from attn_dsl.passes.order import number
from attn_dsl.passes.prove import conjunction, prove
from attn_dsl.passes.schedule import BLOCK, derive_schedule, maximum_of, minimum, minimum_of
from attn_dsl.passes.simplify import simplify, simplify_node
from attn_dsl.passes.symbolic import Opaque, Space

QUERY_COLUMNS = 16
"""Columns of queries in a strip: a tile of 128 queries is a box of 8 rows."""
KEY_COLUMNS = (32, 64, 128)
"""Of a box of keys, which has as many rows as make a tile: the first of these that a strip sees no more of."""
FARTHEST = 2**29
STRIP = Var("strip")
_QY, _QX, _KY, _KX = Var("query row"), Var("query column"), Var("key row"), Var("key column")
_PLACE, _COLUMN, _LEAD, _FIRST = Var("key place"), Var("column of a strip"), Var("lead"), Var("first column")
_COORDINATES = frozenset({"q", "k", *(v.name for v in (_QY, _QX, _KY, _KX))})
_SIZES = ("B", "H", "HK", "Q", "KV")


@dataclass(frozen=True)
class Boxes:
    """Where the tile begins whose first place is q (k) of a head (a key head): its head, row and column in the grid.

    columns: of a box of keys.
    """

    query: tuple[Node, Node, Node]
    key: tuple[Node, Node, Node]
    columns: int


def exchanged(variant: Variant) -> Variant:
    """The variant with queries and keys in each other's place."""
    places: dict[Node, Node] = {Q: K, K: Q, Size("Q"): Size("KV"), Size("KV"): Size("Q")}
    return rewrite_variant(variant, lambda node: places.get(node, node))


@dataclass(frozen=True)
class Strips:
    """The mask of a variant speaks of the columns of a grid of `width`; `mask` does so by coordinates.

    of_keys: the variant is an exchanged one. What is said of queries here is then said of keys, and the other way
    round; `reordered` and `boxes` exchange them back.
    """

    variant: Variant
    width: Node
    of_keys: bool = False

    def exchanged(self) -> Strips | None:
        """Strips of keys of the same grid, where something is known of what queries see them."""
        found = Strips(exchanged(self.variant), self.width, True)
        return None if found.reach is None else found

    @cached_property
    def _by_coordinates(self) -> Variant:
        return rewrite_variant(self.variant, lambda node: _coordinate(node, self.width))

    @cached_property
    def _columns(self) -> Variant:
        """What the mask says of columns alone, as a mask of positions."""
        parts = [part for part in conjuncts(self._by_coordinates.mask) if _is_of_columns(part)]
        mask = substitute(conjunction(parts), {_QX: Q, _KX: K})
        return Variant("columns", self.variant.parameters, (), SCORE, mask)

    @cached_property
    def reach(self) -> tuple[Node, Node] | None:
        """The columns `[first, last)` of keys that the queries of `strip` see, or more; None where nothing is known."""
        if self._columns.mask is TRUE:
            return None
        proof = replace(prove(self._columns), masked=())
        segments = derive_schedule(self._columns, proof).kv.segments
        if not segments:
            return None
        x0 = Binary(BinaryOp.MUL, STRIP, Const(QUERY_COLUMNS))
        last = Binary(BinaryOp.ADD, x0, Const(QUERY_COLUMNS - 1))
        known: dict[Node, Node] = {
            Q0: x0,
            Q1: minimum(last, Binary(BinaryOp.SUB, self.width, Const(1))),
            BLOCK: Const(1),
            Q_OFFSET: Const(0),
            Size("Q"): self.width,
            Size("KV"): self.width,
        }
        first = substitute(minimum_of([segment.begin for segment in segments]), known)
        end = substitute(maximum_of([segment.end for segment in segments]), known)
        return simplify_node(_within(first)), simplify_node(_within(end))

    def starts(self, width: int, columns: int, parameters: Mapping[str, object]) -> list[int] | None:
        """The first column of keys of each strip; None where what a strip sees does not fit `columns`."""
        assert self.reach is not None
        found = []
        for strip in range(-(-width // QUERY_COLUMNS)):
            first, end = (number(substitute(bound, {STRIP: Const(strip)}), parameters) for bound in self.reach)
            if first is None or end is None or end - first > columns:
                return None
            found.append(first)
        return found

    def grid(self, columns: int, parameters: Mapping[str, object]) -> tuple[int, int, int]:
        """Width, and columns of a box of queries and of keys."""
        width = number(self.width, parameters)
        assert width is not None
        return (width, columns, QUERY_COLUMNS) if self.of_keys else (width, QUERY_COLUMNS, columns)

    def name(self, what: str) -> str:
        """The name of a parameter that stands for a size of the call or for `lead`, unlike any other of the variant."""
        names = {p.name for p in self.variant.parameters} | {t.name for t in self.variant.tensors}
        name = f"call_{what}"
        while name in names:
            name += "_"
        return name

    def _solved(self, columns: int, ragged: bool) -> Iterator[Node]:
        """The conjuncts of the mask, and that a place of a key is one of the grid and, if `ragged`, of the keys."""
        yield Compare(CompareOp.GE, _PLACE, Binary(BinaryOp.MUL, _LEAD, Const(columns)))
        if not self._stays_inside(K):
            yield from _bounds(Compare(CompareOp.LT, _KX, self.width), columns)
        if self.of_keys and not self._stays_inside(Q):  # else they would have a share in the gradients of queries
            yield Compare(CompareOp.LT, _QX, self.width)
        if ragged:
            yield Compare(CompareOp.LT, K, Size("KV"))
        for part in conjuncts(self._by_coordinates.mask):
            yield from _bounds(part, columns)

    def _stays_inside(self, position: Index) -> bool:
        """Whether the mask itself keeps no column past the last."""
        past = Compare(CompareOp.GE, position, self.width)
        proof = prove(replace(self._columns, mask=Binary(BinaryOp.AND, self._columns.mask, past)))
        return proof.empty is TRUE

    def reordered(self, columns: int, *, ragged: bool) -> Variant:
        """The variant over places in strips, for heads `strip * H + h`, queries from position 0 on.

        ragged: the last row is not whole. Parameters beside those of the variant are `lead` and the sizes of the call
        that it reads (`named_sizes`).
        """
        assert self.reach is not None
        named = {what: Param(self.name(what), Type.INT) for what in (*_SIZES, "lead")}
        strip = Binary(BinaryOp.FLOORDIV, H, named["H"])
        x0 = Binary(BinaryOp.MUL, strip, Const(QUERY_COLUMNS))
        x1 = substitute(self.reach[0], {STRIP: strip})
        y, x = _divided(Q, QUERY_COLUMNS)
        ky, kx = _divided(K, columns)
        ky = Binary(BinaryOp.SUB, ky, named["lead"])
        there: dict[Node, Node] = {_QY: y, _QX: Binary(BinaryOp.ADD, x0, x), _KY: ky, _KX: Binary(BinaryOp.ADD, x1, kx)}
        there[Q] = Binary(BinaryOp.ADD, Binary(BinaryOp.MUL, there[_QY], self.width), there[_QX])
        there[K] = Binary(BinaryOp.ADD, Binary(BinaryOp.MUL, there[_KY], self.width), there[_KX])
        there |= {H: Binary(BinaryOp.MOD, H, named["H"]), HK: Binary(BinaryOp.MOD, HK, named["HK"])}
        there |= {Size(size): named[size] for size in _SIZES}
        there |= {_PLACE: K, _COLUMN: kx, _LEAD: named["lead"], _FIRST: x1}
        seen = replace(self._by_coordinates, mask=conjunction(list(self._solved(columns, ragged))))
        made = simplify(rewrite_variant(seen, lambda node: there.get(node, node)))
        nodes = set(post_order(*made.roots, *(extent for tensor in made.tensors for extent in tensor.extents)))
        nodes |= {named["H"], named["HK"], named["lead"]}
        used = tuple(Parameter(p.name, Type.INT) for p in named.values() if p in nodes)
        made = replace(made, parameters=(*made.parameters, *used))
        return exchanged(made) if self.of_keys else made

    def named_sizes(self, sizes: Mapping[str, int], lead: int) -> dict[str, int]:
        """What the parameters of `reordered` beside those of the variant are in a call of such sizes."""
        places = {"Q": "KV", "KV": "Q"} if self.of_keys else {}
        return {self.name("lead"): lead} | {self.name(name): sizes[places.get(name, name)] for name in _SIZES}

    def boxes(self, columns: int) -> Boxes:
        """Over the parameters of `reordered`."""
        assert self.reach is not None
        owners = ("HK", "H") if self.of_keys else ("H", "HK")
        heads, kv_heads, lead = (Param(self.name(what), Type.INT) for what in (*owners, "lead"))
        x0 = Binary(BinaryOp.MUL, Binary(BinaryOp.FLOORDIV, H, heads), Const(QUERY_COLUMNS))
        x1 = substitute(self.reach[0], {STRIP: Binary(BinaryOp.FLOORDIV, H, kv_heads)})
        own, other = (K, Q) if self.of_keys else (Q, K)
        y, other_y = _divided(own, QUERY_COLUMNS)[0], _divided(other, columns)[0]
        strip = Binary(BinaryOp.MOD, H, heads), y, x0
        box = Binary(BinaryOp.MOD, H, kv_heads), Binary(BinaryOp.SUB, other_y, lead), x1
        return Boxes(box, strip, columns) if self.of_keys else Boxes(strip, box, columns)


def strips(variant: Variant) -> Iterator[Strips]:
    """The grids of whose columns the mask speaks."""
    widths: dict[Node, None] = {}
    for node in post_order(variant.mask):
        match node:
            case Binary(BinaryOp.MOD, x, y) if x is K and not y.depends and not _reads(y):
                widths[y] = None
    for width in widths:
        found = Strips(variant, width)
        if found.reach is not None:
            yield found


def _reads(node: Node) -> bool:
    return any(isinstance(part, (Load, Size)) for part in post_order(node))


def _coordinate(node: Node, width: Node) -> Node:
    match node:
        case Binary(BinaryOp.FLOORDIV, Index("q"), y) if y is width:
            return _QY
        case Binary(BinaryOp.FLOORDIV, Index("k"), y) if y is width:
            return _KY
        case Binary(BinaryOp.MOD, Index("q"), y) if y is width:
            return _QX
        case Binary(BinaryOp.MOD, Index("k"), y) if y is width:
            return _KX
        case _:
            return node


def _bounds(part: Node, columns: int) -> Iterator[Node]:
    """A conjunct, with a bound of a key's row as one of its place, and that of its column as one within the strip.

    `abs` of something with a row or column becomes two bounds: of each, a row of queries has a number of its own.
    """
    match part:
        case Compare(CompareOp.LE | CompareOp.LT as op, Unary(UnaryOp.ABS, x), y) if x.type is Type.INT:
            halves: list[Node] = [Compare(op, x, y), Compare(op, Unary(UnaryOp.NEG, x), y)]
        case _:
            halves = [part]
    solved = [_bound(half, columns) for half in halves]
    if any(bound is None for bound in solved):
        yield part
    else:
        yield from (bound for bound in solved if bound is not None)


def _bound(part: Node, columns: int) -> Node | None:
    """`place >= e` or `place <= e` for a comparison that is linear in one coordinate of the key; None for another."""
    if not isinstance(part, Compare) or part.x.type is not Type.INT or part.op in (CompareOp.EQ, CompareOp.NE):
        return None
    space = Space()
    x, y = (part.y, part.x) if part.op in (CompareOp.LE, CompareOp.LT) else (part.x, part.y)
    try:
        rest = space.poly(x) - space.poly(y) - (1 if part.op in (CompareOp.LT, CompareOp.GT) else 0)
        for key in (_KY, _KX):
            for sign in (1, -1):
                other = rest - (space.poly(key) if sign > 0 else -space.poly(key))
                if not space.node(other).depends & {"k", _KY.name, _KX.name}:
                    end = space.node(-other if sign > 0 else other)  # key >= -other, or key <= other
                    return _placed(key, sign > 0, end, columns)
    except Opaque:
        pass
    return None


def _placed(key: Node, is_lower: bool, end: Node, columns: int) -> Node:
    op = CompareOp.GE if is_lower else CompareOp.LE
    if key is _KX:
        return Compare(op, _COLUMN, Binary(BinaryOp.SUB, end, _FIRST))
    first = Binary(BinaryOp.MUL, Binary(BinaryOp.ADD, end, _LEAD), Const(columns))
    return Compare(op, _PLACE, first if is_lower else Binary(BinaryOp.ADD, first, Const(columns - 1)))


def _within(bound: Node) -> Node:
    """The same with numbers of 32 bits: what stands for no bound is beyond all columns nevertheless."""

    def nearer(node: Node) -> Node:
        match node:
            case Const(value) if abs(value) > FARTHEST:
                return Const(FARTHEST if value > 0 else -FARTHEST)
            case _:
                return node

    return rewrite(bound, nearer)


def _is_of_columns(part: Node) -> bool:
    return (
        bool(part.depends & _COORDINATES) and part.depends & _COORDINATES <= {_QX.name, _KX.name} and not _reads(part)
    )


def _divided(position: Node, by: int) -> tuple[Node, Node]:
    return Binary(BinaryOp.FLOORDIV, position, Const(by)), Binary(BinaryOp.MOD, position, Const(by))
