"""What a score or mask says of `q - k` alone, cut out, so that a tile of T x K pairs asks only T + K - 1 times.

    0 <= q - k < window and doc[b, q] == doc[b, k]      ->  relative[0] & (doc[b, q] == doc[b, k])
    score + table[h, clamp(k - q, -8, 8) + 8]           ->  score + relative[1]

Rows of a tile run downward from its last query, so that `q - k` is the same along each antidiagonal: element (i, j) of
a part is element i + j of a vector, a view of strides (1, 1) that no one has to write out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from attn_dsl.backend.cpu.scratch import scratch
from attn_dsl.errors import Span
from attn_dsl.ir import nodes as ir
from attn_dsl.ir.nodes import Binary, BinaryOp, Compare, Const, K, Node, Q, Unary, UnaryOp
from attn_dsl.ir.types import Type
from attn_dsl.passes.fold import folded

RELATIVE = Binary(BinaryOp.SUB, Q, K)
PAIR = frozenset("qk")
PLACES = frozenset("bhqk")


@dataclass(frozen=True)
class Linear:
    """The integer `q * query + k * key + rest`, where `rest` depends on neither position."""

    q: int
    k: int
    rest: Node


class ByDistance:
    """Rewrites expressions: every `a + q - k` over `q - k`, and `q + a <= k` as `q - k <= -a`."""

    def __init__(self) -> None:
        self._done: dict[Node, Node] = {}
        self._forms: dict[Node, Linear | None] = {}

    def __call__(self, root: Node) -> Node:
        for node in ir.post_order(root):
            if node not in self._done:
                self._done[node] = self._rule(ir.with_children(node, tuple(self._done[c] for c in node.children)))
        return self._done[root]

    def locations(self, before: Mapping[Node, Span]) -> dict[Node, Span]:
        """The source locations of what has been rewritten."""
        return {after: before[node] for node, after in self._done.items() if node in before}

    def _rule(self, node: Node) -> Node:
        form = self._forms[node] = _linear(node, self._forms)
        match node:
            case Compare(op, x, y) if x.type is Type.INT and (x.depends | y.depends) >= PAIR:
                left, right = self._forms[x], self._forms[y]
                if left is None or right is None or (left.q - right.q, left.k - right.k) not in ((1, -1), (-1, 1)):
                    return node
                difference = RELATIVE if left.q - right.q == 1 else Unary(UnaryOp.NEG, RELATIVE)
                return Compare(op, difference, minus(right.rest, left.rest))
            case Binary(BinaryOp.ADD | BinaryOp.SUB) if form is not None and (form.q, form.k) in ((1, -1), (-1, 1)):
                node = _plus(RELATIVE if form.q == 1 else Unary(UnaryOp.NEG, RELATIVE), form.rest)
                self._forms[node] = form
        return node


def parts(roots: Sequence[Node]) -> tuple[Node, ...]:
    """The largest expressions under the roots that see the positions as `q - k` only."""
    inside: set[Node] = set()
    for node in ir.post_order(*roots):
        free = (child in inside or not child.depends & PAIR for child in node.children)
        whole = node.depends <= PLACES and node.depends >= PAIR and bool(node.children) and all(free)
        if node is RELATIVE or whole:
            inside.add(node)
    found: dict[Node, None] = {root: None for root in roots if root in inside}
    for node in ir.post_order(*roots):
        if node not in inside:
            found.update((child, None) for child in node.children if child in inside)
    return tuple(found)


def antidiagonals(vector: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The view `[..., rows, columns]` of a vector `[..., rows + columns - 1]` with element (i, j) at i + j."""
    vector = vector.contiguous()
    return vector.as_strided((*vector.shape[:-1], rows, columns), (*vector.stride()[:-1], 1, 1))


def sum_antidiagonals(tile: torch.Tensor) -> torch.Tensor:
    """The transpose of `antidiagonals`: `[..., rows, columns]` summed to `[..., rows + columns - 1]`."""
    *lead, rows, columns = tile.shape
    length = rows + columns - 1
    sheared = scratch("antidiagonals", (*lead, rows, length), tile.dtype).zero_()
    strides = sheared.stride()
    sheared.as_strided(tile.shape, (*strides[:-2], strides[-2] + 1, 1)).copy_(tile)
    return sheared.sum(-2)


def _linear(node: Node, forms: dict[Node, Linear | None]) -> Linear | None:
    if node.type is not Type.INT:
        return None
    if not node.depends & PAIR:
        return Linear(0, 0, node)
    match node:
        case ir.Index("q"):
            return Linear(1, 0, Const(0))
        case ir.Index("k"):
            return Linear(0, 1, Const(0))
        case Unary(UnaryOp.NEG, x) if (form := forms.get(x)) is not None:
            return Linear(-form.q, -form.k, folded(Unary(UnaryOp.NEG, form.rest)))
        case Binary(BinaryOp.ADD, x, y) if (one := forms.get(x)) is not None and (two := forms.get(y)) is not None:
            return Linear(one.q + two.q, one.k + two.k, _plus(one.rest, two.rest))
        case Binary(BinaryOp.SUB, x, y) if (one := forms.get(x)) is not None and (two := forms.get(y)) is not None:
            return Linear(one.q - two.q, one.k - two.k, minus(one.rest, two.rest))
    return None


def _plus(x: Node, y: Node) -> Node:
    return y if x is Const(0) else x if y is Const(0) else folded(Binary(BinaryOp.ADD, x, y))


def minus(x: Node, y: Node) -> Node:
    """`x - y`, folded."""
    return x if y is Const(0) else folded(Binary(BinaryOp.SUB, x, y))
