"""Launch the kernel that sorts positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_dsl.backend.portable.device import plain
from attn_dsl.backend.portable.host import empty
from attn_dsl.backend.portable.run import Options, Runner, launch
from attn_dsl.backend.portable.sort import sort_positions

LONGEST = 2**14
"""Positions of a row; of rows with values from a wide range every program reads all that there are."""
CHUNK, PART, BINS = 512, 32, 256
"""Parts of 64 take 248 registers where these take 72."""
_known: dict[int, Options] = {}


def sorted_positions(
    tensor: Tensor, block: int, ends: Sequence[str], *, ordered: bool = True, run: Runner = launch
) -> tuple[Tensor | None, dict[str, tuple[Tensor, Tensor]]]:
    """(order, ends of runs by name, `first` or `last`) of integers [rows 0, rows 1, length], length <= LONGEST.

    order: int16, stable; None unless `ordered`. ends: uint8 of the shape of the tensor, int32 [.., .., blocks].
    """
    outer, inner, length = tensor.shape
    blocks = (outer, inner, -(-length // block))
    order = empty((outer, inner, length), torch.int16, tensor.device) if ordered else None
    made = {
        end: (empty((outer, inner, length), torch.uint8, tensor.device), empty(blocks, torch.int32, tensor.device))
        for end in ends
    }
    nothing = (None, None)
    if block not in _known:
        _known[block] = Options({"CHUNK": CHUNK, "PART": PART, "BINS": BINS, "BLOCK": block, "num_warps": 4})
    run(
        sort_positions, outer * inner * -(-length // CHUNK),
        (tensor, order, *made.get("first", nothing), *made.get("last", nothing), tuple(map(plain, tensor.stride())),
         plain(inner), plain(length)),
        _known[block],
    )  # fmt: skip
    return order, made
