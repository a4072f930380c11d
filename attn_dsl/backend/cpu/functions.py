"""The functions of one variant: emitted once as Python source, then called for every tile and every schedule row."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch

from attn_dsl.backend.cpu.margin import Sides, margin, sides
from attn_dsl.backend.cpu.relative import PAIR, RELATIVE, ByDistance, parts
from attn_dsl.backend.printer import Dialect, Results, Signature, emit, lower
from attn_dsl.backend.python_dialect import TotalDialect
from attn_dsl.backend.torch_dialect import TorchDialect
from attn_dsl.errors import Span
from attn_dsl.ir.nodes import (
    FALSE,
    SCORE,
    TRUE,
    Binary,
    BinaryOp,
    Const,
    Load,
    Node,
    Param,
    Size,
    Unary,
    UnaryOp,
    Var,
    post_order,
    substitute,
)
from attn_dsl.ir.variant import Variant
from attn_dsl.passes.differentiate import Gradient, LoadGradient, differentiate
from attn_dsl.passes.schedule import Schedule
from attn_dsl.passes.simplify import Simplifier

Emitted = Callable[..., Any]
PLACE = ("b", "h", "q", "k", "scalars", "tensors", "relative")
TILE: Mapping[Node, str] = {Var(name): name for name in ("q0", "q1", "k0", "k1", "q_offset", "block")}
ONE = Const(1.0)
EXACT = TorchDialect("torch.float64")
"""A mask compares in double precision, as the schedule does: they must agree on which side of a tie a pair lies."""


@dataclass(frozen=True)
class Target:
    """Where a gradient goes: the elements of a captured tensor that one look-up reads."""

    tensor: str
    relative: bool
    """The indices see the positions as `q - k` only."""


@dataclass(frozen=True)
class Derivative:
    """What `score_grad` (or `sink_grad`) returns, in order: d score / d s, then a partial for each target."""

    function: Emitted
    linear: bool
    """d score / d s is 1 everywhere."""
    loads: tuple[Target, ...]
    parameters: tuple[str, ...]
    indices: Emitted
    """The indices of each look-up of `loads` that is not relative, at the places of a tile."""
    relative_indices: Emitted
    """The same for those that are relative, over a vector of distances."""


@dataclass(frozen=True)
class MaskFunctions:
    """A mask as a margin, not negative where it keeps a pair, in terms of its sides."""

    margin: Node
    sides: Sides
    row_sides: Emitted
    """`(b, h, q, scalars, tensors)`: the values of `sides.rows`."""
    key_sides: Emitted
    relative: Emitted
    """`(b, h, rel, scalars, tensors)`: what sees `q - k` only; where `by_distance`, the margin itself."""
    of_sides: Emitted
    """`(rows, keys, relative, scalars, tensors)`: the margin."""
    partly: bool
    """Some of it sees `q - k` only."""
    by_distance: bool
    """The mask is a function of `q - k` (and of b and h)."""
    alike: bool
    """The mask is a function of `q - k` alone."""
    by_head: bool
    """The mask differs between heads."""
    reads_positions: bool
    """The mask reads tensors at positions: what the schedule cannot know."""


@dataclass(frozen=True)
class TileFunctions:
    """The torch functions of a variant for one dtype of the arithmetic.

    `score` is None where nothing is left of it beside its factors, `mask` where it keeps everything. The logit that
    `score` gets is to be multiplied by `before(scalars)`, what it returns by `after(scalars)`; `score_grad` gets the
    logit itself.
    """

    source: str
    scalars: tuple[Node, ...]
    """What stands in the argument `scalars`: parameters and sizes."""
    score: Emitted | None
    score_relative: Emitted
    score_places: bool
    """The score sees more than the logit: indices or positions."""
    before: Emitted
    after: Emitted
    mask: MaskFunctions | None
    by_distance: bool
    """Some function other than a whole mask works along antidiagonals."""
    score_grad: Derivative
    scored: bool
    """The score is more than the logit alone."""
    grad_relative: Emitted
    sink_grad: Derivative | None


@dataclass(frozen=True)
class ScheduleFunctions:
    """Python integer functions: the kv tiles that a q tile visits, and the two questions about one of them.

    `per_batch`, `per_head`: the answers differ between batches or heads. `slots` are the places of the
    tensors that they look into.
    """

    source: str
    kv_ranges: Emitted
    kv_skip: Emitted | None
    kv_full: Emitted | None
    per_batch: bool
    per_head: bool
    slots: frozenset[int]


@lru_cache(maxsize=256)
def tile_functions(variant: Variant, dtype: torch.dtype, subtract: bool = True) -> TileFunctions:
    """Emit and load the tile functions of a variant whose `const` parameters are bound.

    The mask compares integers by subtraction if `subtract`: to be had where no difference leaves 64 bits.
    """
    gradients, simplify, rewrite = differentiate(variant), Simplifier(), ByDistance()
    score, mask = rewrite(variant.score), margin(rewrite(lower(variant.mask)), subtract=subtract)
    sink = None if variant.sink is None else rewrite(variant.sink)
    slope = _rewritten(gradients.score, lambda node: rewrite(simplify(node)))
    sink_slope = None if gradients.sink is None else _rewritten(gradients.sink, lambda node: rewrite(simplify(node)))
    module = _Module(Signature.of(variant), TorchDialect(), rewrite.locations(variant.locations))
    score_parts, mask_parts, grad_parts = parts([score]), _worthwhile(mask), parts([score, *slope.roots])
    before, core, after = factors(score)

    distance = ("b", "h", "rel", "scalars", "tensors")
    module.add("score_relative", distance, score_parts, {RELATIVE: "rel"})
    module.add("score", ("s", *PLACE), core, _bound(score_parts), frozenset({SCORE}))
    module.add("before", ("scalars",), before)
    module.add("after", ("scalars",), after)
    around = sides(mask)
    module.add("row_sides", ("b", "h", "q", "scalars", "tensors"), around.rows, dialect=EXACT)
    module.add("key_sides", ("b", "h", "k", "scalars", "tensors"), around.keys, dialect=EXACT)
    module.add("mask_relative", distance, mask_parts, {RELATIVE: "rel"}, dialect=EXACT)
    given = _bound(around.rows, "rows") | _bound(around.keys, "keys") | _bound(mask_parts)
    module.add("mask", ("rows", "keys", "relative", "scalars", "tensors"), mask, given, dialect=EXACT)
    module.add("grad_relative", distance, grad_parts, {RELATIVE: "rel"})
    score_loads = module.add_gradient("score_grad", slope, ("s", *PLACE), score, _bound(grad_parts))
    sink_loads: tuple[Target, ...] = ()
    if sink is not None and sink_slope is not None:
        sink_loads = module.add_gradient("sink_grad", sink_slope, ("b", "h", "scalars", "tensors"), sink, {})

    source, names = module.load(f"{variant.name}_cpu_{str(dtype)[6:]}", _TORCH_HEADER.format(dtype=dtype))

    def derivative(name: str, slope: Gradient, loads: tuple[Target, ...]) -> Derivative:
        parameters = tuple(item.parameter.name for item in slope.parameters)
        indices, relative = names[f"{name}_indices"], names[f"{name}_relative_indices"]
        return Derivative(names[name], slope.d_score is ONE, loads, parameters, indices, relative)

    keeps = MaskFunctions(
        margin=mask,
        sides=around,
        row_sides=names["row_sides"],
        key_sides=names["key_sides"],
        relative=names["mask_relative"],
        of_sides=names["mask"],
        partly=bool(mask_parts),
        by_distance=mask in mask_parts,
        alike=mask in mask_parts and mask.depends <= PAIR,
        by_head="h" in mask.depends,
        reads_positions=any(isinstance(n, Load) and n.depends & PAIR for n in post_order(mask)),
    )
    return TileFunctions(
        source=source,
        scalars=module.signature.scalars,
        score=None if core is SCORE else names["score"],
        score_relative=names["score_relative"],
        score_places=bool(core.depends - SCORE.depends),
        before=names["before"],
        after=names["after"],
        mask=None if variant.mask is TRUE else keeps,
        by_distance=bool(score_parts or grad_parts or (mask_parts and mask not in mask_parts))
        or any(load.relative for load in score_loads),
        score_grad=derivative("score_grad", slope, score_loads),
        scored=score is not SCORE,
        grad_relative=names["grad_relative"],
        sink_grad=None if sink_slope is None else derivative("sink_grad", sink_slope, sink_loads),
    )


@lru_cache(maxsize=256)
def schedule_functions(variant: Variant, schedule: Schedule) -> ScheduleFunctions:
    """Emit and load the integer functions of a schedule."""
    ranges = schedule.kv
    module = _Module(Signature.of(variant), TotalDialect(), variant.locations)
    segments = tuple((segment.begin, segment.end, Const(segment.masked)) for segment in ranges.segments)
    roots = [node for begin, end, _ in segments for node in (begin, end)] + [ranges.skip, ranges.full]
    tile = ("b", "h", "q0", "q1", "q_offset", "block", "scalars", "tensors")
    module.add("kv_ranges", tile, segments, TILE)
    pair = ("b", "h", "q0", "q1", "k0", "k1", "q_offset", "scalars", "tensors")
    module.add("kv_skip", pair, ranges.skip, TILE)
    module.add("kv_full", pair, ranges.full, TILE)
    source, names = module.load(f"{variant.name}_schedule", _SCHEDULE_HEADER)
    loaded = {node.tensor for node in post_order(*roots) if isinstance(node, Load)}
    depends = frozenset[str]().union(*(root.depends for root in roots))
    return ScheduleFunctions(
        source=source,
        kv_ranges=names["kv_ranges"],
        kv_skip=None if ranges.skip is FALSE else names["kv_skip"],
        kv_full=None if ranges.full is FALSE else names["kv_full"],
        per_batch="b" in depends,
        per_head="h" in depends,
        slots=frozenset(i for i, tensor in enumerate(variant.tensors) if tensor.name in loaded),
    )


def factors(score: Node) -> tuple[Node, Node, Node]:
    """`(before, core, after)` with `score(s) = after * core(before * s)`, the factors free of places and tensors.

    A factor before costs nothing, since the logit is scaled anyway; one behind costs nothing, since the exponential is.
    """
    before: Node = ONE
    after, score = _factor(score)
    users = {node for node in post_order(score) if SCORE in node.children}
    if len(users) == 1:
        user = users.pop()
        factor, rest = _factor(user)
        if rest is SCORE:
            before, score = factor, substitute(score, {user: SCORE})
    return before, score, after


def _factor(node: Node) -> tuple[Node, Node]:
    """`(factor, rest)` with `node = factor * rest`."""
    match node:
        case Binary(BinaryOp.MUL, x, y) if _uniform(x):
            return x, y
        case Binary(BinaryOp.MUL, x, y) if _uniform(y):
            return y, x
        case Binary(BinaryOp.DIV, x, y) if _uniform(y):
            return Binary(BinaryOp.DIV, ONE, y), x
    return ONE, node


def _rewritten(slope: Gradient, rule: Callable[[Node], Node]) -> Gradient:
    loads = tuple(LoadGradient(cast(Load, rule(item.load)), rule(item.partial)) for item in slope.loads)
    parameters = tuple(replace(item, partial=rule(item.partial)) for item in slope.parameters)
    return Gradient(rule(slope.d_score), loads, parameters)


def _uniform(node: Node) -> bool:
    return all(isinstance(part, Const | Param | Size) or part.children for part in post_order(node)) and not any(
        isinstance(part, Load) for part in post_order(node)
    )


def _worthwhile(mask: Node) -> tuple[Node, ...]:
    """The parts of a margin over `q - k`: the whole, or those that cost more to compute than to lay along a tile."""
    found = parts([mask])
    cheap = (BinaryOp.ADD, BinaryOp.SUB, BinaryOp.MIN, BinaryOp.MAX)

    def costs(node: Node) -> bool:
        match node:
            case Binary(op):
                return op not in cheap
            case Unary(op):
                return op not in (UnaryOp.NEG, UnaryOp.ABS)
            case _:
                return bool(node.children)

    return tuple(part for part in found if part is mask or any(costs(node) for node in post_order(part)))


def _bound(nodes: Sequence[Node], name: str = "relative") -> dict[Node, str]:
    return {node: f"{name}[{i}]" for i, node in enumerate(nodes)}


_SCHEDULE_HEADER = """\
import math

from attn_dsl.backend.cpu import total
"""

_TORCH_HEADER = """\
import torch

from attn_dsl.backend.cpu.elementary import clip, nonzero, tanh, tanh_

FLOAT = {dtype}
"""


class _Module:
    """Functions collected into one source text, then loaded."""

    def __init__(self, signature: Signature, dialect: Dialect, locations: Mapping[Node, Span]) -> None:
        self.signature = signature
        self.dialect = dialect
        self.locations = locations
        self.functions: list[str] = []

    def add(
        self,
        name: str,
        arguments: Sequence[str],
        results: Results,
        bindings: Mapping[Node, str] | None = None,
        owned: frozenset[Node] = frozenset(),
        dialect: Dialect | None = None,
    ) -> None:
        text = emit(
            name,
            arguments,
            results,
            self.signature,
            dialect or self.dialect,
            locations=self.locations,
            bindings=bindings or {},
            owned=owned,
        )
        self.functions.append(text)

    def add_gradient(
        self, name: str, slope: Gradient, arguments: Sequence[str], value: Node, bindings: Mapping[Node, str]
    ) -> tuple[Target, ...]:
        """Emit the value with its partials, and the indices of the look-ups; returns where each partial goes."""
        loads = [item.load for item in slope.loads]
        relative = [bool(load.depends & PAIR) and set(load.indices) <= set(_relative(load)) for load in loads]
        here = [load.indices for load, distance in zip(loads, relative, strict=True) if not distance]
        there = [load.indices for load, distance in zip(loads, relative, strict=True) if distance]
        self.add(name, arguments, (value, *slope.roots), bindings)
        self.add(f"{name}_indices", ("b", "h", "q", "k", "scalars", "tensors"), here)
        self.add(f"{name}_relative_indices", ("b", "h", "rel", "scalars", "tensors"), there, {RELATIVE: "rel"})
        return tuple(Target(load.tensor, distance) for load, distance in zip(loads, relative, strict=True))

    def load(self, name: str, header: str) -> tuple[str, dict[str, Any]]:
        """Compile the text under a name that tracebacks and debuggers can show; returns it and its functions."""
        source = header + "\n\n" + "\n\n".join(self.functions)
        file = f"<attn_dsl {''.join(c if c.isalnum() else '_' for c in name)} {len(linecache.cache)}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        names: dict[str, Any] = {}
        exec(compile(source, file, "exec"), names)
        return source, names


def _relative(load: Load) -> list[Node]:
    """The indices of a look-up that see the positions as `q - k` only, or not at all."""
    inside = parts(load.indices)
    return [index for index in load.indices if index in inside or not index.depends & PAIR]
