"""Where keys and queries stand: variants for caches, pages and packed sequences, each batch entry with its own lengths.

A length is a conjunct of the mask like any other, `k < kv_len[b]`, so the proofs find the tiles that end there, on
the device, and each backend runs it as it is. `KV` stays the capacity of the cache. What else the kernels must know is
declared before all else, as captured tensors:

    page_table: int32[B, pages]                  the keys stand in pages; `KV` is what the table has room for
    key_scale, value_scale: float32[slabs, HK]   what keys and values in 8 bits are multiplied by, for each page (or
                                                 batch entry, where there are none) and head
    query_ends, key_ends: int32[B + 1]           sequences are packed, one behind the other; `Q` and `KV` are parameters
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

from attn_dsl.errors import BindingError
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
    Param,
    Q,
    Size,
    conjuncts,
    substitute,
)
from attn_dsl.ir.types import DType, Type
from attn_dsl.ir.variant import Parameter, Tensor, Variant, rewrite_variant

KV_LEN, PAGE_TABLE, KEY_SCALE, VALUE_SCALE = "kv_len", "page_table", "key_scale", "value_scale"
QUERY_ENDS, KEY_ENDS, LONGEST_QUERY, LONGEST_KEY = "query_ends", "key_ends", "longest_query", "longest_key"
OF_CALLS = (KV_LEN, PAGE_TABLE, KEY_SCALE, VALUE_SCALE)
OF_PACKED = (QUERY_ENDS, KEY_ENDS, LONGEST_QUERY, LONGEST_KEY)
SEQUENCE, SEQUENCES = "sequence_of_the_call", "sequences_of_the_call"


def check_names(variant: Variant, names: tuple[str, ...] = OF_CALLS) -> None:
    """Raises BindingError where the variant declares one of the names itself."""
    for name in names:
        if name in (*(p.name for p in variant.parameters), *(t.name for t in variant.tensors)):
            raise BindingError(f"`{variant.name}` declares `{name}`, which is an argument of every call: rename it")


def with_lengths(variant: Variant) -> Variant:
    """The variant with `tensor kv_len: int32[B]`, in which keys from `kv_len[b]` on are not seen."""
    tensors = (*variant.tensors, Tensor(KV_LEN, DType.INT32, (Size("B"),)))
    return replace(variant, tensors=tensors, mask=_before(variant.mask, K, Load(KV_LEN, (Index("b"),), Type.INT)))


def with_pages(variant: Variant) -> Variant:
    """The variant with `tensor page_table: int32[B, pages]`."""
    table = Tensor(PAGE_TABLE, DType.INT32, (Size("B"), Size("pages_of_a_sequence")))
    return replace(variant, tensors=(table, *variant.tensors))


def with_scales(variant: Variant) -> Variant:
    """The variant with `tensor key_scale, value_scale: float32[slabs, HK]`, which is to get its pages after them."""
    assert not is_paged(variant), "kernels look for the page table before the scales"
    scales = (
        Tensor(name, DType.FLOAT32, (Size("slabs_of_the_cache"), Size("HK"))) for name in (KEY_SCALE, VALUE_SCALE)
    )
    return replace(variant, tensors=(*scales, *variant.tensors))


def with_packing(variant: Variant) -> Variant:
    """The variant of packed sequences: `tensor query_ends, key_ends: int32[B + 1]`, cumulative lengths, and
    `longest_query, longest_key: int`. Rows and keys past those of a sequence see nothing and are not seen."""
    one_more = Binary(BinaryOp.ADD, Size("B"), Const(1))
    mask = variant.mask
    for name, position in ((KEY_ENDS, K), (QUERY_ENDS, Q)):
        mask = _before(mask, position, sequence_length(name))
    ends = (Tensor(name, DType.INT32, (one_more,)) for name in (QUERY_ENDS, KEY_ENDS))
    longest = (Parameter(name, Type.INT) for name in (LONGEST_QUERY, LONGEST_KEY))
    return replace(
        variant, parameters=(*variant.parameters, *longest), tensors=(*ends, *variant.tensors), mask=mask
    )  # fmt: skip


def one_sequence(variant: Variant, *, ends: bool) -> Variant:
    """Of a packed variant, that of one sequence, a batch of 1: `b`, `B`, `Q` and `KV` are parameters. Its lengths are
    those of its query and key unless it `ends` where the packed ones say."""
    if not ends:
        known: dict[Node, Node] = {Compare(CompareOp.LT, K, sequence_length(KEY_ENDS)): TRUE}
        known[Compare(CompareOp.LT, Q, sequence_length(QUERY_ENDS))] = TRUE
        variant = replace(variant, mask=substitute(variant.mask, known))
    names = {Index("b"): SEQUENCE, Size("B"): SEQUENCES, Size("Q"): LONGEST_QUERY, Size("KV"): LONGEST_KEY}
    own: dict[Node, Node] = {node: Param(name, Type.INT) for node, name in names.items()}
    found = rewrite_variant(variant, lambda node: own.get(node, node))
    return replace(
        found, parameters=(*found.parameters, *(Parameter(name, Type.INT) for name in (SEQUENCE, SEQUENCES)))
    )


def sequence_length(ends: str) -> Node:
    """How many rows the packed sequence `b` has."""
    begin, end = (Load(ends, (index,), Type.INT) for index in (Index("b"), Binary(BinaryOp.ADD, Index("b"), Const(1))))
    return Binary(BinaryOp.SUB, end, begin)


def key_end(variant: Variant) -> Node | None:
    """How many keys batch entry `b` has, where calls say so: a mask that ends there."""
    end = sequence_length(KEY_ENDS) if is_packed(variant) else Load(KV_LEN, (Index("b"),), Type.INT)
    return end if Compare(CompareOp.LT, K, end) in conjuncts(variant.mask) else None


def mask_of_rows(variant: Variant) -> Node:
    """The mask for those who write no row past the end of a packed sequence, and need not ask where that is."""
    if not is_packed(variant):
        return variant.mask
    end = Compare(CompareOp.LT, Q, sequence_length(QUERY_ENDS))
    kept = [part for part in conjuncts(variant.mask) if part is not end]
    return reduce(lambda x, y: Binary(BinaryOp.AND, x, y), kept) if kept else TRUE


def _before(mask: Node, position: Node, end: Node) -> Node:
    return Binary(BinaryOp.AND, mask, Compare(CompareOp.LT, position, end))


def is_paged(variant: Variant) -> bool:
    return any(tensor.name == PAGE_TABLE for tensor in variant.tensors)


def is_scaled(variant: Variant) -> bool:
    return any(tensor.name == KEY_SCALE for tensor in variant.tensors)


def is_packed(variant: Variant) -> bool:
    declared = {tensor.name for tensor in variant.tensors} | {parameter.name for parameter in variant.parameters}
    return QUERY_ENDS in declared and SEQUENCE not in declared
