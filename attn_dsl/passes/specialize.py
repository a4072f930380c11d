"""Block-level partial evaluation: on most tiles of a long row, a clamped distance is one number.

    t = clamp(e, low, high)    is high on a tile where e >= high everywhere, low where e <= low everywhere

There `t` has the value that it has at the tile's first pair, and a table look-up by `t` is one scalar instead of one
load for each pair. The tiles where `t` still varies, those that hold a pair with e > low and a pair with e < high, are
an interval in closed form, found like the intervals of a mask; `schedule` marks them as masked, so that every other
tile may use the uniform score.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attn_dsl.ir.nodes import Binary, BinaryOp, Compare, CompareOp, K, Load, Node, Q, post_order, substitute
from attn_dsl.ir.types import Type
from attn_dsl.passes.monotone import K0, POSITIONS, Q0, varies


@dataclass(frozen=True)
class Saturation:
    """An INT node of the score that is uniform on every tile where one of the `conditions` holds for no pair."""

    node: Node
    conditions: tuple[Node, ...]


@dataclass(frozen=True)
class Uniform:
    """What a score becomes on tiles where its saturating nodes are uniform.

    score  the score over `q0`, `k0` (the tile's first positions) where it was over q and k inside those nodes
    """

    score: Node
    saturations: tuple[Saturation, ...]


def specialize(score: Node) -> Uniform | None:
    """The uniform score, or None where no look-up of the score saturates."""
    found = tuple(saturations(score))
    if not found:
        return None
    corner = {s.node: substitute(s.node, {Q: Q0, K: K0}) for s in found}
    return Uniform(substitute(score, corner), found)


def saturations(score: Node) -> Iterator[Saturation]:
    """The saturating nodes in the indices of the score's look-ups, outermost first, none inside another."""
    indices = [index for node in post_order(score) if isinstance(node, Load) for index in node.indices]
    inside: set[Node] = set()
    for node in reversed(list(post_order(*indices))):
        conditions = _conditions(node)
        if conditions and node not in inside:
            inside |= set(post_order(node))
            yield Saturation(node, conditions)


def _conditions(node: Node) -> tuple[Node, ...]:
    """e > low and e < high for the bounds that a chain of `min` and `max` puts around e; none where it is no chain."""
    found: list[Node] = []
    while isinstance(node, Binary) and node.op in (BinaryOp.MIN, BinaryOp.MAX) and varies(node.x) != varies(node.y):
        inner, bound = (node.x, node.y) if varies(node.x) else (node.y, node.x)
        found.append(Compare(CompareOp.LT if node.op is BinaryOp.MIN else CompareOp.GT, inner, bound))
        node = inner
    is_distance = node.type is Type.INT and node.depends & POSITIONS == POSITIONS
    return tuple(found) if is_distance else ()
