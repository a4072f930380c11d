"""Launch the Hopper backward kernel over strips of a grid (`passes/order_grid.py`): strips of keys, boxes of queries.

Tensors are those of the caller, read in boxes and, dK and dV, written so; sizes of the call are those of strips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_dsl.backend.hopper.backward import attention_backward
from attn_dsl.backend.hopper.backward_boxes import gather_queries, spread_rows
from attn_dsl.backend.hopper.backward_rows import prepare_rows
from attn_dsl.backend.hopper.configs_backward import KEYS
from attn_dsl.backend.hopper.launch import BlockShape
from attn_dsl.backend.portable.device import plain
from attn_dsl.backend.portable.host import described, empty, empty_like, multiprocessors, number
from attn_dsl.backend.portable.launch import LAYOUTS, Call
from attn_dsl.backend.portable.listing import Kind
from attn_dsl.backend.portable.run import Options, Runner

if TYPE_CHECKING:
    from attn_dsl.backend.hopper.launch_backward import Kernels, _Plan, _Scratch

ROWS = 64
"""Places of a program that spreads rows."""
SUMS = 2**29
"""Bytes of float32 sums of dQ that are held at once; where there are more, batch entries come one after the other."""
ACROSS, DOWN = 16, 4
"""Columns and rows of a program that gathers dQ."""


@dataclass(frozen=True)
class Launch:
    """As that of `launch_backward`: gradients are in the order of the caller, as are `out` and `shifted`.

    captured: what is known of captured tensors beside their addresses. parts: of the batch, one after the other.
    """

    plan: _Plan
    parameters: tuple[Any, ...]
    captured: tuple[tuple[Any, ...], ...]
    scale: float
    parts: tuple[tuple[slice, _Part], ...]
    kind: Kind | None
    shapes: tuple[tuple[int, ...], ...] = ()

    @staticmethod
    def of(kernels: Kernels, plan: _Plan, call: Call, out: Tensor, grad_out: Tensor) -> Launch:
        batch, heads, rows = call.sizes[0], call.sizes[1], plan.config.queries
        bytes = 4 * heads * -(-call.sizes[3] // rows) * rows * plan.dims[0]
        numbered = any("b" in root.depends for root in kernels.portable.variant.roots)
        count = batch if numbered else min(batch, max(1, SUMS // bytes))
        parts = [slice(first, min(first + count, batch)) for first in range(0, batch, count)]
        return Launch(
            plan, tuple(map(number, call.parameters)), tuple(rest for _, *rest in described(call.tensors)),
            float(call.scale),
            tuple((part, _found(kernels, plan, _of_batch(call, part), out[part], grad_out[part])) for part in parts),
            kernels.portable.kind_of_list(call, rows, KEYS, transposed=True),
        )  # fmt: skip

    def __call__(
        self,
        run: Runner,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tensors: Sequence[Tensor],
        q_offset: int | Tensor,
        out: Tensor,
        shifted: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        counter: Tensor,
        shares: Sequence[Tensor],
        listed: Sequence[Tensor],
        results: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value. `listed` is what `kind` finds, the same for all entries of a batch that
        has parts. There are no `shares` and `results`."""
        assert not shares and not results
        grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
        captured = tuple([(x, *rest) for x, rest in zip(tensors, self.captured, strict=True)])
        of_call = self.parameters, captured, q_offset, self.scale
        dq, dk, dv = (empty_like(x) for x in (query, key, value))
        given = (query, key, value, out, shifted, grad_out, grad_lse, dq, dk, dv)
        for part, launched in self.parts:
            some = [None if x is None else x[part] for x in given] if len(self.parts) > 1 else given
            launched(run, self.plan, counter, listed, of_call, *some)
        return dq, dk, dv


def _of_batch(call: Call, part: slice) -> Call:
    query, key, value = call.query[part], call.key[part], call.value[part]
    return replace(call, query=query, key=key, value=value, dims=(query.shape[0], *call.sizes[1:6]))


def _found(kernels: Kernels, plan: _Plan, call: Call, out: Tensor, grad_out: Tensor) -> _Part:
    tensors = (call.query, call.key, call.value, out, grad_out)
    at = (plan.options, *(x.shape for x in tensors), *(x.stride() for x in tensors), call.query.device, call.sizes)
    found = kernels.boxed.get(at)
    if found is None:
        if len(kernels.boxed) >= LAYOUTS:
            kernels.boxed.clear()
        found = kernels.boxed[at] = _Part.of(kernels, plan, call, out, grad_out)
    assert isinstance(found, _Part)
    return found


@dataclass(frozen=True)
class _Part:
    """Launches for batch entries that are done at once.

    blocks: of query, key, value, output gradient and the gradients of key and value. lines: sizes of what
    `prepare_rows` makes. given: sizes of the call in the order given. dims: (B, H, HK, Q, KV, D) of strips. programs:
    of each kernel.
    """

    blocks: tuple[BlockShape, ...]
    scratch: _Scratch
    strides: tuple[tuple[int, ...], ...]
    sizes: tuple[Any, ...]
    given: tuple[int, ...]
    lines: tuple[int, int, int]
    spread: tuple[tuple[int, ...], Options]
    gather: tuple[tuple[int, ...], Options]
    section: int
    dims: tuple[int, ...]
    programs: tuple[int, int, int, int]

    @staticmethod
    def of(kernels: Kernels, plan: _Plan, call: Call, out: Tensor, grad_out: Tensor) -> _Part:
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
        return _Part(
            tuple(BlockShape.of(x, count, columns, width, across) for x, count, columns, across in grids),
            _Scratch.of(plan, batch * heads, tiles, key_tiles),
            tuple((*(plain(stride // 8) for stride in x.stride()[:3]), plain(1)) for x in (out, grad_out)),
            (*sizes, *extents),
            (*map(plain, given), *extents),
            (batch * own_heads, 2, own_tiles * rows),
            ((width, height, own_tiles, own_heads), Options({**box, "ROWS": ROWS})),
            ((width, height, own_heads, heads // own_heads), Options(gather)),
            kernels.section(batch * kv_heads, key_tiles, multiprocessors(call.query.device), plan.turns is not None),
            call.sizes[:6],
            (batch * own_heads * own_tiles * parts, batch * heads * tiles * parts,
             min(batch * kv_heads * key_tiles, multiprocessors(call.query.device)),
             batch * own_heads * -(-height // DOWN) * -(-width // ACROSS)),
        )  # fmt: skip

    def __call__(
        self,
        run: Runner,
        plan: _Plan,
        counter: Tensor,
        listed: Sequence[Tensor],
        of_call: tuple[Any, ...],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        shifted: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """Write `dq`, `dk` and `dv`. of_call: parameters, captured tensors, `q_offset` and scale."""
        parameters, captured, q_offset, scale = of_call
        rest = parameters, self.sizes, captured
        numbers, sums, turns, done, blocks = self.scratch.made(query.device)
        lines = empty(self.lines, torch.float32, query.device)
        of_rows, of_places, of_keys, of_queries = self.programs
        run(
            prepare_rows, of_rows,
            (out, grad_out, grad_lse, shifted, lines, None, q_offset, *self.strides, parameters, self.given, (), (),
             scale, 0),
            plan.prepare,
        )  # fmt: skip
        run(spread_rows, of_places, (lines, numbers, done, *self.spread[0], *rest, scale), self.spread[1])
        if plan.turns is not None:
            plan.count(run, turns, len(turns), listed, q_offset, rest, scale)
        of_q, of_k, of_v, of_grad, of_dk, of_dv = self.blocks
        run(
            attention_backward, of_keys,
            (of_q(query), of_k(key), of_v(value), of_grad(grad_out), *blocks, of_dk(dk), of_dv(dv), turns, done,
             counter, q_offset, parameters, *self.dims, self.sizes[6:], captured + described(listed), (), scale,
             self.section, 0, self.dims[0] * self.dims[2], 0),
            plan.options,
        )  # fmt: skip
        run(gather_queries, of_queries, (sums, done, dq, *self.gather[0], *rest, scale), self.gather[1])
