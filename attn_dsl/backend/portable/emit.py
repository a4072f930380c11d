"""A variant's own functions as the source of a Python module of `@triton.jit` functions.

Everything that the kernels call through a `constexpr` argument is written here; a function that a variant does not need
is left out, and the kernel then does without. Results are text; `load.py` makes them importable.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from attn_dsl.backend.portable.algebra import LOG2E, ONE, SCALE, Gatherer, times, uniform
from attn_dsl.backend.printer import Results, Signature, emit
from attn_dsl.backend.triton_dialect import TritonDialect, varying
from attn_dsl.errors import Span
from attn_dsl.ir.nodes import (
    FALSE,
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
    Param,
    Q,
    Select,
    Var,
    conjuncts,
    post_order,
    substitute,
)
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import Variant
from attn_dsl.passes.differentiate import Gradient, LoadGradient, ParameterGradient, gradient
from attn_dsl.passes.monotone import K0, Q0
from attn_dsl.passes.schedule import Schedule, TileRanges
from attn_dsl.passes.separate import Terms, separate
from attn_dsl.passes.specialize import Saturation

HEADER = '''"""What the compiler made of the variant `{name}`; the kernels of attn_dsl call these functions."""

import triton
import triton.language as tl

from attn_dsl.backend.portable.device import *  # noqa: F403
'''
ZERO = Const(0.0)
UPSTREAM = Param("upstream gradient", Type.FLOAT)
"""The gradient of the logit; the space keeps it apart from every name of a text."""
TILE_VARS: dict[Node, str] = {Var(name): name for name in ("q0", "q1", "k0", "k1", "q_offset", "block")}
BINDINGS: dict[Node, str] = {**TILE_VARS, UPSTREAM: "g"}
"""What emitted functions find in their arguments, beside `s b h q k`."""


@dataclass(frozen=True)
class Target:
    """A captured tensor or a float parameter that wants a gradient: where its shares come from."""

    name: str
    share: Node
    load: Load | None

    @property
    def axes(self) -> frozenset[str]:
        """Which of `q`, `k` the place of a share varies with."""
        return frozenset() if self.load is None else _depends(self.load.indices) & {"q", "k"}

    def where(self, values: dict[Node, Node]) -> Target:
        """The target where nodes have the values of others."""
        load = None if self.load is None else substitute(self.load, values)
        assert load is None or isinstance(load, Load)
        return Target(self.name, substitute(self.share, values), load)


@dataclass(frozen=True)
class Emitted:
    """The text of the module and what the launcher must know of it.

    functions: names of the functions that exist. targets: what has a gradient buffer, in the order of the kernels'
    `grads`. query_totals, key_totals: how many sums over keys and over queries a program keeps.
    """

    source: str
    functions: frozenset[str]
    targets: tuple[str, ...]
    query_totals: int
    key_totals: int

    @property
    def sums_queries(self) -> bool:
        """Whether the dK and dV kernel adds to a gradient."""
        return "add_key_sums" in self.functions

    @property
    def sums_keys(self) -> bool:
        """Whether the dQ kernel adds to a gradient."""
        return not self.functions.isdisjoint({"add_query_sums", "add_pairs"})

    def function(self, name: str) -> str | None:
        """The function that serves as `name`: on full tiles the one for any tile does where there is no special one."""
        found = name if name in self.functions else name.replace("full_", "")
        return found if found in self.functions else None


@dataclass
class _Module:
    variant: Variant
    signature: Signature
    fast_tanh: bool
    locations: Mapping[Node, Span]
    texts: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def add(self, name: str, arguments: Sequence[str], results: Results, *, tiles: bool = True) -> None:
        text = emit(
            name, arguments, results, self.signature,
            TritonDialect(fast_tanh=self.fast_tanh, tiles=tiles, wide="block" in arguments),
            locations=self.locations, bindings=BINDINGS, decorator="@triton.jit",
        )  # fmt: skip
        self.write(name, text)

    def write(self, name: str, text: str) -> None:
        self.names.append(name)
        self.texts.append(text)


PAIR = ("b", "h", "q", "k", "inside: tl.constexpr", "scalars", "tensors")
TILE = ("b", "h", "q", "k", "q0", "k0", "inside: tl.constexpr", "scalars", "tensors")
"""The arguments of what is computed for pairs; `q0` and `k0` are the first of the tile."""


def emit_module(
    variant: Variant,
    schedule: Schedule,
    wanted: Iterable[str] = (),
    *,
    saturations: Sequence[Saturation] = (),
    fast_tanh: bool = False,
) -> Emitted:
    """The functions of a variant. `wanted` names the captured tensors and parameters that want a gradient.

    Where there are `saturations`, the schedule must be derived with them: `full_score`, `full_key_grad`,
    `full_query_grad` and `add_full_pairs` are for its full tiles, where each of them has the value of the first pair.
    """
    plain = Signature.of(variant)
    first: dict[Node, Node] = {Q: Q0, K: K0}
    corner = {s.node: substitute(s.node, first) for s in saturations}
    moved = {
        substitute(node, values): span
        for values in (first, corner) if corner
        for node, span in variant.locations.items()
    }  # fmt: skip
    module = _Module(
        variant, Signature((*plain.scalars, SCALE), plain.tensors), fast_tanh, {**moved, **variant.locations}
    )
    gather, derivatives = Gatherer(), gradient(variant.score)
    terms = separate(variant.score)
    row = terms.dropped(Q)
    slope = terms_slope(terms)
    residue = dataclasses.replace(terms, affine=()).loop(Q)
    logit = gather.scaled(residue, LOG2E)
    front = _uniform_multiple(logit)
    if front is not None:
        module.add("factor", ("b", "h", "scalars", "tensors"), front, tiles=False)
    else:
        _add_score(module, "score", logit)
        if corner:
            _add_score(module, "full_score", gather.scaled(substitute(residue, corner), LOG2E))
    if slope is not ZERO:
        module.add("slope", ("b", "h", "scalars", "tensors"), times(LOG2E, slope), tiles=False)
    if row is not ZERO:
        module.add("row_term", ("b", "h", "q", "inside: tl.constexpr", "scalars", "tensors"), row)

    if variant.sink is not None:
        module.add("sink", ("b", "h", "scalars", "tensors"), variant.sink, tiles=False)
    _add_masks(module, variant.mask)
    for axis, ranges, tile in (("kv", schedule.kv, ("q0", "q1")), ("q", schedule.q, ("k0", "k1"))):
        _add_ranges(module, axis, ranges, tile)

    targets = targets_of(derivatives, frozenset(wanted))
    sink_targets = [] if variant.sink is None else targets_of(gradient(variant.sink), frozenset(wanted))
    names = tuple(dict.fromkeys(target.name for target in (*targets, *sink_targets)))
    if sink_targets:
        _add_sink_gradient(module, sink_targets, names)
    derivative = derivatives.d_score
    of_keys, of_queries = ([t for t in targets if (t.axes == {"k"}) is by_key] for by_key in (True, False))
    key_totals = _add_gradients(module, "key", gather, derivative, of_keys, names, corner)
    query_totals = _add_gradients(module, "query", gather, derivative, of_queries, names, corner)
    source = HEADER.format(name=variant.name) + "".join(f"\n\n{text}" for text in module.texts)
    return Emitted(source, frozenset(module.names), names, query_totals, key_totals)


def terms_slope(terms: Terms) -> Node:
    """The growth of the logit along k: what is affine in k is `slope * (k - q)`, and for the row `row_term`."""
    parts = [times(term.factor, Const(float(term.k_step))) for term in terms.affine if term.k_step]
    return functools.reduce(lambda x, y: Binary(BinaryOp.ADD, x, y), parts) if parts else ZERO


def _uniform_multiple(logit: Node) -> Node | None:
    """The u for which the logit is u times the bare product, the same for a whole program."""
    match logit:
        case Binary(BinaryOp.MUL, front, rest) if rest is SCORE and uniform(front):
            return front
        case _:
            return None


def _add_score(module: _Module, name: str, logit: Node) -> None:
    """`score` or `full_score` gives a whole tile, whatever the logit depends on."""
    if "score" in logit.depends:
        module.add(name, ("s", *TILE), logit)
        return
    module.add(f"{name}_bias", TILE, logit)
    module.write(
        name,
        f"@triton.jit\ndef {name}(s, b, h, q, k, q0, k0, inside: tl.constexpr, scalars, tensors):\n"
        f"    return tl.zeros(s.shape, tl.float32) + {name}_bias(b, h, q, k, q0, k0, inside, scalars, tensors)\n",
    )


def _add_masks(module: _Module, mask: Node) -> None:
    if mask is TRUE:
        return
    tile = mask.depends & {"q", "k"}  # a mask of scalars becomes one of rows, as the kernels combine it with others
    module.add("mask", PAIR, mask if tile else Select(mask, Compare(CompareOp.GE, Q, Const(0)), FALSE))
    for name, axis in (("key_mask", "k"), ("query_mask", "q")):
        own = [part for part in conjuncts(mask) if axis in part.depends and part.depends <= {"b", "h", axis}]
        if own:  # rows that no pair sees are loaded as zeros, lest what stands there poison a product
            arguments = ("b", "h", axis, "inside: tl.constexpr", "scalars", "tensors")
            module.add(name, arguments, functools.reduce(lambda x, y: Binary(BinaryOp.AND, x, y), own))


def _add_ranges(module: _Module, axis: str, ranges: TileRanges, tile: tuple[str, str]) -> None:
    """`<axis>_ranges` gives the partial and the full segments; `<axis>_skip` says which partial tiles are empty."""
    partial = tuple((s.begin, s.end) for s in ranges.segments if s.masked)
    full = tuple((s.begin, s.end) for s in ranges.segments if not s.masked)
    module.add(
        f"{axis}_ranges", ("b", "h", *tile, "q_offset", "block", "scalars", "tensors"), (partial, full), tiles=False
    )
    if ranges.skip is not FALSE:
        arguments = ("b", "h", "q0", "q1", "k0", "k1", "q_offset", "block", "scalars", "tensors")
        module.add(f"{axis}_skip", arguments, ranges.skip, tiles=False)


def _depends(nodes: Iterable[Node]) -> frozenset[str]:
    return frozenset().union(*(node.depends for node in nodes))


def targets_of(score: Gradient, wanted: frozenset[str]) -> list[Target]:
    """What of `wanted` a score or sink reaches, entries of fewer positions first."""

    def shares() -> Iterable[Target]:
        for item in (*score.loads, *score.parameters):
            match item:
                case LoadGradient(load, partial) if load.tensor in wanted:
                    yield Target(load.tensor, partial, load)
                case ParameterGradient(parameter, partial) if parameter.name in wanted:
                    yield Target(parameter.name, partial, None)

    return sorted(shares(), key=lambda target: len(target.axes))


def _add_gradients(
    module: _Module,
    side: str,
    gather: Gatherer,
    derivative: Node,
    targets: Sequence[Target],
    names: Sequence[str],
    corner: dict[Node, Node],
) -> int:
    """`<side>_grad`, from the gradient `g` of the logit to that of the incoming score and the shares of the targets.

    Targets that vary with at most one position come first: a program sums their shares and `add_<side>_sums` adds the
    sums at its end; `add_pairs` adds the others tile by tile. Where there is a `corner`, `full_<side>_grad` and
    `add_full_pairs` are the same with what saturates as it is there. Returns how many are summed.
    """
    targets = sorted(targets, key=lambda target: len(target.axes))
    count = sum(len(target.axes) < 2 for target in targets)
    if derivative is not ONE or targets:
        regions: list[tuple[str, dict[Node, Node]]] = [("", {}), ("full_", corner)]
        for full, values in regions:
            if not full or corner:
                shares = tuple(times(UPSTREAM, gather(substitute(target.share, values))) for target in targets)
                whole = times(UPSTREAM, gather(substitute(derivative, values)))
                module.add(f"{full}{side}_grad", ("g", "s", *TILE), (whole, shares))
    if count:
        _add_scatter(module, f"{side}_sums", targets[:count], names, first=0)
    if count < len(targets):
        _add_scatter(module, "pairs", targets[count:], names, first=count)
        if corner:
            settled = [target.where(corner) for target in targets[count:]]
            _add_scatter(module, "full_pairs", settled, names, first=count)
    return count


def _add_sink_gradient(module: _Module, targets: Sequence[Target], names: Sequence[str]) -> None:
    """`sink_grad`, from the gradients `g` of the sink by rows to the shares of the targets, which `add_sink` adds."""
    shares = tuple(times(UPSTREAM, target.share) for target in targets)
    module.add("sink_grad", ("g", "b", "h", "scalars", "tensors"), shares, tiles=False)
    _add_scatter(module, "sink", targets, names, first=0)


def _add_scatter(module: _Module, what: str, targets: Sequence[Target], names: Sequence[str], first: int) -> None:
    """`add_<what>` adds amounts `first`, `first + 1`, ... to where the loads of the targets read."""
    places = tuple(() if target.load is None else tuple(target.load.indices) for target in targets)
    module.add(f"{what}_places", TILE, places)
    lines = [
        "@triton.jit",
        f"def add_{what}(amounts, b, h, q, k, q0, k0, keep, inside: tl.constexpr, scalars, tensors, grads, peaks,",
        f"    {' ' * len(what)}     factors, MODE: tl.constexpr):  # fmt: skip",
        f"    places = {what}_places(b, h, q, k, q0, k0, inside, scalars, tensors)",
    ]
    for i, target in enumerate(targets):
        at = names.index(target.name)
        bits, checked = 0, "0"
        if target.load is not None:
            bits = varying(target.load)
            checked = TritonDialect().checked(target.load, module.variant.tensor(target.name))
        amount = f"amounts[{first + i}]" if target.axes else f"tl.sum(amounts[{first + i}])"
        if what == "full_pairs" and len(target.axes) == 1:
            amount = f"tl.sum({amount}, {1 if target.axes == {'q'} else 0}, keep_dims=True)"
        keep = "keep" if target.axes else "None"
        lines.append(
            f"    scatter(grads[{at}], places[{i}], {amount}, {keep}, {bits}, {checked}, {_may_coincide(target)}, "
            f"peaks, factors, {at}, MODE)"
        )
    module.write(f"add_{what}", "\n".join(lines) + "\n")


def _may_coincide(target: Target) -> bool:
    """Whether a tile of pairs may fall on one entry, which is then worth one addition: a clamped distance does."""
    if target.load is None or len(target.axes) < 2:
        return False
    return any(
        isinstance(node, Load)
        or (isinstance(node, Binary) and node.op not in (BinaryOp.ADD, BinaryOp.SUB, BinaryOp.MUL))
        for index in target.load.indices
        for node in post_order(index)
    )
