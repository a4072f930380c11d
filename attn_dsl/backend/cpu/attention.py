"""The CPU backend's two passes over a checked call, as plain functions of tensors; `backend/operators.py` binds them to
autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from attn_dsl.backend.binding import Call
from attn_dsl.backend.cpu.backward import Gradients, Saved, differentiate
from attn_dsl.backend.cpu.forward import attend
from attn_dsl.backend.cpu.functions import schedule_functions, tile_functions
from attn_dsl.backend.cpu.problem import FEW_OPERATIONS, Problem
from attn_dsl.backend.cpu.shapes import TileShape
from attn_dsl.backend.cpu.workers import operations_on
from attn_dsl.ir.nodes import Param, Size
from attn_dsl.ir.variant import Variant
from attn_dsl.passes.schedule import Schedule


def problem_of(variant: Variant, schedule: Schedule, call: Call) -> Problem:
    """The call as the tile loops take it. `schedule` is for tiles that are clipped to the lengths."""
    dtype = torch.float64 if call.query.dtype is torch.float64 else torch.float32
    batch, heads, kv_heads, q_len, kv_len, dim = (call.sizes[name] for name in ("B", "H", "HK", "Q", "KV", "D"))
    offsets = tuple(call.q_offset.tolist()) if isinstance(call.q_offset, Tensor) else (call.q_offset,)
    functions, numbers = tile_functions(variant, dtype), call.numbers
    threads = torch.get_num_threads() if 4 * batch * heads * q_len * kv_len * dim > FEW_OPERATIONS else 1
    problem = Problem(
        functions=functions,
        schedule=schedule_functions(variant, schedule),
        shape=TileShape(q_len, kv_len, 1),
        threads=threads,
        dtype=dtype,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        scale=call.scale,
        offsets=offsets if len(set(offsets)) > 1 else offsets[:1],
        scalars=tuple(numbers[cast(Param | Size, node).name] for node in functions.scalars),
        names=tuple(tensor.name for tensor in variant.tensors),
        tensors=tuple(call.tensors[tensor.name].detach() for tensor in variant.tensors),
    )
    with operations_on(1):
        if problem.integers is None:
            problem = replace(problem, functions=tile_functions(variant, dtype, subtract=False))
        return problem.shaped()


@torch.no_grad()
def forward(problem: Problem, call: Call) -> tuple[Tensor, Tensor]:
    """`(out [B, H, Q, DV], lse [B, H, Q])`; `lse` is float32, or float64 for float64 inputs."""
    with operations_on(1):
        return attend(problem, call.query, _flat(problem, call.key), _flat(problem, call.value), _sink(problem))


def backward(
    problem: Problem,
    call: Call,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    wanted: frozenset[str],
) -> Gradients:
    """Gradients in the dtype of the arithmetic, also of the captured tensors and parameters in `wanted`.

    Raises RuntimeError where autograd would record the work, for a second derivative.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("attention is differentiable once: a graph of its backward pass (create_graph) is not made")
    with operations_on(1):
        key, value = _flat(problem, call.key), _flat(problem, call.value)
        query = torch.zeros(call.query.shape, dtype=key.dtype)
        found = Gradients(query, torch.zeros_like(key), torch.zeros_like(value))
        for name in wanted:
            if name in call.tensors:
                found.tensors[name] = torch.zeros(call.tensors[name].shape, dtype=key.dtype)
            else:
                found.parameters[name] = torch.zeros((), dtype=key.dtype)
        differentiate(problem, Saved(call.query, key, value, out, lse, _sink(problem)), d_out, d_lse, found)
        found.key, found.value = found.key[:, : problem.kv_len], found.value[:, : problem.kv_len]
    return found


def _flat(problem: Problem, x: Tensor) -> Tensor:
    """`[B, HK, KV, D]` as `[B * HK, KV, D]` in the dtype of the arithmetic, without a copy where none is needed.

    Keys that may be gathered are contiguous, and zeros fill the last block.
    """
    x = x.detach().to(problem.dtype)
    x = x if x.stride(-1) == 1 and not problem.gathers else x.contiguous()
    x = x.reshape(-1, *x.shape[2:])
    missing = problem.padded_keys - problem.kv_len if problem.gathers else 0
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


def _sink(problem: Problem) -> Tensor | None:
    """The sink's logits `[B, H]`."""
    if problem.functions.sink_grad is None:
        return None
    b = torch.arange(problem.batch).view(-1, 1, 1, 1)
    h = torch.arange(problem.heads).view(1, -1, 1, 1)
    logits, *_ = problem.functions.sink_grad.function(b, h, problem.scalars, problem.tensors)
    logits = torch.as_tensor(logits, dtype=problem.dtype)
    return logits.expand(problem.batch, problem.heads, 1, 1).reshape(problem.batch, problem.heads)
