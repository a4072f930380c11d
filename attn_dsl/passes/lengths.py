"""Keys that are there: a variant for caches that are filled to a length of their own in each batch entry.

The length is a conjunct of the mask like any other, `k < kv_len[b]`, so the proofs find the tiles that end there, on
the device, and each backend runs it as it is. `KV` stays the capacity of the cache.
"""

from __future__ import annotations

from dataclasses import replace

from attn_dsl.errors import BindingError
from attn_dsl.ir.nodes import Binary, BinaryOp, Compare, CompareOp, Index, K, Load, Size
from attn_dsl.ir.types import DType, Type
from attn_dsl.ir.variant import Tensor, Variant

KV_LEN = "kv_len"


def check_name(variant: Variant) -> None:
    """Raises BindingError where the variant declares `kv_len` itself."""
    if KV_LEN in (*(p.name for p in variant.parameters), *(t.name for t in variant.tensors)):
        raise BindingError(f"`{variant.name}` declares `{KV_LEN}`, which is an argument of every call: rename it")


def with_lengths(variant: Variant) -> Variant:
    """The variant with `tensor kv_len: int32[B]`, in which keys from `kv_len[b]` on are not seen."""
    lengths = Tensor(KV_LEN, DType.INT32, (Size("B"),))
    is_there = Compare(CompareOp.LT, K, Load(KV_LEN, (Index("b"),), Type.INT))
    mask = Binary(BinaryOp.AND, variant.mask, is_there)
    return replace(variant, tensors=(*variant.tensors, lengths), mask=mask)
