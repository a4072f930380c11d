"""Caches in pages, or in 8 bits, for the tile loops: the slabs that a row may see, laid out one behind the other.

A slab is a page, or without a page table what a batch entry holds. Memory for the rest is asked for and never touched.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attn_dsl.backend.binding import Call
from attn_dsl.backend.cpu.pieces import BLOCK
from attn_dsl.backend.cpu.problem import Problem
from attn_dsl.errors import BindingError
from attn_dsl.passes.lengths import KEY_SCALE, KV_LEN, PAGE_TABLE, VALUE_SCALE


@torch.no_grad()
def gathered(problem: Problem, call: Call) -> Call:
    """The call on `key [B, HK, KV, D]` and `value [B, HK, KV, DV]` in the dtype of the arithmetic."""
    size = call.key.shape[2]
    table = call.tensors.get(PAGE_TABLE)
    if table is None:
        table = torch.arange(problem.batch, dtype=torch.int32).view(-1, 1)
    entries, numbers = _visited(problem, size, table.shape[1])
    slabs = table[entries, numbers].long()
    if KV_LEN in call.tensors:  # a block may reach past the keys that there are: some page stands for what is masked
        slabs = torch.where(numbers * size < call.tensors[KV_LEN][entries], slabs, 0)
    outside = slabs[(slabs < 0) | (slabs >= call.key.shape[0])]
    if outside.numel():
        expected = f"expected pages from 0 to {call.key.shape[0] - 1} where there are keys"
        raise BindingError(f"`{PAGE_TABLE}`: {expected}, got {int(outside[0])}")
    found = {}
    for name, pool, scale in (("key", call.key, KEY_SCALE), ("value", call.value, VALUE_SCALE)):
        rows = pool[slabs].to(problem.dtype)
        if scale in call.tensors:
            rows *= call.tensors[scale][slabs][:, :, None, None].to(problem.dtype)
        whole = rows.new_empty((problem.batch, problem.kv_heads, table.shape[1], *pool.shape[2:]))
        whole.transpose(1, 2)[entries, numbers] = rows
        found[name] = whole.flatten(2, 3)
    return replace(call, key=found["key"], value=found["value"])


def _visited(problem: Problem, size: int, count: int) -> tuple[Tensor, Tensor]:
    """(batch entries, numbers within them) of the slabs of `size` keys that the schedule reaches from some row."""
    visited = torch.zeros(problem.batch, count, dtype=torch.bool)
    for b in range(problem.batch):
        offset = problem.offset(b)
        place = (offset, offset + problem.q_len - 1, offset, BLOCK, problem.scalars, problem.lists)
        for h in range(problem.heads if problem.schedule.per_head else 1):
            for begin, end, _ in problem.schedule.kv_ranges(b, h, *place):
                visited[b, begin * BLOCK // size : -(-end * BLOCK // size)] = True
    entries, numbers = visited.nonzero(as_tuple=True)
    return entries, numbers
