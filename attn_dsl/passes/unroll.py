"""Write reductions out: `sum(d in 0..3: f(d))` becomes `f(0) + f(1) + f(2)`.

Proofs, derivatives and rules then need no binders. Reductions longer than `limit` stay loops. The bounds must be
literals (`bake` sees to it).
"""

from __future__ import annotations

import functools

from attn_dsl.ir import nodes as ir
from attn_dsl.ir.nodes import Binary, BinaryOp, Const, Node, Reduce, ReduceOp
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import Variant, rewrite_variant
from attn_dsl.passes.fold import constant

LIMIT = 16  # iterations; beyond it straight-line code costs more to compile than a loop costs to run

_JOIN = {
    ReduceOp.SUM: BinaryOp.ADD,
    ReduceOp.MIN: BinaryOp.MIN,
    ReduceOp.MAX: BinaryOp.MAX,
    ReduceOp.ANY: BinaryOp.OR,
    ReduceOp.ALL: BinaryOp.AND,
}


def unroll(variant: Variant, limit: int = LIMIT) -> Variant:
    """The variant without reductions of up to `limit` iterations."""
    return rewrite_variant(variant, lambda node: _written_out(node, limit))


def unroll_node(root: Node, limit: int | None = None) -> Node:
    """The expression without reductions of up to `limit` iterations, or without any."""
    return ir.rewrite(root, lambda node: _written_out(node, limit))


def bounds(reduction: Reduce) -> tuple[int, int]:
    """The literal bounds `[low, high)` of a reduction."""
    assert isinstance(reduction.low, Const) and isinstance(reduction.high, Const), "`bake` runs first"
    return int(reduction.low.value), int(reduction.high.value)


def empty(op: ReduceOp, kind: Type) -> Const:
    """What a reduction over nothing gives; `min` and `max` over nothing are refused by `bake`."""
    assert op not in (ReduceOp.MIN, ReduceOp.MAX)
    return constant(op is ReduceOp.ALL, kind)


def _written_out(node: Node, limit: int | None) -> Node:
    if not isinstance(node, Reduce):
        return node
    low, high = bounds(node)
    if limit is not None and high - low > limit:
        return node
    terms = [ir.substitute(node.body, {node.var: Const(at)}) for at in range(low, high)]
    op = _JOIN[node.op]
    return functools.reduce(lambda x, y: Binary(op, x, y), terms) if terms else empty(node.op, node.type)
