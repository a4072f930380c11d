"""Keys and queries that are there: variants for caches and sequences with a length of their own in each batch entry.

A length is a conjunct of the mask like any other, `k < kv_len[b]`, so the proofs find the tiles that end there, on
the device, and each backend runs it as it is. `KV` stays the capacity of the cache.
"""

from __future__ import annotations

from dataclasses import replace

from attn_dsl.errors import BindingError
from attn_dsl.ir.nodes import Binary, BinaryOp, Compare, CompareOp, Index, K, Load, Node, Q, Size
from attn_dsl.ir.types import DType, Type
from attn_dsl.ir.variant import Tensor, Variant

KV_LEN, Q_END = "kv_len", "q_end"


def check_name(variant: Variant, name: str = KV_LEN) -> None:
    """Raises BindingError where the variant declares `name` itself."""
    if name in (*(p.name for p in variant.parameters), *(t.name for t in variant.tensors)):
        raise BindingError(f"`{variant.name}` declares `{name}`, which is an argument of every call: rename it")


def with_lengths(variant: Variant) -> Variant:
    """The variant with `tensor kv_len: int32[B]`, in which keys from `kv_len[b]` on are not seen."""
    return _ending(variant, K, KV_LEN)


def with_ends(variant: Variant) -> Variant:
    """`with_lengths`, with `tensor q_end: int32[B]` besides: queries from position `q_end[b]` on see nothing."""
    return _ending(with_lengths(variant), Q, Q_END)


def _ending(variant: Variant, position: Node, name: str) -> Variant:
    is_there = Compare(CompareOp.LT, position, Load(name, (Index("b"),), Type.INT))
    ends = Tensor(name, DType.INT32, (Size("B"),))
    mask = Binary(BinaryOp.AND, variant.mask, is_there)
    return replace(variant, tensors=(*variant.tensors, ends), mask=mask)
