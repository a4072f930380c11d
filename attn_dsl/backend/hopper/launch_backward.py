"""Launch the Hopper backward kernels for a bound call, or say why the call is not for them.

Arguments and results are those of `portable.launch.backward`.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from attn_dsl.backend.hopper.backward import attention_backward
from attn_dsl.backend.hopper.backward_rows import count_listed_turns, count_turns, finish_queries, prepare_rows
from attn_dsl.backend.hopper.configs_backward import KEYS, Config, candidates
from attn_dsl.backend.hopper.emit_backward import FUNCTIONS, Emitted, emit_module
from attn_dsl.backend.hopper.emit_shares import fusable
from attn_dsl.backend.hopper.launch import (
    Block,
    BlockShape,
    Choice,
    Compile,
    compile_ahead,
    compile_here,
    counter_of,
    loadable,
    padded,
    settle,
    whole_sections,
)
from attn_dsl.backend.hopper.launch import refusal as forward_refusal
from attn_dsl.backend.portable import launch as portable
from attn_dsl.backend.portable.classify import q_tiles
from attn_dsl.backend.portable.device import plain
from attn_dsl.backend.portable.host import described, empty, empty_like, multiprocessors, number
from attn_dsl.backend.portable.launch import LAYOUTS, Call, Gradients
from attn_dsl.backend.portable.listing import Kind
from attn_dsl.backend.portable.load import load
from attn_dsl.backend.portable.run import Options, Runner, launch
from attn_dsl.backend.portable.tape import Launches
from attn_dsl.ir.nodes import FALSE, Index, Load, Node, Var, post_order
from attn_dsl.passes.order_grid import Boxes
from attn_dsl.passes.prove import Proof, conjunction, disjunction, prove
from attn_dsl.passes.runs import is_confined
from attn_dsl.passes.schedule import Schedule, derive_schedule
from attn_dsl.passes.specialize import Saturation, saturations

if TYPE_CHECKING:
    from attn_dsl.backend.hopper import launch_boxes

ROWS = 64
"""Of a program that prepares rows."""
WIDTH = 128
"""Query tiles of a program that counts turns."""
LINES, CHUNK = 16, 8
"""Rows of a list, and entries of each, that such a program reads at a time."""
SPILLS = 336
"""Bytes that ptxas may spill: those of a kernel with a branch around its mask, most of them at the mask."""
ORDERED_SPILLS = 576
"""Bytes that ptxas may spill for an order: on an H200, 464 with a branch around the mask beat 144 without it by 7 %."""
FUSED_SPILLS = 640
"""Bytes that ptxas may spill rather than leave a gradient to a pass of its own; most are at the head of a loop."""
CHEAP = 4
"""Operations of a cheap mask: those of a window, where the mask on every tile of 128 queries still gains 1 percent."""
COPIES, COPIED = 16, 2**22
"""So many copies there are of a captured tensor's gradient, of no more elements together unless one has more."""
ORDERED_KEYS = 2**17
"""For so many keys the table that orders programs, 4 bytes for each pair of tiles, takes an eighth of what dQ takes in
float32; for more it would outgrow that."""
SUMS = 2**28
"""Bytes of float32 sums of dQ that are held at once. Where there are more, the pairs of batch and key head run one
section after the other, and their sums take the same memory, a quarter of this where such sections fill the machine."""
FILLS = 6
"""So many programs a multiprocessor fill the machine: what waits for the last of them is little beside the whole."""
ROUNDS, LOCAL_ROUNDS = 2, 8
"""Of the machine, where tiles are uneven: programs whose longest come first. More where a tile of keys sees its
surroundings alone, of which many heads fit the cache."""
BOX_COLUMNS = 64
"""Columns of a box of queries, whose tiles have no more rows."""
_NUMBERS = gl.NVMMASharedLayout(0, 32, rank=2)
_SUMS = gl.NVMMASharedLayout(128, 32, rank=2)
_lock = threading.Lock()


@dataclass
class Kernels:
    """The Hopper backward kernels of a variant: emitted functions, and what was decided for each kind of call."""

    portable: portable.Kernels
    given: Proof | None = None
    boxes: Boxes | None = None
    choices: dict[tuple[Any, ...], Choice[Config]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.proof = self.given or prove(self.portable.variant)
        self._modules: dict[tuple[bool, frozenset[str]], tuple[Emitted, ModuleType]] = {}
        self._plans: dict[tuple[Any, ...], _Plan] = {}
        self.boxed: dict[tuple[Any, ...], Any] = {}
        """What launches over strips of a grid have in common, by kind of call."""

    @functools.cached_property
    def schedule(self) -> Schedule:
        """Which tiles are visited; the kernel asks of each whether it is full, so pieces are not cut for that."""
        return derive_schedule(self.portable.variant, replace(self.proof, masked=()))

    @functools.cached_property
    def uneven(self) -> bool:
        """Whether the keys of a tile decide how many query tiles visit it."""
        bounds = [bound for s in self.schedule.q.segments for bound in (s.begin, s.end)]
        return self.portable.lists is not None or any(node in (Var("k0"), Var("k1")) for node in post_order(*bounds))

    def section(self, pairs: int, tiles: int, machine: int, ordered: bool = False) -> int:
        """How many of so many pairs of batch and key head run side by side, with so many tiles of keys each.

        Even: one, for the cache. Uneven: those of some rounds, so that the longest tiles of these come first. An order:
        more, lest many programs of one head begin together, where the second waits for the first and so on.
        """
        if not self.uneven and not ordered:
            return 1
        local = self.boxes or is_confined(self.portable.variant) or (self.uneven and ordered)
        rounds = LOCAL_ROUNDS if local else ROUNDS
        return whole_sections(pairs, -(-rounds * machine // tiles))

    @functools.cached_property
    def full(self) -> tuple[Node, tuple[Saturation, ...]]:
        """Which tiles have nothing but pairs that count, and what saturates there; no tile does if nothing is known."""
        listed = self.portable.lists is not None  # and says nothing of what saturates
        found = () if listed else tuple(saturations(self.portable.variant.score))
        settled = [
            disjunction([prove(replace(self.portable.variant, mask=condition)).empty for condition in s.conditions])
            for s in found
        ]
        full = conjunction([self.proof.full, *settled])
        return (self.proof.full, ()) if full is FALSE else (full, found)

    @functools.cached_property
    def has_cheap_mask(self) -> bool:
        """Whether it takes a pair few operations to know if it counts."""
        nodes = [x for x in post_order(self.portable.listed[1].mask) if x.depends & {"q", "k"}]
        taken = sum(not isinstance(x, Index) for x in nodes)
        return taken <= CHEAP and self.portable.lists is None and not any(isinstance(x, Load) for x in nodes)

    def fusable(self, wanted: frozenset[str]) -> frozenset[str]:
        """Which gradients of captured tensors and parameters the kernel sums itself, if registers suffice."""
        return fusable(self.portable.variant, wanted, self.full[1]) if wanted else wanted

    def emitted(self, precise: bool, fused: frozenset[str] = frozenset()) -> tuple[Emitted, ModuleType]:
        key = (precise, fused)
        if key not in self._modules:
            full, found = self.full
            text = emit_module(
                self.portable.listed[1], self.schedule, full,
                saturations=found, wanted=self.portable.emitted(fused, not precise)[0].targets, fast_tanh=not precise,
                boxes=self.boxes,
            )  # fmt: skip
            self._modules[key] = text, load(text.source, f"hopper_backward_{self.portable.variant.name}")
        return self._modules[key]

    def source(self, *, precise: bool = False) -> str:
        """The emitted text."""
        return self.emitted(precise)[0].source

    def candidates(self, call: Call, fused: frozenset[str] = frozenset()) -> tuple[Config, ...]:
        """The configurations for a call, without those that differ in nothing but a question that is not asked, or
        asked in any case."""
        text = self.emitted(call.precise, fused)[0]
        listed = self.portable.lists is not None
        found = candidates(padded(call.query.shape[3]), padded(call.value.shape[3]), self.has_cheap_mask, listed)
        asks = (
            listed
            or "full" in text.functions
            or ("mask" not in text.functions and (text.positional or not _whole(call)))
        )
        asks = asks and "plain" not in text.functions
        return found if asks else tuple(config for config in found if config.ask)

    def choice(
        self,
        call: Call,
        ordered: bool = False,
        compile: Compile | None = None,
        fused: frozenset[str] = frozenset(),
    ) -> Choice[Config]:
        """The configuration for calls like this one: the first candidate whose compiled kernel has no defect.

        ordered: programs add to dQ in an order of their own, and so to the same bits in every run. fused: what is
        captured and has its gradient summed by the kernel. Whole and ragged keys have kernels of their own, and the
        first call compiles both, so that no later length compiles any.
        """
        kind = (ordered, fused, *self._kind(call))
        if kind not in self.choices:
            with _lock:
                for one in (call,) if call.grid else (call, _of_other_length(call)):
                    other = (ordered, fused, *self._kind(one))
                    if other not in self.choices:
                        self.choices[other] = self._settle(one, ordered, fused, compile or compile_here)
        return self.choices[kind]

    def plan(self, call: Call, ordered: bool, fused: frozenset[str], config: Config) -> _Plan:
        """What launches with a configuration have in common."""
        key = (config, ordered, fused, *self._kind(call))
        found = self._plans.get(key)
        if found is None:
            found = self._plans[key] = _Plan.of(self, call, ordered, fused, config)
        return found

    def _kind(self, call: Call) -> tuple[Any, ...]:
        """What of a call decides the kernel that Triton compiles for a configuration."""
        query = call.query
        numbers = [isinstance(x, Tensor) for x in (call.q_offset, *call.parameters)]
        dims = (query.shape[3], call.value.shape[3])
        parts = (self.portable.masks_parts(call, rows, KEYS // 2) for rows in (64, 128))
        return (query.dtype, *dims, call.precise, _whole(call), *parts, *numbers)

    def masks_parts(self, call: Call, config: Config, text: Emitted) -> bool:
        """Whether the mask is the same for all pairs of a warpgroup's part of a tile, and says all of what counts."""
        return not text.positional and self.portable.masks_parts(call, config.queries, KEYS // 2)

    def _settle(self, call: Call, ordered: bool, fused: frozenset[str], compile: Compile) -> Choice[Config]:
        limits = (ORDERED_SPILLS,) if ordered else (SPILLS, FUSED_SPILLS) if fused else (SPILLS,)
        if call.grid is not None:  # what stands before the loop is much
            limits = (FUSED_SPILLS,)
        found = self.candidates(call, fused)
        compiled = functools.partial(_compiled, self, call, ordered, fused, compile=compile)
        return settle(found, self.portable.variant.name, compiled, limits)


def _whole(call: Call) -> bool:
    """Whether no tile of keys sticks out."""
    return call.sizes[4] % KEYS == 0


def _of_other_length(call: Call) -> Call:
    """The call with keys, without data, of whole tiles where its own are ragged, or the other way round."""
    rows = KEYS - 1 if _whole(call) else KEYS
    key, value = (x.new_empty((*x.shape[:2], rows, x.shape[3]), device="meta") for x in (call.key, call.value))
    return replace(call, key=key, value=value, dims=(*call.sizes[:4], rows, call.sizes[5]))


def refusal(kernels: Kernels, call: Call, wanted: frozenset[str], ordered: bool = False) -> str | None:
    """Why the gradients of a call are not for these kernels, or None; those of what `wanted` names are apart."""
    if reason := forward_refusal(kernels.portable, call):
        return reason
    if max(call.query.shape[3], call.value.shape[3]) > 128:
        return "the head dimension is above 128: dK and dV do not fit the registers"
    if ordered and call.key.shape[2] > ORDERED_KEYS:
        return f"`deterministic` is asked for with more than {ORDERED_KEYS} keys"
    if call.grid is not None:
        if wanted:
            return f"the gradient of {names_of(wanted)} is made in the order given"
        if call.grid[1] > BOX_COLUMNS or kernels.emitted(call.precise)[0].functions & {"slope", "add_row_sums"}:
            return "tiles of queries are no boxes of the grid"
    if wanted and kernels.portable.emitted(wanted, not call.precise)[0].sums_queries:
        return f"the gradient of {names_of(wanted)} is a sum over queries, made beside dK and dV"
    return None


def names_of(wanted: frozenset[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(wanted))


@dataclass(frozen=True)
class _Layout:
    """What of a launch follows from shapes and strides.

    `inputs`: of query, key, value and output gradient; `outputs`: of the gradients of key and value; `strides`: of the
    output, its gradient and that of the query. `pairs` of batch and key head are done at a time, by one program on each
    of so many multiprocessors of the `machine`.
    """

    pairs: int
    inputs: tuple[BlockShape, ...]
    outputs: tuple[BlockShape, ...]
    strides: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    extents: tuple[int, ...]
    section: int
    machine: int


@dataclass(frozen=True)
class _Plan:
    """What launches of one kernel have in common; `dims` are the head dimensions of the tiles."""

    config: Config
    kernels: Kernels
    dims: tuple[int, int]
    targets: tuple[str, ...]
    turns: Options | None
    prepare: Options
    options: Options
    finish: Options
    layouts: dict[tuple[Any, ...], _Layout]

    @property
    def words(self) -> int:
        """What `done` has of each tile of queries: a count for each half in an order, else bits."""
        return 1 if self.turns is None else 2

    @staticmethod
    def of(kernels: Kernels, call: Call, ordered: bool, fused: frozenset[str], config: Config) -> _Plan:
        text, module = kernels.emitted(call.precise, fused)
        functions = {name: getattr(module, name) if name in text.functions else None for name in FUNCTIONS}
        dim, value_dim = call.query.shape[3], call.value.shape[3]
        d, dv = padded(dim), padded(value_dim)
        tiles = {"QUERIES": config.queries, "D": d}
        prepare = {
            "SLOPE": functions["slope"], **_row_functions(kernels, fused, call.precise), "ROWS": ROWS, **tiles,
            "DV": dv, "VALUE_DIM": value_dim, "UNIT": 8, "num_warps": 8,
        }  # fmt: skip
        names = {name: name.upper() for name in FUNCTIONS} | {"keys": "KEY_TERMS"}
        if kernels.portable.lists is not None:
            functions |= {"full": None, "q_ranges": q_tiles}
        options = {
            **{names[name]: function for name, function in functions.items()}, "DERIVATIVE": text.has_derivative,
            "WHOLE": _whole(call), "POSITIONAL": text.positional, "ASK": config.ask, "ORDERED": ordered,
            "CLEARED": call.grid is None, "LATE": config.late, "PARTS": kernels.masks_parts(call, config, text),
            "WIDE": text.wide, "FRESHES": text.fresh, "KEPT": text.kept, **tiles, "DV": dv,
            "QUERY_STAGES": config.query_stages, "GRAD_STAGES": config.grad_stages, "REGISTERS": config.registers,
            "num_warps": 4,
        }  # fmt: skip
        finish = {**tiles, "DIM": dim, "UNIT": 8, "num_warps": 4}
        turns: dict[str, Any] = {"KEYS": KEYS, "QUERIES": config.queries, "WIDTH": WIDTH}
        if kernels.portable.lists is None:
            turns |= {"Q_RANGES": functions["q_ranges"], "WIDE": text.wide, "num_warps": 1}
        else:
            turns |= {"LINES": LINES, "CHUNK": CHUNK, "num_warps": 4}
        targets = kernels.portable.emitted(fused, not call.precise)[0].targets
        return _Plan(config, kernels, (d, dv), targets, Options(turns) if ordered else None, Options(prepare),
                     Options(options), Options(finish), {})  # fmt: skip

    def count(
        self,
        run: Runner,
        turns: Tensor,
        pairs: int,
        listed: Sequence[Tensor],
        q_offset: int | Tensor,
        of_call: tuple[tuple[Any, ...], ...],
        scale: float,
        first: int = 0,
    ) -> None:
        """Fill `turns` for so many pairs of batch and head, by the list that comes last in `listed` or by ranges."""
        assert self.turns is not None
        programs = pairs * -(-turns.shape[2] // WIDTH)
        if listed:
            run(count_listed_turns, programs, (turns, described(listed[-2:]), of_call[1], first), self.turns)
        else:
            run(count_turns, programs, (turns, q_offset, *of_call, scale, first), self.turns)

    def layout(self, call: Call, out: Tensor, grad_out: Tensor) -> _Layout:
        tensors = (call.query, call.key, call.value, out, grad_out)
        at = (
            *(x.shape for x in tensors),
            *(x.stride() for x in tensors),
            call.sizes,
            call.query.device,
            call.result_strides,
        )
        found = self.layouts.get(at)
        if found is None:
            if len(self.layouts) >= LAYOUTS:
                self.layouts.clear()
            found = self.layouts[at] = self._layout(call, out, grad_out)
        return found

    def _layout(self, call: Call, out: Tensor, grad_out: Tensor) -> _Layout:
        (d, dv), rows = self.dims, self.config.queries
        results = {"dq": call.query, "dk": call.key, "dv": call.value}
        dq, dk, dv_out = (call.result(name, x.shape, "meta") for name, x in results.items())
        (batch, heads, q_len, _), (_, kv_heads, kv_len, _) = call.query.shape, call.key.shape
        tiles, machine = -(-kv_len // KEYS), multiprocessors(call.query.device)
        bytes = heads // kv_heads * -(-q_len // rows) * rows * d * 4
        pairs = _pairs_at_once(batch * kv_heads, tiles, bytes, machine)
        section = self.kernels.section(pairs, tiles, machine, self.turns is not None)
        return _Layout(
            pairs,
            (BlockShape.of(call.query, rows, d), BlockShape.of(call.key, 64, d), BlockShape.of(call.value, 64, dv),
             BlockShape.of(grad_out, rows, dv)),
            (BlockShape.of(dk, 64, d), BlockShape.of(dv_out, 64, dv)),
            tuple((*(plain(stride // 8) for stride in x.stride()[:3]), plain(1)) for x in (out, grad_out, dq)),
            call.sizes[:6], tuple(map(plain, call.sizes[6:])), section, machine,
        )  # fmt: skip


def _pairs_at_once(pairs: int, tiles: int, bytes: int, machine: int) -> int:
    """How many pairs of batch and key head a launch does, with so many tiles of keys and bytes of sums each."""
    if pairs * bytes <= SUMS:
        return pairs
    return min(pairs, max(SUMS // 4 // bytes, -(-FILLS * machine // tiles)))


def backward(
    kernels: Kernels,
    call: Call,
    out: Tensor,
    shifted: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    config: Config,
    *,
    ordered: bool = False,
    fused: frozenset[str] = frozenset(),
    run: Runner = launch,
) -> Gradients:
    """Gradients of query, key, value and what is `fused`, for a call of which `refusal` has nothing to say."""
    out, grad_out = loadable(out), loadable(grad_out)
    plan = kernels.plan(call, ordered, fused, config)
    launched = _launched(kernels, plan, call, out, grad_out)
    inputs = call.query, call.key, call.value, call.tensors, call.q_offset
    shares = _copies(launched.shapes, call.query.device)
    kind, rows = launched.kind, (out, shifted, grad_out, grad_lse)
    listed = () if kind is None else kind.find(call.tensors, call.q_offset, call.query.device, run)
    counter = counter_of(call.query.device)
    dq, dk, dv = launched(run, *inputs, *rows, counter, shares, listed, call.results)
    return Gradients(dq, dk, dv, _sums(plan.targets, shares))


def _launched(
    kernels: Kernels, plan: _Plan, call: Call, out: Tensor, grad_out: Tensor
) -> _Launch | launch_boxes.Launch:
    """What launches for calls like this one."""
    if call.grid is None:
        return _Launch.of(kernels, plan, plan.layout(call, out, grad_out), call)
    from attn_dsl.backend.hopper import launch_boxes

    return launch_boxes.Launch.of(kernels, plan, call, out, grad_out)


@dataclass(frozen=True)
class _Launch:
    """Launches for calls that differ in nothing but their tensors' addresses and `q_offset`.

    shapes: of what is captured and summed. sections: for each launch its first pair of batch and key head and how many
    it does.
    """

    plan: _Plan
    layout: _Layout
    parameters: tuple[Any, ...]
    sizes: tuple[int, ...]
    captured: tuple[tuple[Any, ...], ...]
    scale: float
    shapes: tuple[tuple[int, ...], ...]
    group: int
    tiles: int
    key_tiles: int
    lead: int
    sections: tuple[tuple[int, int], ...]
    scratch: _Scratch
    kind: Kind | None

    @staticmethod
    def of(kernels: Kernels, plan: _Plan, layout: _Layout, call: Call) -> _Launch:
        shapes = {t.name: tuple(x.shape) for t, x in zip(kernels.portable.variant.tensors, call.tensors, strict=True)}
        kv_pairs, group = call.key.shape[0] * call.key.shape[1], call.query.shape[1] // call.key.shape[1]
        tiles, key_tiles = -(-call.query.shape[2] // plan.config.queries), -(-call.key.shape[2] // KEYS)
        starts = range(0, kv_pairs, layout.pairs)
        return _Launch(
            plan, layout, tuple(map(number, call.parameters)), tuple(map(plain, layout.sizes)),
            tuple(rest for _, *rest in described(call.tensors)), float(call.scale),
            tuple(shapes.get(name, ()) for name in plan.targets), group, tiles, key_tiles,
            kernels.portable.lead(call, "k", KEYS),
            tuple((first, min(layout.pairs, kv_pairs - first)) for first in starts),
            _Scratch.of(plan, layout.pairs * group, tiles, key_tiles),
            kernels.portable.kind_of_list(call, plan.config.queries, KEYS, transposed=True),
        )  # fmt: skip

    def __call__(
        self,
        run: Runner,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tensors: Sequence[Tensor],
        q_offset: int | Tensor,
        out: Tensor,
        shifted: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        counter: Tensor,
        shares: Sequence[Tensor],
        listed: Sequence[Tensor],
        results: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value; those of the plan's targets are added to `shares`. `listed` is what `kind`
        finds."""
        plan, layout, device = self.plan, self.layout, query.device
        grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
        inputs = {"dq": query, "dk": key, "dv": value}
        dq, dk, dv = (empty_like(x, results.get(name)) for name, x in inputs.items())
        (of_q, of_k, of_v, of_grad), (of_dk, of_dv) = layout.inputs, layout.outputs
        captured = tuple([(x, *rest) for x, rest in zip(tensors, self.captured, strict=True)])
        of_call, with_lists = (self.parameters, (*self.sizes, *layout.extents), captured), captured + described(listed)
        numbers, sums, turns, done, blocks = self.scratch.made(device)
        for first, pairs in self.sections:
            own, at = pairs * self.group, first * self.group
            run(
                prepare_rows, own * self.tiles * (plan.config.queries // ROWS),
                (out, grad_out, grad_lse, shifted, numbers, sums, q_offset, *layout.strides[:2], *of_call,
                 described([x[0] for x in shares]), self.scale, at),
                plan.prepare,
            )  # fmt: skip
            if plan.turns is not None:
                done.zero_()
                plan.count(run, turns, own, listed, q_offset, of_call, self.scale, at)
            run(
                attention_backward, min(pairs * self.key_tiles, layout.machine),
                (of_q(query), of_k(key), of_v(value), of_grad(grad_out), *blocks, of_dk(dk), of_dv(dv), turns, done,
                 counter, q_offset, self.parameters, *layout.sizes, layout.extents, with_lists, described(shares),
                 self.scale, layout.section, self.lead, pairs, first),
                plan.options,
            )  # fmt: skip
            finished = (sums, dq, layout.strides[2], self.sizes, self.scale, at)
            run(finish_queries, own * self.tiles * 2, finished, plan.finish)
        return dq, dk, dv


class Replay:
    """The backward pass of one kind of call, known by shapes, strides, dtypes and numbers; it holds no tensors.

    `out` and `grad_out` are such as `loadable` returns.
    """

    def __init__(
        self,
        kernels: Kernels,
        call: Call,
        out: Tensor,
        grad_out: Tensor,
        config: Config,
        ordered: bool,
        fused: frozenset[str],
    ) -> None:
        plan = kernels.plan(call, ordered, fused, config)
        launched, count = _launched(kernels, plan, call, out, grad_out), len(call.tensors)
        offset: list[Any] = [] if isinstance(call.q_offset, Tensor) else [call.q_offset]
        self._kind, lists = launched.kind, 0 if launched.kind is None else launched.kind.count
        names = tuple(call.results)

        def function(run: Runner, query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> Sequence[Tensor]:
            out, shifted, grad_out, counter, *others = rest
            others, listed = others[: len(others) - lists], others[len(others) - lists :]
            others, given = others[: len(others) - len(names)], others[len(others) - len(names) :]
            behind = count + len(plan.targets)
            more = offset + others[behind:]
            q_offset, grad_lse = more[0], more[1] if len(more) > 1 else None
            rows, results = (out, shifted, grad_out, grad_lse), dict(zip(names, given, strict=True))
            return launched(
                run, query, key, value, others[:count], q_offset, *rows, counter, others[count:behind], listed, results
            )

        self._launches = Launches(function)
        self._targets, self._shapes = plan.targets, launched.shapes

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tensors: Sequence[Tensor],
        q_offset: int | Tensor,
        out: Tensor,
        shifted: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        results: Sequence[Tensor] = (),
    ) -> Gradients:
        """`results`: in the order of those that the call was known by, with their strides."""
        shares = _copies(self._shapes, query.device)
        counter = counter_of(query.device)
        inputs = [query, key, value, out, shifted, grad_out, counter, *tensors, *shares]
        if isinstance(q_offset, Tensor):
            inputs.append(q_offset)
        if grad_lse is not None:
            inputs.append(grad_lse)
        inputs += results
        listed = () if self._kind is None else self._kind.find(tensors, q_offset, query.device)
        dq, dk, dv = self._launches(inputs, listed)
        return Gradients(dq, dk, dv, _sums(self._targets, shares))


def _copies(shapes: Sequence[tuple[int, ...]], device: torch.device) -> list[Tensor]:
    """Zeros [copies, *shape]: programs add to different copies, lest all wait for one entry of a small tensor.

    There are as many copies of one tensor as of another.
    """
    if not shapes:
        return []
    largest = max(math.prod(shape) for shape in shapes)
    copies = max(1, min(COPIES, COPIED // max(largest, 1)))
    return [torch.zeros(copies, *shape, dtype=torch.float32, device=device) for shape in shapes]


def _sums(targets: Sequence[str], shares: Sequence[Tensor]) -> dict[str, Tensor]:
    return {name: x.sum(0) for name, x in zip(targets, shares, strict=True)}


def _row_functions(kernels: Kernels, fused: frozenset[str], precise: bool) -> dict[str, Any]:
    """What `prepare_rows` calls for gradients of what is captured; None where none is wanted of it."""
    text, module = kernels.portable.emitted(fused, not precise)
    own, of_rows = kernels.emitted(precise, fused)
    adds = "add_row_sums" in own.functions
    names = {"SINK": "sink", "ROW": "row_term", "SINK_GRAD": "sink_grad", "ADD_SINK": "add_sink"}
    wanted = text.functions if adds or "sink_grad" in text.functions else frozenset[str]()
    found = {key: getattr(module, name) if name in wanted else None for key, name in names.items()}
    return {**found, "ADD_ROW_SUMS": of_rows.add_row_sums if adds else None}


@dataclass(frozen=True)
class _Scratch:
    """What the kernels of a launch hand on to each other: `numbers` and `sums` of `backward_rows.py`, which are also
    `blocks` for the copy engine, lse, delta and sums; `turns` where programs have an order, and `done`. These are their
    shapes."""

    numbers: tuple[int, int, int]
    sums: tuple[int, int]
    done: tuple[int, int, int]
    turns: tuple[int, int, int] | None
    row: BlockShape
    block: BlockShape

    @staticmethod
    def of(plan: _Plan, pairs: int, tiles: int, key_tiles: int) -> _Scratch:
        """For so many pairs of batch and query head, tiles of queries and of keys."""
        queries, d = plan.config.queries, plan.dims[0]
        rows, half = tiles * queries, d if queries == 128 else d // 2
        sums = (pairs * rows * d // 32, 32)
        return _Scratch(
            (pairs, 2, rows), sums, (pairs, tiles, plan.words),
            None if plan.turns is None else (pairs, key_tiles, tiles),
            BlockShape([pairs, rows], [2 * rows, 1], [1, queries], _NUMBERS),
            BlockShape(list(sums), [32, 1], [2 * half, 32], _SUMS),
        )  # fmt: skip

    def made(self, device: torch.device) -> _Made:
        """Without an order, `turns` is not read, nor is `done` where sums are cleared."""
        numbers, sums = empty(self.numbers, torch.float32, device), empty(self.sums, torch.float32, device)
        done = empty(self.done, torch.int32, device)
        turns = done if self.turns is None else empty(self.turns, torch.int32, device)
        blocks = self.row(numbers), self.row(numbers.select(1, 1)), self.block(sums)
        return _Made(numbers, sums, turns, done, blocks)


class _Made(NamedTuple):
    numbers: Tensor
    sums: Tensor
    turns: Tensor
    done: Tensor
    blocks: tuple[Block, Block, Block]


# ---------------------------------------------------------------- compiling without a launch


def build(
    kernels: Kernels,
    call: Call,
    config: Config | None = None,
    *,
    ordered: bool = False,
    fused: frozenset[str] = frozenset(),
) -> Any:
    """The backward kernel compiled ahead of time, with the configuration that is found good unless one is given."""
    config = config or kernels.choice(call, ordered, compile_ahead, fused).config
    assert config is not None, "no configuration fits"
    return _compiled(kernels, call, ordered, fused, config, compile_ahead)


def _compiled(
    kernels: Kernels, call: Call, ordered: bool, fused: frozenset[str], config: Config, compile: Compile
) -> Any:
    compiled: list[Any] = []

    def run(kernel: Any, programs: int, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        if kernel is attention_backward:
            compiled.append(compile(kernel, arguments, options))

    batch, heads, q_len, _ = call.query.shape
    out = torch.empty(batch, heads, q_len, call.value.shape[3], dtype=call.query.dtype, device="meta")
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device="meta")
    backward(kernels, call, out, lse, out, None, config, ordered=ordered, fused=fused, run=run)
    return compiled[0]
