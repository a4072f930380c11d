"""A variant's own functions as the Hopper backward kernel wants them.

As in the forward (`emit.py`), `logit = factor * residue + slope * (k - q)` in base 2 and without what depends on the
row alone; but `factor` may have any sign, since no maximum is taken of residues. `score` gives the residue, the
derivative of the score but for a factor that is the same for a head (`gain`), where it is not 1, and what the shares of
captured tensors keep (`emit_shares.py`); they share what they have in common. Look-ups by key are made once for each
head (`keys`), those by query once for each tile (`columns`). On full tiles, where what saturates is one number, `plain`
and the tile's `shift` stand for `score`. Where queries lie in boxes of a grid, `bounds` says which of them a key sees,
and the mask is what that leaves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attn_dsl.backend.hopper.bounds import box_bounds
from attn_dsl.backend.hopper.emit import (
    KEY_BOX,
    QUERY_BOX,
    ZERO,
    Module,
    elements,
    is_uniform,
    needs_64_bits,
    of_pairs,
    outermost,
    split_shift,
)
from attn_dsl.backend.hopper.emit_shares import CORNER, add_functions, corner_of, shares
from attn_dsl.backend.portable.algebra import LOG2E, ONE, Gatherer, times
from attn_dsl.backend.portable.algebra import uniform as is_free
from attn_dsl.backend.portable.emit import HEADER, terms_slope
from attn_dsl.backend.printer import lower
from attn_dsl.ir.nodes import (
    FALSE,
    SCORE,
    TRUE,
    Binary,
    BinaryOp,
    Load,
    Node,
    Q,
    Unary,
    UnaryOp,
    post_order,
    substitute,
)
from attn_dsl.ir.variant import Variant
from attn_dsl.passes.differentiate import gradient
from attn_dsl.passes.order_grid import Boxes
from attn_dsl.passes.schedule import Schedule
from attn_dsl.passes.separate import separate
from attn_dsl.passes.specialize import Saturation

PROGRAM = ("b", "h", "scalars", "tensors")
KEYS = ("b", "h", "k", "inside: tl.constexpr", "uniform", "scalars", "tensors")
COLUMNS = ("b", "h", "q", "inside: tl.constexpr", "uniform", "scalars", "tensors")
PAIR = ("b", "h", "q", "k", "inside: tl.constexpr", "uniform", "keys", "columns", "scalars", "tensors")
BOUNDS = ("b", "h", "k", "inside: tl.constexpr", "uniform", "keys", "scalars", "tensors")
RANGES = ("b", "h", "k0", "k1", "q_offset", "block", "scalars", "tensors")
TILE = ("b", "h", "q0", "q1", "k0", "k1", "q_offset", "block", "scalars", "tensors")
FUNCTIONS = (
    "factor", "gain", "uniform", "keys", "columns", "score", "plain", "plain_factor", "shift", "slope", "bounds",
    "mask", "full", "q_ranges", "fresh", "add_key_sums", "add_pairs", "add_tile", "query_box", "key_box",
)  # fmt: skip
IMPORTS = "from attn_dsl.backend.hopper.device import add_to, row_totals, warp_sums\n"


@dataclass(frozen=True)
class Emitted:
    """The text of the module, and the names of the functions that it has.

    has_derivative: `score` gives a second value. kept: how many it gives beyond that. fresh: how many `fresh` gives.
    positional: they depend on a position, so that a pair past the end of the queries or keys, or under the mask, may
    hold anything. wide: ranges are bounded by numbers of more than 32 bits.
    """

    source: str
    functions: frozenset[str]
    has_derivative: bool
    fresh: int
    kept: int
    positional: bool
    wide: bool


def emit_module(
    variant: Variant,
    schedule: Schedule,
    full: Node,
    *,
    saturations: Sequence[Saturation] = (),
    wanted: Sequence[str] = (),
    fast_tanh: bool = True,
    boxes: Boxes | None = None,
) -> Emitted:
    """The functions of a variant; `full` says in which tiles of the schedule all pairs count and `saturations` hold.

    `wanted` names the captured tensors and parameters whose gradients the kernel sums, in the order of its `shares`.
    `boxes` are those of a grid.
    """
    gather, terms, found = Gatherer(), separate(variant.score), shares(variant, frozenset(wanted))
    front, residue = gather.factors(dataclasses.replace(terms, affine=()).loop(Q))
    seen, rest = (None, variant.mask) if boxes is None else box_bounds(variant.mask, boxes.columns)
    bounds = () if seen is None else tuple(map(lower, (seen.low, seen.high, seen.left, seen.right)))
    residue, mask = lower(residue), lower(rest)
    gain, derivative = gather.factors(gradient(variant.score).d_score)
    derivative, kept = lower(derivative), [lower(inner) for inner in found.kept]
    corner = {lower(node): lower(value) for node, value in corner_of(saturations).items()}
    plain, shift = split_shift(substitute(residue, corner))
    settled = [substitute(node, corner) for node in (derivative, *kept)]

    roots = [residue, derivative, mask, *bounds, *kept, *map(lower, found.fresh), plain, shift, *settled]
    uniform = outermost(roots, is_uniform)
    keys, columns = outermost(roots, _looks_up("k")), outermost(roots, _looks_up("q"))
    module = Module(variant, fast_tanh, elements(uniform=uniform, keys=keys, columns=columns))

    module.add("factor", PROGRAM, times(LOG2E, front))
    module.add("gain", PROGRAM, gain, ONE)
    module.add("uniform", PROGRAM, tuple(uniform), ())
    module.add("keys", KEYS, tuple(keys), ())
    module.add("columns", COLUMNS, tuple(columns), ())
    one = derivative is ONE
    others = [*([] if one else [derivative]), *kept]
    module.add("score", ("s", *PAIR, "q0", "k0"), _results(of_pairs(residue), others), SCORE)
    if saturations:
        match plain:  # a multiple of the bare product that is the same for a head is no work of the pairs
            case Binary(BinaryOp.MUL, lead, rest) if rest is SCORE and is_free(lead):
                front, plain = times(front, lead), SCORE
        module.add("plain", ("s", *PAIR, "q0", "k0"), _results(of_pairs(plain), settled[one:]))
        module.add("plain_factor", PROGRAM, times(LOG2E, front))
        module.add("shift", CORNER, shift, ZERO)
    if (slope := terms_slope(terms)) is not ZERO:
        module.add("slope", PROGRAM, times(LOG2E, slope))
    if boxes is not None:
        module.add("bounds", BOUNDS, bounds)
        module.add("query_box", QUERY_BOX, boxes.query)
        module.add("key_box", KEY_BOX, boxes.key)
    module.add("mask", PAIR, mask, TRUE)
    if mask is not TRUE or bounds or saturations:
        module.add("full", TILE, full, FALSE)
    ranges = tuple((s.begin, s.end) for s in schedule.q.segments)
    module.add("q_ranges", RANGES, ranges)
    add_functions(module, found, wanted, corner)
    header = HEADER.format(name=variant.name) + (IMPORTS if found.items else "")
    source = header + "".join(f"\n\n{text}" for text in module.texts)
    values = [residue, derivative, *kept]
    positional = any(value.depends & {"q", "k"} for value in values) or any(map(_singular, values[1:]))
    return Emitted(
        source, frozenset(module.names), not one, len(found.fresh), len(kept), positional, needs_64_bits(ranges)
    )


def _results(first: Node, rest: Sequence[Node]) -> Node | tuple[Node, ...]:
    return (first, *rest) if rest else first


def _singular(derivative: Node) -> bool:
    """Whether it may be infinite or nan for some score, as where a row of zeros stands for one that is not there."""
    risky = {
        UnaryOp.SQRT,
        UnaryOp.RSQRT,
        UnaryOp.LOG,
        UnaryOp.LOG2,
        UnaryOp.LOG1P,
        UnaryOp.TAN,
        UnaryOp.EXP,
        UnaryOp.EXP2,
    }
    for node in post_order(derivative):
        match node:
            case Unary(op, x) if op in risky and "score" in x.depends:
                return True
            case Binary(BinaryOp.DIV | BinaryOp.MOD | BinaryOp.POW, _, y) if "score" in node.depends:
                if "score" in y.depends or node.op is not BinaryOp.DIV:
                    return True
    return False


def _looks_up(axis: str) -> Callable[[Node], bool]:
    """Whether a node reads memory by one position, which the compiler cannot move out of a loop."""

    def wanted(node: Node) -> bool:
        return (
            axis in node.depends
            and node.depends <= {"b", "h", axis}
            and any(isinstance(inner, Load) and axis in inner.depends for inner in post_order(node))
        )

    return wanted
