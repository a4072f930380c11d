"""The order that only data tells: where the mask keeps pairs with `t[q] == t[k]`, positions sorted by t.

Equal elements then lie together, and what was scattered over all tiles are blocks along the diagonal:

    t[b, h, q] == t[b, h, k]      becomes  sorted[b, h, q'] == sorted[b, h, k'], nondecreasing in the position
    q >= k, beside that           becomes  q' >= k', since the sort is stable: equal elements keep their order
    a position anywhere else      becomes  order[b, h, q'], a look-up
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from attn_dsl.ir.nodes import (
    TRUE,
    Binary,
    BinaryOp,
    Compare,
    CompareOp,
    Index,
    K,
    Load,
    Node,
    Q,
    Unary,
    UnaryOp,
    conjuncts,
    post_order,
)
from attn_dsl.ir.types import DType, Type
from attn_dsl.ir.variant import Nondecreasing, Tensor, Variant, rewrite_variant
from attn_dsl.passes.simplify import simplify


@dataclass(frozen=True)
class Sorted:
    """The mask of a variant keeps only pairs for which `tensor` holds the same element at q and at k.

    axis: that of the position. indices: what is on each axis, `b`, `h` or `hk` beside the position.
    """

    variant: Variant
    tensor: Tensor
    axis: int
    indices: tuple[str, ...]

    @property
    def sorted_name(self) -> str:
        """Of the tensor that holds the elements in their order."""
        return self._fresh(f"sorted_{self.tensor.name}")

    @property
    def order_name(self) -> str:
        """Of the tensor that holds the positions, int32, in the order of their elements."""
        return self._fresh(f"order_{self.tensor.name}")

    def _fresh(self, name: str) -> str:
        names = {p.name for p in self.variant.parameters} | {t.name for t in self.variant.tensors}
        while name in names:
            name += "_"
        return name

    def reordered(self) -> Variant:
        """The variant over places in the sorted order, for calls whose queries and keys are the same positions."""
        rules = {"q": self._position(Q), "k": self._position(K)}
        equal = Compare(CompareOp.EQ, self._load(self.sorted_name, Q), self._load(self.sorted_name, K))
        ordered: Node = equal
        rest: Node = TRUE
        for part in conjuncts(self.variant.mask):
            if isinstance(part, Compare) and {part.x, part.y} == {Q, K}:
                ordered = Binary(BinaryOp.AND, ordered, part)
            elif not self._is_equality(part):
                rest = Binary(BinaryOp.AND, rest, part)
        looked_up = rewrite_variant(
            replace(self.variant, mask=rest),
            lambda node: rules[node.name] if isinstance(node, Index) and node.name in rules else node,
        )
        made = simplify(replace(looked_up, mask=Binary(BinaryOp.AND, ordered, looked_up.mask)))
        read = {node.tensor for node in post_order(*made.roots) if isinstance(node, Load)}
        extents = self.tensor.extents
        added = (
            Tensor(self.sorted_name, self.tensor.dtype, extents, (Nondecreasing(self.axis),)),
            Tensor(self.order_name, DType.INT32, extents),
        )
        kept = tuple(tensor for tensor in made.tensors if tensor.name in read or tensor.name != self.tensor.name)
        return replace(made, tensors=(*kept, *(tensor for tensor in added if tensor.name in read)))

    def _position(self, place: Index) -> Node:
        return self._load(self.order_name, place)

    def _load(self, name: str, place: Index) -> Load:
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
