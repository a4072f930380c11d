"""The order that only data tells: where the mask keeps pairs with `t[q] == t[k]`, positions sorted by t.

Equal elements then are runs, and what was scattered over all tiles are blocks along the diagonal. Where first(i) and
last(i) are the ends of the run that a place i is in,

    t[b, h, q] == t[b, h, k]      becomes  first(q') <= k' <= last(q'), or as well  first(k') <= q' <= last(k')
    q >= k, beside that           becomes  q' >= k', since the sort is stable: equal elements keep their order
    a position anywhere else      becomes  order[b, h, q'], a look-up

A row's pass asks for the ends of its queries, a column's for those of its keys, and beside `q >= k` for one end alone.
Of a place an end is stored as 8 bits, where it lies in the block of BLOCK places, and of a block as a place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Literal

from attn_dsl.ir.nodes import (
    TRUE,
    Binary,
    BinaryOp,
    Compare,
    CompareOp,
    Const,
    Index,
    K,
    Load,
    Node,
    Q,
    Select,
    Unary,
    UnaryOp,
    conjuncts,
    post_order,
    substitute,
)
from attn_dsl.ir.types import DType, Type
from attn_dsl.ir.variant import Nondecreasing, Tensor, Variant, rewrite_variant
from attn_dsl.passes.simplify import simplify

End = Literal["first", "last"]
ENDS: tuple[End, ...] = ("first", "last")
BLOCK = 256
"""Places of a block."""
BEYOND: dict[End, int] = {"first": 0, "last": BLOCK - 1}
"""What stands for an end that lies in another block, or where the block begins or ends: that of the block says it."""


@dataclass(frozen=True)
class Sorted:
    """The mask of a variant keeps only pairs for which `tensor` holds the same element at q and at k.

    axis: that of the position. indices: what is on each axis, `b`, `h` or `hk` beside the position.
    """

    variant: Variant
    tensor: Tensor
    axis: int
    indices: tuple[str, ...]

    @cached_property
    def order_name(self) -> str:
        """Of the tensor that holds the positions, int32, in the order of their elements."""
        return self._fresh(f"order_{self.tensor.name}")

    @cached_property
    def end_names(self) -> dict[End, tuple[str, str]]:
        """Of the tensors that hold an end of runs, uint8 for each place and int32 for each block."""
        names = {end: (f"{end}_{self.tensor.name}", f"{end}_{self.tensor.name}_by_block") for end in ENDS}
        return {end: (self._fresh(places), self._fresh(blocks)) for end, (places, blocks) in names.items()}

    def _fresh(self, name: str) -> str:
        names = {p.name for p in self.variant.parameters} | {t.name for t in self.variant.tensors}
        while name in names:
            name += "_"
        return name

    def reordered(self, side: Index = Q) -> Variant:
        """The variant over places in the sorted order, for calls whose queries and keys are the same positions, by the
        runs that the positions of one side are in: Q for a forward pass, K for a backward."""
        other = K if side is Q else Q
        rules = {"q": self._position(Q), "k": self._position(K)}
        kept: list[Compare] = []
        rest: Node = TRUE
        for part in conjuncts(self.variant.mask):
            if isinstance(part, Compare) and {part.x, part.y} == {Q, K}:
                kept.append(part)
            elif not self._is_equality(part):
                rest = Binary(BinaryOp.AND, rest, part)
        least = {pair for part in kept for pair in _at_most(part)}
        if (other, side) not in least:
            kept.append(Compare(CompareOp.LE, other, self.end("last", side)))
        if (side, other) not in least:
            kept.append(Compare(CompareOp.LE, self.end("first", side), other))
        looked_up = rewrite_variant(
            replace(self.variant, mask=rest),
            lambda node: rules[node.name] if isinstance(node, Index) and node.name in rules else node,
        )
        mask: Node = reduce(lambda x, y: Binary(BinaryOp.AND, x, y), kept, looked_up.mask)
        made = simplify(replace(looked_up, mask=mask))
        read = {node.tensor for node in post_order(*made.roots) if isinstance(node, Load)}
        added = [Tensor(self.order_name, DType.INT32, self.tensor.extents)]
        for end in ENDS:
            places, blocks = self.end_names[end]
            added += [
                Tensor(places, DType.UINT8, self.tensor.extents),
                Tensor(blocks, DType.INT32, self._block_extents),
            ]
        kept_tensors = (tensor for tensor in made.tensors if tensor.name in read or tensor.name != self.tensor.name)
        return replace(made, tensors=(*kept_tensors, *(tensor for tensor in added if tensor.name in read)))

    @property
    def shown(self) -> Node:
        """The mask of `reordered`, for people: the ends of runs as if they were tensors."""
        ends: dict[Node, Node] = {self.end(end, Q): self._load(f"{end}_{self.tensor.name}", Q) for end in ENDS}
        return substitute(self.reordered().mask, ends)

    def end(self, end: End, place: Index) -> Node:
        """The first or last place of the run that a place is in."""
        of_places, of_blocks = self.end_names[end]
        code, size = self._load(of_places, place), Const(BLOCK)
        block = Binary(BinaryOp.FLOORDIV, place, size)
        inside = Binary(BinaryOp.ADD, Binary(BinaryOp.MUL, block, size), code)
        beyond = Compare(CompareOp.EQ, code, Const(BEYOND[end]))
        return Select(beyond, self._load(of_blocks, block), inside)

    @property
    def _block_extents(self) -> tuple[Node, ...]:
        extents = list(self.tensor.extents)
        whole = Binary(BinaryOp.ADD, extents[self.axis], Const(BLOCK - 1))
        extents[self.axis] = Binary(BinaryOp.FLOORDIV, whole, Const(BLOCK))
        return tuple(extents)

    def _position(self, place: Index) -> Node:
        return self._load(self.order_name, place)

    def _load(self, name: str, place: Node) -> Load:
        indices = tuple(place if axis == self.axis else Index(index) for axis, index in enumerate(self.indices))
        return Load(name, indices, Type.INT)

    def _is_equality(self, part: Node) -> bool:
        found = _equality(self.variant, part)
        return found is not None and found.tensor is self.tensor


def sorts(variant: Variant) -> Iterator[Sorted]:
    """The orders by a tensor of which a conjunct of the mask says that both positions hold the same element.

    Not by one that is promised to be nondecreasing: it is sorted.
    """
    found = (_equality(variant, part) for part in conjuncts(variant.mask))
    yield from {order.tensor.name: order for order in found if order is not None}.values()


def _at_most(part: Compare) -> Iterator[tuple[Node, Node]]:
    """(x, y) where a comparison of positions says x <= y."""
    if part.op in (CompareOp.LE, CompareOp.LT, CompareOp.EQ):
        yield part.x, part.y
    if part.op in (CompareOp.GE, CompareOp.GT, CompareOp.EQ):
        yield part.y, part.x


def _equality(variant: Variant, part: Node) -> Sorted | None:
    match part:
        case Compare(CompareOp.EQ, Load(name, left), Load(other, right)) if name == other:
            pass
        case Unary(UnaryOp.NOT, Compare(CompareOp.NE, Load(name, left), Load(other, right))) if name == other:
            pass
        case _:
            return None
    tensor = variant.tensor(name)
    apart = [axis for axis, (x, y) in enumerate(zip(left, right, strict=True)) if x is not y]
    if len(apart) != 1 or {left[apart[0]], right[apart[0]]} != {Q, K} or tensor.dtype.type is not Type.INT:
        return None
    (axis,) = apart
    beside = [index for at, index in enumerate(left) if at != axis]
    if not all(isinstance(index, Index) and index.name in ("b", "h", "hk") for index in beside):
        return None
    names = tuple(index.name if isinstance(index, Index) else "" for index in left)
    is_sorted = any(isinstance(promise, Nondecreasing) and promise.axis == axis for promise in tensor.promises)
    if is_sorted or len(set(names)) < len(names):
        return None
    return Sorted(variant, tensor, axis, names)
