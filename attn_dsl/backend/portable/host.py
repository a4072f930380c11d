"""What a launch must know of its tensors, in the terms of the kernels.

`standalone.py` copies what it needs from here into files that stand alone, so this module knows nothing of variants.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from attn_dsl.backend.portable.backward import ROWS
from attn_dsl.backend.portable.device import plain
from attn_dsl.backend.portable.tiles import Tile, Tiles

Scalar = bool | int | float


@functools.cache
def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class Call:
    """One call of a variant, bound.

    parameters: in declared order, numbers or tensors of one element. tensors: the captured tensors, in declared order.
    extents: sizes that only captured tensors know, in the order of `Kernels.extents`. q_offset: a number or [B].
    precise: exact instead of hardware functions. float32_precision: `ieee` or `tf32`. capability: compute capability to
    compile for, where it is not that of the tensors' device. results: tensors to write `out`, `dq`, `dk` and `dv` to,
    dense in their last axis; what is not there is written to a new one. rows: dense integers [B, H, Q] and
    [B, HK, KV], B and heads as in the call or 1, each once: row i of the positions of queries is row `rows[0][b, h, i]`
    of query, `out` and lse, and row i of those of keys row `rows[1][b, hk, i]` of key and value. grid: positions are
    those of a grid of so many columns, read in boxes with so many columns of queries and of keys. dims: (B, H, HK,
    Q, KV, D), where the shapes of query and key do not say them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    parameters: tuple[Scalar | Tensor, ...]
    tensors: tuple[Tensor, ...]
    extents: tuple[int, ...]
    scale: float
    q_offset: int | Tensor = 0
    precise: bool = False
    float32_precision: str = "ieee"
    tiles: Tiles | None = None
    capability: tuple[int, int] | None = None
    results: Mapping[str, Tensor] = field(default_factory=dict)
    rows: tuple[Tensor, Tensor] | None = None
    grid: tuple[int, int, int] | None = None
    dims: tuple[int, ...] | None = None

    def result(self, name: str, shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
        """Where a result of a name is written."""
        found = self.results.get(name)
        if found is None:
            found = torch.empty(shape, dtype=self.query.dtype, device=device or self.query.device)
        return found

    @property
    def result_strides(self) -> tuple[tuple[int, ...], ...]:
        """Those of the results that are given."""
        return tuple([x.stride() for x in self.results.values()])

    @property
    def sizes(self) -> tuple[int, ...]:
        if self.dims is not None:
            return (*self.dims, *self.extents)
        (batch, heads, q_len, dim), (_, kv_heads, kv_len, _) = self.query.shape, self.key.shape
        return (batch, heads, kv_heads, q_len, kv_len, dim, *self.extents)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, whose reading of its arguments takes longer than what it does."""
    return torch.empty_strided(shape, _dense(shape), dtype=dtype, device=device)


def empty_like(tensor: Tensor, given: Tensor | None = None) -> Tensor:
    """`given`, or a dense tensor of that shape."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format) if given is None else given


@functools.lru_cache(maxsize=4096)
def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides[: len(shape)])


def span(tensor: Tensor) -> int:
    """How far the last element is from the first, in elements."""
    return sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


@functools.cache
def chunks(dim: int) -> tuple[int, int]:
    """A head dimension as one power of two, or two, each at least 16: 192 = 128 + 64, 80 = 64 + 16, 121 -> 128."""
    whole = max(16, triton.next_power_of_2(dim))
    half = whole // 2
    rest = max(16, triton.next_power_of_2(dim - half)) if dim > 32 else whole
    return (half, rest) if half + rest < whole else (whole, 0)


@functools.cache
def _cache_bytes(index: int | None) -> int:
    """What of the second-level cache keys and values may take."""
    return 2**24 if index is None else int(torch.cuda.get_device_properties(index).L2_cache_size * 0.6)


def section(key: Tensor, value: Tensor, group: int, length: int | None = None) -> int:
    """How many heads run side by side, so that their keys and values, `length` of them if given, stay in the cache."""
    rows = key.shape[2] if length is None else length
    size = rows * (key.shape[3] + value.shape[3]) * key.element_size()
    return max(1, _cache_bytes(key.device.index if key.is_cuda else None) // size) * group


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at a time, one on each; where no GPU is at hand, as many as one of the kind has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 4 if interpreted() else 132


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU; None in the interpreter."""
    return None if interpreted() else torch.cuda.get_device_capability(device)


def in_units(tensor: Tensor, unit: int) -> tuple[int, int, int, int]:
    """As `strides_of` on the device takes them."""
    batch, heads, rows, column = tensor.stride()
    return plain(batch // unit), plain(heads // unit), plain(rows // unit), plain(column)


def unit_of(*tensors: Tensor) -> int:
    """8, or 16 where there are elements of 8 bits, where every stride but the last is a multiple of so many elements,
    which lets loads be as wide as the machine's."""
    unit = 16 if any(tensor.element_size() == 1 for tensor in tensors) else 8
    return unit if all(stride % unit == 0 for tensor in tensors for stride in tensor.stride()[:3]) else 1


def dense_columns(*tensors: Tensor) -> bool:
    return all(tensor.stride(3) == 1 for tensor in tensors)


def number(value: Scalar | Tensor) -> Scalar | Tensor:
    """A parameter as the kernels take it; the interpreter takes neither floats nor bools in tuples."""
    if isinstance(value, int) and not isinstance(value, bool):
        return plain(value)
    return torch.tensor(value) if interpreted() and isinstance(value, (bool, float)) else value


def described(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Captured tensors as the kernels know them."""
    return tuple((t, tuple(map(plain, t.shape)), tuple(map(plain, t.stride()))) for t in tensors)


def precision_of(call: Call) -> str:
    """How the kernels multiply: PRECISION."""
    if call.query.dtype is torch.float32:
        return call.float32_precision
    return "widen" if interpreted() and call.query.dtype is torch.bfloat16 else "ieee"


def dimensions(call: Call) -> dict[str, int]:
    """The kernels' constants for the head dimensions."""
    (d0, d1), (dv0, dv1) = chunks(call.query.shape[3]), chunks(call.value.shape[3])
    return {"D": call.query.shape[3], "D0": d0, "D1": d1, "DV": call.value.shape[3], "DV0": dv0, "DV1": dv1}


def padded_rows(rows: int) -> int:
    """`padded` of the backward kernels."""
    unit: int = ROWS.value
    return -(-rows // unit) * unit


def tile_options(tile: Tile) -> dict[str, int]:
    return {"BM": tile.rows, "BN": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}
