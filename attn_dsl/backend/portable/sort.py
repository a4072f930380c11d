"""Positions in the order of what a tensor holds, stable, and the runs of equal elements: one kernel, no more memory.

A program finds where the positions of one chunk go. It counts the elements of the whole row by value, in bins; where
the values of a row span more than there are bins, it compares with every element instead.
"""

import triton
import triton.language as tl

from attn_dsl.backend.portable.device import scalar


@triton.jit
def _read(row, stride, first, length, COUNT: tl.constexpr):
    """(positions, whether they are inside, elements) from a position on."""
    place = first + tl.arange(0, COUNT)
    inside = place < length
    return place, inside, tl.load(row + place * stride, mask=inside, other=0)


@triton.jit
def _store_end(codes, blocks, row, place, end, edge, inside, length, BEYOND: tl.constexpr, BLOCK: tl.constexpr):
    """An end of the runs that places are in: relative to the block, if it lies there, and at its edge as it is."""
    block = place // BLOCK
    code = tl.where(end // BLOCK == block, end - block * BLOCK, BEYOND)
    tl.store(codes + row * length + place, code.to(tl.uint8), mask=inside)
    tl.store(blocks + row * tl.cdiv(length, BLOCK) + block, end, mask=inside & edge)


@triton.jit
def _store(
        order, first_codes, first_blocks, last_codes, last_blocks, row, position, place, first, last, inside, length,
        BLOCK: tl.constexpr
):  # fmt: skip
    """Note where positions go, and the ends of the runs there; each place is that of one position."""
    if order is not None:
        tl.store(order + row * length + place, position.to(order.dtype.element_ty), mask=inside)
    if first_codes is not None:
        edge = place % BLOCK == 0
        _store_end(first_codes, first_blocks, row, place, first, edge, inside, length, 0, BLOCK)
    if last_codes is not None:
        edge = (place % BLOCK == BLOCK - 1) | (place == length - 1)
        _store_end(last_codes, last_blocks, row, place, last, edge, inside, length, BLOCK - 1, BLOCK)


@triton.jit(do_not_specialize=["strides", "rows", "length"])
def sort_positions(
        tensor, order, first_codes, first_blocks, last_codes, last_blocks, strides, rows, length, CHUNK: tl.constexpr,
        PART: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The elements of `tensor` [rows 0, rows 1, length] decide where each position goes in its row.

    order     [rows, length]    the positions, equal elements in the order given
    codes     [rows, length]    uint8, the first or last place of the run that a place is in, if it lies in the block of
                                BLOCK places; else 0 for a first, BLOCK - 1 for a last place
    blocks    [rows, blocks]    int32, that of the first or last place of each block

    What is not wanted is None. One program for CHUNK positions, PART of which are looked at together.
    """
    length = scalar(length, False)
    chunks = tl.cdiv(length, CHUNK)
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    inner = scalar(rows, False)
    base = tensor + (row // inner) * scalar(strides[0], True) + (row % inner) * scalar(strides[1], True)
    stride = scalar(strides[2], True)
    low = tl.load(base).to(tl.int64)
    high = low
    for c in range(chunks):
        _, inside, x = _read(base, stride, c * CHUNK, length, CHUNK)
        x = x.to(tl.int64)
        low = tl.minimum(low, tl.min(tl.where(inside, x, low)))
        high = tl.maximum(high, tl.max(tl.where(inside, x, high)))
    ends = first_codes, first_blocks, last_codes, last_blocks
    if (high - low >= 0) & (high - low < BINS):  # a span of 64 bits may be less than 0
        total, before = tl.zeros([BINS], tl.int32), tl.zeros([BINS], tl.int32)
        for c in range(chunks):
            _, inside, x = _read(base, stride, c * CHUNK, length, CHUNK)
            found = tl.histogram((x.to(tl.int64) - low).to(tl.int32), BINS, mask=inside)
            total += found
            before += found * (c < chunk).to(tl.int32)
        first = tl.cumsum(total, 0) - total
        for part in range(CHUNK // PART):
            position, inside, x = _read(base, stride, chunk * CHUNK + part * PART, length, PART)
            x = tl.where(inside, (x.to(tl.int64) - low).to(tl.int32), 0)
            earlier = tl.arange(0, PART)[None, :] < tl.arange(0, PART)[:, None]
            own = tl.sum((earlier & (x[None, :] == x[:, None])).to(tl.int32), 1)
            begin = tl.gather(first, x, 0)
            place = begin + tl.gather(before, x, 0) + own
            last = begin + tl.gather(total, x, 0) - 1
            _store(order, *ends, row, position, place, begin, last, inside, length, BLOCK)
            before += tl.histogram(x, BINS, mask=inside)
    else:
        for part in range(CHUNK // PART):
            position, inside, x = _read(base, stride, chunk * CHUNK + part * PART, length, PART)
            less, equal, earlier = tl.zeros([PART], tl.int32), tl.zeros([PART], tl.int32), tl.zeros([PART], tl.int32)
            for c in range(tl.cdiv(length, PART)):
                other, there, y = _read(base, stride, c * PART, length, PART)
                same = there[None, :] & (y[None, :] == x[:, None])
                less += tl.sum((there[None, :] & (y[None, :] < x[:, None])).to(tl.int32), 1)
                equal += tl.sum(same.to(tl.int32), 1)
                earlier += tl.sum((same & (other[None, :] < position[:, None])).to(tl.int32), 1)
            _store(order, *ends, row, position, less + earlier, less, less + equal - 1, inside, length, BLOCK)
