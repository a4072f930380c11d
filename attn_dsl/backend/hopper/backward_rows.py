"""What is done row by row around the backward kernel, at the speed of the memory.

Before: delta and lse as the kernel wants them, and zeros where dQ will be summed. After: dQ from those sums, which lie
in the order of the tensor cores' registers. What stands between the kernels is for the pairs of batch and head of one
launch, from pair `first` of the call on.
"""

import triton
import triton.language as tl

from attn_dsl.backend.portable.device import ADD, LOG2E, captured, first_position, scalar, scalars_of, strides_of


@triton.jit
def _rows(base, strides, b, h, rows, inside, D: tl.constexpr, DIM: tl.constexpr):
    column = tl.arange(0, D)
    base += b * strides[0] + h * strides[1]
    places = base + rows.to(tl.int64)[:, None] * strides[2] + column[None, :]
    keep = inside[:, None] if D == DIM else inside[:, None] & (column[None, :] < DIM)
    return tl.load(places, mask=keep, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["q_offset", "out_strides", "grad_strides", "parameters", "sizes", "tensors", "shares",
                               "scale", "first"])  # fmt: skip
def prepare_rows(
        out, grad_out, grad_lse, lse, numbers, sums, q_offset, out_strides, grad_strides, parameters, sizes, tensors,
        shares, scale, first, SLOPE: tl.constexpr, SINK: tl.constexpr, ROW: tl.constexpr, SINK_GRAD: tl.constexpr,
        ADD_SINK: tl.constexpr, ADD_ROW_SUMS: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr,
        D: tl.constexpr, DV: tl.constexpr,
        VALUE_DIM: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """numbers [pairs, 2, Q rounded up to QUERIES] float32, lse in base 2 and delta, and zeros in `sums`, if any.

    lse is plus infinity where a row has no key or there is no row, so that its probabilities are 0; where the logits
    have a slope along k - q, `slope * (q - first q of the tile)` is added. One program for ROWS rows of a head.

    A sink takes the share p = exp(sink - lse) of a row and no value, so its gradient is -p * delta: where SINK_GRAD is
    given, that reaches what the sink reads. The gradients of a row's logits sum to dLSE + p * delta, which is what
    ADD_ROW_SUMS adds to the entries of tensors by query.
    """
    out_strides, grad_strides = strides_of(out_strides, UNIT), strides_of(grad_strides, UNIT)
    heads, q_len = scalar(sizes[1], False), scalar(sizes[3], False)
    padded = tl.cdiv(q_len, QUERIES) * QUERIES
    tiles = padded // ROWS
    own, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    pair = first + own
    b, h = pair // heads, pair % heads
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < q_len
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    o = _rows(out, out_strides, b64, h64, rows, inside, DV, VALUE_DIM)
    g = _rows(grad_out, grad_strides, b64, h64, rows, inside, DV, VALUE_DIM)
    delta = tl.sum(o * g, 1)
    place = pair.to(tl.int64) * q_len + rows
    if grad_lse is not None:
        delta -= tl.load(grad_lse + place, mask=inside, other=0.0)
    row = tl.load(lse + place, mask=inside, other=float("-inf"))
    if SINK_GRAD is not None or ADD_ROW_SUMS is not None:
        scalars, found = scalars_of(parameters + sizes + (scale,), False), captured(tensors, False)
        gradients, q = captured(shares, False), first_position(q_offset, b, tl.int32) + rows
        total = tl.zeros([ROWS], tl.float32)
        if grad_lse is not None:
            total += tl.load(grad_lse + place, mask=inside, other=0.0)
        if SINK is not None:
            logit = tl.zeros([ROWS], tl.float32) + SINK(b, h, scalars, found)
            if ROW is not None:
                logit -= ROW(b, h, q, False, scalars, found)
            p = tl.where(row == float("-inf"), 0.0, tl.exp2((logit - row) * LOG2E))
            total += p * delta
            if SINK_GRAD is not None:
                amounts = SINK_GRAD(-p * delta, b, h, scalars, found)
                ADD_SINK(amounts, b, h, 0, 0, 0, 0, None, False, scalars, found, gradients, None, None, ADD)
        if ADD_ROW_SUMS is not None:
            ADD_ROW_SUMS(tl.where(row == float("-inf"), 0.0, total), b, h, q, scalars, found, gradients)
    row = tl.where(row == float("-inf"), float("inf"), row * LOG2E)
    if SLOPE is not None:
        scalars = scalars_of(parameters + sizes + (scale,), False)
        slope = SLOPE(b, h, scalars, captured(tensors, False))
        row += slope * (rows % QUERIES).to(tl.float32)
    target = numbers + own.to(tl.int64) * (2 * padded) + rows
    tl.store(target, row)
    tl.store(target + padded, delta)
    if sums is not None:
        zeros = sums + (own.to(tl.int64) * padded + tile * ROWS) * D
        tl.store(zeros + tl.arange(0, ROWS * D), tl.zeros([ROWS * D], tl.float32))


@triton.jit(do_not_specialize=["dq_strides", "sizes", "scale", "first"])
def finish_queries(
        sums, dq, dq_strides, sizes, scale, first, QUERIES: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
        UNIT: tl.constexpr
):  # fmt: skip
    """dq [B, H, Q, DIM] = scale * sums: one program for the half tile that a warpgroup summed."""
    strides = strides_of(dq_strides, UNIT)
    WIDTH: tl.constexpr = D if QUERIES == 128 else D // 2
    q_len = scalar(sizes[3], False)
    halves = tl.cdiv(q_len, QUERIES) * 2
    half, own = tl.program_id(0) % halves, (tl.program_id(0) // halves).to(tl.int64)
    x = tl.load(sums + (own * halves + half) * (64 * WIDTH) + tl.arange(0, 64 * WIDTH))
    # n / 8, warp, lane / 4, lane % 4, row / 8, n % 2
    x = tl.reshape(x, [WIDTH // 8, 4, 8, 4, 2, 2])
    x = tl.reshape(tl.permute(x, (1, 4, 2, 0, 3, 5)), [64, WIDTH])
    row = half // 2 * QUERIES + tl.arange(0, 64)
    column = tl.arange(0, WIDTH)
    if QUERIES == 128:
        row += half % 2 * 64
    else:
        column += half % 2 * WIDTH
    keep = (row < q_len)[:, None]
    if D != DIM:
        keep = keep & (column < DIM)[None, :]
    heads = scalar(sizes[1], False)
    b, h = (first + own) // heads, (first + own) % heads
    places = dq + b * strides[0] + h * strides[1] + row.to(tl.int64)[:, None] * strides[2] + column[None, :]
    tl.store(places, (x * scale).to(dq.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["q_offset", "parameters", "sizes", "tensors", "scale", "first"])
def count_turns(
        turns, q_offset, parameters, sizes, tensors, scale, first, Q_RANGES: tl.constexpr, KEYS: tl.constexpr,
        QUERIES: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """turns [pairs, key tiles, query tiles] int32: how many earlier tiles of keys visit a tile of queries.

    One program for WIDTH tiles of queries of a head.
    """
    heads, q_len, kv_len = scalar(sizes[1], False), scalar(sizes[3], False), scalar(sizes[4], False)
    tiles, key_tiles = tl.cdiv(q_len, QUERIES), tl.cdiv(kv_len, KEYS)
    parts = tl.cdiv(tiles, WIDTH)
    part, own = tl.program_id(0) % parts, tl.program_id(0) // parts
    b, h = (first + own) // heads, (first + own) % heads
    scalars, tensors = scalars_of(parameters + sizes + (scale,), WIDE), captured(tensors, WIDE)
    start = first_position(q_offset, b, tl.int32)
    if WIDE:
        b, h, start = b.to(tl.int64), h.to(tl.int64), start.to(tl.int64)
    i = part * WIDTH + tl.arange(0, WIDTH)
    seen = tl.zeros([WIDTH], tl.int32)
    for j in range(key_tiles):
        k0 = j * KEYS
        if WIDE:
            k0 = k0.to(tl.int64)
        segments = Q_RANGES(b, h, k0, k0 + (KEYS - 1), start, QUERIES, scalars, tensors)
        visited = tl.zeros([WIDTH], tl.int1)
        for s in tl.static_range(len(segments)):
            visited = visited | ((i >= tl.maximum(segments[s][0], 0)) & (i < segments[s][1]))
        tl.store(turns + (own * key_tiles + j).to(tl.int64) * tiles + i, seen, mask=i < tiles)
        seen += visited.to(tl.int32)


@triton.jit(do_not_specialize=["listed", "sizes", "first"])
def count_listed_turns(
        turns, listed, sizes, first, KEYS: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr,
        LINES: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """As `count_turns`, of a list of query tiles by key tiles (`classify.py`): its rows, then its entries.

    LINES rows and CHUNK entries of each are read at a time.
    """
    heads, q_len, kv_len = scalar(sizes[1], False), scalar(sizes[3], False), scalar(sizes[4], False)
    tiles, key_tiles = tl.cdiv(q_len, QUERIES), tl.cdiv(kv_len, KEYS)
    parts = tl.cdiv(tiles, WIDTH)
    part, own = tl.program_id(0) % parts, tl.program_id(0) // parts
    b, h = (first + own) // heads, (first + own) % heads
    lists = captured(listed, True)
    rows, entries = lists[0], lists[1][0]
    rows_of_head = rows[0] + b * rows[2][0] + h * rows[2][1]
    i = part * WIDTH + tl.arange(0, WIDTH)
    seen = tl.zeros([WIDTH], tl.int32)
    for top in range(0, key_tiles, LINES):
        j = top + tl.arange(0, LINES)
        row, inside = rows_of_head + j * 4, j < key_tiles
        begin, last = tl.load(row, mask=inside, other=0), tl.load(row + 3, mask=inside, other=0)
        masked, full = tl.load(row + 1, mask=inside, other=0), tl.load(row + 2, mask=inside, other=0)
        visited = tl.zeros([LINES, WIDTH], tl.int32)
        for start in range(0, tl.max(masked + full), CHUNK):
            n = (start + tl.arange(0, CHUNK))[None, :]
            held = n < (masked + full)[:, None]
            place = tl.where(n < masked[:, None], begin[:, None] + n, last[:, None] - (n - masked[:, None]))
            entry = tl.where(held, tl.load(entries + place, mask=held, other=0).to(tl.int32), -1)
            visited += tl.sum((entry[:, :, None] == i[None, None, :]).to(tl.int32), 1)
        before = seen[None, :] + tl.cumsum(visited, 0) - visited
        places = (own * key_tiles + j).to(tl.int64)[:, None] * tiles + i[None, :]
        tl.store(turns + places, before, mask=inside[:, None] & (i < tiles)[None, :])
        seen += tl.sum(visited, 0)
