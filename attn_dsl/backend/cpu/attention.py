"""The CPU backend as PyTorch sees it: one differentiable function of query, key, value, tensors and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attn_dsl.backend.cpu.backward import Gradients, Saved, backward
from attn_dsl.backend.cpu.forward import forward
from attn_dsl.backend.cpu.functions import schedule_functions, tile_functions
from attn_dsl.backend.cpu.tiles import FEW_OPERATIONS, Problem, TileShape
from attn_dsl.ir.variant import Variant
from attn_dsl.passes.schedule import Schedule


def attention(
    variant: Variant,
    schedule: Schedule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    q_offset: int | Tensor,
    sizes: Mapping[str, int],
    parameters: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """`(out [B, H, Q, DV], lse [B, H, Q])` of a checked call; `lse` is float32, or float64 for float64 inputs.

    `parameters` are Python numbers or 0-d tensors. Differentiable once with respect to query, key, value, float tensors
    and float parameters that are tensors; what would need a second derivative raises.
    """
    values = {name: v.item() if isinstance(v, Tensor) else v for name, v in parameters.items()}
    problem = problem_of(variant, schedule, query, key, scale, q_offset, sizes, values, tensors)
    names = tuple(name for name, tensor in tensors.items() if tensor.is_floating_point())
    numbers = tuple(name for name, v in parameters.items() if isinstance(v, Tensor) and v.is_floating_point())
    wanted = [tensors[name] for name in names] + [parameters[name] for name in numbers]
    out, lse = _Attention.apply(problem, names, numbers, query, key, value, *wanted)  # type: ignore[no-untyped-call]
    return out, lse


def problem_of(
    variant: Variant,
    schedule: Schedule,
    query: Tensor,
    key: Tensor,
    scale: float,
    q_offset: int | Tensor,
    sizes: Mapping[str, int],
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> Problem:
    """The call as the tile loops take it."""
    dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
    batch, heads, q_len, dim = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    offsets = tuple(int(o) for o in q_offset.tolist()) if isinstance(q_offset, Tensor) else (q_offset,)
    functions = tile_functions(variant, dtype)
    operations = 4 * batch * heads * q_len * kv_len * dim
    threads = torch.get_num_threads() if operations > FEW_OPERATIONS else 1
    return Problem(
        functions=functions,
        schedule=schedule_functions(variant, schedule),
        shape=TileShape.choose(q_len, kv_len, batch * kv_heads, heads // kv_heads, dtype, threads),
        threads=threads,
        dtype=dtype,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        scale=scale,
        offsets=offsets if len(set(offsets)) > 1 else offsets[:1],
        scalars=tuple({**values, **sizes}[name] for name in functions.scalars),
        tensors=tuple(tensors[tensor.name].detach() for tensor in variant.tensors),
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        problem: Problem,
        names: tuple[str, ...],
        numbers: tuple[str, ...],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *wanted: Tensor,
    ) -> tuple[Tensor, Tensor]:
        sink = _sink(problem)
        out, lse, careful = forward(problem, query, _flat(problem, key), _flat(problem, value), sink)
        ctx.save_for_backward(query, key, value, out, lse, sink, *wanted)
        ctx.problem, ctx.names, ctx.numbers, ctx.careful = problem, names, numbers, careful
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        problem: Problem = ctx.problem
        query, key, value, out, lse, sink, *wanted = ctx.saved_tensors
        flat_key, flat_value = _flat(problem, key), _flat(problem, value)
        gradients = Gradients(
            torch.zeros(query.shape, dtype=problem.dtype), torch.zeros_like(flat_key), torch.zeros_like(flat_value)
        )
        for name, tensor, needed in zip((*ctx.names, *ctx.numbers), wanted, ctx.needs_input_grad[6:], strict=True):
            if needed:
                into = gradients.tensors if name in ctx.names else gradients.parameters
                into[name] = torch.zeros(tensor.shape, dtype=problem.dtype)
        saved = Saved(query, flat_key, flat_value, out, lse, sink, ctx.careful)
        d_out = torch.zeros_like(out) if d_out is None else d_out
        backward(problem, saved, d_out, d_lse, gradients)
        named = gradients.tensors | gradients.parameters
        others = (
            named[name].to(tensor.dtype) if name in named else None
            for name, tensor in zip((*ctx.names, *ctx.numbers), wanted, strict=True)
        )
        return (
            None,
            None,
            None,
            gradients.query.to(query.dtype),
            gradients.key.view(key.shape).to(key.dtype),
            gradients.value.view(value.shape).to(value.dtype),
            *others,
        )


def _flat(problem: Problem, x: Tensor) -> Tensor:
    """`[B, HK, KV, D]` as `[B * HK, KV, D]` in the dtype of the arithmetic, without a copy where none is needed."""
    x = x.detach().to(problem.dtype)
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.reshape(-1, *x.shape[2:])


def _sink(problem: Problem) -> Tensor | None:
    """The sink's logits `[B, H]`."""
    if problem.functions.sink_grad is None:
        return None
    b = torch.arange(problem.batch).view(-1, 1, 1, 1)
    h = torch.arange(problem.heads).view(1, -1, 1, 1)
    logits, *_ = problem.functions.sink_grad.function(b, h, problem.scalars, problem.tensors)
    logits = torch.as_tensor(logits, dtype=problem.dtype)
    return logits.expand(problem.batch, problem.heads, 1, 1).reshape(problem.batch, problem.heads)
