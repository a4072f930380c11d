"""The backward kernels: row numbers, dK and dV over the transposed ranges, dQ over the direct ranges.

With p the probabilities, dP = dO V^T and delta = rowsum(dO * O) - dLSE, the gradient of the logit is
dS = p * (dP - delta). From it come dV = p^T dO, dK = scale dX^T Q and dQ = scale dX K, where dX is dS times the
derivative of the variant's score, and the gradients of captured tensors and parameters: what an entry's index does not
depend on is summed first. Sums over keys are made by the dQ kernel, sums over queries by the dK and dV kernel, entries
that vary with both are added tile by tile by the dQ kernel. SCORE, KEY_GRAD, QUERY_GRAD and SCATTER_PAIRS hold for any
tile; those that begin with FULL hold for full tiles, where what saturates is one number.
"""

# ruff: noqa: E741, RUF005, SIM108 (l is the row sum; tuples and static conditions as Triton knows them)

import triton
import triton.language as tl

from attn_dsl.backend.portable.device import (
    LOG2E,
    bounds_of,
    captured,
    count,
    first_position,
    first_tile,
    inner_products,
    load_rows,
    nth,
    own_mask,
    packed_program,
    program,
    scalar,
    scalars_of,
    scale_rows,
    store_rows,
    strides_of,
    weighted_sum,
    zero_rows,
)

ROWS: tl.constexpr = tl.constexpr(128)
"""Row numbers are padded to a multiple of this, which no tile has more rows than."""


@triton.jit(do_not_specialize=[
    "q_offset", "out_strides", "grad_strides", "parameters", "sizes", "tensors", "grads", "scale"])  # fmt: skip
def attention_delta(
        out, grad_out, grad_lse, lse, numbers, q_offset, out_strides, grad_strides, parameters, sizes, tensors, grads,
        peaks, factors, scale, SINK: tl.constexpr, ROW: tl.constexpr, SINK_GRAD: tl.constexpr, SCATTER: tl.constexpr,
        MODE: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr,
        UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr = False
):  # fmt: skip
    """numbers [B, H, `padded(Q)`, 2] float32: lse in base 2 and delta; one program for BM rows of one batch and head.

    They stand together, and aligned, since the dK and dV kernel reads both for each column of its transposed tiles. A
    row without a key and one past Q have plus infinity, so that their probabilities are 0, and for delta 0.

    A sink takes the share p = exp(sink - lse) of a row and no value, so its gradient is -p * delta: where SINK_GRAD is
    given, that reaches what the sink reads.
    """
    out_strides, grad_strides = strides_of(out_strides, UNIT), strides_of(grad_strides, UNIT)
    heads, q_len = scalar(sizes[1], False), scalar(sizes[3], False)
    if PACKED:  # BM is ROWS
        ends = captured(tensors, True)[0]
        tile, b, h = packed_program(ends, scalar(sizes[0], False), heads, BM)
        first_row, q_len = bounds_of(ends, b)
        pair, numbers = h, numbers_of(numbers, ends, b, heads)
        out, grad_out = out + first_row * out_strides[2], grad_out + first_row * grad_strides[2]
        b, h = b.to(tl.int64), h.to(tl.int64)
    else:
        tiles = padded(q_len) // BM
        pair, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
        b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    lines = tl.arange(0, BM)
    inside = lines < q_len - tile * BM
    first = (tile * BM).to(tl.int64)
    out += b * out_strides[0] + h * out_strides[1] + first * out_strides[2]
    grad_out += b * grad_strides[0] + h * grad_strides[1] + first * grad_strides[2]
    o = load_rows(out, lines, out_strides, inside, True, DV, DV0, DV1)
    g = load_rows(grad_out, lines, grad_strides, inside, CONTIGUOUS, DV, DV0, DV1)
    total = tl.zeros([BM], tl.float32)
    for i in tl.static_range(len(o)):
        total += tl.sum(o[i].to(tl.float32) * g[i].to(tl.float32), 1)
    if PACKED:
        place = (first_row + first + lines) * heads + h
    else:
        place = pair.to(tl.int64) * q_len + first + lines
    if grad_lse is not None:
        total -= tl.load(grad_lse + place, mask=inside, other=0.0)
    l = tl.load(lse + place, mask=inside, other=float("-inf"))
    pairs = tl.join(tl.where(l == float("-inf"), float("inf"), l * LOG2E), total)
    numbers += pair.to(tl.int64) * padded(q_len) * 2 + first * 2
    places = numbers + lines[:, None] * 2 + tl.arange(0, 2)[None, :]
    if PACKED:  # a tile that its sequence does not need
        tl.store(places, pairs, mask=first + tl.zeros_like(pairs) < padded(q_len))
    else:
        tl.store(places, pairs)

    if SINK_GRAD is not None:
        scalars, tensors = scalars_of(parameters + sizes + (scalar(scale, False),), WIDE), captured(tensors, WIDE)
        grads = captured(grads, WIDE)
        start = first_position(q_offset, b, tl.int64)
        q = start + first + lines
        if not WIDE:
            b, h, q = b.to(tl.int32), h.to(tl.int32), q.to(tl.int32)
        logit = tl.zeros([BM], tl.float32) + SINK(b, h, scalars, tensors)
        if ROW is not None:
            logit -= ROW(b, h, q, False, scalars, tensors)
        p = tl.where(l == float("-inf"), 0.0, tl.exp2((logit - l) * LOG2E))
        shares = SINK_GRAD(-p * total, b, h, scalars, tensors)
        SCATTER(shares, b, h, 0, 0, 0, 0, None, False, scalars, tensors, grads, peaks, factors, MODE)


@triton.jit
def padded(rows):
    """How many rows the row numbers are kept for: whole tiles of any shape."""
    return tl.cdiv(rows, ROWS) * ROWS


@triton.jit
def numbers_of(numbers, ends, b, heads):
    """Those of a packed sequence, whose heads follow each other within the tiles of the sequence."""
    return numbers + first_tile(ends, b, ROWS).to(tl.int64) * ROWS * heads * 2


@triton.jit
def _row_numbers(numbers, N: tl.constexpr):
    """(lse in base 2, delta) of N rows."""
    return tl.split(tl.reshape(tl.load(numbers + tl.arange(0, 2 * N)), [N, 2]))


@triton.jit
def _gradient(
        products, upstream, lse, delta, b, h, q, k, q0, k0, keep, factor, ramp, scalars, tensors, SCORE: tl.constexpr,
        SCORE_GRAD: tl.constexpr
):  # fmt: skip
    """(p, gradient of the scaled product, shares of captured tensors), in the shape of `products`.

    SCORE is None: the logit is factor * product. lse is in base 2, plus infinity for rows without a key. `keep` says
    which pairs the mask keeps, None all; p and gradient are not poisoned by what the others hold.
    """
    if SCORE is None:
        x = products * factor
    else:
        x = SCORE(products, b, h, q, k, q0, k0, keep is None, scalars, tensors)
    if ramp is not None:
        x = x + ramp
    p = tl.exp2(x - lse)
    if keep is not None:
        p = tl.where(keep, p, 0.0)
    grad = p * (upstream - delta)
    shares = ()
    if SCORE_GRAD is not None:
        grad, shares = SCORE_GRAD(grad, products, b, h, q, k, q0, k0, keep is None, scalars, tensors)
    if keep is not None:
        grad = tl.where(keep, grad, 0.0)
    return p, grad, shares


@triton.jit
def _zeros(N: tl.constexpr, ROWS: tl.constexpr):
    result = ()
    for _ in tl.static_range(N):
        result = result + (tl.zeros([ROWS, 1], tl.float32),)
    return result


@triton.jit
def _add_sums(totals, shares, keep):
    """Add to each total the row sums of its share; there may be more shares than totals."""
    result = ()
    for i in tl.static_range(len(totals)):
        share = shares[i]
        if keep is not None:
            share = tl.where(keep, share, 0.0)
        result = result + (totals[i] + tl.sum(share, 1, keep_dims=True),)
    return result


@triton.jit
def _kept(shares, keep):
    """The shares where `keep`, else 0."""
    result = ()
    for i in tl.static_range(len(shares)):
        result = result + (tl.where(keep, shares[i], 0.0),)
    return result


# ---------------------------------------------------------------- dK and dV


@triton.jit
def _visit_queries(
        tile, state, keys, rows_of_values, query, grad_out, numbers, query_strides, grad_strides, q_len, factor,
        slope, b, h, start, k, k0, loaded, scalars, tensors, SCORE: tl.constexpr, MASK: tl.constexpr,
        QUERY_MASK: tl.constexpr, KEY_GRAD: tl.constexpr, MASKED: tl.constexpr, CONTIGUOUS: tl.constexpr,
        D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr,
        DV1: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Take one query tile into the state (dK / scale, dV, totals); tiles are transposed, [keys, queries]."""
    dk, dv, totals = state
    lines = tl.arange(0, BM)
    first = tile * BM
    wide = first.to(tl.int64)
    q = (start + first + lines).to(k.dtype)[None, :]
    keep = None
    if MASKED:
        positions = (start + first + lines).to(k.dtype)
        keep = own_mask(lines, q_len - first, positions, b, h, QUERY_MASK, scalars, tensors)
    queries = load_rows(query + wide * query_strides[2], lines, query_strides, keep, CONTIGUOUS, D, D0, D1)
    products = inner_products(keys, queries, PRECISION)
    l, row_delta = _row_numbers(numbers + first * 2, BM)
    ramp = None
    if slope is not None:  # slope * (k - k0), the same for all tiles; k0 - q goes to the row
        ramp = (slope * tl.arange(0, k.shape[0]).to(tl.float32))[:, None]
        l -= slope * (k0 - (start + first + lines)).to(tl.float32)
    outs = load_rows(grad_out + wide * grad_strides[2], lines, grad_strides, keep, CONTIGUOUS, DV, DV0, DV1)
    upstream = inner_products(rows_of_values, outs, PRECISION)
    if MASKED:
        keep = keep[None, :] & loaded[:, None]
        if MASK is not None:
            keep = keep & MASK(b, h, q, k, False, scalars, tensors)
    p, grad, shares = _gradient(
        products, upstream, l[None, :], row_delta[None, :], b, h, q, k, (start + first).to(k.dtype), k0.to(k.dtype),
        keep, factor, ramp, scalars, tensors, SCORE, KEY_GRAD
    )  # fmt: skip
    dv = weighted_sum(dv, p.to(grad_out.dtype.element_ty), outs, PRECISION)
    dk = weighted_sum(dk, grad.to(query.dtype.element_ty), queries, PRECISION)
    return dk, dv, _add_sums(totals, shares, keep)


@triton.jit(do_not_specialize=[
    "q_offset", "query_strides", "key_strides", "value_strides", "grad_strides", "dk_strides", "dv_strides",
    "parameters", "sizes", "tensors", "grads", "scale", "section"])  # fmt: skip
def attention_keys_backward(
        query, key, value, grad_out, numbers, dk_out, dv_out, q_offset, query_strides, key_strides,
        value_strides, grad_strides, dk_strides, dv_strides, parameters, sizes, tensors, grads, peaks, factors,
        scale, section, SCORE: tl.constexpr, FULL_SCORE: tl.constexpr, FACTOR: tl.constexpr, SLOPE: tl.constexpr,
        MASK: tl.constexpr, KEY_MASK: tl.constexpr, QUERY_MASK: tl.constexpr, Q_RANGES: tl.constexpr,
        SKIP: tl.constexpr, KEY_GRAD: tl.constexpr, FULL_KEY_GRAD: tl.constexpr, SCATTER: tl.constexpr,
        TOTALS: tl.constexpr, MODE: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
        DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
        UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
        PACKED: tl.constexpr = False
):  # fmt: skip
    """dK [B, HK, KV, D] and dV [B, HK, KV, DV]: one program owns BN keys and loops over the heads of their group."""
    query_strides, key_strides = strides_of(query_strides, UNIT), strides_of(key_strides, UNIT)
    value_strides, grad_strides = strides_of(value_strides, UNIT), strides_of(grad_strides, UNIT)
    dk_strides, dv_strides = strides_of(dk_strides, UNIT), strides_of(dv_strides, UNIT)
    batch, heads, kv_heads, q_len, kv_len = scalars_of(sizes, False)[:5]
    wide = captured(tensors, True)
    if PACKED:
        ends, key_ends = wide[0], wide[1]
        tile, b, hk = packed_program(key_ends, batch, kv_heads, BN)
        pair, numbers = hk, numbers_of(numbers, ends, b, heads)
        first_row, q_len = bounds_of(ends, b)
        first_key, kv_len = bounds_of(key_ends, b)
        query, grad_out = query + first_row * query_strides[2], grad_out + first_row * grad_strides[2]
        key, value = key + first_key * key_strides[2], value + first_key * value_strides[2]
        dk_out, dv_out = dk_out + first_key * dk_strides[2], dv_out + first_key * dv_strides[2]
    else:
        tiles = tl.cdiv(kv_len, BN)
        tile, pair = program(tiles, batch * kv_heads, section)
        tile = tiles - 1 - tile  # under a causal mask the first keys have the most queries
        b, hk = pair // kv_heads, pair % kv_heads
    scale = scalar(scale, False)
    scalars_64 = scalars_of(parameters + sizes + (scale,), True)
    scalars, tensors = scalars_of(parameters + sizes + (scale,), WIDE), captured(tensors, WIDE)
    grads = captured(grads, WIDE)

    start = first_position(q_offset, b, tl.int64)
    columns = tl.arange(0, BN)
    inside = columns < kv_len - tile * BN
    k0 = (tile * BN).to(tl.int64)
    k = k0 + columns
    if not WIDE:
        k = k.to(tl.int32)

    b64, hk64 = b.to(tl.int64), hk.to(tl.int64)
    if WIDE:
        b = b64
    key += b64 * key_strides[0] + hk64 * key_strides[1] + k0 * key_strides[2]
    value += b64 * value_strides[0] + hk64 * value_strides[1] + k0 * value_strides[2]
    state = (zero_rows(BN, D0, D1), zero_rows(BN, DV0, DV1), _zeros(TOTALS, BN))
    group = heads // kv_heads
    for member in range(group):
        h = hk * group + member
        row = pair.to(tl.int64) * group + member
        h64 = h.to(tl.int64)
        if WIDE:
            h = h64
        q_base = query + b64 * query_strides[0] + h64 * query_strides[1]
        g_base = grad_out + b64 * grad_strides[0] + h64 * grad_strides[1]
        factor, slope = 1.0, None
        if FACTOR is not None:
            factor = FACTOR(b, h, scalars, tensors)
        if SLOPE is not None:
            slope = SLOPE(b, h, scalars, tensors)
        loaded = inside
        if KEY_MASK is not None:
            loaded = loaded & KEY_MASK(b, h, k, False, scalars, tensors)
        keys = load_rows(key, columns, key_strides, loaded, CONTIGUOUS, D, D0, D1)
        rows = load_rows(value, columns, value_strides, loaded, CONTIGUOUS, DV, DV0, DV1)
        partial, full = Q_RANGES(b64, h64, k0, k0 + (BN - 1), start, BM, scalars_64, wide)
        masked, rest = partial, 0
        if FULL_SCORE is not None or FULL_KEY_GRAD is not None:  # these look tensors up without asking where they end
            masked = partial + full
            rest = tl.where(k0 + BN > kv_len, count(full), 0)
        if len(masked) > 0:
            for n in range(count(partial) + rest):
                i = nth(masked, n)
                q0 = start + i.to(tl.int64) * BM
                if SKIP is None or SKIP(
                    b64, h64, q0, q0 + (BM - 1), k0, k0 + (BN - 1), start, BM, scalars_64, wide
                ) == 0:  # fmt: skip
                    state = _visit_queries(
                        i, state, keys, rows, q_base, g_base, numbers + row * padded(q_len) * 2,
                        query_strides, grad_strides, q_len, factor, slope, b, h, start, k[:, None], k0, loaded,
                        scalars, tensors, SCORE, MASK, QUERY_MASK, KEY_GRAD, True, CONTIGUOUS, D, D0, D1, DV, DV0,
                        DV1, BM, PRECISION
                    )  # fmt: skip
        if len(full) > 0:
            for n in range(rest, count(full)):
                state = _visit_queries(
                    nth(full, n), state, keys, rows, q_base, g_base, numbers + row * padded(q_len) * 2,
                    query_strides, grad_strides, q_len, factor, slope, b, h, start, k[:, None], k0, loaded,
                    scalars, tensors, FULL_SCORE, MASK, QUERY_MASK, FULL_KEY_GRAD, False, CONTIGUOUS, D, D0, D1, DV,
                    DV0, DV1, BM, PRECISION
                )  # fmt: skip
        if SCATTER is not None:  # the index may depend on the head
            SCATTER(
                state[2], b, h, 0, k[:, None], 0, 0, inside[:, None], False, scalars, tensors, grads, peaks, factors,
                MODE
            )  # fmt: skip
            state = (state[0], state[1], _zeros(TOTALS, BN))

    dk, dv, _ = state
    dk_out += b64 * dk_strides[0] + hk64 * dk_strides[1] + k0 * dk_strides[2]
    dv_out += b64 * dv_strides[0] + hk64 * dv_strides[1] + k0 * dv_strides[2]
    store_rows(dk_out, columns, dk_strides, inside, scale_rows(dk, scale), D, D0, D1)
    store_rows(dv_out, columns, dv_strides, inside, dv, DV, DV0, DV1)


# ---------------------------------------------------------------- dQ


@triton.jit
def _visit_keys(
        tile, state, queries, outs, key, value, lse, delta, key_strides, value_strides, kv_len, factor, slope, b,
        h, q, q0, inside, scalars, tensors, grads, peaks, factors, SCORE: tl.constexpr, MASK: tl.constexpr,
        KEY_MASK: tl.constexpr, QUERY_GRAD: tl.constexpr, SCATTER_PAIRS: tl.constexpr, MODE: tl.constexpr,
        MASKED: tl.constexpr, CONTIGUOUS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
        DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Take one key tile into the state (dQ / scale, totals)."""
    dq, totals = state
    columns = tl.arange(0, BN)
    first = tile * BN
    k = (first + columns)[None, :].to(q.dtype)
    loaded = None
    if MASKED:
        positions = (first + columns).to(q.dtype)
        loaded = own_mask(columns, kv_len - first, positions, b, h, KEY_MASK, scalars, tensors)
    wide = first.to(tl.int64)
    keys = load_rows(key + wide * key_strides[2], columns, key_strides, loaded, CONTIGUOUS, D, D0, D1)
    rows = load_rows(
        value + wide * value_strides[2], columns, value_strides, loaded, CONTIGUOUS, DV, DV0, DV1
    )  # fmt: skip
    ramp = None
    if slope is not None:  # slope * (k - first), the same for all tiles; first - q goes to the row
        ramp = (slope * columns.to(tl.float32))[None, :]
        lse -= slope * (first - tl.reshape(q, [q.shape[0]])).to(tl.float32)
    products = inner_products(queries, keys, PRECISION)
    upstream = inner_products(outs, rows, PRECISION)
    keep = None
    if MASKED:
        keep = loaded[None, :] & inside[:, None]
        if MASK is not None:
            keep = keep & MASK(b, h, q, k, False, scalars, tensors)
    _, grad, shares = _gradient(
        products, upstream, lse[:, None], delta[:, None], b, h, q, k, q0.to(q.dtype), first.to(q.dtype), keep, factor,
        ramp, scalars, tensors, SCORE, QUERY_GRAD
    )  # fmt: skip
    dq = weighted_sum(dq, grad.to(key.dtype.element_ty), keys, PRECISION)
    if SCATTER_PAIRS is not None:
        if not MASKED:  # a row past Q has no probability, but a derivative that may be anything
            shares = _kept(shares, inside[:, None])
        SCATTER_PAIRS(
            shares, b, h, q, k, q0.to(q.dtype), first.to(q.dtype), keep, not MASKED, scalars, tensors, grads, peaks,
            factors, MODE
        )  # fmt: skip
    return dq, _add_sums(totals, shares, keep)


@triton.jit(do_not_specialize=[
    "q_offset", "query_strides", "key_strides", "value_strides", "grad_strides", "dq_strides", "parameters", "sizes",
    "tensors", "grads", "scale", "section"])  # fmt: skip
def attention_queries_backward(
        query, key, value, grad_out, numbers, dq_out, q_offset, query_strides, key_strides, value_strides,
        grad_strides, dq_strides, parameters, sizes, tensors, grads, peaks, factors, scale, section,
        SCORE: tl.constexpr, FULL_SCORE: tl.constexpr, FACTOR: tl.constexpr, SLOPE: tl.constexpr, MASK: tl.constexpr,
        KEY_MASK: tl.constexpr, QUERY_MASK: tl.constexpr, KV_RANGES: tl.constexpr, SKIP: tl.constexpr,
        QUERY_GRAD: tl.constexpr, FULL_QUERY_GRAD: tl.constexpr, SCATTER: tl.constexpr,
        SCATTER_PAIRS: tl.constexpr, SCATTER_FULL_PAIRS: tl.constexpr, TOTALS: tl.constexpr, MODE: tl.constexpr,
        D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr,
        DV1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr,
        WIDE: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr = False
):  # fmt: skip
    """dQ [B, H, Q, D]: one program owns BM queries of one batch and head."""
    query_strides, key_strides = strides_of(query_strides, UNIT), strides_of(key_strides, UNIT)
    value_strides, grad_strides = strides_of(value_strides, UNIT), strides_of(grad_strides, UNIT)
    dq_strides = strides_of(dq_strides, UNIT)
    batch, heads, kv_heads, q_len, kv_len = scalars_of(sizes, False)[:5]
    wide = captured(tensors, True)
    if PACKED:
        ends, key_ends = wide[0], wide[1]
        tile, b, h = packed_program(ends, batch, heads, BM)
        first_row, q_len = bounds_of(ends, b)
        first_key, kv_len = bounds_of(key_ends, b)
        pair, numbers = h, numbers_of(numbers, ends, b, heads)
        query, grad_out = query + first_row * query_strides[2], grad_out + first_row * grad_strides[2]
        key, value = key + first_key * key_strides[2], value + first_key * value_strides[2]
        dq_out = dq_out + first_row * dq_strides[2]
    else:
        tile, pair = program(tl.cdiv(q_len, BM), batch * heads, section)
        b, h = pair // heads, pair % heads
    hk = h // (heads // kv_heads)
    scale = scalar(scale, False)
    scalars_64 = scalars_of(parameters + sizes + (scale,), True)
    scalars, tensors = scalars_of(parameters + sizes + (scale,), WIDE), captured(tensors, WIDE)
    grads = captured(grads, WIDE)

    start = first_position(q_offset, b, tl.int64)
    lines = tl.arange(0, BM)
    first = (tile * BM).to(tl.int64)
    inside = lines < q_len - tile * BM
    q0 = start + first
    q = q0 + lines
    if not WIDE:
        q = q.to(tl.int32)
    b64, h64, hk64 = b.to(tl.int64), h.to(tl.int64), hk.to(tl.int64)
    if WIDE:
        b, h = b64, h64
    if QUERY_MASK is not None:
        seen = inside & QUERY_MASK(b, h, q, False, scalars, tensors)
    else:
        seen = inside

    query += b64 * query_strides[0] + h64 * query_strides[1] + first * query_strides[2]
    grad_out += b64 * grad_strides[0] + h64 * grad_strides[1] + first * grad_strides[2]
    key += b64 * key_strides[0] + hk64 * key_strides[1]
    value += b64 * value_strides[0] + hk64 * value_strides[1]
    queries = load_rows(query, lines, query_strides, seen, CONTIGUOUS, D, D0, D1)
    outs = load_rows(grad_out, lines, grad_strides, inside, CONTIGUOUS, DV, DV0, DV1)
    l, row_delta = _row_numbers(numbers + pair.to(tl.int64) * padded(q_len) * 2 + first * 2, BM)

    factor, slope = 1.0, None
    if FACTOR is not None:
        factor = FACTOR(b, h, scalars, tensors)
    if SLOPE is not None:
        slope = SLOPE(b, h, scalars, tensors)
    state = (zero_rows(BM, D0, D1), _zeros(TOTALS, BM))
    partial, full = KV_RANGES(b64, h64, q0, q0 + (BM - 1), start, BN, scalars_64, wide)
    if len(partial) > 0:
        for n in range(count(partial)):
            j = nth(partial, n)
            k0 = j.to(tl.int64) * BN
            if SKIP is None or SKIP(b64, h64, q0, q0 + (BM - 1), k0, k0 + (BN - 1), start, BN, scalars_64, wide) == 0:
                state = _visit_keys(
                    j, state, queries, outs, key, value, l, row_delta, key_strides, value_strides, kv_len, factor,
                    slope, b, h, q[:, None], q0, inside, scalars, tensors, grads, peaks, factors, SCORE, MASK,
                    KEY_MASK, QUERY_GRAD, SCATTER_PAIRS, MODE, True, CONTIGUOUS, D, D0, D1, DV, DV0, DV1, BN,
                    PRECISION
                )  # fmt: skip
    if len(full) > 0:
        for n in range(count(full)):
            state = _visit_keys(
                nth(full, n), state, queries, outs, key, value, l, row_delta, key_strides, value_strides, kv_len,
                factor, slope, b, h, q[:, None], q0, inside, scalars, tensors, grads, peaks, factors, FULL_SCORE,
                MASK, KEY_MASK, FULL_QUERY_GRAD, SCATTER_FULL_PAIRS, MODE, False, CONTIGUOUS, D, D0, D1, DV, DV0,
                DV1, BN, PRECISION
            )  # fmt: skip

    dq, totals = state
    if SCATTER is not None:
        SCATTER(
            _kept(totals, inside[:, None]), b, h, q[:, None], 0, 0, 0, inside[:, None], False, scalars, tensors,
            grads, peaks, factors, MODE
        )  # fmt: skip
    dq_out += b64 * dq_strides[0] + h64 * dq_strides[1] + first * dq_strides[2]
    store_rows(dq_out, lines, dq_strides, inside, scale_rows(dq, scale), D, D0, D1)
