"""Launch the Hopper backward kernel over strips of a grid (`passes/order_grid.py`): strips of keys, boxes of queries.

Tensors are those of the caller, read in boxes and, dK and dV, written so; sizes of the call are those of strips.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attn_dsl.backend.hopper.backward import attention_backward
from attn_dsl.backend.hopper.backward_boxes import gather_queries, spread_rows
from attn_dsl.backend.hopper.backward_rows import prepare_rows
from attn_dsl.backend.hopper.configs_backward import KEYS
from attn_dsl.backend.hopper.launch import BlockShape
from attn_dsl.backend.portable.device import plain
from attn_dsl.backend.portable.host import described, multiprocessors, number
from attn_dsl.backend.portable.launch import Call, Gradients
from attn_dsl.backend.portable.run import Options, Runner, launch

if TYPE_CHECKING:
    from attn_dsl.backend.hopper.configs_backward import Config
    from attn_dsl.backend.hopper.launch_backward import Kernels

ROWS = 64
"""Places of a program that spreads rows."""
ACROSS, DOWN = 16, 4
"""Columns and rows of a program that gathers dQ."""


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
    run: Runner = launch,
) -> Gradients:
    """Gradients of query, key and value, in the order of the caller, as are `out` and `shifted`."""
    from attn_dsl.backend.hopper.launch_backward import _Scratch, loadable

    assert call.grid is not None
    out, grad_out = loadable(out), loadable(grad_out)
    plan = kernels.plan(call, ordered, frozenset(), config)
    (d, dim_v), rows, query, device = plan.dims, config.queries, call.query, call.query.device
    width, of_queries, of_keys = call.grid
    batch, heads, kv_heads, q_len, kv_len = call.sizes[:5]
    length, dim = query.shape[2:]
    height, own_heads = length // width, query.shape[1]
    tiles, own_tiles, key_tiles = -(-q_len // rows), -(-length // rows), -(-kv_len // KEYS)

    dq = torch.empty(query.shape, dtype=query.dtype, device=device)
    dk, dv = torch.empty_like(call.key), torch.empty_like(call.value)
    grids = [(query, rows, d, of_queries), (call.key, 64, d, of_keys), (call.value, 64, dim_v, of_keys),
             (grad_out, rows, dim_v, of_queries), (dk, 64, d, of_keys), (dv, 64, dim_v, of_keys)]  # fmt: skip
    blocks = [BlockShape.of(x, count, columns, width, box)(x) for x, count, columns, box in grids]
    sizes, extents, scale = tuple(map(plain, call.sizes[:6])), tuple(map(plain, call.sizes[6:])), float(call.scale)
    parameters, captured = tuple(map(number, call.parameters)), described(call.tensors)
    of_call = (parameters, (*sizes, *extents), captured, scale)
    of_grid = (batch, own_heads, call.key.shape[1], length, length, dim)
    kind = kernels.portable.kind_of_list(call, rows, KEYS, transposed=True)
    listed = () if kind is None else described(kind.find(call.tensors, call.q_offset, device, run))
    scratch = _Scratch.of(plan, batch * heads, tiles, key_tiles).made(device)
    numbers = torch.empty(batch * own_heads, 2, own_tiles * rows, dtype=torch.float32, device=device)
    strides = [(*(plain(stride // 8) for stride in x.stride()[:3]), plain(1)) for x in (out, grad_out)]
    run(
        prepare_rows, batch * own_heads * own_tiles * (rows // ROWS),
        (out, grad_out, grad_lse, shifted, numbers, None, call.q_offset, *strides, parameters,
         (*map(plain, of_grid), *extents), (), scale, 0),
        plan.prepare,
    )  # fmt: skip
    box = {"BOX": plan.options["QUERY_BOX"], "COLUMNS": of_queries, "QUERIES": rows, "D": d, "num_warps": 4}
    run(
        spread_rows, batch * heads * tiles * (rows // ROWS),
        (numbers, scratch.numbers, scratch.sums, width, height, own_tiles, own_heads, *of_call),
        Options({**box, "ROWS": ROWS}),
    )  # fmt: skip
    section = -(-2 * multiprocessors(device) // key_tiles) if kernels.uneven else 1
    run(
        attention_backward, batch * kv_heads * key_tiles,
        (*blocks[:4], *scratch.blocks, *blocks[4:], scratch.turns, scratch.done, call.q_offset, parameters,
         *call.sizes[:6], extents, captured + listed, (), scale, section, 0, 0),
        plan.options,
    )  # fmt: skip
    run(
        gather_queries, batch * own_heads * -(-height // DOWN) * -(-width // ACROSS),
        (scratch.sums, dq, width, height, own_heads, heads // own_heads, *of_call),
        Options({**box, "DIM": dim, "ACROSS": ACROSS, "DOWN": DOWN}),
    )  # fmt: skip
    return Gradients(dq, dk, dv, {})
