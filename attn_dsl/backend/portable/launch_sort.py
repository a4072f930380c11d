"""Launch the kernels that sort positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_dsl.backend.portable.device import plain
from attn_dsl.backend.portable.host import empty
from attn_dsl.backend.portable.run import Options, Runner, launch
from attn_dsl.backend.portable.sort import count_bins, sort_positions
from attn_dsl.backend.portable.tape import LaunchesByKind

LONGEST = 2**14
"""Positions of a row; of rows with values from a wide range every program sorts all that there are."""
SECTION, BINS = 1024, 256
"""Positions of a program, and numbers that it keeps of them for as long as the kernels run: half a byte a position."""
COUNT_WARPS, SORT_WARPS = 8, 8
"""Where 4 warps sort, ptxas spills 16 bytes on sm_80, and wants 127 registers instead of 103 on sm_90."""
_known: dict[int, tuple[Options, Options]] = {}
_launches = LaunchesByKind()


def sorted_positions(
    tensor: Tensor, block: int, ends: Sequence[str], *, ordered: bool = True, run: Runner = launch
) -> tuple[Tensor | None, dict[str, tuple[Tensor, Tensor]]]:
    """(order, ends of runs by name, `first` or `last`) of integers [rows 0, rows 1, length], length <= LONGEST.

    order: int16, stable; None unless `ordered`. ends: uint8 of the shape of the tensor, int32 [.., .., blocks].
    """
    wanted = tuple(ends)
    if run is launch and tensor.is_cuda:

        def function(run: Runner, x: Tensor) -> list[Tensor]:
            return _made(x, block, wanted, ordered=ordered, run=run)

        found = iter(_launches((block, wanted, ordered), function, (tensor,)))
    else:
        found = iter(_made(tensor, block, wanted, ordered=ordered, run=run))
    order = next(found) if ordered else None
    return order, {end: (next(found), next(found)) for end in wanted}


def _made(tensor: Tensor, block: int, ends: Sequence[str], *, ordered: bool, run: Runner) -> list[Tensor]:
    """The order, if it is wanted, then both tensors of each end."""
    outer, inner, length = tensor.shape
    blocks = (outer, inner, -(-length // block))
    order = empty((outer, inner, length), torch.int16, tensor.device) if ordered else None
    made = {
        end: (empty((outer, inner, length), torch.uint8, tensor.device), empty(blocks, torch.int32, tensor.device))
        for end in ends
    }
    nothing = (None, None)
    if block not in _known:
        _known[block] = _options(block)
    counting, sorting = _known[block]
    sections = -(-length // SECTION)
    counts = empty((outer * inner, sections, BINS), torch.int16, tensor.device)
    ranges = empty((outer * inner, sections, 2), tensor.dtype, tensor.device)
    shape = tuple(map(plain, tensor.stride())), plain(inner), plain(length)
    run(count_bins, outer * inner * sections, (tensor, counts, ranges, *shape), counting)
    run(
        sort_positions, outer * inner * sections,
        (tensor, counts, ranges, order, *made.get("first", nothing), *made.get("last", nothing), *shape), sorting,
    )  # fmt: skip
    return [*([] if order is None else [order]), *(x for pair in made.values() for x in pair)]


def _options(block: int) -> tuple[Options, Options]:
    """Of both kernels."""
    both = {"SECTION": SECTION, "BINS": BINS}
    sorting = {**both, "SECTIONS": LONGEST // SECTION, "THREADS": 32 * SORT_WARPS, "BLOCK": block}
    return Options({**both, "num_warps": COUNT_WARPS}), Options({**sorting, "num_warps": SORT_WARPS})
