"""Rows of a tensor gathered in another order, or scattered back: one read and one write of each."""

import triton
import triton.language as tl

from attn_dsl.backend.portable.device import scalar, strides_of


@triton.jit(do_not_specialize=["strides", "index_strides", "heads", "rows"])
def permute_rows(
        x, made, index, strides, index_strides, heads, rows, D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
        DENSE: tl.constexpr, SCATTER: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """made[..., i, :] = x[..., index[i], :] or, if SCATTER, made[..., index[i], :] = x[..., i, :].

    `made` is contiguous [B, H, rows, D]. One program for ROWS rows of a head.
    """
    strides = strides_of(strides, UNIT)
    heads, rows = scalar(heads, False), scalar(rows, False)
    tiles = tl.cdiv(rows, ROWS)
    pair, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    here = tile * ROWS + tl.arange(0, ROWS)
    inside = here < rows
    index += b * scalar(index_strides[0], True) + h * scalar(index_strides[1], True)
    there = tl.load(index + here * scalar(index_strides[2], True), mask=inside, other=0)
    if SCATTER:
        source, target = here.to(tl.int64), there
    else:
        source, target = there, here.to(tl.int64)
    column = tl.arange(0, WIDTH)
    keep = inside[:, None] & (column < D)[None, :]
    across = column if DENSE else column * strides[3]
    x += b * strides[0] + h * strides[1]
    found = tl.load(x + source[:, None] * strides[2] + across[None, :], mask=keep)
    made += pair.to(tl.int64) * rows * D
    tl.store(made + target[:, None] * D + column[None, :], found, mask=keep)
