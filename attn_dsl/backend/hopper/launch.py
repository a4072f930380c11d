"""Launch the Hopper kernels for a bound call, or say why the call is not for them.

Arguments are taken to be valid (`api.py` checks them); `Call` and what is returned are those of the portable backend.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from attn_dsl.backend.hopper import check
from attn_dsl.backend.hopper.configs import Config, candidates
from attn_dsl.backend.hopper.emit import Emitted, emit_module
from attn_dsl.backend.hopper.forward import attention_forward
from attn_dsl.backend.portable import launch as portable
from attn_dsl.backend.portable.algebra import SCALE
from attn_dsl.backend.portable.device import plain
from attn_dsl.backend.portable.launch import Call
from attn_dsl.backend.portable.load import load
from attn_dsl.ir.nodes import Node, Param, Var, post_order
from attn_dsl.ir.types import Type

ROWS = 64
_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_FUNCTIONS = ("factor", "uniform", "rows", "residue", "slope", "mask", "row_term", "sink", "kv_ranges")


@dataclass
class Kernels:
    """The Hopper kernels of a variant: emitted functions, and the configurations that were found good or bad."""

    portable: portable.Kernels
    rejected: dict[Config, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._modules: dict[tuple[frozenset[Node], bool], tuple[Emitted, ModuleType]] = {}

    def functions(self, call: Call) -> dict[str, Any]:
        """The emitted functions by the name of the kernel's argument; None where the variant has none."""
        key = (_positive(self.portable, call), not call.precise)
        if key not in self._modules:
            variant, schedule = self.portable.variant, self.portable.schedule
            text = emit_module(variant, schedule, key[0], fast_tanh=key[1])
            self._modules[key] = text, load(text.source, f"hopper_{variant.name}")
        text, module = self._modules[key]
        return {name.upper(): getattr(module, name) if name in text.functions else None for name in _FUNCTIONS}


def _positive(kernels: portable.Kernels, call: Call) -> frozenset[Node]:
    """The parameters that are known to be > 0, and the softmax scale."""
    declared = zip(kernels.variant.parameters, call.parameters, strict=True)
    known = {
        Param(parameter.name, parameter.type)
        for parameter, value in declared
        if parameter.type is Type.FLOAT and isinstance(value, (int, float)) and value > 0
    }
    return frozenset(known | ({SCALE} if call.scale > 0 else set()))


def padded(dim: int) -> int:
    """The head dimension of the tiles: a power of two, at least 64."""
    return max(64, 1 << math.ceil(math.log2(dim)))


def refusal(kernels: portable.Kernels, call: Call) -> str | None:
    """Why the call is not for these kernels, or None."""
    query, key, value = call.query, call.key, call.value
    if query.dtype not in _TYPES:
        return f"the element type is {str(query.dtype).removeprefix('torch.')}, not bfloat16 or float16"
    for dim in (query.shape[3], value.shape[3]):
        if dim > 256 or dim % 8:
            return f"the head dimension {dim} is not a multiple of 8 up to 256"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not _copyable(tensor):
            return f"the bulk copy engine needs rows of `{name}` contiguous and at multiples of 16 bytes"
    return "positions need 64 bits" if kernels.wide(call) else None


def _copyable(tensor: Tensor) -> bool:
    aligned = all(
        stride % 8 == 0 for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1
    )
    address = 0 if tensor.device.type == "meta" else tensor.data_ptr()
    return tensor.stride(3) == 1 and aligned and address % 16 == 0


def _descriptor(tensor: Tensor, rows: int, dim: int) -> TensorDescriptor:
    """Blocks of [1, 1, rows, dim]; what a block has beyond the tensor is read as 0 and not written."""
    block = [1, 1, rows, dim]
    layout = _layout(rows, dim, tensor.dtype)
    strides = [plain_stride(size, stride) for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], block, layout)


def plain_stride(size: int, stride: int) -> int:
    """The stride of an axis of one element is never used, but must be one that the copy engine takes."""
    return stride if size > 1 else 8


@functools.cache
def _layout(rows: int, dim: int, dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, dim], _TYPES[dtype])


@functools.cache
def _multiprocessors(index: int | None) -> int:
    return 132 if index is None else torch.cuda.get_device_properties(index).multi_processor_count


Runner = Callable[[Any, int, tuple[Any, ...], dict[str, Any]], Any]


def _launch(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return kernel[(programs,)](*arguments, **options)


def forward(
    kernels: Kernels, call: Call, run: Runner = _launch, config: Config | None = None, section: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, H, Q, DV], lse [B, H, Q], shifted [B, H, Q]), as `portable.launch.forward`; the call must not be one of
    which `refusal` speaks. `section` is how many heads run side by side."""
    query, value = call.query, call.value
    batch, heads, q_len, dim = query.shape
    value_dim = value.shape[3]
    out = torch.empty((batch, heads, q_len, value_dim), dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=query.device)
    functions = kernels.functions(call)
    shifted = lse if functions["ROW_TERM"] is None else torch.empty_like(lse)
    d, dv = padded(dim), padded(value_dim)
    if config is None:
        config = candidates(d, dv)[0]
    if d != dv:
        config = replace(config, own_output=True)
    arguments = (
        _descriptor(query, ROWS, d), _descriptor(call.key, config.keys, d), _descriptor(value, config.keys, dv),
        _descriptor(out, ROWS, dv), lse, shifted, call.q_offset, *_numbers(call), float(call.scale),
        section or _section(kernels, call),
    )  # fmt: skip
    options = {**functions, "D": d, "DV": dv, **_options(config), "num_warps": 4}
    tiles = batch * heads * triton.cdiv(q_len, config.rows)
    index = query.device.index if query.is_cuda else None
    run(attention_forward, min(tiles, _multiprocessors(index)) if config.persistent else tiles, arguments, options)
    return out, lse, shifted


def _numbers(call: Call) -> tuple[Any, ...]:
    """The kernel's arguments `parameters, B, H, HK, Q, KV, DIM, extents, tensors`."""
    parameters = tuple(plain(p) if isinstance(p, int) and not isinstance(p, bool) else p for p in call.parameters)
    tensors = tuple((t, tuple(map(plain, t.shape)), tuple(map(plain, t.stride()))) for t in call.tensors)
    return parameters, *call.sizes[:6], tuple(map(plain, call.sizes[6:])), tensors


def _section(kernels: Kernels, call: Call) -> int:
    """How many heads run side by side.

    Where the rows of a query decide how many key tiles it visits, all of them, so that the longest tiles of all heads
    come first; else those whose query heads share keys, which then stay in the cache.
    """
    batch, heads = call.query.shape[:2]
    bounds = [bound for s in kernels.portable.schedule.kv.segments for bound in (s.begin, s.end)]
    uneven = any(node in (Var("q0"), Var("q1")) for node in post_order(*bounds))
    return batch * heads if uneven else heads // call.key.shape[1]


def _options(config: Config) -> dict[str, Any]:
    return {
        "GROUPS": config.groups, "KEYS": config.keys, "STAGES": config.stages, "REGISTERS": config.registers,
        "PIN": config.pin, "CARRY_WIDE": config.carry_wide, "PING_PONG": config.ping_pong,
        "OWN_OUTPUT": config.own_output,
    }  # fmt: skip


def build(kernels: Kernels, call: Call, config: Config | None = None) -> Any:
    """The forward kernel compiled ahead of time; tensors may be on the device `meta`."""
    compiled: list[Any] = []

    def run(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        compiled.append(check.compile_ahead(kernel, arguments, options))

    forward(kernels, call, run, config)
    return compiled[0]
