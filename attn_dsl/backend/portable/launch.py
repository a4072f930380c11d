"""Launch the kernels for a bound call: tensors in, tensors out.

Arguments are taken to be valid (`api.py` checks them): query [B, H, Q, D], key [B, HK, KV, D], value [B, HK, KV, DV] of
one dtype (float32, bfloat16, float16), any strides, 0 among them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attn_dsl.backend.portable import backward as backward_kernels
from attn_dsl.backend.portable import device, listing, tiles
from attn_dsl.backend.portable.classify import kv_list, q_list
from attn_dsl.backend.portable.device import plain
from attn_dsl.backend.portable.emit import Emitted, emit_module
from attn_dsl.backend.portable.forward import attention_forward
from attn_dsl.backend.portable.host import (
    Call,
    capability_of,
    chunks,
    dense_columns,
    described,
    dimensions,
    empty,
    in_units,
    interpreted,
    number,
    padded_rows,
    precision_of,
    section,
    span,
    tile_options,
    unit_of,
)
from attn_dsl.backend.portable.launch_permute import Permuting, permuted, scattered
from attn_dsl.backend.portable.load import load
from attn_dsl.backend.portable.run import Options, Repeated, Runner, launch
from attn_dsl.backend.portable.tiles import Tile, Tiles
from attn_dsl.backend.portable.width import fits, position_bits
from attn_dsl.backend.printer import SIZES, Signature
from attn_dsl.ir.nodes import FALSE, K, Load, Node, Param, Q, Size, conjuncts, post_order
from attn_dsl.ir.variant import Variant
from attn_dsl.passes.leading import leading, leading_tiles
from attn_dsl.passes.lengths import is_packed, is_paged, is_scaled
from attn_dsl.passes.runs import by_runs
from attn_dsl.passes.schedule import Schedule, derive_schedule
from attn_dsl.passes.specialize import Saturation, specialize
from attn_dsl.passes.summaries import derive_claims, reads_at_positions

__all__ = ["LAYOUTS", "Call", "Gradients", "Kernels", "Replay", "backward", "chunks", "forward", "interpreted", "tiles"]

LONGER = 8
"""Leading tiles that are longer than others come first where they are one in so many, or fewer."""


@dataclass
class Kernels:
    """A simplified variant without `const` parameters, and its schedule for padded tiles.

    Functions are emitted on first use.
    """

    variant: Variant
    schedule: Schedule

    def __post_init__(self) -> None:
        self.extents = _extents(self.variant)
        self.plans: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self.bounded: dict[tuple[Any, ...], bool] = {}
        """Whether the keys that rows see lie between numbers of 32 bits, by what decides it; for other backends."""
        self._widths: dict[tuple[Any, ...], bool] = {}
        self._leads: dict[tuple[Any, ...], int] = {}
        nodes = frozenset(post_order(*self.variant.roots))
        self._sizes = tuple(i for i, size in enumerate((*SIZES, *self.extents)) if size in nodes)
        self._modules: dict[tuple[frozenset[str], bool, bool], tuple[Emitted, ModuleType]] = {}
        self.paged, self.scaled = is_paged(self.variant), is_scaled(self.variant)
        self.packed = is_packed(self.variant)

    def lead(self, call: Call, axis: str, block: int) -> int:
        """So many first tiles of `block` queries or keys (`axis` q or k) are much longer than others (`leading`)."""
        end, offset = self._leading[axis], call.q_offset
        if end is None or isinstance(offset, Tensor):
            return 0
        key = (axis, block, offset, call.sizes, tuple(x if isinstance(x, int) else None for x in call.parameters))
        if key not in self._leads:
            if len(self._leads) >= LAYOUTS:
                self._leads.clear()
            sizes = dict(zip((size.name for size in SIZES), call.sizes, strict=False))
            names = (parameter.name for parameter in self.variant.parameters)
            found = leading_tiles(end, block, offset, sizes, dict(zip(names, call.parameters, strict=True)))
            length = sizes["Q" if axis == "q" else "KV"]
            self._leads[key] = found if LONGER * found * block <= length else 0
        return self._leads[key]

    @functools.cached_property
    def _leading(self) -> dict[str, Node | None]:
        return {axis: leading(self.variant, axis) for axis in ("q", "k")}

    @functools.cached_property
    def gathers(self) -> bool:
        """Whether pairs look up elements of their own."""
        nodes = post_order(*self.variant.roots)
        return any(isinstance(node, Load) and {"q", "k"} <= node.depends for node in nodes)

    def tiles(self, call: Call, capability: tuple[int, int] | None) -> Tiles:
        """Those of the call, or of the table."""
        return call.tiles or self.table(capability, call.query.dtype, call.query.shape[3], call.value.shape[3])

    def table(self, capability: tuple[int, int] | None, dtype: torch.dtype, dim: int, value_dim: int) -> Tiles:
        """The tiles that the table has for head dimensions."""
        return tiles.choose(capability, dtype.itemsize, sum(chunks(dim)), sum(chunks(value_dim)), self.gathers)

    @functools.cached_property
    def split(self) -> tuple[Schedule, tuple[Saturation, ...]]:
        """The schedule whose full tiles see no look-up vary that saturates, and what saturates."""
        uniform = specialize(self.variant.score)
        if uniform is None:
            return self.schedule, ()
        found = uniform.saturations
        return derive_schedule(self.variant, padded=True, saturations=found), found

    @functools.cached_property
    def lists(self) -> listing.Lists | None:
        """Lists of the tiles to visit, where ranges in closed form hold others too; None where they do not."""
        ranges = self.schedule.kv, self.schedule.q
        closed = not reads_at_positions(self.variant.mask) and all(axis.skip is FALSE for axis in ranges)
        if closed or self.paged or self.scaled or self.packed:
            return None
        claims = derive_claims(self.variant, saturations=self.split[1])
        return listing.Lists(self.variant, self.extents, claims)

    @functools.cached_property
    def listed(self) -> tuple[Variant, Variant]:
        """The variant for kernels that walk lists: its mask by the runs that queries are in, and by those of keys."""
        if self.lists is None:
            return self.variant, self.variant
        return by_runs(self.variant, self.lists.runs, Q), by_runs(self.variant, self.lists.runs, K)

    def kind_of_list(self, call: Call, rows: int, keys: int, transposed: bool = False) -> listing.Kind | None:
        """The lists for calls like this one and tiles of a shape; None where there are ranges."""
        if self.lists is None:
            return None
        shape = listing.Shape(rows, keys, transposed)
        return listing.Kind(self.lists, shape, self.wide(call), call.sizes, call.parameters)

    def masks_parts(self, call: Call, rows: int, keys: int) -> bool:
        """Whether the mask is the same for all pairs of each part of `rows` x `keys` of the tiles in a list."""
        return self.lists is not None and self.lists.uniform(listing.Source.of(call), rows, keys)

    @functools.cached_property
    def by_head(self) -> bool:
        """Whether heads see different tiles, or load different keys: they cannot share a tile then."""
        ranges = self.split[0].kv
        nodes = [ranges.skip, *(bound for s in ranges.segments for bound in (s.begin, s.end))]
        own = (part.depends for part in conjuncts(self.variant.mask) if "q" not in part.depends)
        return any("h" in node.depends for node in nodes) or any(depends >= {"h", "k"} for depends in own)

    def text(self, wanted: frozenset[str] = frozenset(), *, fast_tanh: bool = False, listed: bool = False) -> Emitted:
        """The functions for gradients of the captured tensors and parameters that are `wanted`.

        listed: for kernels that walk lists, and find what these bring behind the captured tensors.
        """
        schedule, saturations = self.split
        variant = self.listed[0] if listed else self.variant
        return emit_module(variant, schedule, wanted, saturations=saturations, fast_tanh=fast_tanh)

    def emitted(self, wanted: frozenset[str], fast_tanh: bool, listed: bool = False) -> tuple[Emitted, ModuleType]:
        key = (wanted, fast_tanh, listed and self.lists is not None)
        if key not in self._modules:
            text = self.text(wanted, fast_tanh=fast_tanh, listed=listed)
            self._modules[key] = text, load(text.source, self.variant.name)
        return self._modules[key]

    def wide(self, call: Call) -> bool:
        """Whether positions must be 64-bit for this call."""
        numbers = tuple(p for p in call.parameters if isinstance(p, int))
        sizes = call.sizes
        bits = position_bits(call.q_offset, sizes[3], sizes[4])
        key = (numbers, bits, *(sizes[i] for i in self._sizes))
        if key not in self._widths:
            self._widths[key] = not self._fits(call, 2**bits)
        return self._widths[key] or any(span(tensor) >= 2**31 for tensor in call.tensors)

    def _fits(self, call: Call, highest: int) -> bool:
        values: dict[Node, int] = dict(zip((*SIZES, *self.extents), call.sizes, strict=True))
        for parameter, value in zip(self.variant.parameters, call.parameters, strict=True):
            if isinstance(value, int):
                values[Param(parameter.name, parameter.type)] = value
        return fits(self.variant.roots, values, highest)


def _extents(variant: Variant) -> tuple[Size, ...]:
    return tuple(node for node in Signature.of(variant).scalars if isinstance(node, Size) and node not in SIZES)


@dataclass(frozen=True)
class _Layout:
    """What of a forward launch follows from shapes and strides."""

    programs: int
    strides: tuple[tuple[int, int, int, int], ...]
    sizes: tuple[int, ...]
    section: int
    options: Options


LAYOUTS = 4096
"""So many are kept for each plan; lengths that change with every call must not fill the memory."""


@dataclass(frozen=True)
class Plan:
    """What the kernels of one call have in common."""

    kernels: Kernels
    call: Call
    run: Runner
    emitted: Emitted
    functions: ModuleType
    tiles: Tiles
    common: Mapping[str, Any]
    made: dict[tuple[Any, ...], Options]
    layouts: dict[tuple[Any, ...], _Layout]
    backward_layouts: dict[tuple[Any, ...], _BackwardLayout]

    @staticmethod
    def of(kernels: Kernels, call: Call, wanted: frozenset[str], run: Runner, listed: bool = True) -> Plan:
        """listed: the kernels walk lists where there are some."""
        query, value = call.query, call.value
        fast = not call.precise and not interpreted() and query.dtype is not torch.float32 and torch.version.hip is None
        capability, precision = call.capability or capability_of(query.device), precision_of(call)
        dims = (query.shape[3], value.shape[3])
        page = call.key.shape[2] if kernels.paged else 0
        key = (wanted, fast, query.dtype, dims, capability, precision, kernels.wide(call), call.tiles, page, listed)
        shared = kernels.plans.get(key)
        if shared is None:
            common = {**dimensions(call), "WIDE": key[6], "PRECISION": precision}
            chosen = kernels.tiles(call, capability)
            shared = kernels.plans[key] = (*kernels.emitted(wanted, fast, listed), chosen, common, {}, {}, {})
        return Plan(kernels, call, run, *shared)

    @property
    def storage(self) -> dict[str, Any]:
        """The constants of the kernels that read a cache: keys of a page, and whether there are scales."""
        return {"PAGE": self.call.key.shape[2] if self.kernels.paged else 0, "SCALED": self.kernels.scaled}

    def options(self, kind: str, unit: int, contiguous: bool, make: Callable[[], dict[str, Any]]) -> Options:
        """The options of one kernel, made once for all calls that are alike to Triton."""
        key = (kind, unit, contiguous)
        if key not in self.made:
            self.made[key] = Options({**make(), "UNIT": unit, "CONTIGUOUS": contiguous})
        return self.made[key]

    def named(self, **names: str) -> dict[str, Any]:
        """Emitted functions by the name of the kernel's argument; None where the variant has none."""
        found = {key: self.emitted.function(name) for key, name in names.items()}
        return {key: None if name is None else getattr(self.functions, name) for key, name in found.items()}

    def ranges(self, **names: str) -> dict[str, Any]:
        """As `named`, for what says which tiles are visited; a list says it all."""
        if self.kernels.lists is None:
            return self.named(**names)
        return {"SKIP": None} | ({"Q_RANGES": q_list} if "Q_RANGES" in names else {"KV_RANGES": kv_list})

    def captured(self, tile: Tile, transposed: bool = False) -> tuple[Any, ...]:
        """The captured tensors as a kernel takes them, behind them the list of the tiles to visit if there is one."""
        call, kind = self.call, self.kernels.kind_of_list(self.call, tile.rows, tile.keys, transposed)
        if kind is None:
            return described(call.tensors)
        return described((*call.tensors, *kind.find(call.tensors, call.q_offset, call.query.device, self.run)))

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(plain, self.call.sizes))

    def tiles_of(self, x: Tensor, rows: int) -> int:
        """How many tiles of rows of one head there are, or may be where sequences are packed."""
        batch, _, length, _ = x.shape
        return length // rows + self.call.sizes[0] if self.kernels.packed else batch * -(-length // rows)

    def strides(self, x: Tensor, unit: int) -> tuple[int, int, int, int]:
        """`in_units`; packed sequences have no stride of the batch."""
        batch, *rest = in_units(x, unit)
        return (plain(0) if self.kernels.packed else batch, *rest)  # type: ignore[return-value]

    def section(self, group: int) -> int:
        return section(self.call.key, self.call.value, group, self.call.sizes[4])


def outputs(call: Call, packed: bool) -> tuple[Tensor, Tensor]:
    """Where `out [B, H, Q, DV]` and `lse [B, H, Q]` are written; of packed sequences, row by row."""
    batch, heads, rows = call.query.shape[:3]
    width, device = call.value.shape[3], call.query.device
    if not packed:
        lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=device)
        return call.result("out", (batch, heads, rows, width)), lse
    lse = torch.empty((1, rows, heads), dtype=torch.float32, device=device).transpose(1, 2)
    return call.result("out", (1, rows, heads, width)).transpose(1, 2), lse


def forward(kernels: Kernels, call: Call, run: Runner = launch) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, H, Q, DV], lse [B, H, Q], shifted [B, H, Q]): `shifted` is the float32 log-sum-exp without the score's
    row terms, which `backward` wants; it is `lse` itself where there are none."""
    if call.rows is not None:
        scatter = functools.partial(permuted, scatter=True, run=run)
        return scattered(scatter, call.rows[0], *forward(kernels, gathered(call, run), run))
    plan = Plan.of(kernels, call, frozenset(), run)
    query, key, value = call.query, call.key, call.value
    out, lse = outputs(call, kernels.packed)
    shifted = torch.empty_like(lse) if "row_term" in plan.emitted.functions else lse
    shapes: tuple[Any, ...] = (
        query.shape,
        query.stride(),
        key.dtype,
        key.stride(),
        value.shape,
        value.stride(),
        call.sizes,
    )
    if call.results:
        shapes += (call.result_strides,)
    layout = plan.layouts.get(shapes)
    if layout is None:
        if len(plan.layouts) >= LAYOUTS:
            plan.layouts.clear()
        layout = plan.layouts[shapes] = _forward_layout(plan, out)
    parameters = tuple(number(value) for value in call.parameters)
    run(
        attention_forward,
        layout.programs,
        (query, key, value, out, lse, shifted, call.q_offset, *layout.strides, parameters, layout.sizes,
         plan.captured(plan.tiles.forward), number(float(call.scale)), layout.section),
        layout.options,
    )  # fmt: skip
    return out, lse, shifted


def gathered(call: Call, run: Runner = launch) -> Call:
    """A call with `rows` as one without, whose tensors are in their order."""
    assert call.rows is not None
    queries, keys = call.rows
    given = call.query, call.key, call.value
    query, key, value = permuted(given, (queries, keys, keys), scatter=False, run=run)
    return replace(call, query=query, key=key, value=value, rows=None)


@dataclass
class Replay:
    """The forward pass of one kind of call, known by its shapes, strides, dtypes and numbers."""

    layout: _Layout
    out: tuple[int, ...]
    fixed: tuple[Any, ...]
    captured: tuple[tuple[Any, ...], ...]
    end: tuple[Any, ...]
    has_row: bool
    kind: listing.Kind | None
    runner: Repeated = field(default_factory=Repeated)
    gather: Permuting = field(default_factory=lambda: Permuting(3, scatter=False))
    scatter: Permuting = field(default_factory=lambda: Permuting(1, scatter=True))

    @staticmethod
    def of(kernels: Kernels, call: Call) -> Replay:
        if call.rows is not None:
            call = gathered(call)
        query, value = call.query, call.value
        plan = Plan.of(kernels, call, frozenset(), launch)
        shape = (*query.shape[:3], value.shape[3])
        layout = _forward_layout(plan, call.result("out", shape, "meta"))
        parameters = tuple(number(x) for x in call.parameters)
        captured = tuple(rest for _, *rest in described(call.tensors))
        end = (number(float(call.scale)), layout.section)
        row = "row_term" in plan.emitted.functions
        kind = kernels.kind_of_list(call, plan.tiles.forward.rows, plan.tiles.forward.keys)
        return Replay(layout, shape, (*layout.strides, parameters, layout.sizes), captured, end, row, kind)

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, tensors: Sequence[Tensor], q_offset: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """(out, lse), not differentiable."""
        return self.outputs(query, key, value, tensors, q_offset)[:2]

    def outputs(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tensors: Sequence[Tensor],
        q_offset: int | Tensor,
        out: Tensor | None = None,
        rows: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `forward`; `out` and `rows` are given where the call that this was made for has them, with its strides."""
        device = query.device
        if rows is not None:
            query, key, value = self.gather((query, key, value), (rows[0], rows[1], rows[1]))
        out = empty(self.out, query.dtype, device) if out is None else out
        lse = empty(self.out[:3], torch.float32, device)
        shifted = torch.empty_like(lse) if self.has_row else lse
        if isinstance(q_offset, Tensor):
            q_offset = q_offset.to(torch.int64)
        captured = tuple((x, *rest) for x, rest in zip(tensors, self.captured, strict=True))
        if self.kind is not None:
            captured += described(self.kind.find(tensors, q_offset, device))
        arguments = (query, key, value, out, lse, shifted, q_offset, *self.fixed, captured, *self.end)
        self.runner(attention_forward, self.layout.programs, arguments, self.layout.options)
        return (out, lse, shifted) if rows is None else scattered(self.scatter, rows[0], out, lse, shifted)


def _forward_layout(plan: Plan, out: Tensor) -> _Layout:
    query, key, value = plan.call.query, plan.call.key, plan.call.value
    unit, tile = unit_of(query, key, value, out), plan.tiles.forward

    def options() -> dict[str, Any]:
        functions = plan.named(
            SCORE="score", FULL_SCORE="full_score", FACTOR="factor", SLOPE="slope", MASK="mask", KEY_MASK="key_mask",
            ROW="row_term", SINK="sink",
        )  # fmt: skip
        functions |= plan.ranges(KV_RANGES="kv_ranges", SKIP="kv_skip")
        return {**functions, **plan.common, **tile_options(tile), **plan.storage, "PACKED": plan.kernels.packed}

    return _Layout(
        query.shape[1] * plan.tiles_of(query, tile.rows),
        tuple(plan.strides(tensor, unit) for tensor in (query, key, value, out)),
        plan.sizes,
        plan.section(query.shape[1] // key.shape[1]),
        plan.options("forward", unit, dense_columns(query, key, value), options),
    )


@dataclass(frozen=True)
class Gradients:
    """`captured` holds the gradients of captured tensors and parameters by name, float32, in their shapes."""

    query: Tensor
    key: Tensor
    value: Tensor
    captured: Mapping[str, Tensor]


def backward(
    kernels: Kernels,
    call: Call,
    out: Tensor,
    shifted: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: frozenset[str] = frozenset(),
    *,
    deterministic: bool = False,
    run: Runner = launch,
) -> Gradients:
    """Gradients of `forward`. `wanted` names captured float tensors and float parameters.

    Query, key and value gradients are the same bits in every run; so are the others if `deterministic`, at twice the
    price where there are any: a first pass finds the largest share of each target, the second adds in fixed point.
    """
    plan = Plan.of(kernels, call, wanted, run)
    return _backward(plan, kernels.variant, out, shifted, grad_out, grad_lse, deterministic, True)


def captured_gradients(
    kernels: Kernels,
    call: Call,
    out: Tensor,
    shifted: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: frozenset[str],
    *,
    deterministic: bool = False,
    run: Runner = launch,
) -> Mapping[str, Tensor]:
    """`backward(...).captured`, where the other gradients come from elsewhere: only kernels that add to it run."""
    plan = Plan.of(kernels, call, wanted, run)
    return _backward(plan, kernels.variant, out, shifted, grad_out, grad_lse, deterministic, False).captured


def _backward(
    plan: Plan,
    variant: Variant,
    out: Tensor,
    shifted: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    deterministic: bool,
    everything: bool,
) -> Gradients:
    names = plan.emitted.targets
    dtype = torch.int64 if deterministic else torch.float32
    sums = [torch.zeros(_shape(variant, plan.call, name), dtype=dtype, device=out.device) for name in names]
    if grad_lse is not None:
        grad_lse = _by_row(grad_lse.float(), plan.kernels.packed)
    given = (out, _by_row(shifted, plan.kernels.packed), grad_out, grad_lse, sums)
    if not (deterministic and sums):
        dq, dk, dv = _gradients(plan, *given, None, None, device.ADD.value, everything)
        return Gradients(dq, dk, dv, dict(zip(names, sums, strict=True)))
    peaks = torch.zeros(len(sums), dtype=torch.int32, device=out.device)
    _gradients(plan, *given, peaks, peaks, device.PEAK.value, everything)
    factors = _fixed_point(peaks, plan.call)
    dq, dk, dv = _gradients(plan, *given, peaks, factors, device.FIXED.value, everything)
    floats = [(total.double() / factor.double()).float() for total, factor in zip(sums, factors, strict=True)]
    return Gradients(dq, dk, dv, dict(zip(names, floats, strict=True)))


def _by_row(x: Tensor, packed: bool) -> Tensor:
    """Numbers of rows `[B, H, Q]` as the kernels take them: dense, those of packed sequences row by row."""
    return x.transpose(1, 2).contiguous() if packed else x.contiguous()


def _shape(variant: Variant, call: Call, name: str) -> tuple[int, ...]:
    for tensor, value in zip(variant.tensors, call.tensors, strict=True):
        if tensor.name == name:
            return tuple(value.shape)
    return ()


def _fixed_point(peaks: Tensor, call: Call) -> Tensor:
    """Powers of two by which shares are multiplied, so that the sum of all of them fits 62 bits.

    nan, and with it a gradient of nan, where a share is not finite.
    """
    batch, heads, _, q_len, kv_len = call.sizes[:5]
    pairs = batch * heads * q_len * kv_len
    peak = peaks.view(torch.float32)
    exponent = torch.where(peak > 0, torch.frexp(peak).exponent.float(), 0.0)
    power = (61.0 - pairs.bit_length() - exponent).clamp(-126, 126)
    return torch.where(peak.isfinite(), torch.exp2(power), torch.nan)


@dataclass(frozen=True)
class _BackwardLayout:
    """What of a backward pass follows from shapes and strides: for each of the three kernels how many programs it has,
    the arguments that are no tensors of the call, and its options."""

    rows: tuple[int, tuple[Any, ...], Options]
    keys: tuple[int, tuple[Any, ...], int, Options]
    queries: tuple[int, tuple[Any, ...], int, Options]
    numbered: int
    sizes: tuple[int, ...]
    has_sink: bool


def _backward_layout(plan: Plan, out: Tensor, grad_out: Tensor, mode: int) -> _BackwardLayout:
    query, key, value = plan.call.query, plan.call.key, plan.call.value
    heads, kv_heads, packed = query.shape[1], key.shape[1], plan.kernels.packed
    dq, dk, dv = _inner(plan.call, "meta")
    unit = unit_of(query, key, value, grad_out, dq, dk, dv)
    strides = tuple(plan.strides(tensor, unit) for tensor in (query, key, value, grad_out))
    contiguous, tiles = dense_columns(query, key, value, grad_out), plan.tiles

    def options(which: str, totals: int, tile: Tile, ranges: dict[str, str], **names: str) -> Options:
        def make() -> dict[str, Any]:
            functions = plan.named(
                SCORE="score", FULL_SCORE="full_score", FACTOR="factor", SLOPE="slope", MASK="mask",
                KEY_MASK="key_mask", QUERY_MASK="query_mask", **names,
            )  # fmt: skip
            functions |= plan.ranges(**ranges)
            return {
                **functions, "TOTALS": totals, "MODE": mode, **plan.common, **tile_options(tile), "PACKED": packed
            }  # fmt: skip

        return plan.options(f"{which} {mode}", unit, contiguous, make)

    rows, sink = (padded_rows(1) if packed else 64), "sink_grad" in plan.emitted.functions
    numbered = padded_rows(1) * plan.tiles_of(query, padded_rows(1))
    own = unit_of(out, grad_out)
    return _BackwardLayout(
        (heads * (numbered // rows), (plan.strides(out, own), plan.strides(grad_out, own)),
         plan.options(f"rows {mode}", own, dense_columns(grad_out), lambda: _rows_options(plan, rows, sink, mode))),
        (kv_heads * plan.tiles_of(key, tiles.keys.keys), (*strides, plan.strides(dk, unit), plan.strides(dv, unit)),
         plan.section(1),
         options("keys", plan.emitted.key_totals, tiles.keys, {"Q_RANGES": "q_ranges", "SKIP": "q_skip"},
                 KEY_GRAD="key_grad", FULL_KEY_GRAD="full_key_grad", SCATTER="add_key_sums")),
        (heads * plan.tiles_of(query, tiles.queries.rows), (*strides, plan.strides(dq, unit)),
         plan.section(heads // kv_heads),
         options("queries", plan.emitted.query_totals, tiles.queries, {"KV_RANGES": "kv_ranges", "SKIP": "kv_skip"},
                 QUERY_GRAD="query_grad", FULL_QUERY_GRAD="full_query_grad", SCATTER="add_query_sums",
                 SCATTER_PAIRS="add_pairs", SCATTER_FULL_PAIRS="add_full_pairs")),
        numbered, plan.sizes, sink,
    )  # fmt: skip


def _inner(call: Call, device: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Where the gradients of query, key and value are written."""
    inputs = {"dq": call.query, "dk": call.key, "dv": call.value}
    dq, dk, dv = (call.result(name, x.shape, device) for name, x in inputs.items())
    return dq, dk, dv


def _rows_options(plan: Plan, rows: int, sink: bool, mode: int) -> dict[str, Any]:
    functions: dict[str, Any] = plan.named(SINK="sink", ROW="row_term", SINK_GRAD="sink_grad", SCATTER="add_sink")
    common = {name: plan.common[name] for name in ("DV", "DV0", "DV1")} | {"BM": rows, "PACKED": plan.kernels.packed}
    if sink:
        return {**functions, **common, "MODE": mode, "WIDE": plan.common["WIDE"]}
    return {**dict.fromkeys(functions), **common, "MODE": device.ADD.value, "WIDE": False}  # the same for all variants


def _gradients(
    plan: Plan,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    sums: Sequence[Tensor],
    peaks: Tensor | None,
    factors: Tensor | None,
    mode: int,
    everything: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One run of the kernels: (dQ, dK, dV), and what is added to `sums` or, in the mode PEAK, to `peaks`.

    Unless `everything` is wanted, a kernel that adds nothing to them does not run, and dQ, dK, dV are not to be used.
    """
    call = plan.call
    query, key, value = call.query, call.key, call.value
    shapes: tuple[Any, ...] = (
        mode, query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride(), out.stride(),
        grad_out.stride(), call.sizes,
    )  # fmt: skip
    if call.results:
        shapes += (call.result_strides,)
    layout = plan.backward_layouts.get(shapes)
    if layout is None:
        if len(plan.backward_layouts) >= LAYOUTS:
            plan.backward_layouts.clear()
        layout = plan.backward_layouts[shapes] = _backward_layout(plan, out, grad_out, mode)
    numbers = torch.empty((query.shape[1], layout.numbered, 2), dtype=torch.float32, device=query.device)
    dq, dk, dv = _inner(call)
    parameters, scale = tuple(map(number, call.parameters)), number(float(call.scale))

    def end(captured: tuple[Any, ...]) -> tuple[Any, ...]:
        return (parameters, layout.sizes, captured, described(sums), peaks, factors, scale)

    programs, strides, options = layout.rows
    of_sink = (call.q_offset, *strides, *end(described(call.tensors)))
    if not layout.has_sink:
        ends = described(call.tensors[:1]) if plan.kernels.packed else ()
        of_sink = (0, *strides, (), layout.sizes[:6], ends, (), None, None, 1.0)
    rows = (out, grad_out, grad_lse, lse, numbers, *of_sink)
    plan.run(backward_kernels.attention_delta, programs, rows, options)
    inputs = (query, key, value, grad_out, numbers)
    programs, strides, section, options = layout.keys
    if everything or plan.emitted.sums_queries:
        captured = plan.captured(plan.tiles.keys, transposed=True)
        of_keys = (*inputs, dk, dv, call.q_offset, *strides, *end(captured), section)
        plan.run(backward_kernels.attention_keys_backward, programs, of_keys, options)
    programs, strides, section, options = layout.queries
    if everything or plan.emitted.sums_keys:
        captured = plan.captured(plan.tiles.queries)
        of_queries = (*inputs, dq, call.q_offset, *strides, *end(captured), section)
        plan.run(backward_kernels.attention_queries_backward, programs, of_queries, options)
    return dq, dk, dv
