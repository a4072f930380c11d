"""Leading positions that see, or are seen by, more than others: the global tokens of a sparse mask.

    mask is true wherever q < globals     the first tiles of queries visit every tile of keys
    mask is true wherever k < globals     the first tiles of keys are visited by every tile of queries

Such a tile takes many times as long as its neighbours, so kernels begin with those of all heads: one that came last
would run alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from attn_dsl.ir.nodes import FALSE, SCORE, Binary, BinaryOp, Const, Load, Node, Size, post_order, substitute
from attn_dsl.ir.variant import Variant
from attn_dsl.passes.monotone import Q_OFFSET
from attn_dsl.passes.order import number
from attn_dsl.passes.prove import disjunction, prove
from attn_dsl.passes.schedule import BLOCK, ZERO, derive_schedule


def leading(variant: Variant, axis: str) -> Node | None:
    """How many tiles, from the first on, hold positions of `axis`, `q` or `k`, that the mask keeps with all others.

    Over `block`, `q_offset` and sizes; None where the mask says nothing of the kind.
    """
    parts = [part for part in disjuncts(variant.mask) if part.depends == {axis} and not _reads(part)]
    if not parts:
        return None
    own = Variant("leading", variant.parameters, (), SCORE, disjunction(parts))
    schedule = derive_schedule(own, replace(prove(own), masked=()))
    segments = (schedule.q if axis == "q" else schedule.kv).segments
    return segments[0].end if len(segments) == 1 and segments[0].begin is ZERO else None


def leading_tiles(
    end: Node, block: int, q_offset: int, sizes: Mapping[str, int], parameters: Mapping[str, object]
) -> int:
    """The number that `leading` stands for; 0 where it is not known."""
    known: dict[Node, Node] = {BLOCK: Const(block), Q_OFFSET: Const(q_offset)}
    known |= {Size(name): Const(size) for name, size in sizes.items()}
    return max(number(substitute(end, known), parameters) or 0, 0)


def disjuncts(node: Node) -> Iterator[Node]:
    match node:
        case Binary(BinaryOp.OR, x, y):
            yield from disjuncts(x)
            yield from disjuncts(y)
        case _ if node is not FALSE:
            yield node


def _reads(node: Node) -> bool:
    return any(isinstance(part, Load) for part in post_order(node))
