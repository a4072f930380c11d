"""Gradients of captured tensors and float parameters as the Hopper backward kernel sums them.

With g the gradient of a logit, a pair adds g * inner * outer to an entry: `outer` is the same for all pairs that share
the entry, `inner` is not. An inner factor that depends on the score is kept, times the probability, until g is there;
one of positions is computed then. Sums of g * inner come first, the kernel's own, in registers:

    an entry by key, or by neither position    over the queries of a head, added once a head
    an entry by a distance that saturates      over a whole tile where it is one entry, else pair by pair

A row's sum of g follows from its delta, so that `backward_rows.py` has what an entry by query wants where inner is 1.
Left out (`fusable`) is what has no sum that comes first: an entry of a dense bias, or one by query with another inner
factor, which would take a sum over the lanes of a warp in each step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from attn_dsl.backend.hopper.emit import Module
from attn_dsl.backend.portable.algebra import ONE, SCALE, Gatherer, times
from attn_dsl.backend.portable.emit import Target, targets_of
from attn_dsl.backend.printer import lower
from attn_dsl.backend.triton_dialect import TritonDialect, varying
from attn_dsl.ir.nodes import (
    Binary,
    BinaryOp,
    Cast,
    Const,
    Index,
    K,
    Node,
    Param,
    Q,
    Size,
    Unary,
    UnaryOp,
    operands,
    substitute,
)
from attn_dsl.ir.variant import Variant
from attn_dsl.passes.differentiate import gradient
from attn_dsl.passes.monotone import K0, Q0
from attn_dsl.passes.specialize import Saturation

PLACE = ("b", "h", "q", "k", "inside: tl.constexpr", "uniform", "scalars", "tensors")
CORNER = ("b", "h", "q0", "k0", "uniform", "scalars", "tensors")
ROWS = ("b", "h", "q", "inside: tl.constexpr", "scalars", "tensors")
PAIR, ROW = frozenset({"q", "k"}), frozenset({"q"})


@dataclass(frozen=True)
class Share:
    """What pairs add to a target: g * inner * outer."""

    target: Target
    inner: Node
    outer: Node


@dataclass(frozen=True)
class Shares:
    """The shares of all targets, and their inner factors beside 1: `fresh` ones and those that are `kept`."""

    items: tuple[Share, ...]
    fresh: tuple[Node, ...]
    kept: tuple[Node, ...]

    def number(self, share: Share) -> int:
        """Which of the kernel's sums a share is made of."""
        return (ONE, *self.fresh, *self.kept).index(share.inner)

    def of(self, *axes: frozenset[str]) -> list[Share]:
        return [share for share in self.items if share.target.axes in axes]


def corner_of(saturations: Iterable[Saturation]) -> dict[Node, Node]:
    """What saturates, and its value for the first pair of a tile."""
    return {s.node: substitute(s.node, {Q: Q0, K: K0}) for s in saturations}


def fusable(variant: Variant, wanted: frozenset[str], saturations: Sequence[Saturation]) -> frozenset[str]:
    """The names whose gradients the kernels can sum."""
    corner = corner_of(saturations)

    def is_dense(share: Share) -> bool:
        if share.target.axes != PAIR:
            return share.target.axes == ROW and share.inner is not ONE
        settled = share.target.where(corner)
        return bool(settled.axes or substitute(share.outer, corner).depends & PAIR)

    return wanted - {share.target.name for share in shares(variant, wanted).items if is_dense(share)}


def shares(variant: Variant, wanted: frozenset[str]) -> Shares:
    """The shares of `wanted`, all of them `fusable`."""
    gather, items = Gatherer(), list[Share]()
    for target in targets_of(gradient(variant.score), wanted):
        outer, rest = gather.factors(target.share)
        inner: Node = ONE
        for part in operands(BinaryOp.MUL, rest):
            if part.depends <= {"b", "h"} | target.axes:
                outer = times(outer, part)
            else:
                inner = times(inner, part)
        items.append(Share(target, inner, outer))
    inners = [inner for inner in dict.fromkeys(share.inner for share in items) if inner is not ONE]
    fresh = tuple(inner for inner in inners if _is_finite(inner))
    return Shares(tuple(items), fresh, tuple(inner for inner in inners if inner not in fresh))


def _is_finite(node: Node) -> bool:
    """Whether it is made of positions and parameters so that it is finite for any of them."""
    match node:
        case Const() | Index() | Param() | Size():
            return node is not SCALE
        case Binary(BinaryOp.ADD | BinaryOp.SUB | BinaryOp.MUL | BinaryOp.MIN | BinaryOp.MAX, x, y):
            return _is_finite(x) and _is_finite(y)
        case Cast(x=x) | Unary(UnaryOp.NEG | UnaryOp.ABS, x):
            return _is_finite(x)
        case _:
            return False


def add_functions(module: Module, found: Shares, names: Sequence[str], corner: dict[Node, Node]) -> None:
    """`fresh`, and what adds sums of g * inner to the gradients of `names`: `add_key_sums`, `add_row_sums`, `add_pairs`
    and `add_tile`.

    But for rows, the gradients have an axis of copies in front, in which the kernel spreads what it adds.
    """
    if found.fresh:
        module.add("fresh", PLACE, tuple(lower(inner) for inner in found.fresh))
    by_pair = found.of(PAIR)
    settled = [Share(s.target.where(corner), s.inner, substitute(s.outer, corner)) for s in by_pair]
    for what, arguments, group in (
        ("key_sums", PLACE, found.of(frozenset(), frozenset("k"))),
        ("row_sums", ROWS, found.of(ROW)),
        ("pairs", PLACE, by_pair),
        ("tile", CORNER, settled),
    ):
        if group:
            places = tuple(() if share.target.load is None else tuple(share.target.load.indices) for share in group)
            module.add(f"{what}_places", arguments, (places, tuple(share.outer for share in group)))
            lines = [_addition(module.variant, what, i, share, found, names) for i, share in enumerate(group)]
            module.write(f"add_{what}", _adding(what, arguments, lines))


def _adding(what: str, arguments: Sequence[str], lines: Sequence[str]) -> str:
    plain = [name.split(":")[0] for name in arguments]
    given = ", ".join("False" if name == "inside" else name for name in plain)
    end = "grads" if what == "row_sums" else "grads, copy"
    return "\n".join([
        "@triton.jit",
        f"def add_{what}(sums, {', '.join(name for name in plain if name != 'inside')}, {end}):",
        f"    places, factors = {what}_places({given})",
        *lines,
        "",
    ])  # fmt: skip


def _addition(variant: Variant, what: str, i: int, share: Share, found: Shares, names: Sequence[str]) -> str:
    """The line that adds a share's sums to its gradient."""
    load, grad, amount = share.target.load, f"grads[{names.index(share.target.name)}]", f"sums[{found.number(share)}]"
    bits = 0 if load is None else varying(load)
    checked = 0 if load is None else int(TritonDialect(tiles=False).checked(load, variant.tensor(load.tensor)))
    if what == "row_sums":
        place = f"{grad}, places[{i}], sums * factors[{i}]"
        return f"    scatter({place}, None, {bits}, {checked}, False, None, None, 0, ADD)"
    if what == "key_sums":
        amount = f"row_totals({amount}, k)" if share.target.axes else f"warp_sums({amount})"
    return f"    add_to({grad}, (copy,) + places[{i}], {amount} * factors[{i}], {bits << 1}, {checked << 1})"
