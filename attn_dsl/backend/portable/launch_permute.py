"""Launch the kernel that puts rows in another order."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from attn_dsl.backend.portable.device import plain
from attn_dsl.backend.portable.host import in_units, unit_of
from attn_dsl.backend.portable.permute import permute_rows
from attn_dsl.backend.portable.run import Options, launch

ROWS = 32
"""Of one program."""
_known: dict[tuple[int, int, bool, bool], Options] = {}


def permuted(x: Tensor, index: Tensor, *, scatter: bool) -> Tensor:
    """Row i of [B, H, S, D] is row `index[b, h, i]` of x or, if `scatter`, the other way about; contiguous.

    index: int64 [B, H, S], broadcast or not; each row once.
    """
    batch, heads, rows, dim = x.shape
    made = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    unit, dense = unit_of(x), x.stride(3) == 1
    strides = tuple(map(plain, index.expand(x.shape[:3]).stride()))
    launch(
        permute_rows, batch * heads * triton.cdiv(rows, ROWS),
        (x, made, index, in_units(x, unit), strides, plain(heads), plain(rows)), _options(dim, unit, dense, scatter),
    )  # fmt: skip
    return made


def _options(dim: int, unit: int, dense: bool, scatter: bool) -> Options:
    key = (dim, unit, dense, scatter)
    if key not in _known:
        width = triton.next_power_of_2(dim)
        options = {"D": dim, "WIDTH": width, "UNIT": unit, "DENSE": dense, "SCATTER": scatter, "ROWS": ROWS}
        _known[key] = Options({**options, "num_warps": 4})
    return _known[key]
