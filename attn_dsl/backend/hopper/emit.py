"""A variant's own functions as the Hopper kernels want them: `logit = factor * residue + slope * (k - q) + row_term`.

All in base 2 but `row_term`. `factor` is positive and the same for a program, so that the largest logit of a row is the
largest residue and `factor` costs nothing: it is the multiplier of the exponential's own multiply-add. Values that
depend on batch and head alone, and look-ups by query, are computed once a tile (`uniform`, `rows`) and passed on.

Full tiles have `plain + shift` for the residue: where a clamped distance saturates, what it looks up is one number of
the tile, `shift`, which costs nothing for an element. The mask is `(low <= k <= high or k <= head) and mask`, and in a
grid `left <= k % columns <= right` (`bounds.py`). Where the residue is at most `peak` and the exponents of all logits
fit a float, softmax needs no maximum.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from attn_dsl.backend.hopper.bounds import bounds, column_bounds
from attn_dsl.backend.portable.algebra import LOG2E, ONE, SCALE, Gatherer, times
from attn_dsl.backend.portable.algebra import uniform as uniform_factor
from attn_dsl.backend.portable.emit import HEADER, TILE_VARS, terms_slope
from attn_dsl.backend.printer import Results, Signature, emit, lower
from attn_dsl.backend.triton_dialect import TritonDialect
from attn_dsl.ir.nodes import (
    SCORE,
    TRUE,
    Binary,
    BinaryOp,
    Compare,
    CompareOp,
    Const,
    K,
    Load,
    Node,
    Q,
    Select,
    Unary,
    UnaryOp,
    post_order,
    substitute,
)
from attn_dsl.ir.variant import Variant
from attn_dsl.passes.lengths import key_end, mask_of_rows
from attn_dsl.passes.monotone import K0, Q0
from attn_dsl.passes.order_grid import Boxes
from attn_dsl.passes.schedule import Schedule
from attn_dsl.passes.separate import Terms, separate
from attn_dsl.passes.specialize import Saturation

ZERO = Const(0.0)
PROGRAM = ("b", "h", "scalars", "tensors")
ROWS = ("b", "h", "q", "inside: tl.constexpr", "uniform", "scalars", "tensors")
PAIR = ("b", "h", "q", "k", "inside: tl.constexpr", "uniform", "rows", "scalars", "tensors")
BOUND = ("b", "h", "q", "inside: tl.constexpr", "uniform", "rows", "scalars", "tensors")
TILE = ("b", "h", "q0", "k0", "uniform", "scalars", "tensors")
QUERY_BOX = ("b", "h", "q", "scalars", "tensors")
KEY_BOX = ("b", "h", "k", "scalars", "tensors")
RANGES = ("b", "h", "q0", "q1", "q_offset", "block", "scalars", "tensors")


@dataclass(frozen=True)
class Emitted:
    """The text of the module, and the names of the functions that it has."""

    source: str
    functions: frozenset[str]


@dataclass
class Module:
    """The functions of a variant, as they are written. `bindings` says what nodes are called that come as arguments."""

    variant: Variant
    fast_tanh: bool
    bindings: dict[Node, str]
    texts: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @cached_property
    def signature(self) -> Signature:
        """The softmax scale comes behind the scalars of the variant."""
        own = Signature.of(self.variant)
        return Signature((*own.scalars, SCALE), own.tensors)

    def add(self, name: str, arguments: Sequence[str], results: Results | None, neutral: Results | None = None) -> None:
        """Write a function of this name, unless there are no results, or those that go without saying."""
        if results is None or results == neutral:
            return
        inside = any(argument.startswith("inside") for argument in arguments)
        bindings = dict[Node, str](TILE_VARS.items())
        bindings |= {node: text for node, text in self.bindings.items() if text.split("[")[0] in arguments}
        text = emit(
            name, arguments, results, self.signature,
            TritonDialect(fast_tanh=self.fast_tanh, tiles=inside, wide="block" in arguments and needs_64_bits(results)),
            locations=self.variant.locations, bindings=bindings, decorator="@triton.jit",
        )  # fmt: skip
        self.write(name, text)

    def write(self, name: str, text: str) -> None:
        self.names.append(name)
        self.texts.append(text)


def elements(**arguments: Sequence[Node]) -> dict[Node, str]:
    """What nodes are called that come as elements of arguments."""
    return {node: f"{name}[{i}]" for name, nodes in arguments.items() for i, node in enumerate(nodes)}


def of_pairs(node: Node) -> Node:
    """The node as a number for each pair of a tile, even if it is the same for a row, a column or all of them."""
    if node.depends >= {"q", "k"} or "score" in node.depends:
        return node
    return Select(Compare(CompareOp.EQ, SCORE, SCORE), node, node)


def needs_64_bits(results: Results) -> bool:
    """Whether bounds of a schedule hold a number that 32 bits do not."""
    if not isinstance(results, Node):
        return any(map(needs_64_bits, results))
    return any(isinstance(node, Const) and abs(node.value) >= 2**31 for node in post_order(results))


def emit_module(
    variant: Variant,
    schedule: Schedule,
    positive: frozenset[Node] = frozenset((SCALE,)),
    *,
    fast_tanh: bool = True,
    saturations: Sequence[Saturation] = (),
    bounded: bool = False,
    boxes: Boxes | None = None,
) -> Emitted:
    """The functions of a variant; `positive` are the parameters (and the softmax scale) known to be > 0 in the call.

    `saturations` are those that the schedule was derived with. `bounded` says that the `reach` of the logits may stand
    in for the maximum of each row: the function `peak` is then there. `boxes` are those of a grid.
    """
    terms = separate(variant.score)
    factor, residue = _logit(terms, positive)
    plain, shift = split_shift(substitute(residue, {s.node: substitute(s.node, {Q: Q0, K: K0}) for s in saturations}))
    row, (seen, mask) = terms.dropped(Q), bounds(mask_of_rows(variant))
    columns, mask = (None, mask) if boxes is None else column_bounds(mask, boxes.columns)
    residue, plain, shift, mask = lower(residue), lower(plain), lower(shift), lower(mask)
    low, high, head = (None if bound is None else lower(bound) for bound in (seen.low, seen.high, seen.head))
    left_right = () if columns is None else tuple(map(lower, columns))

    inner = [node for node in (residue, plain, shift, mask, low, high, head, *left_right) if node is not None]
    uniform, rows = outermost(inner, is_uniform), outermost(inner, _is_row)
    module = Module(variant, fast_tanh, elements(uniform=uniform, rows=rows))

    span, slope = reach(variant, positive) if bounded else None, terms_slope(terms)
    module.add("factor", PROGRAM, factor)
    module.add("uniform", PROGRAM, tuple(uniform), ())
    module.add("rows", ROWS, tuple(rows), ())
    module.add("residue", ("s", *PAIR, "q0", "k0"), of_pairs(residue), SCORE)
    module.add("plain", ("s", *PAIR, "q0", "k0"), of_pairs(plain), SCORE)
    module.add("shift", TILE, shift, ZERO)
    module.add("peak", PROGRAM, None if span is None else Const(span.residue))
    module.add("slope", PROGRAM, None if slope is ZERO else times(LOG2E, slope))
    module.add("row_term", ROWS, row, ZERO)
    module.add("sink", PROGRAM, variant.sink)
    module.add("low", BOUND, low)
    module.add("high", BOUND, high)
    module.add("head", BOUND, head)
    module.add("columns", BOUND, left_right, ())
    module.add("mask", PAIR, mask, TRUE)
    module.add("length", PROGRAM, key_end(variant))
    if boxes is not None:
        module.add("query_box", QUERY_BOX, boxes.query)
        module.add("key_box", KEY_BOX, boxes.key)
    segments = schedule.kv.segments
    masked = tuple((s.begin, s.end) for s in segments if s.masked)
    module.add("kv_ranges", RANGES, (masked, tuple((s.begin, s.end) for s in segments if not s.masked)))
    source = HEADER.format(name=variant.name) + "".join(f"\n\n{text}" for text in module.texts)
    return Emitted(source, frozenset(module.names))


@dataclass(frozen=True)
class Reach:
    """Logits, in base 2, are at most factor * residue away from zero."""

    factor: Node
    residue: float


def reach(variant: Variant, positive: frozenset[Node]) -> Reach | None:
    """How far logits may be from zero, where that does not depend on the products: a soft cap knows it."""
    terms = separate(variant.score)
    factor, residue = _logit(terms, positive)
    largest = _magnitude(residue)
    if largest is None or not math.isfinite(largest) or terms_slope(terms) is not ZERO:
        return None
    return Reach(factor, largest)


def _magnitude(node: Node) -> float | None:
    """No value of the node is farther from zero; None for "don't know"."""
    match node:
        case Const(value):
            return abs(float(value))
        case Unary(UnaryOp.TANH | UnaryOp.SIGMOID | UnaryOp.ERF | UnaryOp.SIN | UnaryOp.COS | UnaryOp.SIGN):
            return 1.0
        case Unary(UnaryOp.NEG | UnaryOp.ABS, x):
            return _magnitude(x)
        case Binary(BinaryOp.ADD | BinaryOp.SUB | BinaryOp.MUL | BinaryOp.MIN | BinaryOp.MAX as op, x, y):
            a, b = _magnitude(x), _magnitude(y)
            if a is None or b is None:
                return None
            return a * b if op is BinaryOp.MUL else a + b if op in (BinaryOp.ADD, BinaryOp.SUB) else max(a, b)
        case Select(_, x, y):
            a, b = _magnitude(x), _magnitude(y)
            return None if a is None or b is None else max(a, b)
        case _:
            return None


def value(node: Node, known: Mapping[Node, float]) -> float | None:
    """The number that products and quotients of known parameters are; None for anything else."""
    match node:
        case Const(number):
            return float(number)
        case Binary(BinaryOp.MUL, x, y):
            a, b = value(x, known), value(y, known)
            return None if a is None or b is None else a * b
        case Binary(BinaryOp.DIV, x, y):
            a, b = value(x, known), value(y, known)
            return None if a is None or not b else a / b
        case _:
            return known.get(node)


def _logit(terms: Terms, positive: frozenset[Node]) -> tuple[Node, Node]:
    """(factor, residue): what the loop makes of the bare product, without affine terms, in base 2."""
    gather = Gatherer()
    logit = dataclasses.replace(terms, affine=()).loop(Q)
    front, rest = gather.factors(logit)
    if not _is_positive(front, positive):
        front, rest = ONE, gather(logit)
    led = _led(rest)
    if led is not None and _is_positive(led[0], positive):
        front, rest = times(front, led[0]), led[1]
    return times(LOG2E, front), rest


def _led(node: Node) -> tuple[Node, Node] | None:
    """(a, r) with node = a * r, where r is the bare product and something added to it."""
    match node:
        case Binary(BinaryOp.MUL, a, x) if x is SCORE and uniform_factor(a):
            return a, SCORE
        case Binary(BinaryOp.ADD | BinaryOp.SUB as op, x, y):
            if found := _led(x):
                return found[0], Binary(op, found[1], _over(y, found[0]))
            if op is BinaryOp.ADD and (found := _led(y)):
                return found[0], Binary(op, found[1], _over(x, found[0]))
    return None


def _over(node: Node, divisor: Node) -> Node:
    """node / divisor, the division in front, where it is computed once."""
    match node:
        case Binary(BinaryOp.MUL, a, x) if uniform_factor(a):
            return times(Binary(BinaryOp.DIV, a, divisor), x)
        case _:
            return times(Binary(BinaryOp.DIV, ONE, divisor), node)


def split_shift(node: Node) -> tuple[Node, Node]:
    """(rest, shift) with node = rest + shift, `shift` the same for all pairs of a tile."""
    match node:
        case Binary(BinaryOp.ADD | BinaryOp.SUB as op, x, y) if not y.depends & {"q", "k", "score"}:
            rest, shift = split_shift(x)
            return rest, y if shift is ZERO and op is BinaryOp.ADD else Binary(op, shift, y)
        case _:
            return node, ZERO


def _is_positive(node: Node, known: frozenset[Node]) -> bool:
    match node:
        case Const(value):
            return value > 0
        case Unary(UnaryOp.EXP | UnaryOp.EXP2 | UnaryOp.SIGMOID):
            return True
        case Unary(UnaryOp.SQRT | UnaryOp.RSQRT, x):
            return _is_positive(x, known)
        case Binary(BinaryOp.ADD | BinaryOp.MUL | BinaryOp.DIV, x, y):
            return _is_positive(x, known) and _is_positive(y, known)
        case _:
            return node in known


def is_uniform(node: Node) -> bool:
    """Worth a register of a program: an operation or a look-up over batch and head."""
    return node.depends <= {"b", "h"} and bool(node.children)


def _is_row(node: Node) -> bool:
    """Worth a register of a row: it reads memory, which the compiler cannot move out of a loop."""
    return (
        "q" in node.depends
        and node.depends <= {"b", "h", "q"}
        and any(isinstance(inner, Load) and "q" in inner.depends for inner in post_order(node))
    )


def outermost(roots: Iterable[Node], wanted: Callable[[Node], bool]) -> list[Node]:
    """The nodes that are wanted and under no other wanted node."""
    found: dict[Node, None] = {}
    seen: set[Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if wanted(node):
            found[node] = None
        else:
            stack.extend(reversed(node.children))
    return list(found)
