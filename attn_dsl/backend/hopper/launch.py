"""Launch the Hopper kernels for a bound call, or say why the call is not for them.

Arguments are taken to be valid (`api.py` checks them); `Call` and what is returned are those of the portable backend.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompilationError
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.errors import PTXASError

from attn_dsl.backend.cache_triton import compiling
from attn_dsl.backend.hopper import check
from attn_dsl.backend.hopper.bounds import bounds
from attn_dsl.backend.hopper.channels import SWIZZLED
from attn_dsl.backend.hopper.configs import Config, candidates
from attn_dsl.backend.hopper.emit import Emitted, Reach, emit_module, reach, value
from attn_dsl.backend.hopper.forward import attention_forward
from attn_dsl.backend.portable import launch as portable
from attn_dsl.backend.portable.algebra import SCALE
from attn_dsl.backend.portable.classify import kv_list
from attn_dsl.backend.portable.device import plain
from attn_dsl.backend.portable.host import described, empty, multiprocessors, number
from attn_dsl.backend.portable.launch import LAYOUTS, Call
from attn_dsl.backend.portable.listing import Kind
from attn_dsl.backend.portable.load import load
from attn_dsl.backend.portable.run import Compiler, Options, Runner, inputs_of, launch, variant_of
from attn_dsl.backend.portable.tape import Launches
from attn_dsl.backend.portable.width import fits, position_bits
from attn_dsl.backend.printer import SIZES
from attn_dsl.backend.work import FORWARD, better_tile
from attn_dsl.ir.nodes import Node, Param, Var, post_order
from attn_dsl.ir.types import Type
from attn_dsl.passes.order_grid import Boxes
from attn_dsl.passes.runs import is_confined
from attn_dsl.passes.schedule import derive_schedule
from attn_dsl.passes.specialize import saturations

ROWS = 64
CACHE = 32 * 2**20
"""Bytes of keys and values that stay in the second level cache. Where tiles are uneven, heads with so many run side by
side, so that there are short tiles enough to even out the long ones; else only the heads that share keys."""
EXPONENTS = 96
"""Weights may be as small as 2 ** -this: they and their sums are then normal numbers of float32 and bfloat16."""
GRAPHED = 4096
"""So many launches in graphs find a counter that is zero; those beyond zero theirs in the graph, at 2 microseconds."""
TABLE_SPILLS = 128
"""Bytes that may be spilled beyond `check.SPILLS`, once a query tile, where tables say where keys and sequences are; or
where rows are, if no configuration does with less."""
SMALL = 1e-12
"""A factor above this is known to be positive, and may be divided by."""
_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_FUNCTIONS = (
    "factor", "uniform", "rows", "residue", "plain", "shift", "peak", "slope", "low", "high", "head", "columns", "mask",
    "row_term", "sink", "kv_ranges", "query_box", "key_box", "length",
)  # fmt: skip
_lock = threading.Lock()

C = TypeVar("C")
"""A configuration, of the forward or the backward kernel."""
Compile = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Any]
"""From a kernel, its arguments and options to what Triton compiles for them."""


@dataclass(frozen=True)
class Choice(Generic[C]):
    """The configuration that calls of a kind run with, and what the assembler said of it; None where none is good.

    `rejected` are the configurations that were to come first, each with the reason.
    """

    config: C | None
    build: check.Build | None
    rejected: tuple[tuple[C, str], ...] = ()

    @property
    def reason(self) -> str | None:
        """Why no configuration is good, or None where one is."""
        return None if self.config else f"no configuration is good, the last since {self.rejected[-1][1]}"


@dataclass
class Kernels:
    """The Hopper kernels of a variant: emitted functions, and what was decided for each kind of call."""

    portable: portable.Kernels
    boxes: Boxes | None = None
    choices: dict[tuple[Any, ...], Choice[Config]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._modules: dict[tuple[frozenset[Node], bool, bool], tuple[Emitted, ModuleType]] = {}
        self._reaches: dict[tuple[bool, ...], Reach | None] = {}
        self._plans: dict[tuple[Any, ...], _Plan] = {}
        self._finer: dict[tuple[Any, ...], tuple[int, int] | None] = {}
        parameters = enumerate(self.portable.variant.parameters)
        self._floats = tuple(i for i, parameter in parameters if parameter.type is Type.FLOAT)
        variant = self.portable.variant
        self.saturations = tuple(saturations(variant.score))
        """Where a clamped distance is one number for a whole tile; the schedule counts the others as masked."""
        self.schedule = self.portable.schedule
        if self.saturations:
            self.schedule = derive_schedule(variant, padded=True, saturations=self.saturations)
        ends = [end for s in self.schedule.kv.segments for end in (s.begin, s.end)]
        listed = self.portable.lists is not None
        self.uneven = listed or any(node in (Var("q0"), Var("q1")) for node in post_order(*ends))
        """Whether the rows of a query tile decide how many key tiles it visits."""

    @functools.cached_property
    def reached(self) -> int:
        """One part in so many of the keys is in use at a time: a quarter or less where a tile sees one document."""
        return 4 if is_confined(self.portable.variant) else 1

    def section(self, call: Call) -> int:
        """So many heads run side by side."""
        batch, heads, kv_heads, _, kv_len = call.sizes[:5]
        group = heads // kv_heads
        if not self.uneven:
            return group
        dims = padded(call.query.shape[3]) + padded(call.value.shape[3])
        most = CACHE * self.reached // (call.key.element_size() * dims * kv_len)
        return group * whole_sections(batch * kv_heads, most)

    def functions(self, call: Call) -> dict[str, Any]:
        """The emitted functions by the name of the kernel's argument; None where the variant has none."""
        key = (_positive(self.portable, call), not call.precise, self._is_bounded(call))
        if key not in self._modules:
            text = self._emit(*key)
            self._modules[key] = text, load(text.source, f"hopper_{self.portable.variant.name}")
        text, module = self._modules[key]
        found = {name.upper(): getattr(module, name) if name in text.functions else None for name in _FUNCTIONS}
        return found if self.portable.lists is None else found | {"KV_RANGES": kv_list}

    def source(self, *, precise: bool = False) -> str:
        """The emitted text, for parameters of which nothing is known and a positive softmax scale."""
        positive = frozenset((SCALE,))
        return self._emit(positive, not precise, False).source

    def _emit(self, positive: frozenset[Node], fast_tanh: bool, bounded: bool) -> Emitted:
        return emit_module(
            self.portable.listed[0], self.schedule, positive,
            fast_tanh=fast_tanh, saturations=self.saturations, bounded=bounded, boxes=self.boxes,
        )  # fmt: skip

    def _is_bounded(self, call: Call) -> bool:
        """Whether the exponents of all logits fit a float, and with it the weights as the second product takes them."""
        if call.query.dtype != torch.bfloat16:
            return False
        signs = self._signs(call)
        if signs not in self._reaches:
            self._reaches[signs] = reach(self.portable.variant, _positive(self.portable, call))
        found = self._reaches[signs]
        if found is None:
            return False
        declared = zip(self.portable.variant.parameters, call.parameters, strict=True)
        known: dict[Node, float] = {Param(p.name, p.type): x for p, x in declared if isinstance(x, (int, float))}
        factor = value(found.factor, known | {SCALE: call.scale})
        return factor is not None and 2 * factor * found.residue <= EXPONENTS

    def choice(self, call: Call, compile: Compile | None = None) -> Choice[Config]:
        """The configuration for calls like this one: the first candidate whose compiled kernel has no defect."""
        kind = self._kind(call)
        found = self.choices.get(kind)
        if found is None:
            with _lock:
                found = self.choices[kind] = self.choices.get(kind) or self._settle(call, compile or compile_here)
        return found

    def plan(self, call: Call, config: Config) -> _Plan:
        """What launches with a configuration have in common."""
        key = (config, self._kind(call))
        found = self._plans.get(key)
        if found is None:
            found = self._plans[key] = _Plan.of(self, call, config)
        return found

    def _kind(self, call: Call) -> tuple[Any, ...]:
        """What of a call decides the kernel that Triton compiles for a configuration."""
        query, parameters = call.query, call.parameters
        numbers = [isinstance(x, Tensor) for x in (call.q_offset, *parameters)]
        return (
            query.dtype,
            query.shape[3],
            call.value.shape[3],
            call.precise,
            self.page(call),
            _sorted(call),
            self._is_bounded(call),
            self.finer(call),
            *(self.portable.masks_parts(call, ROWS, keys) for keys in (64, 128)),
            *self._signs(call),
            *numbers,
        )

    def page(self, call: Call) -> int:
        """Keys of a page; 0 where they stand in one piece."""
        return call.key.shape[2] if self.portable.paged else 0

    def masks_parts(self, call: Call, config: Config, functions: Mapping[str, Any]) -> bool:
        """Whether the mask is the same for all pairs of a warpgroup's part of a tile, and nothing else wants rows."""
        alone = all(functions[name] is None for name in ("RESIDUE", "PLAIN", "LOW", "HIGH", "HEAD"))
        return alone and functions["MASK"] is not None and self.portable.masks_parts(call, ROWS, config.keys)

    def may_freeze(self, call: Call) -> bool:
        """Whether the maximum of some tiles will nearly always do for the others, and weights may be far from 1."""
        functions = self.functions(call)
        bare = all(functions[name] is None for name in ("RESIDUE", "PLAIN", "PEAK"))
        return bare and call.query.dtype == torch.bfloat16

    def _signs(self, call: Call) -> tuple[bool, ...]:
        """Whether the softmax scale and each float parameter are known to be > 0."""
        found = [not isinstance(x := call.parameters[i], Tensor) and x > SMALL for i in self._floats]
        return (call.scale > SMALL, *found)

    def candidates(self, call: Call) -> tuple[Config, ...]:
        """The configurations for calls like this one, the preferred one first."""
        functions = self.functions(call)
        ramped = functions["SLOPE"] is not None and functions["PLAIN"] is None
        listed = self.portable.lists is not None
        found = _candidates(call, ramped=ramped, frozen=self.may_freeze(call), listed=listed)
        finer = self.finer(call)

        def rank(config: Config) -> tuple[bool, bool]:
            other = finer not in (None, (config.rows, config.keys))
            return not self.masks_parts(call, config, functions), other

        return tuple(sorted(found, key=rank))

    def finer(self, call: Call) -> tuple[int, int] | None:
        """Rows and keys of tiles that pay instead of the first that the model knows (`work.better_tile`), or None.

        Of lists, pages, packed sequences and grids it is not known: the host does not know what is visited.
        """
        of, dim = self.portable, padded(call.query.shape[3])
        if of.lists is not None or of.paged or of.packed or self.boxes or dim != padded(call.value.shape[3]):
            return None
        declared = zip(of.variant.parameters, call.parameters, strict=True)
        numbers = {parameter.name: x for parameter, x in declared if not isinstance(x, Tensor)}
        key = (dim, *numbers.items())
        if key not in self._finer:
            if len(self._finer) >= LAYOUTS:
                self._finer.clear()
            self._finer[key] = better_tile(FORWARD.get(dim, {}), self.schedule.kv, numbers)
        return self._finer[key]

    def _settle(self, call: Call, compile: Compile) -> Choice[Config]:
        found = self.candidates(call)
        spills = check.SPILLS + TABLE_SPILLS * (self.portable.packed or self.portable.paged)
        limits = (spills,) if call.rows is None else (spills, spills + TABLE_SPILLS)
        return settle(found, self.portable.variant.name, lambda config: _compiled(self, call, config, compile), limits)


def _candidates(call: Call, *, ramped: bool = False, frozen: bool = False, listed: bool = False) -> tuple[Config, ...]:
    """Those for the dimensions of a call, whose tiles of keys are boxes of a grid if there is one."""
    dims, copied = (padded(call.query.shape[3]), padded(call.value.shape[3])), call.rows is not None
    found = candidates(*dims, ramped=ramped, frozen=frozen, copied=copied, listed=listed)
    return tuple(config for config in found if call.grid is None or config.keys % call.grid[2] == 0)


def settle(found: Sequence[C], name: str, compiled: Callable[[C], Any], limits: Sequence[int]) -> Choice[C]:
    """The first configuration whose kernel, of the variant of that name, has no defect.

    limits: of the bytes that it may spill; the second counts if no configuration keeps the first, and so on. Each
    configuration is compiled once.
    """

    @functools.cache
    def inspected(config: C) -> check.Build | str:
        try:
            return check.inspected(name, compiled(config))
        except (CompilationError, PTXASError) as error:
            return f"it does not compile ({type(error).__name__})"

    rejected: list[tuple[C, str]] = []
    for spills in limits:
        rejected.clear()
        for config in found:
            build = inspected(config)
            defect = build if isinstance(build, str) else build.defect_beyond(spills)
            if not isinstance(build, str) and defect is None:
                return Choice(config, build, tuple(rejected))
            rejected.append((config, str(defect)))
    return Choice(None, None, tuple(rejected))


def _positive(kernels: portable.Kernels, call: Call) -> frozenset[Node]:
    """The parameters that are known to be > 0, and the softmax scale."""
    declared = zip(kernels.variant.parameters, call.parameters, strict=True)
    known = {
        Param(parameter.name, parameter.type)
        for parameter, value in declared
        if parameter.type is Type.FLOAT and isinstance(value, (int, float)) and value > SMALL
    }
    return frozenset(known | ({SCALE} if call.scale > SMALL else set()))


def padded(dim: int) -> int:
    """The head dimension of the tiles: a power of two, at least 64."""
    return max(64, 1 << math.ceil(math.log2(dim)))


def blocks(dim: int, least: int) -> tuple[int, ...]:
    """Widths of the one or two blocks of columns that are multiplied: powers of two, at least `dim` together.

    `least` is the width that pays: 16 columns of queries and keys, which are steps of their product, or 64 of values,
    for fewer of which a product whose left operand is in registers takes no less time.
    """
    whole = padded(dim)
    if whole == 64:
        return (64,)
    first, second = whole // 2, max(least, 1 << math.ceil(math.log2(dim - whole // 2)))
    return (whole,) if second == first else (first, second)


def whole_sections(pairs: int, most: int) -> int:
    """How many pairs of batch and head run side by side: at most `most`, and so that the last section lacks few.

    The machine waits for the last section, whose tiles must be many, lest the longest of them end alone.
    """
    most = min(max(most, 1), pairs)
    return min(range((most + 1) // 2, most + 1), key=lambda section: (-pairs % section, -section))


def refusal(kernels: portable.Kernels, call: Call) -> str | None:
    """Why the call is not for these kernels, or None."""
    query, key, value = call.query, call.key, call.value
    if call.rows is not None:  # `loaded` copies what must be
        query, key, value = (torch.empty(x.shape, dtype=x.dtype, device="meta") for x in (query, key, value))
    if query.dtype not in _TYPES:
        return f"the element type is {str(query.dtype).removeprefix('torch.')}, not bfloat16 or float16"
    shapes = (query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride())
    if reason := _shape_refusal(*shapes):
        return reason
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.device.type != "meta" and tensor.data_ptr() % 16:
            return f"the bulk copy engine needs `{name}` at a multiple of 16 bytes"
    if not _candidates(call):
        return "no tile of keys is a box of the grid"
    return "positions need 64 bits" if kernels.wide(call) or not _bounds_fit(kernels, call) else None


def _bounds_fit(kernels: portable.Kernels, call: Call) -> bool:
    """Whether the keys that a row sees lie between numbers of 32 bits."""
    sizes = call.sizes
    bits = position_bits(call.q_offset, sizes[3], sizes[4])
    key = (tuple(x if isinstance(x, int) else None for x in call.parameters), sizes, bits)
    if key not in kernels.bounded:
        if len(kernels.bounded) >= LAYOUTS:
            kernels.bounded.clear()
        seen, _ = bounds(kernels.variant.mask)
        declared = zip(kernels.variant.parameters, call.parameters, strict=True)
        numbers: dict[Node, int] = {Param(p.name, p.type): x for p, x in declared if isinstance(x, int)}
        numbers |= dict(zip((*SIZES, *kernels.extents), sizes, strict=True))
        kernels.bounded[key] = fits([x for x in (seen.low, seen.high, seen.head) if x is not None], numbers, 1 << bits)
    return kernels.bounded[key]


@functools.lru_cache(maxsize=LAYOUTS)
def _shape_refusal(*shapes: tuple[int, ...]) -> str | None:
    """`shapes`: size and strides of query, key and value."""
    if 0 in (*shapes[0], *shapes[2]):
        return "the bulk copy engine takes no tensor of no element"
    for dim in (shapes[0][3], shapes[4][3]):
        if dim > 256 or dim % 8:
            return f"the head dimension {dim} is not a multiple of 8 up to 256"
    for name, sizes, strides in zip(("query", "key", "value"), shapes[::2], shapes[1::2], strict=True):
        outer = [stride for size, stride in zip(sizes[:3], strides[:3], strict=True) if size > 1]
        if strides[3] != 1 or any(stride % 8 for stride in outer):
            return f"the bulk copy engine needs rows of `{name}` contiguous and at multiples of 16 bytes"
        if 0 in outer:
            return f"the bulk copy engine does not take `{name}` with a broadcast axis"
    return None


def loadable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that the bulk copy engine takes."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    aligned = tensor.device.type == "meta" or tensor.data_ptr() % 16 == 0
    if aligned and tensor.stride(3) == 1 and all(stride > 0 and stride % 8 == 0 for stride in strides[:-1]):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def loaded(call: Call) -> Call:
    """The call, with copies of what has `rows` that cannot be copied 16 bytes at a time."""
    given = call.query, call.key, call.value
    query, key, value = found = tuple(map(loadable, given)) if call.rows is not None else given
    if all(x is y for x, y in zip(found, given, strict=True)):
        return call
    return replace(call, query=query, key=key, value=value)


def by_row(shape: tuple[int, ...], packed: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor [B, H, Q, ...]; of packed sequences row by row."""
    if not packed:
        return empty(shape, dtype, device)
    batch, heads, rows, *rest = shape
    return empty((batch, rows, heads, *rest), dtype, device).transpose(1, 2)


class Block(TensorDescriptor):  # type: ignore[misc]
    """A descriptor whose fields, those of `of`, were checked by `refusal`."""

    shape = property(lambda self: self.of.sizes)
    strides = property(lambda self: self.of.strides)
    block_shape = property(lambda self: self.of.block)
    layout = property(lambda self: self.of.layout)

    def __init__(self, base: Tensor, of: BlockShape) -> None:
        self.base, self.of, self.known = base, of, of.known


@dataclass(frozen=True, eq=False)
class BlockShape:
    """What the descriptor of a tensor [B, H, S, D] has beside its address: blocks of [1, 1, rows, dim]; of a grid
    [B, H, Y, X, D] with rows of `width`, boxes of [1, 1, rows // columns, columns, dim].

    What a block has beyond the tensor is read as 0 and not written. `known` is for `start.Ready`.
    """

    sizes: list[int]
    strides: list[int]
    block: list[int]
    layout: Any
    known: dict[int, tuple[Any, ...]] = field(default_factory=dict)

    @staticmethod
    def of(tensor: Tensor, rows: int, dim: int, width: int = 0, columns: int = 0) -> BlockShape:
        # The stride of an axis of one element is never used, but must be one that the copy engine takes.
        strides = [t if n > 1 else 8 for n, t in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)]
        sizes, block = list(tensor.shape), [1, 1, rows, dim]
        if width:
            sizes[2:3], block[2:3] = [sizes[2] // width, width], [rows // columns, columns]
            strides[2:] = [strides[2] * width, strides[2]]
        layout = gl.NVMMASharedLayout.get_default_for(block, _TYPES[tensor.dtype])
        return BlockShape(sizes, [*strides, 1], block, layout)

    def __call__(self, tensor: Tensor) -> Block:
        return Block(tensor, self)


@dataclass(frozen=True)
class _Layout:
    """What of a launch follows from shapes and strides. `shapes`: of query, key, value and output."""

    programs: int
    shapes: tuple[BlockShape, BlockShape, BlockShape, BlockShape]
    sizes: tuple[int, ...]
    extents: tuple[int, ...]
    section: int


@dataclass(frozen=True)
class _Plan:
    """What launches of one kernel have in common; `dims` are the head dimensions of the tiles."""

    config: Config
    kernels: Kernels
    dims: tuple[int, int]
    has_row_term: bool
    options: Options
    layouts: dict[tuple[Any, ...], _Layout]

    @staticmethod
    def of(kernels: Kernels, call: Call, config: Config) -> _Plan:
        functions = kernels.functions(call)
        d, dv = padded(call.query.shape[3]), padded(call.value.shape[3])
        parts = kernels.masks_parts(call, config, functions)
        of_call = {
            "D": blocks(call.query.shape[3], 16), "DV": blocks(call.value.shape[3], 64), "PARTS": parts,
            "PAGE": kernels.page(call), "PACKED": kernels.portable.packed, "SORTED": _sorted(call),
            "num_warps": 4,
        }  # fmt: skip
        options = Options({**functions, **_options(config, copies=call.rows is not None), **of_call})
        return _Plan(config, kernels, (d, dv), functions["ROW_TERM"] is not None, options, {})

    def layout(self, call: Call) -> _Layout:
        query, key, value = call.query, call.key, call.value
        at = (
            query.shape,
            query.stride(),
            key.shape,
            key.stride(),
            value.shape,
            value.stride(),
            call.sizes,
            call.grid,
            query.device,
            call.result_strides,
        )
        found = self.layouts.get(at)
        if found is None:
            if len(self.layouts) >= LAYOUTS:
                self.layouts.clear()
            found = self.layouts[at] = self._layout(call)
        return found

    def _layout(self, call: Call) -> _Layout:
        (d, dv), config = self.dims, self.config
        batch, heads, _, q_len = call.sizes[:4]
        shape, packed = (*call.query.shape[:3], call.value.shape[3]), self.options["PACKED"]
        out = call.results.get("out", by_row(shape, packed, call.query.dtype, torch.device("meta")))
        width, of_queries, of_keys = call.grid or (0, 0, 0)
        keys, page = (config.keys, d, dv), self.options["PAGE"]
        if 0 < page < config.keys:
            keys = (page, SWIZZLED.value, SWIZZLED.value)
        tiles = heads * (shape[2] // config.rows + batch if packed else batch * -(-q_len // config.rows))
        return _Layout(
            min(tiles, multiprocessors(call.query.device)),
            (BlockShape.of(call.query, ROWS, d, width, of_queries),
             BlockShape.of(call.key, keys[0], keys[1], width, of_keys),
             BlockShape.of(call.value, keys[0], keys[2], width, of_keys),
             BlockShape.of(out, ROWS, dv, width, of_queries)),
            call.sizes[:6], tuple(map(plain, call.sizes[6:])), self.kernels.section(call),
        )  # fmt: skip


def forward(
    kernels: Kernels, call: Call, run: Runner = launch, config: Config | None = None, section: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, H, Q, DV], lse [B, H, Q], shifted [B, H, Q]), as `portable.launch.forward`.

    The call must not be one of which `refusal` speaks, and `config`, that of `Kernels.choice` unless given, must be
    there. `section` overrides how many heads run side by side.
    """
    call, config = loaded(call), config or kernels.choice(call).config
    assert config is not None, "no configuration fits: ask `Kernels.choice` first"
    plan = kernels.plan(call, config)
    launched = _Launch.of(kernels, plan, plan.layout(call), call, section)
    inputs, kind = (call.query, call.key, call.value, call.tensors, call.q_offset), launched.kind
    listed = () if kind is None else kind.find(call.tensors, call.q_offset, call.query.device, run)
    return launched(run, *inputs, counter_of(call.query.device), listed, call.results.get("out"), call.rows)


def _sorted(call: Call) -> tuple[int, ...] | None:
    """SORTED of the kernel."""
    if call.rows is None:
        return None
    assert all(x.is_contiguous() for x in call.rows), "rows stand where a dense tensor says"
    differs = [x.shape[i] == y.shape[i] for x, y in zip(call.rows, (call.query, call.key), strict=True) for i in (0, 1)]
    return *map(int, differs), call.query.shape[3], call.value.shape[3]


@dataclass(frozen=True)
class _Launch:
    """A launch for calls that differ in nothing but their tensors' addresses and `q_offset`.

    rows: batch, heads and queries; in a grid, those of strips.
    """

    plan: _Plan
    layout: _Layout
    out: tuple[int, ...]
    rows: tuple[int, ...]
    numbers: tuple[Any, ...]
    captured: tuple[tuple[Any, ...], ...]
    end: tuple[float, int, int]
    kind: Kind | None

    @staticmethod
    def of(kernels: Kernels, plan: _Plan, layout: _Layout, call: Call, section: int | None = None) -> _Launch:
        out = (*call.query.shape[:3], call.value.shape[3])
        rows = out[:3] if call.grid is None else (call.sizes[0], call.sizes[1], call.sizes[3])
        captured = tuple(rest for _, *rest in described(call.tensors))
        numbers = (tuple(map(number, call.parameters)), *layout.sizes, layout.extents)
        kind = kernels.portable.kind_of_list(call, plan.config.rows, plan.config.keys)
        lead = kernels.portable.lead(call, "q", plan.config.rows)
        end = (float(call.scale), section or layout.section, lead)
        return _Launch(plan, layout, out, rows, numbers, captured, end, kind)

    def __call__(
        self,
        run: Runner,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tensors: Sequence[Tensor],
        q_offset: int | Tensor,
        counter: Tensor,
        listed: Sequence[Tensor],
        out: Tensor | None = None,
        rows: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`listed`: what `kind` finds. out, rows: as in the call."""
        device = query.device
        packed = self.plan.options["PACKED"]
        out = by_row(self.out, packed, query.dtype, device) if out is None else out
        lse = by_row(self.rows, packed, torch.float32, device)
        shifted = torch.empty_like(lse) if self.plan.has_row_term else lse
        q, k, v, o = self.layout.shapes
        captured = tuple([(x, *rest) for x, rest in zip(tensors, self.captured, strict=True)]) + described(listed)
        if packed:
            captured += ((out, (), ()),)
        run(
            attention_forward,
            self.layout.programs,
            (
                q(query),
                k(key),
                v(value),
                o(out),
                lse,
                shifted,
                counter,
                q_offset,
                *self.numbers,
                captured,
                *self.end,
                () if rows is None else (*rows, query, key, value, out),
            ),
            self.plan.options,
        )  # fmt: skip
        return out, lse, shifted


class Replay:
    """The forward pass of one kind of call, known by its shapes, strides, dtypes and numbers; it holds no tensors."""

    def __init__(self, kernels: Kernels, call: Call, config: Config) -> None:
        given, call = call, loaded(call)
        self._loads = call is not given
        plan = kernels.plan(call, config)
        launched, count = _Launch.of(kernels, plan, plan.layout(call), call), len(call.tensors)
        offset: list[Any] = [] if isinstance(call.q_offset, Tensor) else [call.q_offset]
        gives_out, gives_rows = "out" in call.results, call.rows is not None

        def function(
            run: Runner, query: Tensor, key: Tensor, value: Tensor, counter: Tensor, *rest: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            behind = len(rest) - lists
            q_offset, *found = offset + list(rest[count:behind])
            out = found.pop(0) if gives_out else None
            rows = tuple(found) if gives_rows else None
            return launched(run, query, key, value, rest[:count], q_offset, counter, rest[behind:], out, rows)

        self._kind, lists = launched.kind, 0 if launched.kind is None else launched.kind.count
        self._launches = Launches(function)

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
        given = map(loadable, (query, key, value)) if self._loads else (query, key, value)
        inputs = [*given, counter_of(query.device), *tensors]
        if isinstance(q_offset, Tensor):
            q_offset = q_offset.to(torch.int64)
            inputs.append(q_offset)
        inputs += [x for x in (out, *(rows or ())) if x is not None]
        listed = () if self._kind is None else self._kind.find(tensors, q_offset, query.device)
        out, lse, shifted = self._launches(inputs, listed)
        return out, lse, shifted


_counters: dict[int, _Counters] = {}


class _Counters:
    """Zeros of int32 on one device for kernels to count query tiles with, which they leave zero.

    Kernels on one stream follow each other and share one. A graph may be replayed beside them: each launch in a graph
    has one of its own, which is zero before the graph runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.of_streams: dict[int, Tensor] = {}
        self.for_graphs = torch.zeros(GRAPHED, 4, dtype=torch.int32, device=device)  # each at a multiple of 16 bytes
        self.taken = itertools.count()


def counter_of(device: torch.device) -> Tensor:
    """The one for a kernel that is launched now."""
    known = _counters.get(device.index) if device.type == "cuda" else None
    if device.type != "cuda" or torch._C._cuda_isCurrentStreamCapturing():
        place = GRAPHED if known is None else next(known.taken)
        if known is None or place >= GRAPHED:
            return torch.zeros(1, dtype=torch.int32, device=device)
        return known.for_graphs[place, :1]
    if known is None:
        known = _counters.setdefault(device.index, _Counters(device))
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    found = known.of_streams.get(stream)
    if found is None:
        found = known.of_streams[stream] = torch.zeros(1, dtype=torch.int32, device=device)
    return found


def _options(config: Config, *, copies: bool) -> dict[str, Any]:
    """copies: the producer is a warpgroup that copies rows."""
    registers, own = config.copying if copies else (config.registers, 24)
    return {
        "GROUPS": config.groups, "KEYS": config.keys, "STAGES": config.stages, "REGISTERS": registers,
        "PRODUCER_REGISTERS": own,
        "PIN": config.pin, "CARRY_WIDE": config.carry_wide, "PING_PONG": config.ping_pong,
        "OWN_OUTPUT": config.own_output, "AHEAD": config.ahead, "HOLD": config.hold,
        "RESCALE_LATE": config.rescale_late, "FROZEN": config.frozen,
    }  # fmt: skip


# ---------------------------------------------------------------- compiling without a launch


def compile_here(kernel: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """For the GPU of the first argument, where a launch will find it."""
    with (
        torch.cuda.device(arguments[0].base.device),
        compiling(variant_of(options), lambda: inputs_of(kernel, arguments, options)),
    ):
        return kernel.run(*arguments, grid=(1,), warmup=True, **options)


def compile_ahead(kernel: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """For a Hopper GPU that is not here; tensors may be on the device `meta`."""
    compiler = Compiler(GPUTarget("cuda", 90, 32))
    compiler(kernel, 1, arguments, options)
    return compiler.compiled[0]


def build(kernels: Kernels, call: Call, config: Config | None = None) -> Any:
    """The forward kernel compiled ahead of time, with the configuration that is found good unless one is given."""
    config = config or kernels.choice(call, compile_ahead).config
    assert config is not None, "no configuration fits"
    return _compiled(kernels, call, config, compile_ahead)


def _compiled(kernels: Kernels, call: Call, config: Config, compile: Compile) -> Any:
    compiled: list[Any] = []

    def run(kernel: Any, programs: int, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        if kernel is attention_forward:
            compiled.append(compile(kernel, arguments, options))

    forward(kernels, call, run, config)
    return compiled[0]
