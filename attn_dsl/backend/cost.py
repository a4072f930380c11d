"""What a call costs, counted: pairs, operations, bytes and memory, dense against scheduled. No tensor is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from attn_dsl.backend.cpu.functions import ScheduleFunctions

FORWARD, BACKWARD = 2, 5
"""Matrix products a pair: q k and p v; again q k, then dO v, dS k, dS q and p dO."""


@dataclass(frozen=True)
class Cost:
    """Counts of one call.

    `pairs` of query and key with all heads and batches, `visited` those in tiles that the schedule visits. Operations
    are multiplications and additions of the matrix products, `bytes` what must be read and written at least once,
    `memory` what is held beside inputs and outputs: a dense matrix of logits, or one number for each row.
    """

    pairs: int
    visited: int
    flops_dense: int
    flops: int
    flops_backward_dense: int
    flops_backward: int
    bytes: int
    memory_dense: int
    memory: int

    def __str__(self) -> str:
        share = 100 * self.visited / self.pairs
        return "\n".join(
            (
                f"pairs      {self.visited:,} of {self.pairs:,} visited ({share:.1f}%)",
                f"forward    {self.flops / 1e9:,.2f} GFLOP, dense {self.flops_dense / 1e9:,.2f}",
                f"backward   {self.flops_backward / 1e9:,.2f} GFLOP, dense {self.flops_backward_dense / 1e9:,.2f}",
                f"traffic    {self.bytes / 2**20:,.2f} MiB at least",
                f"memory     {self.memory / 2**20:,.2f} MiB beside the tensors, dense {self.memory_dense / 2**20:,.2f}",
            )
        )


def visited_pairs(
    functions: ScheduleFunctions,
    sizes: dict[str, int],
    scalars: tuple[object, ...],
    lists: tuple[object, ...],
    offset: int,
    block: tuple[int, int],
) -> int:
    """Pairs in the tiles that the schedule visits, over all batches and heads; tiles are cut to the lengths."""
    rows, keys = block
    batches = range(sizes["B"]) if functions.per_batch else range(1)
    heads = range(sizes["H"]) if functions.per_head else range(1)
    repeat = (sizes["B"] // len(batches)) * (sizes["H"] // len(heads))
    total = 0
    for b in batches:
        for h in heads:
            for start in range(0, sizes["Q"], rows):
                stop = min(start + rows, sizes["Q"])
                q0, q1 = offset + start, offset + stop - 1
                for begin, end, _ in functions.kv_ranges(b, h, q0, q1, offset, keys, scalars, lists):
                    total += (
                        repeat
                        * (stop - start)
                        * _keys(functions, b, h, q0, q1, offset, begin, end, keys, sizes["KV"], scalars, lists)
                    )
    return total


def visited_tiles(
    functions: ScheduleFunctions,
    sizes: Mapping[str, int],
    scalars: tuple[object, ...],
    offset: int,
    block: tuple[int, int],
) -> int:
    """Tiles that a schedule without questions about single tiles visits, over all batches and heads."""
    rows, keys = block
    batches, heads = range(sizes["B"] if functions.per_batch else 1), range(sizes["H"] if functions.per_head else 1)
    last = offset + sizes["Q"] - 1
    total = 0
    for b in batches:
        for h in heads:
            for q0 in range(offset, last + 1, rows):
                q1 = min(q0 + rows - 1, last)
                ranges = functions.kv_ranges(b, h, q0, q1, offset, keys, scalars, ())
                total += sum(max(end - begin, 0) for begin, end, _ in ranges)
    return total * (sizes["B"] // len(batches)) * (sizes["H"] // len(heads))


def _keys(
    functions: ScheduleFunctions,
    b: int,
    h: int,
    q0: int,
    q1: int,
    offset: int,
    begin: int,
    end: int,
    block: int,
    kv_len: int,
    scalars: tuple[object, ...],
    lists: tuple[object, ...],
) -> int:
    """Keys of the tiles `[begin, end)` that are not skipped."""
    skip = functions.kv_skip
    if skip is None:
        return max(min(end * block, kv_len) - begin * block, 0)
    tiles = ((at * block, min(at * block + block, kv_len)) for at in range(begin, end))
    return sum(k1 - k0 for k0, k1 in tiles if not skip(b, h, q0, q1, k0, k1 - 1, offset, scalars, lists))


def cost(visited: int, sizes: dict[str, int], value_dim: int, dtype: torch.dtype) -> Cost:
    """The counts that follow from the number of visited pairs."""
    batch, heads, kv_heads, q_len, kv_len, dim = (sizes[name] for name in ("B", "H", "HK", "Q", "KV", "D"))
    pairs = batch * heads * q_len * kv_len
    forward, backward = 2 * (dim + value_dim), 2 * (3 * dim + 2 * value_dim)
    rows, keys = batch * heads * q_len, batch * kv_heads * kv_len
    width = dtype.itemsize
    return Cost(
        pairs=pairs,
        visited=visited,
        flops_dense=pairs * forward,
        flops=visited * forward,
        flops_backward_dense=pairs * backward,
        flops_backward=visited * backward,
        bytes=(rows + keys) * (dim + value_dim) * width + rows * 4,
        memory_dense=pairs * width,
        memory=rows * 4,
    )
