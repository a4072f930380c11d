"""Launchers for files that stand alone: `standalone.py` copies them there, behind the kernels.

The shortest way from tensors to launches, without the memory of earlier calls that `launch.py` has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from attn_dsl.backend.portable.backward import (
    attention_delta,
    attention_keys_backward,
    attention_queries_backward,
)
from attn_dsl.backend.portable.device import ADD
from attn_dsl.backend.portable.forward import attention_forward
from attn_dsl.backend.portable.host import (
    Call,
    capability_of,
    chunks,
    dense_columns,
    described,
    dimensions,
    in_units,
    number,
    padded_rows,
    precision_of,
    section,
    span,
    tile_options,
    unit_of,
)
from attn_dsl.backend.portable.tiles import Tiles, choose


@dataclass(frozen=True)
class Functions:
    """A variant's functions, for each kernel by the names of its arguments.

    targets: which captured tensors have a gradient. gathers: see `choose`. reach: while sizes, positions and integer
    parameters stay below it, no integer of the variant leaves 32 bits.
    """

    forward: Mapping[str, Any]
    reach: int
    gathers: bool
    delta: Mapping[str, Any] | None = None
    keys: Mapping[str, Any] | None = None
    queries: Mapping[str, Any] | None = None
    targets: tuple[int, ...] = ()


def checked(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value, a batch of 1 broadcast. Raises ValueError where the three do not fit."""
    shapes = [tuple(x.shape) for x in (query, key, value)]
    if not all(len(shape) == 4 and 0 not in shape for shape in shapes):
        raise ValueError(f"expected query, key and value of 4 axes, none empty, got shapes {shapes}")
    (batch, heads, _, dim), (key_batch, kv_heads, _, key_dim), _ = shapes
    if key_batch not in (1, batch) or heads % kv_heads or key_dim != dim or shapes[1][:3] != shapes[2][:3]:
        raise ValueError(f"expected query [B, H, Q, D], key [B, HK, KV, D], value [B, HK, KV, DV], got {shapes}")
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"expected float32, bfloat16 or float16, got {query.dtype}")
    if any(x.dtype is not query.dtype or x.device != query.device for x in (key, value)):
        raise ValueError("expected query, key and value of one dtype on one device")
    return key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)


def tiles_of(functions: Functions, call: Call) -> Tiles:
    capability = call.capability or capability_of(call.query.device)
    d, dv = (sum(chunks(x.shape[3])) for x in (call.query, call.value))
    return call.tiles or choose(capability, call.query.element_size(), d, dv, functions.gathers)


def is_wide(functions: Functions, call: Call) -> bool:
    """Whether positions must be 64-bit."""
    if isinstance(call.q_offset, Tensor) or any(span(tensor) >= 2**31 for tensor in call.tensors):
        return True
    numbers = (*call.sizes, call.q_offset + call.sizes[3], *(x for x in call.parameters if isinstance(x, int)))
    return any(abs(x) > functions.reach for x in numbers)


def common(functions: Functions, call: Call) -> dict[str, Any]:
    """Constants of all kernels."""
    return {**dimensions(call), "WIDE": is_wide(functions, call), "PRECISION": precision_of(call)}


def scalars_and_tensors(call: Call) -> tuple[Any, ...]:
    """The kernels' arguments `parameters, sizes, tensors`."""
    return tuple(map(number, call.parameters)), tuple(map(number, call.sizes)), described(call.tensors)


def run_forward(functions: Functions, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, H, Q, DV], lse [B, H, Q], shifted [B, H, Q]): `shifted` is lse without the row terms of the score."""
    query, key, value, tile = call.query, call.key, call.value, tiles_of(functions, call).forward
    batch, heads, q_len = query.shape[:3]
    out = torch.empty((batch, heads, q_len, value.shape[3]), dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=query.device)
    shifted = lse if functions.forward["ROW"] is None else torch.empty_like(lse)
    unit = unit_of(query, key, value, out)
    attention_forward[(batch * heads * triton.cdiv(q_len, tile.rows),)](
        query, key, value, out, lse, shifted, call.q_offset,
        *(in_units(x, unit) for x in (query, key, value, out)),
        *scalars_and_tensors(call), number(call.scale), section(key, value, heads // key.shape[1]),
        **functions.forward, **common(functions, call), **tile_options(tile),
        UNIT=unit, CONTIGUOUS=dense_columns(query, key, value),
    )  # fmt: skip
    return out, lse, shifted


def run_backward(
    functions: Functions, call: Call, out: Tensor, shifted: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(dQ, dK, dV, gradients of the captured tensors that have one, float32)."""
    assert functions.delta is not None and functions.keys is not None and functions.queries is not None
    query, key, value, tiles = call.query, call.key, call.value, tiles_of(functions, call)
    (batch, heads, q_len, _), (_, kv_heads, kv_len, _) = query.shape, key.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    numbers = torch.empty((batch, heads, padded_rows(q_len), 2), dtype=torch.float32, device=query.device)
    sums = [torch.zeros(call.tensors[i].shape, device=query.device) for i in functions.targets]
    constants, arguments = common(functions, call), scalars_and_tensors(call)
    end = (described(sums), None, None, number(call.scale))

    unit, rows = unit_of(out, grad_out), 64
    attention_delta[(batch * heads * (padded_rows(q_len) // rows),)](
        out, grad_out, grad_lse, shifted, numbers, call.q_offset, in_units(out, unit), in_units(grad_out, unit),
        *arguments, *end, **functions.delta, MODE=ADD.value, DV=constants["DV"], DV0=constants["DV0"],
        DV1=constants["DV1"], BM=rows, UNIT=unit, CONTIGUOUS=dense_columns(grad_out), WIDE=constants["WIDE"],
    )  # fmt: skip
    unit = unit_of(query, key, value, grad_out, dq, dk, dv)
    inputs = (query, key, value, grad_out, numbers)
    strides = tuple(in_units(x, unit) for x in (query, key, value, grad_out))
    constants |= {"MODE": ADD.value, "UNIT": unit, "CONTIGUOUS": dense_columns(query, key, value, grad_out)}
    attention_keys_backward[(batch * kv_heads * triton.cdiv(kv_len, tiles.keys.keys),)](
        *inputs, dk, dv, call.q_offset, *strides, in_units(dk, unit), in_units(dv, unit), *arguments, *end,
        section(key, value, 1), **functions.keys, **constants, **tile_options(tiles.keys),
    )  # fmt: skip
    attention_queries_backward[(batch * heads * triton.cdiv(q_len, tiles.queries.rows),)](
        *inputs, dq, call.q_offset, *strides, in_units(dq, unit), *arguments, *end,
        section(key, value, heads // kv_heads), **functions.queries, **constants, **tile_options(tiles.queries),
    )  # fmt: skip
    return dq, dk, dv, sums


class Differentiable(torch.autograd.Function):
    """(out, lse) with the gradients of query, key, value and of captured float tensors."""

    @staticmethod
    def forward(
        ctx: Any, functions: Functions, call: Call, query: Tensor, key: Tensor, value: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, lse, shifted = run_forward(functions, call)
        ctx.save_for_backward(query, key, value, out, shifted, *tensors)
        ctx.functions, ctx.call = functions, call
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        _, _, _, out, shifted, *tensors = ctx.saved_tensors
        grad_out, grad_lse = grad_out.contiguous(), grad_lse.contiguous()
        dq, dk, dv, sums = run_backward(ctx.functions, ctx.call, out, shifted, grad_out, grad_lse)
        grads: list[Tensor | None] = [None] * len(tensors)
        for i, total in zip(ctx.functions.targets, sums, strict=True):
            grads[i] = total.to(tensors[i].dtype)
        return (None, None, dq, dk, dv, *grads)
