"""What is done row by row around the backward kernel where it goes by strips of a grid (`passes/order_grid.py`).

A query lies in the boxes of two or three strips. Before: its log-sum-exp and delta go to each of its places. After: dQ
is the sum of what its places have.
"""

import triton
import triton.language as tl

from attn_dsl.backend.portable.device import captured, scalar, scalars_of


@triton.jit(do_not_specialize=["width", "height", "own_tiles", "heads", "parameters", "sizes", "tensors", "scale"])
def spread_rows(
        given, numbers, done, width, height, own_tiles, heads, parameters, sizes, tensors, scale, BOX: tl.constexpr,
        COLUMNS: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """numbers [B * H, 2, Q rounded up to QUERIES] float32, H and Q being those of strips, and zeros in `done`.

    given [B * heads, 2, own_tiles * QUERIES] has the numbers by positions. One program for ROWS places of a head. A
    place outside of the grid has the log-sum-exp of a row without keys.
    """
    tiles = tl.cdiv(scalar(sizes[3], False), QUERIES)
    parts = tiles * (QUERIES // ROWS)
    pair, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    b, h = pair // scalar(sizes[1], False), pair % scalar(sizes[1], False)
    scalars, tensors = scalars_of(parameters + sizes + (scale,), False), captured(tensors, False)
    head, y0, x0 = BOX(b, h, part * ROWS, scalars, tensors)
    place = tl.arange(0, ROWS)
    y, x = y0 + place // COLUMNS, x0 + place % COLUMNS
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    source = given + (b * heads + head).to(tl.int64) * (2 * own_tiles * QUERIES) + y * width + x
    target = numbers + pair.to(tl.int64) * (2 * tiles * QUERIES) + part * ROWS + place
    tl.store(target, tl.load(source, mask=inside, other=float("inf")))
    tl.store(target + tiles * QUERIES, tl.load(source + own_tiles * QUERIES, mask=inside, other=0.0))
    words = done + (pair * tiles + part * ROWS // QUERIES) * WORDS
    tl.store(words + tl.arange(0, WORDS), tl.zeros([WORDS], tl.int32))


@triton.jit(do_not_specialize=["width", "height", "heads", "strips", "parameters", "sizes", "tensors", "scale"])
def gather_queries(
        sums, done, dq, width, height, heads, strips, parameters, sizes, tensors, scale, BOX: tl.constexpr,
        COLUMNS: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, ACROSS: tl.constexpr,
        DOWN: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """dq [B, heads, height * width, DIM] = scale * the sum of `sums` over the strips that have a query, where
    WORDS of `done` say that anybody stored any.

    One program for DOWN rows of ACROSS columns of a head.
    """
    across, down = tl.cdiv(width, ACROSS), tl.cdiv(height, DOWN)
    piece, pair = tl.program_id(0) % (across * down), tl.program_id(0) // (across * down)
    b, head = pair // heads, pair % heads
    first = piece % across * ACROSS
    number = tl.arange(0, ACROSS * DOWN)
    y, x = piece // across * DOWN + number // ACROSS, first + number % ACROSS
    # [half, n / 8, warp, lane / 4, lane % 4, row / 8, n % 2], as in `finish_queries`, of both halves. Eight columns of
    # some rows are next to each other: as an axis of their own, they are what lanes of a warp read.
    eight, column = tl.arange(0, D // 8)[None, :, None], tl.arange(0, 8)[None, None, :]
    by_column = eight * 512 + column // 2 * 4 + column % 2
    scalars, tensors = scalars_of(parameters + sizes + (scale,), False), captured(tensors, False)
    tiles = tl.cdiv(scalar(sizes[3], False), QUERIES)
    total = tl.zeros([ACROSS * DOWN, D // 8, 8], tl.float32)
    for strip in range(strips):
        _, y0, x0 = BOX(b, strip * heads + head, 0, scalars, tensors)
        if (x0 < first + ACROSS) & (x0 + COLUMNS > first):
            place = (y - y0) * COLUMNS + x - x0
            keep = (y < height) & (x < width) & (x >= x0) & (x < x0 + COLUMNS)
            own = ((b * strips + strip) * heads + head).to(tl.int64) * tiles
            stored = tl.load(done + (own + place // QUERIES) * WORDS, mask=keep, other=0) != 0
            row = place % 64
            by_row = place // 64 * (64 * D) + row // 16 * 128 + row % 8 * 16 + row // 8 % 2 * 2
            sources = sums + own * (QUERIES * D) + (by_row[:, None, None] + by_column)
            found = tl.load(sources, mask=keep[:, None, None], other=0.0)
            total += tl.where(stored[:, None, None], found, 0.0)
    total = tl.reshape(total, [ACROSS * DOWN, D])
    column = tl.arange(0, D)
    keep = ((y < height) & (x < width))[:, None]
    if D != DIM:
        keep = keep & (column < DIM)[None, :]
    places = dq + pair.to(tl.int64) * height * width * DIM + ((y * width + x)[:, None] * DIM + column[None, :])
    tl.store(places, (total * scale).to(dq.dtype.element_ty), mask=keep)
