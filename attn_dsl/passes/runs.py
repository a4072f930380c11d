"""Equality of what a nondecreasing tensor says at q and at k, as bounds of a position.

Where `t` does not decrease, the positions with the value t[q] are a run without gaps, so that

    t[b, q] == t[b, k]      iff      first[b, q] <= k <= last[b, q]      iff      first[b, k] <= q <= last[b, k]

with `first` and `last` the ends of the run that a position is in. A kernel that reads them once a row compares
positions from then on, and looks up nothing for an element. Beside `q >= k`, one of the two bounds says nothing.
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
    rewrite,
    substitute,
)
from attn_dsl.ir.types import DType, Type
from attn_dsl.ir.variant import Nondecreasing, Tensor, Variant


@dataclass(frozen=True)
class Runs:
    """The ends of the runs of equal values of a tensor along an axis: int32 tensors in its shape."""

    tensor: Tensor
    axis: int
    first: Tensor
    last: Tensor


def runs_of(variant: Variant) -> tuple[Runs, ...]:
    """The tensors of whose runs the mask speaks, in the order of their declaration."""
    found = {(pair[0].tensor, axis) for pair, axis in _equalities(variant)}
    result = []
    for tensor in variant.tensors:
        for axis in range(len(tensor.extents)):
            if (tensor.name, axis) in found:
                ends = (Tensor(f"{end} of {tensor.name}, axis {axis}", DType.INT32, tensor.extents) for end in _ENDS)
                result.append(Runs(tensor, axis, *ends))
    return tuple(result)


_ENDS = ("first", "last")


def is_confined(variant: Variant) -> bool:
    """Whether the mask keeps no pair of positions of two runs, so that a tile sees its surroundings alone."""
    parts = (part for part in conjuncts(variant.mask) if isinstance(part, Compare) and part.op is CompareOp.EQ)
    return any(_equality(variant, part) is not None for part in parts)


def by_runs(variant: Variant, runs: tuple[Runs, ...], position: Index) -> Variant:
    """The variant whose mask compares the other position with the ends of the run of `position`.

    The tensors of the runs stand behind the others.
    """
    if not runs:
        return variant
    known = {(run.tensor.name, run.axis): run for run in runs}
    other = K if position is Q else Q
    values: dict[Node, Node] = {}
    for (x, y), axis in _equalities(variant):
        own = x if position.depends <= x.depends else y
        run = known[own.tensor, axis]
        first, last = (Load(end.name, own.indices, Type.INT) for end in (run.first, run.last))
        bounds = Compare(CompareOp.LE, first, other), Compare(CompareOp.LE, other, last)
        values[Compare(CompareOp.EQ, x, y)] = Binary(BinaryOp.AND, *bounds)
        values[Compare(CompareOp.NE, x, y)] = Unary(UnaryOp.NOT, Binary(BinaryOp.AND, *bounds))
    ends = tuple(end for run in runs for end in (run.first, run.last))
    mask = _without_idle_bounds(substitute(variant.mask, values), frozenset(end.name for end in ends))
    return replace(variant, mask=mask, tensors=(*variant.tensors, *ends))


def _equalities(variant: Variant) -> Iterator[tuple[tuple[Load, Load], int]]:
    """Each equality of a tensor in order, or inequality, and the axis where its sides differ."""
    for node in post_order(variant.mask):
        found = _equality(variant, node)
        if found is not None:
            yield found


def _equality(variant: Variant, node: Node) -> tuple[tuple[Load, Load], int] | None:
    """`t[.., q, ..] == t[.., k, ..]` or `!=` of a tensor in order along the axis where the two differ, or None."""
    match node:
        case Compare(CompareOp.EQ | CompareOp.NE, Load(a, at) as x, Load(b, there) as y) if a == b:
            axes = [axis for axis, (i, j) in enumerate(zip(at, there, strict=True)) if i is not j]
            promised = {p.axis for p in variant.tensor(a).promises if isinstance(p, Nondecreasing)}
            if x.type is Type.INT and len(axes) == 1 and axes[0] in promised:
                rest = [index for axis, index in enumerate(at) if axis != axes[0]]
                if {at[axes[0]], there[axes[0]]} == {Q, K} and not any(i.depends & {"q", "k"} for i in rest):
                    return (x, y), axes[0]
    return None


def _without_idle_bounds(mask: Node, ends: frozenset[str]) -> Node:
    """The mask without the bound of a run that a conjunct `q >= k` or `q <= k` implies: first[k] <= k, last[q] >= q."""
    parts = list(conjuncts(mask))
    orders = {(x, y) for part in parts for x, y in _ordered(part)}

    def idle(node: Node) -> bool:
        match node:
            case Compare(CompareOp.LE, Load(name, indices), position) if name in ends and name.startswith("first"):
                return any((own, position) in orders for own in indices if own in (Q, K))
            case Compare(CompareOp.LE, position, Load(name, indices)) if name in ends and name.startswith("last"):
                return any((position, own) in orders for own in indices if own in (Q, K))
            case _:
                return False

    def rule(node: Node) -> Node:
        match node:
            case Binary(BinaryOp.AND, x, y) if idle(x) or idle(y):
                return y if idle(x) else x
            case _:
                return node

    total: Node = TRUE
    for part in parts:
        part = part if list(_ordered(part)) else rewrite(part, rule)
        if not idle(part):
            total = part if total is TRUE else Binary(BinaryOp.AND, total, part)
    return total


def _ordered(node: Node) -> Iterator[tuple[Node, Node]]:
    """(x, y) where the node says x <= y of the positions."""
    match node:
        case Compare(CompareOp.LE | CompareOp.LT, x, y) if {x, y} == {Q, K}:
            yield x, y
        case Compare(CompareOp.GE | CompareOp.GT, x, y) if {x, y} == {Q, K}:
            yield y, x
        case _:
            pass
