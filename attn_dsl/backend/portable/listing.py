"""Lists of the tiles that a call visits: made once for tensors that do not change, found again by later calls.

A list belongs to tile shapes, lengths, parameters and the contents of the tensors that the mask reads (`kept.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from attn_dsl.backend.kept import Store
from attn_dsl.backend.portable.classify import find_runs, list_tiles, summarize_tiles
from attn_dsl.backend.portable.device import plain
from attn_dsl.backend.portable.emit_lists import Emitted, emit_lists
from attn_dsl.backend.portable.host import Call, Scalar, described, number
from attn_dsl.backend.portable.load import load
from attn_dsl.backend.portable.run import Options, Repeated, Runner, launch
from attn_dsl.backend.portable.tape import LaunchesByKind
from attn_dsl.backend.printer import SIZES
from attn_dsl.errors import BindingError
from attn_dsl.ir.nodes import (
    TRUE,
    Compare,
    CompareOp,
    Const,
    K,
    Load,
    Node,
    Param,
    Q,
    conjuncts,
    post_order,
    substitute,
)
from attn_dsl.ir.types import DType
from attn_dsl.ir.variant import Variant
from attn_dsl.passes.fold import fold_all
from attn_dsl.passes.runs import runs_of
from attn_dsl.passes.summaries import Claims, Refinement

PADDED_BYTES = 2**20
"""Up to so many bytes, a list has room for every tile; a larger one is counted first, which the host waits for."""
NARROW = 2**8
"""So many tiles have numbers of 8 bits."""
CAPTURED_BYTES = 2**28
"""The same while a CUDA graph is captured, which nothing can wait for."""
KEPT = 64
"""For so many kinds of calls the size of pieces is remembered."""
PIECES = 4096
"""Pieces or pairs that a program looks at together."""
WIDTH = 128
"""Tiles that a program decides together by their summaries."""
ALONE = 512
"""So many pieces one warp looks at, which waits for no other; more are for four."""


@dataclass(frozen=True)
class Shape:
    """What a list is for: tiles of `rows` x `keys`, visited from a tile of keys if `transposed`, else of queries."""

    rows: int
    keys: int
    transposed: bool = False


@dataclass(frozen=True)
class Source:
    """What of a call lists are made from; fields as those of `Call`."""

    sizes: tuple[int, ...]
    tensors: Sequence[Tensor]
    parameters: Sequence[Scalar | Tensor]
    q_offset: int | Tensor
    device: torch.device

    @staticmethod
    def of(call: Call) -> Source:
        return Source(call.sizes, call.tensors, call.parameters, call.q_offset, call.query.device)


@dataclass(frozen=True)
class Kind:
    """The lists of calls that differ in nothing but their tensors and `q_offset`."""

    lists: Lists
    shape: Shape
    wide: bool
    sizes: tuple[int, ...]
    parameters: Sequence[Scalar | Tensor]

    @property
    def count(self) -> int:
        """How many tensors `find` gives."""
        return 2 * len(self.lists.runs) + 2

    def find(
        self, tensors: Sequence[Tensor], q_offset: int | Tensor, device: torch.device, run: Runner = launch
    ) -> tuple[Tensor, ...]:
        """As `Lists.find`; who repeats the kernels of one call makes no lists, since these change with the tensors."""
        source = Source(self.sizes, tensors, self.parameters, q_offset, device)
        return self.lists.find(source, self.shape, self.wide, launch if isinstance(run, Repeated) else run)

    def described(self, tensors: Sequence[Tensor], q_offset: int | Tensor, device: torch.device) -> str:
        """How many tiles the list for these tensors holds, for people; waits for the GPU."""
        found = TileList(self.shape, *self.find(tensors, q_offset, device)[-2:])
        masked, full = found.counts
        shape, (batch, heads, q_len, kv_len) = self.shape, (self.sizes[i] for i in (0, 1, 3, 4))
        total = batch * heads * -(-q_len // shape.rows) * -(-kv_len // shape.keys)
        return f"{masked} masked and {full} full of {total} tiles of {shape.rows} x {shape.keys}, {found.bytes} bytes"


@dataclass(frozen=True)
class TileList:
    """`rows` [B, H, tiles, 4] int32, of which `batch` and `heads` are stored, and `entries` [n], the numbers of tiles,
    uint8 where all have one, else int32."""

    shape: Shape
    rows: Tensor
    entries: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """As kernels take them, behind the captured tensors."""
        return self.rows, self.entries

    @property
    def bytes(self) -> int:
        """What is stored; axes that the mask does not vary with are stored once."""
        rows = math.prod(n for n, stride in zip(self.rows.shape, self.rows.stride(), strict=True) if stride)
        return 4 * rows + self.entries.nbytes

    def text(self) -> str:
        """For people; waits for the GPU."""
        masked, full = self.counts
        own = "a tile of keys" if self.shape.transposed else "a tile of queries"
        tiles = f"tiles of {self.shape.rows} x {self.shape.keys} from {own}"
        return f"{tiles}: {masked} masked, {full} full, {self.bytes} bytes"

    @property
    def counts(self) -> tuple[int, int]:
        """(masked, full) tiles over all heads; waits for the GPU."""
        masked, full = self.rows[..., 1:3].sum((0, 1, 2)).tolist()
        return masked, full


@dataclass(frozen=True)
class Ends:
    """The first and last positions of runs of equal values (`passes/runs.py`), two tensors for each `Runs`."""

    tensors: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        return 4 * sum(tensor.numel() for tensor in self.tensors)

    def text(self) -> str:
        """For people."""
        return f"ends of runs of equal values: {self.bytes} bytes"


@functools.lru_cache(maxsize=KEPT)
def _room(q_len: int, kv_len: int, start: int, shape: Shape) -> int:
    """Tiles of a head that hold a pair with q >= k."""
    tiles, rows = -(-kv_len // shape.keys), range(start, start + q_len, shape.rows)
    if not shape.transposed:
        ends = (min(q + shape.rows, start + q_len) - 1 for q in rows)
        return sum(max(0, min(tiles, end // shape.keys + 1)) for end in ends)
    q_tiles = len(rows)
    return sum(max(0, q_tiles - max(k - start, 0) // shape.rows) for k in range(0, kv_len, shape.keys))


class Lists:
    """The lists of a variant's calls, and the kernels that make them."""

    def __init__(self, variant: Variant, extents: Sequence[Node], claims: Claims) -> None:
        self.variant, self.extents, self.claims = variant, tuple(extents), claims
        read = {node.tensor for node in post_order(variant.mask) if isinstance(node, Load)}
        used = {node.name for node in post_order(variant.mask) if isinstance(node, Param)}
        self._tensors = tuple(i for i, tensor in enumerate(variant.tensors) if tensor.name in read)
        self._parameters = tuple(i for i, parameter in enumerate(variant.parameters) if parameter.name in used)
        self._lists_made: Store[TileList] = Store()
        self._ends_made: Store[Ends] = Store()
        self._known_pieces: dict[tuple[Any, ...], tuple[int, int]] = {}
        self.runs = runs_of(variant)
        self._options: dict[tuple[Any, ...], Options] = {}
        self._launches = LaunchesByKind()

    @functools.cached_property
    def emitted(self) -> tuple[Emitted, ModuleType]:
        text = emit_lists(self.variant, self.claims)
        return text, load(text.source, f"lists_{self.variant.name}")

    # -- finding ------------------------------------------------------------------------------------------------------

    def find(self, source: Source, shape: Shape, wide: bool, run: Runner = launch) -> tuple[Tensor, ...]:
        """What kernels take behind the captured tensors of a call: the ends of runs, then rows and entries.

        They are made unless they are there; `run` other than `launch` only compiles.
        """
        if run is not launch or source.device.type == "meta":
            ends = self.make_ends(source, run).tensors if self.runs else ()
            return *ends, *self.make(source, shape, wide, run).tensors
        (place, sources), device = self._made_of(source), source.device
        listed = self._lists_made.find((shape, *place), sources, device, lambda: self.make(source, shape, wide))
        if not self.runs:
            return listed.tensors
        ends = self._ends_made.find(
            place, sources, device,
            lambda: Ends(self._repeated(source, ("ends",), lambda run, given: self.make_ends(given, run).tensors)),
        ).tensors  # fmt: skip
        return *ends, *listed.tensors

    def _made_of(self, source: Source) -> tuple[tuple[Any, ...], list[Tensor]]:
        """What a list depends on: numbers, and tensors."""
        found: list[Any] = [source.sizes[:5], source.sizes[6:], source.device]
        sources = [source.tensors[i] for i in self._tensors]
        for x in (source.q_offset, *(source.parameters[i] for i in self._parameters)):
            if isinstance(x, Tensor):
                sources.append(x)
            else:
                found.append((type(x), x))
        return tuple(found), sources

    # -- making -------------------------------------------------------------------------------------------------------

    def make_ends(self, source: Source, run: Runner = launch) -> Ends:
        """The ends of all runs."""
        made: list[Tensor] = []
        for runs in self.runs:
            index = next(i for i, tensor in enumerate(self.variant.tensors) if tensor is runs.tensor)
            along = _moved(source.tensors[index], runs.axis, -1)
            rows = along.reshape(-1, along.shape[-1]).contiguous()
            count, length = rows.shape
            ends = [torch.empty_like(rows, dtype=torch.int32) for _ in range(2)]
            arguments = (*ends, rows, length, length.bit_length())
            run(find_runs, count * -(-length // _RUN_OPTIONS["BLOCK"]), arguments, _RUN_OPTIONS)
            made += [_moved(end.view(along.shape), -1, runs.axis) for end in ends]
        return Ends(tuple(made))

    def make(self, source: Source, shape: Shape, wide: bool, run: Runner = launch) -> TileList:
        """A new list."""
        batch, heads, q_len, kv_len = (source.sizes[i] for i in (0, 1, 3, 4))
        varies = self.variant.mask.depends
        own_batch = batch if "b" in varies or (isinstance(source.q_offset, Tensor) and "q" in varies) else 1
        own_heads = heads if "h" in varies else 1
        q_tiles, k_tiles = -(-q_len // shape.rows), -(-kv_len // shape.keys)
        own, other = (k_tiles, q_tiles) if shape.transposed else (q_tiles, k_tiles)
        device = source.device
        programs = own_batch * own_heads * own
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        dtype = torch.uint8 if other <= NARROW else torch.int32
        each = _room(*source.sizes[3:5], source.q_offset, shape) if self._causal(source) else own * other
        count = own_batch * own_heads * each
        room = dtype.itemsize * count

        def begun(run: Runner, source: Source) -> tuple[Tensor, Callable[[Tensor | None, int], None]]:
            """(rows, what fills them and entries, of which a row of tiles has so many)."""
            rows = torch.empty(own_batch, own_heads, own, 4, dtype=torch.int32, device=device)
            arguments = self._arguments(source, shape, wide, own_batch, own_heads, run)
            options = self._list_options(source, shape, wide)

            def fill(entries: Tensor | None, capacity: int) -> None:
                run(list_tiles, programs, (rows, entries, *arguments, own_heads, capacity), options)

            return rows, fill

        def filled(run: Runner, source: Source, count: int) -> tuple[Tensor, Tensor]:
            """(rows, entries), for which there is room."""
            rows, fill = begun(run, source)
            entries = torch.empty(max(1, count), dtype=dtype, device=device)
            fill(entries, other)
            return rows, entries

        if run is not launch or device.type == "meta":  # nothing is made
            rows, entries = filled(run, source, 1)
        elif room <= (CAPTURED_BYTES if capturing else PADDED_BYTES):
            rows, entries = self._repeated(source, (shape, wide), lambda run, given: filled(run, given, count))
        elif capturing:
            raise BindingError(
                f"a list of {count} tiles is too large to be made in a CUDA graph: make it before, with "
                "`schedule`, and hold it"
            )
        else:
            rows, fill = begun(run, source)
            fill(None, 0)
            flat = rows.view(programs, 4)
            counts = flat[:, 1] + flat[:, 2]
            ends = counts.cumsum(0, dtype=torch.int32)
            flat[:, 0], flat[:, 3] = ends - counts, ends - 1
            entries = torch.empty(max(1, int(ends[-1])), dtype=dtype, device=device)
            fill(entries, 0)
        return TileList(shape, rows.expand(batch, heads, -1, -1), entries)

    def _repeated(
        self, source: Source, place: tuple[Any, ...], make: Callable[[Runner, Source], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What `make` gives, by the launches of the last time where tensors alone are new."""
        inputs = [*source.tensors, *([source.q_offset] if isinstance(source.q_offset, Tensor) else [])]
        if not inputs or not inputs[0].is_cuda or any(isinstance(x, Tensor) for x in source.parameters):
            return make(launch, source)
        sizes, parameters, device = source.sizes, source.parameters, source.device
        start = None if isinstance(source.q_offset, Tensor) else source.q_offset

        def function(run: Runner, *given: Tensor) -> tuple[Tensor, ...]:
            tensors, offset = (given[:-1], given[-1]) if start is None else (given, start)
            return make(run, Source(sizes, tensors, parameters, offset, device))

        numbers = sizes, tuple([(type(x), x) for x in parameters]), start
        return tuple(self._launches((*place, *numbers), function, inputs))

    def _arguments(
        self, source: Source, shape: Shape, wide: bool, batch: int, heads: int, run: Runner
    ) -> tuple[Any, ...]:
        """(q_offset, parameters, sizes, tensors, summaries) as kernels take them; the summaries, of tiles of the axis
        that is visited, are made where claims read some."""
        given = (source.q_offset, tuple(map(number, source.parameters)), tuple(map(plain, source.sizes)))
        tensors = described(source.tensors)
        if self._by_mask(source, shape):
            return (*given, tensors, ())
        axis, tiles = (
            ("q", -(-source.sizes[3] // shape.rows)) if shape.transposed else ("k", -(-source.sizes[4] // shape.keys))
        )
        read = [
            tensor
            for summary in self.claims.summaries
            if summary.axis == axis
            for tensor in (summary.low, summary.high)
        ]
        dtypes = (torch.float32 if tensor.dtype is DType.FLOAT32 else torch.int64 for tensor in read)
        results = [torch.empty(batch, heads, tiles, dtype=dtype, device=source.device) for dtype in dtypes]
        if results:
            arguments = (results[0], *given, tensors, described(results), heads)
            run(summarize_tiles, batch * heads * tiles, arguments, self._summary_options(axis, shape, wide))
        return (*given, tensors, described(results))

    def _terms(self, axis: str) -> Any:
        """What is summarized of an axis, None where nothing is."""
        text, module = self.emitted
        return getattr(module, f"{axis}_terms") if f"{axis}_terms" in text.functions else None

    def _summary_options(self, axis: str, shape: Shape, wide: bool) -> Options:
        block = shape.keys if axis == "k" else shape.rows
        key = ("summaries", axis, block, wide)
        if key not in self._options:
            self._options[key] = Options({
                "TERMS": self._terms(axis), "OF_KEYS": axis == "k", "BLOCK": block,
                "SPAN": triton.next_power_of_2(block), "WIDE": wide, "num_warps": 1,
            })  # fmt: skip
        return self._options[key]

    def _by_mask(self, source: Source, shape: Shape) -> bool:
        """Whether the mask of one pair of each piece of a tile decides, so that nothing else is asked."""
        refined = self.claims.refined
        if refined is None or not refined.piecewise or self.claims.uniform != TRUE:
            return False
        return self._pieces_of(source, shape) <= PIECES

    def _pieces_of(self, source: Source, shape: Shape) -> int:
        """Pieces of a tile, and some that are looked at beside them."""
        q_piece, k_piece = self._pieces(source, shape)
        own, other = shape.rows // q_piece, shape.keys // k_piece
        if shape.transposed:
            own, other = other, own
        return int(triton.next_power_of_2(own)) * other

    def _list_options(self, source: Source, shape: Shape, wide: bool) -> Options:
        """Which functions decide, about pieces of which size, so many tiles at a time."""
        q_piece, k_piece = self._pieces(source, shape)
        own_axis, own, other = ("k", shape.keys, shape.rows) if shape.transposed else ("q", shape.rows, shape.keys)
        tiles = -(-source.sizes[3] // shape.rows) if shape.transposed else -(-source.sizes[4] // shape.keys)
        width, pairs = max(16, min(WIDTH, triton.next_power_of_2(tiles))), False
        refined, by_mask = self.claims.refined, self._by_mask(source, shape)
        elements = width
        if refined is not None:
            pieces = self._pieces_of(source, shape)
            pairs = not by_mask and (refined.elements or pieces > PIECES)
            width = 1 if pairs else min(width, max(1, PIECES // pieces))
            elements = PIECES if pairs else width * pieces
        if pairs:
            q_piece = k_piece = 1
        causal = self._causal(source)
        key = ("list", shape, wide, q_piece, k_piece, width, causal)
        if key not in self._options:
            _, module = self.emitted
            own_pieces = triton.next_power_of_2(own // (k_piece if shape.transposed else q_piece))
            self._options[key] = Options({
                "TERMS": None if by_mask else self._terms(own_axis), "CLAIMS": None if by_mask else module.claims,
                "REFINED": None if refined is None or by_mask or pairs else module.refined,
                "MASK": module.mask if by_mask or pairs else None, "TRANSPOSED": shape.transposed, "BM": shape.rows,
                "BN": shape.keys, "Q_PIECE": q_piece, "K_PIECE": k_piece, "OWN_PIECES": own_pieces,
                "ROWS": min(own & -own, max(1, PIECES // other)) if pairs else own_pieces,
                "SPAN": triton.next_power_of_2(own), "WIDTH": width, "WIDE": wide, "CAUSAL": causal,
                "num_warps": 1 if elements <= ALONE else 4,
            })  # fmt: skip
        return self._options[key]

    def _causal(self, source: Source) -> bool:
        """Whether it is known of which tiles the mask says q >= k."""
        return self._is_causal and not isinstance(source.q_offset, Tensor)

    @functools.cached_property
    def _is_causal(self) -> bool:
        later = {(CompareOp.GE, Q, K), (CompareOp.GT, Q, K), (CompareOp.LE, K, Q), (CompareOp.LT, K, Q)}
        parts = conjuncts(self.variant.mask)
        return any(isinstance(part, Compare) and (part.op, part.x, part.y) in later for part in parts)

    def _pieces(self, source: Source, shape: Shape) -> tuple[int, int]:
        """The largest pieces, powers of two, within which every quotient of a position is one number."""
        refined = self.claims.refined
        if refined is None:
            return shape.rows, shape.keys
        numbers = [None if isinstance(x, Tensor) else x for x in (source.q_offset, *source.parameters)]
        key = (shape.rows, shape.keys, source.sizes, *numbers)
        if key not in self._known_pieces:
            if len(self._known_pieces) >= KEPT:
                self._known_pieces.clear()
            self._known_pieces[key] = self._new_pieces(refined, source, shape)
        return self._known_pieces[key]

    def _new_pieces(self, refined: Refinement, source: Source, shape: Shape) -> tuple[int, int]:
        known = self._numbers(source)
        found = []
        for axis, block in (("q", shape.rows), ("k", shape.keys)):
            piece = block
            for node in refined.divisors[axis]:
                value = fold_all(substitute(node, known))
                piece = math.gcd(piece, int(value.value)) if isinstance(value, Const) else 1
            found.append(piece)
        offset = source.q_offset
        if refined.divisors["q"]:
            found[0] = 1 if isinstance(offset, Tensor) else math.gcd(found[0], offset)
        return found[0], found[1]

    def uniform(self, source: Source, rows: int, keys: int) -> bool:
        """Whether the mask is the same for all pairs of each part of `rows` x `keys`, which divide tiles."""
        refined = self.claims.refined
        if refined is None or not refined.piecewise:
            return False
        q_piece, k_piece = self._pieces(source, Shape(rows, keys))
        return (q_piece, k_piece) == (rows, keys)

    def _numbers(self, source: Source) -> dict[Node, Node]:
        known: dict[Node, Node] = dict(zip((*SIZES, *self.extents), map(Const, source.sizes), strict=True))
        for declared, value in zip(self.variant.parameters, source.parameters, strict=True):
            if not isinstance(value, Tensor):
                known[Param(declared.name, declared.type)] = Const(value)
        return known


_RUN_OPTIONS = Options({"BLOCK": 256, "num_warps": 4})


def _moved(x: Tensor, axis: int, to: int) -> Tensor:
    """With an axis elsewhere; most often it is there."""
    return x if (axis - to) % x.dim() == 0 else x.movedim(axis, to)
