"""The forward kernel: one program computes a tile of query rows against the key tiles that its ranges name.

Softmax runs online, in base 2: with x the logit times log2(e), m the running row maximum and l the running row sum,
p = 2 ** (x - m). A sink is a logit without a value: m starts at it, and l at 1.
"""

# ruff: noqa: E741, SIM108 (l is the row sum; static conditions as Triton knows them)

import triton
import triton.language as tl

from attn_dsl.backend.portable.device import (
    LN2,
    LOG2E,
    along_keys,
    bounds_of,
    captured,
    count,
    first_position,
    inner_products,
    load_rows,
    nth,
    own_mask,
    packed_program,
    place_rows,
    program,
    round_rows,
    scalar,
    scalars_of,
    scale_rows,
    slab,
    store_rows,
    strides_of,
    weighted_sum,
    widened,
    zero_rows,
)


@triton.jit
def _visit(
        tile, at, state, query, key, value, key_strides, value_strides, kv_len, factor, slope, b, h, q, q0, scalars,
        tensors, SCORE: tl.constexpr, MASK: tl.constexpr, KEY_MASK: tl.constexpr, MASKED: tl.constexpr,
        CONTIGUOUS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr,
        DV0: tl.constexpr, DV1: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, PAGE: tl.constexpr
):  # fmt: skip
    """Take one key tile, which stands `at` its slab, into the state (accumulator, m, l)."""
    acc, m, l = state
    columns = tl.arange(0, BN)
    first = tile * BN
    k = (first + columns)[None, :].to(q.dtype)
    loaded = None
    if MASKED:
        positions = (first + columns).to(q.dtype)
        loaded = own_mask(columns, kv_len - first, positions, b, h, KEY_MASK, scalars, tensors)
    key_base, lines = place_rows(key, first, columns, key_strides, at, BN, PAGE)
    value_base, lines = place_rows(value, first, columns, value_strides, at, BN, PAGE)
    keys = widened(load_rows(key_base, lines, key_strides, loaded, CONTIGUOUS, D, D0, D1), query[0].dtype)
    x = along_keys(inner_products(query, keys, PRECISION), at, 2)
    if SCORE is not None:
        x = SCORE(x, b, h, q, k, q0.to(q.dtype), first.to(q.dtype), not MASKED, scalars, tensors)
    if MASKED:
        keep = loaded[None, :]
        if MASK is not None:
            keep = keep & MASK(b, h, q, k, False, scalars, tensors)
        x = tl.where(keep, x, float("-inf"))

    # `factor` is positive, so the largest logit is the largest product; a row that saw nothing keeps m = -inf, p = 0.
    if slope is None:
        peak = tl.maximum(m, tl.max(x, 1) * factor)
        base = tl.where(peak == float("-inf"), 0.0, peak)
        p = tl.exp2(x * factor - base[:, None])
    else:  # slope * (k - q0) is a vector that all tiles share, plus a scalar for the tile
        x = x * factor + (slope * columns.to(tl.float32))[None, :]
        ahead = slope * (first - q0).to(tl.float32)
        peak = tl.maximum(m, tl.max(x, 1) + ahead)
        base = tl.where(peak == float("-inf"), 0.0, peak)
        p = tl.exp2(x - (base - ahead)[:, None])
    decay = tl.exp2(m - base)
    l = l * decay + tl.sum(p, 1)
    acc = scale_rows(acc, decay[:, None])
    rows = widened(load_rows(value_base, lines, value_strides, loaded, CONTIGUOUS, DV, DV0, DV1), query[0].dtype)
    acc = weighted_sum(acc, along_keys(p, at, 1).to(rows[0].dtype), rows, PRECISION)
    return acc, peak, l


@triton.jit(do_not_specialize=[
    "q_offset", "query_strides", "key_strides", "value_strides", "out_strides", "parameters", "sizes", "tensors",
    "scale", "section"])  # fmt: skip
def attention_forward(
        query, key, value, out, lse, shifted, q_offset, query_strides, key_strides, value_strides, out_strides,
        parameters, sizes, tensors, scale, section, SCORE: tl.constexpr, FULL_SCORE: tl.constexpr,
        FACTOR: tl.constexpr, SLOPE: tl.constexpr, MASK: tl.constexpr, KEY_MASK: tl.constexpr, ROW: tl.constexpr,
        SINK: tl.constexpr, KV_RANGES: tl.constexpr, SKIP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr,
        D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr,
        BN: tl.constexpr, UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
        PAGE: tl.constexpr = 0, SCALED: tl.constexpr = False, PACKED: tl.constexpr = False
):  # fmt: skip
    """out [B, H, Q, DV], lse [B, H, Q] and, where ROW is given, `shifted` [B, H, Q]: lse without the row term.

    sizes are (B, H, HK, Q, KV, D, extents...), `q_offset` is a number or a pointer to [B]. SINK gives the sink's logit.
    SCORE maps products of query and key to base-2 logits without the row term, FULL_SCORE does so on full tiles; where
    it is None, the logit is FACTOR times the product. Where SLOPE is given, slope * (k - q) is added, in base 2. PAGE
    and SCALED say how keys and values are stored, see `slab`; if PACKED, lse and `shifted` are [rows of all, H].
    """
    query_strides, key_strides = strides_of(query_strides, UNIT), strides_of(key_strides, UNIT)
    value_strides, out_strides = strides_of(value_strides, UNIT), strides_of(out_strides, UNIT)
    batch, heads, kv_heads, q_len, kv_len = scalars_of(sizes, False)[:5]
    wide = captured(tensors, True)
    if PACKED:
        ends, key_ends = wide[0], wide[1]
        tile, b, h = packed_program(ends, batch, heads, BM)
        first_row, q_len = bounds_of(ends, b)
        first_key, kv_len = bounds_of(key_ends, b)
        query, out = query + first_row * query_strides[2], out + first_row * out_strides[2]
        key, value = key + first_key * key_strides[2], value + first_key * value_strides[2]
    else:
        tile, pair = program(tl.cdiv(q_len, BM), batch * heads, section)
        b, h = pair // heads, pair % heads
    hk = h // (heads // kv_heads)
    scale = scalar(scale, False)
    scalars_64 = scalars_of(parameters + sizes + (scale,), True)
    scalars = scalars_of(parameters + sizes + (scale,), WIDE)
    tensors = captured(tensors, WIDE)

    start = first_position(q_offset, b, tl.int64)
    rows = tl.arange(0, BM)
    inside = rows < q_len - tile * BM
    q0 = start + tile * BM
    q = (q0 + rows)[:, None]
    if not WIDE:
        q = q.to(tl.int32)

    b64, h64, hk64 = b.to(tl.int64), h.to(tl.int64), hk.to(tl.int64)
    if WIDE:
        b, h = b64, h64
    query += b64 * query_strides[0] + h64 * query_strides[1]
    query += (tile * BM).to(tl.int64) * query_strides[2]
    if PAGE == 0:
        key += b64 * key_strides[0] + hk64 * key_strides[1]
        value += b64 * value_strides[0] + hk64 * value_strides[1]
    else:
        key += hk64 * key_strides[1]
        value += hk64 * value_strides[1]
    block = load_rows(query, rows, query_strides, inside, CONTIGUOUS, D, D0, D1)

    factor = 1.0
    if FACTOR is not None:  # its sign goes into the query, lest the largest product be the smallest logit
        factor = FACTOR(b, h, scalars, tensors)
        block = round_rows(scale_rows(block, tl.where(factor < 0, -1.0, 1.0)), query.dtype.element_ty)
        factor = tl.maximum(tl.abs(factor), 1e-37)

    slope = None
    lead = 0.0  # what the loop's logits lack for a row, in base 2, when the row term is counted from the row itself
    if SLOPE is not None:
        slope = SLOPE(b, h, scalars, tensors)
        lead = slope * rows.to(tl.float32)
    row = tl.zeros([BM], tl.float32)
    if ROW is not None:
        row = tl.reshape(tl.zeros([BM, 1], tl.float32) + ROW(b, h, q, False, scalars, tensors), [BM])
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    if SINK is not None:
        m = (tl.zeros([BM], tl.float32) + SINK(b, h, scalars, tensors) - row) * LOG2E + lead
        l = tl.where(m > float("-inf"), 1.0, 0.0)

    state = (zero_rows(BM, DV0, DV1), m, l)
    partial, full = KV_RANGES(b64, h64, q0, q0 + (BM - 1), start, BN, scalars_64, wide)
    if len(partial) > 0:
        at = slab(nth(partial, 0), b, hk, wide, BN, PAGE, SCALED)
        for n in range(count(partial)):
            j = nth(partial, n)
            following = slab(nth(partial, n + 1), b, hk, wide, BN, PAGE, SCALED)
            k0 = j.to(tl.int64) * BN
            if SKIP is None or SKIP(b64, h64, q0, q0 + (BM - 1), k0, k0 + (BN - 1), start, BN, scalars_64, wide) == 0:
                state = _visit(
                    j, at, state, block, key, value, key_strides, value_strides, kv_len, factor, slope, b, h, q, q0,
                    scalars, tensors, SCORE, MASK, KEY_MASK, True, CONTIGUOUS, D, D0, D1, DV, DV0, DV1, BN,
                    PRECISION, PAGE
                )  # fmt: skip
            at = following
    if len(full) > 0:
        at = slab(nth(full, 0), b, hk, wide, BN, PAGE, SCALED)
        for n in range(count(full)):
            following = slab(nth(full, n + 1), b, hk, wide, BN, PAGE, SCALED)
            state = _visit(
                nth(full, n), at, state, block, key, value, key_strides, value_strides, kv_len, factor, slope, b, h, q,
                q0, scalars, tensors, FULL_SCORE, MASK, KEY_MASK, False, CONTIGUOUS, D, D0, D1, DV, DV0, DV1, BN,
                PRECISION, PAGE
            )  # fmt: skip
            at = following

    acc, m, l = state
    empty = (l == 0.0) | (row == float("-inf"))
    acc = scale_rows(acc, tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, l))[:, None])
    result = tl.where(empty, float("-inf"), (m + tl.log2(tl.where(empty, 1.0, l)) - lead) * LN2)
    out += b64 * out_strides[0] + h64 * out_strides[1]
    out += (tile * BM).to(tl.int64) * out_strides[2]
    store_rows(out, rows, out_strides, inside, acc, DV, DV0, DV1)
    if PACKED:
        place = (first_row + tile * BM + rows) * heads + h
    else:
        place = pair.to(tl.int64) * q_len + tile * BM + rows
    if ROW is not None:
        tl.store(shifted + place, result, mask=inside)
    tl.store(lse + place, result + row, mask=inside)
