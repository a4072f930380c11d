"""The decode kernel: few queries against a long cache. One program computes a tile of packed rows against one of the
splits of the key tiles that its ranges name; a second kernel merges the splits.

A packed row is a query token of one head; the heads of a tile share their keys and values, which are read once for all
of them: row r is token r // pack of head r % pack. A split is a share of the *visited* tiles, so that a window costs
what it sees, and each batch entry finds its own on the device. Softmax is that of `forward.py`; the sink is a logit of
the first split. Splits are merged in their order: the same bits in every run.
"""

# ruff: noqa: E741 (l is the row sum; static conditions as Triton knows them)

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attn_dsl.backend.portable.device import (
    LN2,
    LOG2E,
    along_keys,
    captured,
    count,
    first_position,
    inner_products,
    load_rows,
    nth,
    own_mask,
    place_rows,
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
def _by_row(x, BM: tl.constexpr):
    """A number of the head, a scalar or [BM, 1], as [BM] float32."""
    return tl.reshape(tl.zeros([BM, 1], tl.float32) + x, [BM])


@triton.jit
def _visit(
        tile, at, state, query, key, value, key_strides, value_strides, kv_len, factor, slope, b, head, h, q, q0,
        scalars, tensors, SCORE: tl.constexpr, MASK: tl.constexpr, KEY_MASK: tl.constexpr, MASKED: tl.constexpr,
        CONTIGUOUS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr,
        DV0: tl.constexpr, DV1: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, PAGE: tl.constexpr
):  # fmt: skip
    """Take one key tile, which stands `at` its slab, into the state (accumulator, m, l). `factor` and `slope` are [BM],
    or None."""
    acc, m, l = state
    columns = tl.arange(0, BN)
    first = tile * BN
    k = (first + columns)[None, :].to(q.dtype)
    loaded = None
    if MASKED:
        positions = (first + columns).to(q.dtype)
        loaded = own_mask(columns, kv_len - first, positions, b, head, KEY_MASK, scalars, tensors)
    key_base, lines = place_rows(key, first, columns, key_strides, at, BN, PAGE)
    value_base, lines = place_rows(value, first, columns, value_strides, at, BN, PAGE)
    keys = widened(load_rows(key_base, lines, key_strides, loaded, CONTIGUOUS, D, D0, D1), query[0].dtype)
    rows = widened(load_rows(value_base, lines, value_strides, loaded, CONTIGUOUS, DV, DV0, DV1), query[0].dtype)
    x = along_keys(inner_products(query, keys, PRECISION), at, 2)
    if SCORE is not None:
        x = SCORE(x, b, h, q, k, q0.to(q.dtype), first.to(q.dtype), not MASKED, scalars, tensors)
    if factor is not None:
        x = x * factor[:, None]
    ahead = tl.zeros_like(m)
    if slope is not None:  # slope * (k - q0): what all tiles share, and a number of the tile and the row
        x = x + slope[:, None] * columns.to(tl.float32)[None, :]
        ahead = slope * (first - q0).to(tl.float32)
    if MASKED:
        keep = loaded[None, :]
        if MASK is not None:
            keep = keep & MASK(b, h, q, k, False, scalars, tensors)
        x = tl.where(keep, x, float("-inf"))

    peak = tl.maximum(m, tl.max(x, 1) + ahead)  # a row that saw nothing keeps m = -inf, p = 0
    base = tl.where(peak == float("-inf"), 0.0, peak)
    p = tl.exp2(x - (base - ahead)[:, None])
    decay = tl.exp2(m - base)
    l = l * decay + tl.sum(p, 1)
    acc = scale_rows(acc, decay[:, None])
    acc = weighted_sum(acc, along_keys(p, at, 1).to(rows[0].dtype), rows, PRECISION)
    return acc, peak, l


@triton.jit(do_not_specialize=[
    "q_offset", "query_strides", "key_strides", "value_strides", "out_strides", "parameters", "sizes", "tensors",
    "scale", "pack", "splits"])  # fmt: skip
def attention_decode(
        query, key, value, out, lse, shifted, q_offset, query_strides, key_strides, value_strides, out_strides,
        parameters, sizes, tensors, scale, pack, splits, SCORE: tl.constexpr, FULL_SCORE: tl.constexpr,
        FACTOR: tl.constexpr, SLOPE: tl.constexpr, MASK: tl.constexpr, KEY_MASK: tl.constexpr, ROW: tl.constexpr,
        SINK: tl.constexpr, KV_RANGES: tl.constexpr, SKIP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr,
        D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr,
        BN: tl.constexpr, UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
        OVERLAP: tl.constexpr, PAGE: tl.constexpr = 0, SCALED: tl.constexpr = False
):  # fmt: skip
    """out [splits, B, H, Q, DV], lse and, where ROW is given, `shifted` [splits, B, H, Q], each of one split.

    `pack` heads share a tile; it divides H // HK. Tile ranges and KEY_MASK do not depend on the head unless it is 1.
    The other arguments are those of `attention_forward`, with PAGE and SCALED. OVERLAP lets the kernel that merges
    begin early.
    """
    if OVERLAP:
        gdc_launch_dependents()
    query_strides, key_strides = strides_of(query_strides, UNIT), strides_of(key_strides, UNIT)
    value_strides, out_strides = strides_of(value_strides, UNIT), strides_of(out_strides, UNIT)
    batch, heads, kv_heads, q_len, kv_len = scalars_of(sizes, False)[:5]
    row_tiles = tl.cdiv(pack * q_len, BM)
    number = tl.program_id(0)
    first_row = number % row_tiles * BM
    split = number // row_tiles % splits
    group = number // row_tiles // splits
    b, head = group // (heads // pack), group % (heads // pack) * pack
    hk = head // (heads // kv_heads)
    wide = captured(tensors, True)
    scale = scalar(scale, False)
    scalars_64 = scalars_of(parameters + sizes + (scale,), True)
    scalars = scalars_of(parameters + sizes + (scale,), WIDE)
    tensors = captured(tensors, WIDE)

    start = first_position(q_offset, b, tl.int64)
    inside = first_row + tl.arange(0, BM) < pack * q_len
    row = tl.minimum(first_row + tl.arange(0, BM), pack * q_len - 1)  # the last row stands in for those past it
    token, h_row = row // pack, head + row % pack
    first_token = first_row // pack
    q0 = start + first_token
    q1 = start + tl.minimum((first_row + BM - 1) // pack, q_len - 1)
    q, h = (start + token)[:, None], h_row[:, None]
    b64, head64, hk64, token64, h_row64 = (
        b.to(tl.int64), head.to(tl.int64), hk.to(tl.int64), token.to(tl.int64), h_row.to(tl.int64)
    )  # fmt: skip
    if WIDE:
        b, head, h = b64, head64, h.to(tl.int64)
    else:
        q = q.to(tl.int32)

    if PAGE == 0:
        key += b64 * key_strides[0] + hk64 * key_strides[1]
        value += b64 * value_strides[0] + hk64 * value_strides[1]
    else:
        key += hk64 * key_strides[1]
        value += hk64 * value_strides[1]
    place = h_row64 * query_strides[1] + token64 * query_strides[2]
    block = load_rows(
        query + b64 * query_strides[0], place, (0, 0, 1, query_strides[3]), None, CONTIGUOUS, D, D0, D1
    )  # fmt: skip
    block = round_rows(block, query.dtype.element_ty)

    factor = None
    if FACTOR is not None:
        factor = _by_row(FACTOR(b, h, scalars, tensors), BM)
    slope = None
    lead = tl.zeros([BM], tl.float32)  # what the loop's logits lack for a row, in base 2, as it counts from q0
    if SLOPE is not None:
        slope = _by_row(SLOPE(b, h, scalars, tensors), BM)
        lead = slope * (token - first_token).to(tl.float32)
    term = tl.zeros([BM], tl.float32)
    if ROW is not None:
        term = _by_row(ROW(b, h, q, False, scalars, tensors), BM)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    if SINK is not None:
        m = (_by_row(SINK(b, h, scalars, tensors), BM) - term) * LOG2E + lead
        m = tl.where(split == 0, m, float("-inf"))
        l = tl.where(m > float("-inf"), 1.0, 0.0)

    state = (zero_rows(BM, DV0, DV1), m, l)
    partial, full = KV_RANGES(b64, head64, q0, q1, start, BN, scalars_64, wide)
    partial_count = count(partial)
    tiles = partial_count + count(full)
    begin = (split.to(tl.int64) * tiles // splits).to(tl.int32)
    end = ((split + 1).to(tl.int64) * tiles // splits).to(tl.int32)
    if len(partial) > 0:
        at = slab(nth(partial, begin), b, hk, wide, BN, PAGE, SCALED)
        for n in range(begin, tl.minimum(end, partial_count)):
            j = nth(partial, n)
            following = slab(nth(partial, n + 1), b, hk, wide, BN, PAGE, SCALED)
            k0 = j.to(tl.int64) * BN
            if SKIP is None or SKIP(b64, head64, q0, q1, k0, k0 + (BN - 1), start, BN, scalars_64, wide) == 0:
                state = _visit(
                    j, at, state, block, key, value, key_strides, value_strides, kv_len, factor, slope, b, head, h, q,
                    q0, scalars, tensors, SCORE, MASK, KEY_MASK, True, CONTIGUOUS, D, D0, D1, DV, DV0, DV1, BN,
                    PRECISION, PAGE
                )  # fmt: skip
            at = following
    if len(full) > 0:
        first = tl.maximum(begin - partial_count, 0)
        at = slab(nth(full, first), b, hk, wide, BN, PAGE, SCALED)
        for n in range(first, end - partial_count):
            following = slab(nth(full, n + 1), b, hk, wide, BN, PAGE, SCALED)
            state = _visit(
                nth(full, n), at, state, block, key, value, key_strides, value_strides, kv_len, factor, slope, b, head,
                h, q, q0, scalars, tensors, FULL_SCORE, MASK, KEY_MASK, False, CONTIGUOUS, D, D0, D1, DV, DV0, DV1, BN,
                PRECISION, PAGE
            )  # fmt: skip
            at = following

    acc, m, l = state
    empty = (l == 0.0) | (term == float("-inf"))
    acc = scale_rows(acc, tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, l))[:, None])
    result = tl.where(empty, float("-inf"), (m + tl.log2(tl.where(empty, 1.0, l)) - lead) * LN2)
    rows = batch.to(tl.int64) * heads * q_len  # of one split
    out += split * rows * DV + b64 * out_strides[0]
    place = h_row64 * out_strides[1] + token64 * out_strides[2]
    store_rows(out, place, (0, 0, 1, out_strides[3]), inside, acc, DV, DV0, DV1)
    place = split * rows + (b64 * heads + h_row64) * q_len + token64
    if ROW is not None:
        tl.store(shifted + place, result, mask=inside)
    tl.store(lse + place, result + term, mask=inside)


@triton.jit
def _log_sum(parts, row, rows, splits, CHUNK: tl.constexpr):
    """The log-sum-exp of a row's log-sum-exps; minus infinity where no split saw anything."""
    m = float("-inf")
    l = 0.0
    for first in range(0, splits, CHUNK):
        split = first + tl.arange(0, CHUNK)
        x = tl.load(parts + split.to(tl.int64) * rows + row, mask=split < splits, other=float("-inf"))
        peak = tl.maximum(m, tl.max(x, 0))
        base = tl.where(peak == float("-inf"), 0.0, peak)
        l = l * tl.exp(m - base) + tl.sum(tl.exp(x - base), 0)
        m = peak
    return tl.where(l == 0.0, float("-inf"), m + tl.log(tl.where(l == 0.0, 1.0, l)))


@triton.jit(do_not_specialize=["rows", "splits"])
def merge_splits(
        parts, part_lse, part_shifted, out, lse, shifted, rows, splits, DV: tl.constexpr, WIDTH: tl.constexpr,
        CHUNK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """out [rows, DV], lse and, unless it is None, shifted [rows], from parts [splits, rows, ...] as they were left by
    `attention_decode`: out = sum_i exp(lse_i - lse) out_i. One program a row."""
    if OVERLAP:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    weights = part_lse if shifted is None else part_shifted  # without the row's own term, which cancels
    total = _log_sum(weights, row, rows, splits, CHUNK)
    base = tl.where(total == float("-inf"), 0.0, total)
    columns = tl.arange(0, WIDTH)
    acc = tl.zeros([WIDTH], tl.float32)
    for first in range(0, splits, CHUNK):
        split = first + tl.arange(0, CHUNK)
        place = split.to(tl.int64) * rows + row
        weight = tl.exp(tl.load(weights + place, mask=split < splits, other=float("-inf")) - base)
        inside = (split < splits)[:, None] & (columns < DV)[None, :]
        part = tl.load(parts + place[:, None] * DV + columns[None, :], mask=inside, other=0.0)
        acc += tl.sum(weight[:, None] * part, 0)
    tl.store(out + row * DV + columns, acc.to(out.dtype.element_ty), mask=columns < DV)
    if shifted is None:
        tl.store(lse + row, total)
    else:
        tl.store(shifted + row, total)
        tl.store(lse + row, _log_sum(part_lse, row, rows, splits, CHUNK))
