"""When the decode kernel takes a call, how the call is laid over the machine, and its launch.

All of it follows from shapes, strides, dtypes and the GPU: lengths and offsets may live on the device and grow between
replays of a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from attn_dsl.backend.portable.decode import attention_decode, merge_splits
from attn_dsl.backend.portable.host import (
    Call,
    capability_of,
    chunks,
    dense_columns,
    described,
    in_units,
    interpreted,
    multiprocessors,
    number,
    unit_of,
)
from attn_dsl.backend.portable.launch import Kernels, Plan
from attn_dsl.backend.portable.run import Options, Repeated, Runner, launch

MOST_TOKENS = 64
"""Longer queries are for the other kernels."""
FEW_ROWS = 64
"""So many rows of one tile cost a tensor core less than the reading of their keys costs the memory."""
MOST_SPLITS = 256
STAGE_BYTES = 2**15
"""Of keys and values that one step of the kernel's loop reads; half as much in float32, where registers are short."""
REGISTERS = 200
"""Of a thread, where splits are merged: two programs of four warps leave room for the merge, which begins early."""


@dataclass(frozen=True)
class Layout:
    """How a call is laid over a GPU.

    pack: heads that share a tile. rows, keys: of a tile. splits: into how many parts the visited tiles of each tile of
    rows are cut.
    """

    pack: int
    rows: int
    keys: int
    warps: int
    stages: int
    row_tiles: int
    splits: int

    def __str__(self) -> str:
        heads = f"{self.pack} head{'s' * (self.pack > 1)} a tile"
        return (
            f"{self.rows} rows x {self.keys} keys, {heads}, {self.warps} warps, {self.stages} stages, "
            f"{self.splits} split{'s' * (self.splits > 1)} of the keys"
        )


def reason(call: Call) -> str | None:
    """Why the decode kernel takes a call, or None where it does not."""
    (batch, heads, tokens, _), kv_heads = call.query.shape, call.key.shape[1]
    rows = heads // kv_heads * tokens
    if tokens > MOST_TOKENS:
        return None
    what = f"{tokens} query token{'s' * (tokens > 1)} of {heads // kv_heads} head{'s' * (heads > kv_heads)}"
    if rows <= FEW_ROWS:
        return f"{what} a key head are {rows} rows"
    tiles, machine = batch * heads, multiprocessors(call.query.device)
    return f"{what} a key head are {tiles} tiles for {machine} multiprocessors" if tiles < machine else None


def layout_of(kernels: Kernels, call: Call, splits: int | None = None) -> Layout:
    """The layout of a call; `splits` is worked out unless given.

    Two programs of a multiprocessor hide each other's waits. Where many programs make several waves, a fourth stage
    keeps a third program out, which would leave the last wave emptier: 10 percent on an H200 at 64 caches of 4096.
    """
    batch, heads, kv_heads, tokens, kv_len, dim = call.sizes[:6]
    value_dim = call.value.shape[3]
    pack = 1 if kernels.by_head else heads // kv_heads
    size, wide = call.key.element_size(), sum(chunks(dim)) + sum(chunks(value_dim))
    most, step = (FEW_ROWS, STAGE_BYTES) if call.query.element_size() == 2 else (FEW_ROWS // 2, STAGE_BYTES // 2)
    rows = min(max(16, triton.next_power_of_2(pack * tokens)), most)
    width = wide * size
    keys = min(max(16, 1 << (step // width).bit_length() - 1), 128)
    warps = 8 if rows * wide > 2**14 else 4
    row_tiles = triton.cdiv(pack * tokens, rows)
    programs = batch * (heads // pack) * row_tiles
    if splits is None:
        splits = fewest_splits(programs, 2 * multiprocessors(call.query.device), triton.cdiv(kv_len, keys))
    room = 1 + (_shared(_capability(call)) // 2 - 2**13) // (keys * width)  # stages that two programs have room for
    stages = max(2, min(room, 4 if splits == 1 and rows == 16 else 3))
    return Layout(pack, rows, keys, warps, stages, row_tiles, splits)


@functools.lru_cache(maxsize=4096)
def fewest_splits(programs: int, places: int, tiles: int) -> int:
    """The fewest splits whose waves of programs fill the machine's `places` to 85 percent of what the best number does,
    and what else fits these waves.

    `programs` are those of one split; a split has at least one of the `tiles`.
    """
    if programs * 5 >= places * 4:  # one wave or more as it is
        return 1

    def filled(splits: int) -> float:
        waves = programs * splits / places
        return waves / -(-programs * splits // places)

    numbers = range(1, min(tiles, places, MOST_SPLITS) + 1)
    best = max(map(filled, numbers))
    fewest = next(splits for splits in numbers if filled(splits) >= 0.85 * best)
    return min(-(-programs * fewest // places) * places // programs, numbers[-1])


def _shared(capability: tuple[int, int] | None) -> int:
    """Bytes of shared memory of a multiprocessor that programs may have."""
    match capability:
        case (9 | 10 | 11, _):
            return 227 * 1024
        case (8, 0 | 7):
            return 163 * 1024
        case (7, _):
            return 64 * 1024
        case _:
            return 99 * 1024


def _capability(call: Call) -> tuple[int, int] | None:
    """None in the interpreter; for tensors that are not on a GPU, where the call names none, that of a large one."""
    if call.capability is not None or call.query.is_cuda or interpreted():
        return call.capability or capability_of(call.query.device)
    return 9, 0


def forward(
    kernels: Kernels, call: Call, run: Runner = launch, layout: Layout | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, shifted) as `launch.forward`, which the backward pass may take as well."""
    q_offset = call.q_offset
    return Replay.of(kernels, call, layout).launch(call.query, call.key, call.value, call.tensors, q_offset, run)


@dataclass
class Replay:
    """The launches of one kind of call, known by its shapes, strides, dtypes and numbers."""

    layout: Layout
    programs: int
    out: tuple[int, ...]
    strides: tuple[tuple[int, int, int, int], ...]
    numbers: tuple[tuple[Any, ...], tuple[int, ...]]
    captured: tuple[tuple[Any, ...], ...]
    scale: Any
    options: Options
    merging: Options
    has_row: bool
    runner: Repeated = field(default_factory=Repeated)
    merger: Repeated = field(default_factory=Repeated)

    @staticmethod
    def of(kernels: Kernels, call: Call, layout: Layout | None = None) -> Replay:
        query, key, value = call.query, call.key, call.value
        plan = Plan.of(kernels, call, frozenset(), launch, listed=False)
        layout = layout_of(kernels, call) if layout is None else layout
        shape = (*query.shape[:3], value.shape[3])
        out = torch.empty(shape, device="meta")
        unit, value_dim = unit_of(query, key, value, out), value.shape[3]
        capability = _capability(call)
        overlap = {}
        if capability is not None and capability >= (9, 0) and torch.version.hip is None:
            overlap = {"launch_pdl": True}
        crowded = bool(overlap) and layout.splits > 1 and layout.warps == 4 and layout.rows < FEW_ROWS

        def options() -> dict[str, Any]:
            functions = plan.named(
                SCORE="score", FULL_SCORE="full_score", FACTOR="factor", SLOPE="slope", MASK="mask",
                KEY_MASK="key_mask", ROW="row_term", SINK="sink", KV_RANGES="kv_ranges", SKIP="kv_skip",
            )  # fmt: skip
            tile = {"BM": layout.rows, "BN": layout.keys, "num_warps": layout.warps, "num_stages": layout.stages}
            if crowded:
                tile["maxnreg"] = REGISTERS
            return {**functions, **plan.common, **tile, "OVERLAP": bool(overlap), **plan.storage}

        def merging() -> dict[str, Any]:
            width = triton.next_power_of_2(value_dim)
            return {"DV": value_dim, "WIDTH": width, "CHUNK": 32, "OVERLAP": bool(overlap), "num_warps": 4, **overlap}

        kind = f"decode {layout.rows} {layout.keys} {layout.warps} {layout.stages}" + " crowded" * crowded
        return Replay(
            layout,
            query.shape[0] * (query.shape[1] // layout.pack) * layout.row_tiles * layout.splits,
            shape,
            tuple(in_units(tensor, unit) for tensor in (query, key, value, out)),
            (tuple(number(x) for x in call.parameters), plan.sizes),
            tuple(rest for _, *rest in described(call.tensors)),
            number(float(call.scale)),
            plan.options(kind, unit, dense_columns(query, key, value), options),
            plan.made.setdefault(("merge", 0, True), Options(merging())),
            "row_term" in plan.emitted.functions,
        )

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, tensors: Sequence[Tensor], q_offset: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """(out, lse), not differentiable."""
        return self.launch(query, key, value, tensors, q_offset, self.runner, self.merger)[:2]

    def launch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tensors: Sequence[Tensor],
        q_offset: int | Tensor,
        run: Runner = launch,
        merge: Runner | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(out, lse, shifted), by one kernel or, where there are splits, two, the second by `merge` or else `run`."""
        outputs = self._outputs((), query.dtype, query.device)
        splits = self.layout.splits
        parts = outputs if splits == 1 else self._outputs((splits,), torch.float32, query.device)
        captured = tuple((x, *rest) for x, rest in zip(tensors, self.captured, strict=True))
        run(
            attention_decode,
            self.programs,
            (query, key, value, *parts, q_offset, *self.strides, *self.numbers, captured, self.scale, self.layout.pack,
             splits),
            self.options,
        )  # fmt: skip
        if splits > 1:
            (out, lse, shifted), (part, part_lse, part_shifted), rows = outputs, parts, outputs[1].numel()
            own = (part_shifted, shifted) if self.has_row else (None, None)
            (merge or run)(merge_splits, rows, (part, part_lse, own[0], out, lse, own[1], rows, splits), self.merging)
        return outputs

    def _outputs(
        self, splits: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = torch.empty((*splits, *self.out), dtype=dtype, device=device)
        lse = torch.empty((*splits, *self.out[:3]), dtype=torch.float32, device=device)
        return out, lse, torch.empty_like(lse) if self.has_row else lse
