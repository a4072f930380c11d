"""A variant's claims about tiles as functions for the kernels of `classify.py`.

| function | meaning |
|---|---|
| `q_terms`, `k_terms` | the expressions of one position that are summarized, at many positions |
| `claims` | (possible, certain) for tiles, by the summaries that `q_values` and `k_values` hold, low and high of each |
| `refined` | the same for pieces of tiles, without summaries |
| `mask` | whether pairs are kept |
"""

from __future__ import annotations

from dataclasses import dataclass

from attn_dsl.backend.portable.emit import HEADER, PAIR
from attn_dsl.backend.printer import Results, Signature, emit
from attn_dsl.backend.triton_dialect import TritonDialect
from attn_dsl.ir.nodes import FALSE, Binary, BinaryOp, Compare, CompareOp, Const, Index, Node, Select, Var
from attn_dsl.ir.variant import Variant
from attn_dsl.passes.monotone import K1, Q1
from attn_dsl.passes.summaries import Claims

VARS = ("q0", "q1", "k0", "k1", "q_offset")
TILES = ("b", "h", "q0", "q1", "k0", "k1", "q_offset", "q_values", "k_values", "scalars", "tensors")


@dataclass(frozen=True)
class Emitted:
    """The text of the module and the functions that it has."""

    source: str
    functions: frozenset[str]


class TileDialect(TritonDialect):
    """For values of many tiles at once, in 64 bits: what varies are the corners, `b` and `h`."""

    def __init__(self) -> None:
        super().__init__(tiles=False, wide=True, varying=frozenset({*VARS, "b", "h"}))


def emit_lists(variant: Variant, claims: Claims) -> Emitted:
    """The functions of a variant's claims; `refined` and `mask` only where claims are refined."""
    texts: dict[str, str] = {}
    bound: dict[Node, str] = {Var(var): var for var in VARS}

    def add(name: str, arguments: tuple[str, ...], results: Results, dialect: TritonDialect) -> None:
        texts[name] = emit(
            name, arguments, results, Signature.of(variant), dialect,
            locations=variant.locations, bindings=bound if "q0" in arguments else {}, decorator="@triton.jit",
        )  # fmt: skip

    for axis in ("q", "k"):
        summaries = [summary for summary in claims.summaries if summary.axis == axis]
        if summaries:
            arguments = ("b", "h", axis, "inside: tl.constexpr", "scalars", "tensors")
            add(f"{axis}_terms", arguments, tuple(summary.node for summary in summaries), TritonDialect())
        loads = [load for summary in summaries for load in summary.loads]
        bound |= {load: f"{axis}_values[{i}]" for i, load in enumerate(loads)}
    certain = Binary(BinaryOp.AND, claims.certain, claims.uniform)
    add("claims", TILES, _of_tiles(claims.possible, certain), TileDialect())
    if claims.refined is not None:
        mask = variant.mask
        has_positions = mask.depends & {"q", "k"}
        shown = mask if has_positions else Select(mask, Compare(CompareOp.GE, Index("q"), Const(0)), FALSE)
        add("mask", PAIR, shown, TritonDialect())
        certain = Binary(BinaryOp.AND, claims.refined.certain, claims.uniform)
        add("refined", TILES, _of_tiles(claims.refined.possible, certain), TileDialect())
    source = HEADER.format(name=variant.name) + "".join(f"\n\n{text}" for text in texts.values())
    return Emitted(source, frozenset(texts))


def _of_tiles(*nodes: Node) -> tuple[Node, ...]:
    """The conditions as values of tiles, also where they depend on less."""
    zero = Const(0)
    exists = Binary(BinaryOp.AND, Compare(CompareOp.GE, Q1, zero), Compare(CompareOp.GE, K1, zero))
    return tuple(Binary(BinaryOp.AND, exists, node) for node in nodes)
