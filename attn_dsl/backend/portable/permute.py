"""Rows of tensors gathered in another order, or scattered back: one read and one write of each, one launch for all."""

import triton
import triton.language as tl

from attn_dsl.backend.portable.device import scalar, strides_of


@triton.jit(do_not_specialize=["parts"])
def permute_rows(
        place, parts, DIMS: tl.constexpr, UNIT: tl.constexpr, DENSE: tl.constexpr, SCATTER: tl.constexpr,
        ROWS: tl.constexpr
):  # fmt: skip
    """Of each part, made[..., i, :] = x[..., index[i], :] or, if SCATTER, made[..., index[i], :] = x[..., i, :].

    A part is (x, made, lines, index, strides of x, strides of index, heads, rows, programs): `made` is contiguous
    [B, H, rows, D], with D of DIMS; lines are pairs of contiguous [B, H, rows], of which the second becomes the first
    in the same order. One program for ROWS rows of a head. `place` is the first tensor made, which says where to run.
    """
    number = tl.program_id(0)
    for i in tl.static_range(len(parts)):
        programs = scalar(parts[i][8], False)
        if (number >= 0) & (number < programs):
            _permute(number, parts[i], DIMS[i], UNIT, DENSE, SCATTER, ROWS)
        number -= programs


@triton.jit
def _permute(
        number, part, D: tl.constexpr, UNIT: tl.constexpr, DENSE: tl.constexpr, SCATTER: tl.constexpr,
        ROWS: tl.constexpr
):  # fmt: skip
    WIDTH: tl.constexpr = triton.next_power_of_2(D)
    strides, index_strides = strides_of(part[4], UNIT), part[5]
    heads, rows = scalar(part[6], False), scalar(part[7], False)
    tiles = tl.cdiv(rows, ROWS)
    pair, tile = number // tiles, number % tiles
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    here = tile * ROWS + tl.arange(0, ROWS)
    inside = here < rows
    index = part[3] + b * scalar(index_strides[0], True) + h * scalar(index_strides[1], True)
    there = tl.load(index + here * scalar(index_strides[2], True), mask=inside, other=0).to(tl.int64)
    if SCATTER:
        source, target = here.to(tl.int64), there
    else:
        source, target = there, here.to(tl.int64)
    first = pair.to(tl.int64) * rows
    for i in tl.static_range(len(part[2])):
        number = tl.load(part[2][i][1] + first + source, mask=inside)
        tl.store(part[2][i][0] + first + target, number, mask=inside)
    column = tl.arange(0, WIDTH)
    keep = inside[:, None] & (column < D)[None, :]
    across = column if DENSE else column * strides[3]
    x = part[0] + b * strides[0] + h * strides[1]
    found = tl.load(x + source[:, None] * strides[2] + across[None, :], mask=keep)
    tl.store(part[1] + first * D + target[:, None] * D + column[None, :], found, mask=keep)
