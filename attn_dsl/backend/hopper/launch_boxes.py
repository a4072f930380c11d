"""Launch the Hopper backward kernel over strips of a grid (`passes/order_grid.py`): strips of keys, boxes of queries.

Tensors are those of the caller, read in boxes and, dK and dV, written so; sizes of the call are those of strips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_dsl.backend.hopper.backward import attention_backward
from attn_dsl.backend.hopper.backward_boxes import gather_queries, spread_rows
from attn_dsl.backend.hopper.backward_rows import prepare_rows
from attn_dsl.backend.hopper.configs_backward import KEYS
from attn_dsl.backend.hopper.launch import BlockShape, counter_of, loadable
from attn_dsl.backend.portable.device import plain
from attn_dsl.backend.portable.host import described, multiprocessors, number
from attn_dsl.backend.portable.launch import LAYOUTS, Call, Gradients
from attn_dsl.backend.portable.run import Options, Runner, launch

if TYPE_CHECKING:
    from attn_dsl.backend.hopper.configs_backward import Config
    from attn_dsl.backend.hopper.launch_backward import Kernels, _Plan, _Scratch

ROWS = 64
"""Places of a program that spreads rows."""
SUMS = 2**29
"""Bytes of float32 sums of dQ that are held at once; where there are more, batch entries come one after the other."""
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
    out, grad_out = loadable(out), loadable(grad_out)
    plan = kernels.plan(call, ordered, frozenset(), config)
    batch, heads, rows = call.sizes[0], call.sizes[1], config.queries
    bytes = 4 * heads * -(-call.sizes[3] // rows) * rows * plan.dims[0]
    numbered = any("b" in root.depends for root in kernels.portable.variant.roots)
    count = batch if numbered else min(batch, max(1, SUMS // bytes))
    dq, dk, dv = grads = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (call.query, call.key, call.value)
    ]
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    if count == batch:
        given = (call, out, shifted, grad_out, grad_lse)
        _found(kernels, plan, call, out, grad_out)(kernels, *given, grads, run)
        return Gradients(dq, dk, dv, {})
    for first in range(0, batch, count):
        part = slice(first, first + count)
        query, key, value = call.query[part], call.key[part], call.value[part]
        some = replace(call, query=query, key=key, value=value, dims=(query.shape[0], *call.sizes[1:6]))
        given = (some, out[part], shifted[part], grad_out[part], None if grad_lse is None else grad_lse[part])
        _found(kernels, plan, some, given[1], given[3])(kernels, *given, [x[part] for x in grads], run)
    return Gradients(dq, dk, dv, {})


def _found(kernels: Kernels, plan: _Plan, call: Call, out: Tensor, grad_out: Tensor) -> _Launch:
    tensors = (call.query, call.key, call.value, out, grad_out)
    at = (plan.options, *(x.shape for x in tensors), *(x.stride() for x in tensors), call.query.device, call.sizes)
    found = kernels.boxed.get(at)
    if found is None:
        if len(kernels.boxed) >= LAYOUTS:
            kernels.boxed.clear()
        found = kernels.boxed[at] = _Launch.of(kernels, plan, call, out, grad_out)
    assert isinstance(found, _Launch)
    return found


@dataclass(frozen=True)
class _Launch:
    """Launches for calls that differ in nothing but their tensors' addresses.

    blocks: of query, key, value, output gradient and the gradients of key and value. tiles: of queries of a strip, of
    queries of the grid, and of keys of a strip. given: sizes of the call in the order given. programs: of each kernel.
    """

    plan: _Plan
    blocks: tuple[BlockShape, ...]
    scratch: _Scratch
    strides: tuple[tuple[int, ...], ...]
    sizes: tuple[Any, ...]
    given: tuple[int, ...]
    lines: tuple[int, int, int]
    spread: tuple[tuple[int, ...], Options]
    gather: tuple[tuple[int, ...], Options]
    section: int
    programs: tuple[int, int, int, int]

    @staticmethod
    def of(kernels: Kernels, plan: _Plan, call: Call, out: Tensor, grad_out: Tensor) -> _Launch:
        from attn_dsl.backend.hopper.launch_backward import _Scratch

        assert call.grid is not None
        (d, dim_v), rows, (width, of_queries, of_keys) = plan.dims, plan.config.queries, call.grid
        batch, heads, kv_heads, q_len, kv_len = call.sizes[:5]
        _, own_heads, length, dim = call.query.shape
        height, parts = length // width, rows // ROWS
        tiles, own_tiles, key_tiles = -(-q_len // rows), -(-length // rows), -(-kv_len // KEYS)
        grids = [(call.query, rows, d, of_queries), (call.key, 64, d, of_keys), (call.value, 64, dim_v, of_keys),
                 (grad_out, rows, dim_v, of_queries)]  # fmt: skip
        made = [torch.empty(x.shape, dtype=x.dtype, device="meta") for x in (call.key, call.value)]
        grids += [(x, 64, columns, of_keys) for x, columns in zip(made, (d, dim_v), strict=True)]
        box = {"BOX": plan.options["QUERY_BOX"], "COLUMNS": of_queries, "QUERIES": rows, "WORDS": plan.words,
               "num_warps": 4}  # fmt: skip
        gather = {**box, "D": d, "DIM": dim, "ACROSS": ACROSS, "DOWN": DOWN}
        sizes, extents = tuple(map(plain, call.sizes[:6])), tuple(map(plain, call.sizes[6:]))
        given = (batch, own_heads, call.key.shape[1], length, length, dim)
        return _Launch(
            plan,
            tuple(BlockShape.of(x, count, columns, width, across) for x, count, columns, across in grids),
            _Scratch.of(plan, batch * heads, tiles, key_tiles),
            tuple((*(plain(stride // 8) for stride in x.stride()[:3]), plain(1)) for x in (out, grad_out)),
            (*sizes, *extents),
            (*map(plain, given), *extents),
            (batch * own_heads, 2, own_tiles * rows),
            ((width, height, own_tiles, own_heads), Options({**box, "ROWS": ROWS})),
            ((width, height, own_heads, heads // own_heads), Options(gather)),
            kernels.section(batch * kv_heads, key_tiles, multiprocessors(call.query.device), plan.turns is not None),
            (batch * own_heads * own_tiles * parts, batch * heads * tiles * parts,
             min(batch * kv_heads * key_tiles, multiprocessors(call.query.device)),
             batch * own_heads * -(-height // DOWN) * -(-width // ACROSS)),
        )  # fmt: skip

    def __call__(
        self,
        kernels: Kernels,
        call: Call,
        out: Tensor,
        shifted: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        grads: Sequence[Tensor],
        run: Runner,
    ) -> None:
        """Write the gradients of query, key and value to `grads`."""
        plan, device, scale, (dq, dk, dv) = self.plan, call.query.device, float(call.scale), grads
        kind = kernels.portable.kind_of_list(call, plan.config.queries, KEYS, transposed=True)
        captured = described(call.tensors)
        listed = () if kind is None else kind.find(call.tensors, call.q_offset, device, run)
        parameters = tuple(map(number, call.parameters))
        of_call = (parameters, self.sizes, captured, scale)
        numbers, sums, turns, done, blocks = self.scratch.made(device)
        lines = torch.empty(self.lines, dtype=torch.float32, device=device)
        of_rows, of_places, of_keys, of_queries = self.programs
        run(
            prepare_rows, of_rows,
            (out, grad_out, grad_lse, shifted, lines, None, call.q_offset, *self.strides, parameters, self.given, (),
             (), scale, 0),
            plan.prepare,
        )  # fmt: skip
        run(spread_rows, of_places, (lines, numbers, done, *self.spread[0], *of_call), self.spread[1])
        if plan.turns is not None:
            plan.count(run, turns, len(turns), listed, call.q_offset, of_call[:3], scale)
        q, k, v, g, of_dk, of_dv = self.blocks
        run(
            attention_backward, of_keys,
            (q(call.query), k(call.key), v(call.value), g(grad_out), *blocks, of_dk(dk), of_dv(dv), turns, done,
             counter_of(device), call.q_offset, parameters, *call.sizes[:6], self.sizes[6:],
             captured + described(listed), (), scale, self.section, 0, call.sizes[0] * call.sizes[2], 0),
            plan.options,
        )  # fmt: skip
        run(gather_queries, of_queries, (sums, done, dq, *self.gather[0], *of_call), self.gather[1])
