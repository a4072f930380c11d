"""A variant's own functions as the Hopper backward kernel wants them.

As in the forward (`emit.py`), `logit = factor * residue + slope * (k - q)` in base 2 and without what depends on the
row alone; but `factor` may have any sign, since no maximum is taken of residues. `score` gives the residue and, where
it is not 1, the derivative of the score, which share what they have in common. Look-ups by key are made once for each
head (`keys`), those by query once for each tile (`columns`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from attn_dsl.backend.hopper.emit import ZERO, Module, is_uniform, needs_64_bits, outermost
from attn_dsl.backend.portable.algebra import LOG2E, ONE, SCALE, Gatherer, times
from attn_dsl.backend.portable.emit import HEADER, terms_slope
from attn_dsl.backend.printer import Signature, lower
from attn_dsl.ir.nodes import FALSE, SCORE, TRUE, Binary, BinaryOp, Load, Node, Q, Unary, UnaryOp, post_order
from attn_dsl.ir.variant import Variant
from attn_dsl.passes.differentiate import gradient
from attn_dsl.passes.schedule import Schedule
from attn_dsl.passes.separate import separate

PROGRAM = ("b", "h", "scalars", "tensors")
KEYS = ("b", "h", "k", "inside: tl.constexpr", "uniform", "scalars", "tensors")
COLUMNS = ("b", "h", "q", "inside: tl.constexpr", "uniform", "scalars", "tensors")
PAIR = ("b", "h", "q", "k", "inside: tl.constexpr", "uniform", "keys", "columns", "scalars", "tensors")
RANGES = ("b", "h", "k0", "k1", "q_offset", "block", "scalars", "tensors")
TILE = ("b", "h", "q0", "q1", "k0", "k1", "q_offset", "block", "scalars", "tensors")
FUNCTIONS = ("factor", "uniform", "keys", "columns", "score", "slope", "mask", "full", "q_ranges")


@dataclass(frozen=True)
class Emitted:
    """The text of the module, and the names of the functions that it has.

    has_derivative: `score` gives two values. positional: they depend on a position, so that a pair past the end of
    the queries or keys, or under the mask, may hold anything. wide: ranges are bounded by numbers of more than 32 bits.
    """

    source: str
    functions: frozenset[str]
    has_derivative: bool
    positional: bool
    wide: bool


def emit_module(variant: Variant, schedule: Schedule, full: Node, *, fast_tanh: bool = True) -> Emitted:
    """The functions of a variant; `full` says which tiles of the schedule need no mask."""
    plain = Signature.of(variant)
    signature = Signature((*plain.scalars, SCALE), plain.tensors)
    gather, terms = Gatherer(), separate(variant.score)
    front, residue = gather.factors(dataclasses.replace(terms, affine=()).loop(Q))
    residue, mask = lower(residue), lower(variant.mask)
    derivative = lower(gather(gradient(variant.score).d_score))

    roots = [residue, derivative, mask]
    uniform = outermost(roots, is_uniform)
    keys, columns = outermost(roots, _looks_up("k")), outermost(roots, _looks_up("q"))
    bindings = {node: f"uniform[{i}]" for i, node in enumerate(uniform)}
    bindings |= {node: f"keys[{i}]" for i, node in enumerate(keys)}
    bindings |= {node: f"columns[{i}]" for i, node in enumerate(columns)}
    module = Module(variant, signature, fast_tanh, bindings)

    module.add("factor", PROGRAM, times(LOG2E, front))
    if uniform:
        module.add("uniform", PROGRAM, tuple(uniform))
    if keys:
        module.add("keys", KEYS, tuple(keys))
    if columns:
        module.add("columns", COLUMNS, tuple(columns))
    if residue is not SCORE or derivative is not ONE:
        module.add("score", ("s", *PAIR), residue if derivative is ONE else (residue, derivative))
    if (slope := terms_slope(terms)) is not ZERO:
        module.add("slope", PROGRAM, times(LOG2E, slope))
    if mask is not TRUE:
        module.add("mask", PAIR, mask)
        if full is not FALSE:
            module.add("full", TILE, full)
    ranges = tuple((s.begin, s.end) for s in schedule.q.segments)
    module.add("q_ranges", RANGES, ranges)
    source = HEADER.format(name=variant.name) + "".join(f"\n\n{text}" for text in module.texts)
    positional = bool((residue.depends | derivative.depends) & {"q", "k"}) or _singular(derivative)
    return Emitted(source, frozenset(module.names), derivative is not ONE, positional, needs_64_bits(ranges))


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
