"""Which tiles a kernel visits, found on the device: summaries of what a mask reads, and lists of tiles.

A list has a row for each tile of one axis, its own, and names tiles of the other. One program streams over those, asks
the emitted claims (`emit_lists.py`) about each, and keeps what is not EMPTY. Nothing is stored of an empty tile.

    rows     [B, H, tiles, 4] int32    first, masked, full, last
    entries  [...] int32 or uint8      masked tiles at first, first + 1, ..., full ones at last, last - 1, ...

Where the mask does not vary with `b` or `h`, B or H is 1 here, and a stride of 0 in the kernels. They read lists by
`kv_list` and `q_list`, which stand in for the emitted ranges.
"""

# ruff: noqa: SIM102 (static conditions as Triton knows them)

import triton
import triton.language as tl

from attn_dsl.backend.portable.device import captured, first_position, scalars_of

FAR: tl.constexpr = tl.constexpr(2**30)
"""Farther than any position within a row."""

# ---------------------------------------------------------------- reading a list


@triton.jit
def _row(tensors, b, h, tile):
    """((masked segment,), (full segment,)) of a tile's row; a segment of a list is (entries, first, step, count)."""
    rows, entries = tensors[len(tensors) - 2], tensors[len(tensors) - 1]
    place = rows[0] + b * rows[2][0] + h * rows[2][1] + tile * 4
    first, masked, full, last = tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)
    return ((entries[0], first, 1, masked),), ((entries[0], last, -1, full),)


@triton.jit
def kv_list(b, h, q0, q1, q_offset, block, scalars, tensors):
    """`kv_ranges` of a list, whose rows and entries are the last two of the tensors."""
    return _row(tensors, b, h, (q0 - q_offset) // (q1 + 1 - q0))


@triton.jit
def q_list(b, h, k0, k1, q_offset, block, scalars, tensors):
    """`q_ranges` of a list, whose rows and entries are the last two of the tensors."""
    return _row(tensors, b, h, k0 // (k1 + 1 - k0))


@triton.jit
def q_tiles(b, h, k0, k1, q_offset, block, scalars, tensors):
    """(masked segment, full segment) of the same."""
    masked, full = _row(tensors, b, h, k0 // (k1 + 1 - k0))
    return masked + full


# ---------------------------------------------------------------- summaries


@triton.jit
def _smallest(x):
    """Of the last axis; nan counts as anything."""
    if x.dtype.is_floating():
        x = tl.where(x != x, float("-inf"), x)
    return tl.min(x, 0)


@triton.jit
def _largest(x):
    if x.dtype.is_floating():
        x = tl.where(x != x, float("inf"), x)
    return tl.max(x, 0)


@triton.jit
def _summarize(
        tile, first, length, b, h, results, scalars, tensors, FIRST: tl.constexpr, TERMS: tl.constexpr,
        BLOCK: tl.constexpr, SPAN: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Store the least and the greatest of each term in a tile of positions; `results` are from number FIRST on.

    SPAN is a power of two, not less than BLOCK: the last position of the tile is looked at more often.
    """
    positions = first + tl.minimum(tile * BLOCK + tl.minimum(tl.arange(0, SPAN), BLOCK - 1), length - 1)
    if not WIDE:
        positions = positions.to(tl.int32)
    terms = TERMS(b, h, positions, False, scalars, tensors)
    for i in tl.static_range(len(terms)):
        low, high = results[FIRST + 2 * i], results[FIRST + 2 * i + 1]
        place = b.to(tl.int64) * low[2][0] + h.to(tl.int64) * low[2][1] + tile
        value = terms[i] + tl.zeros([SPAN], terms[i].dtype)
        tl.store(low[0] + place, _smallest(value).to(low[0].dtype.element_ty))
        tl.store(high[0] + place, _largest(value).to(high[0].dtype.element_ty))


@triton.jit(do_not_specialize=["q_offset", "parameters", "sizes", "tensors", "results", "heads"])
def summarize_tiles(
        place, q_offset, parameters, sizes, tensors, results, heads, Q_TERMS: tl.constexpr, K_TERMS: tl.constexpr,
        FIRST_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BM_SPAN: tl.constexpr, BN_SPAN: tl.constexpr,
        WIDE: tl.constexpr
):  # fmt: skip
    """The `results`, [batch, heads, tiles] each: least and greatest value of each term of q, then of each of k.

    One program for a tile of queries, then one for a tile of keys, of each batch entry and head that terms vary with.
    `place` is the first of the results, which says where to run.
    """
    scalars, tensors = scalars_of(parameters + sizes, WIDE), captured(tensors, WIDE)
    results = captured(results, True)
    lengths = scalars_of(sizes, True)
    q_len, kv_len = lengths[3], lengths[4]
    q_tiles = tl.cdiv(q_len, BM)
    if Q_TERMS is None:
        q_tiles = q_tiles * 0
    k_tiles = tl.cdiv(kv_len, BN)
    if K_TERMS is None:
        k_tiles = k_tiles * 0
    tile, pair = tl.program_id(0) % (q_tiles + k_tiles), tl.program_id(0) // (q_tiles + k_tiles)
    b, h = pair // heads, pair % heads
    start = first_position(q_offset, b, tl.int64)
    if WIDE:
        b, h = b.to(tl.int64), h.to(tl.int64)
    if Q_TERMS is not None:
        if tile < q_tiles:
            _summarize(tile, start, q_len, b, h, results, scalars, tensors, 0, Q_TERMS, BM, BM_SPAN, WIDE)
    if K_TERMS is not None:
        if tile >= q_tiles:
            _summarize(
                tile - q_tiles, start * 0, kv_len, b, h, results, scalars, tensors, FIRST_K, K_TERMS, BN, BN_SPAN, WIDE
            )  # fmt: skip


# ---------------------------------------------------------------- runs


@triton.jit(do_not_specialize=["length", "steps"])
def find_runs(first, last, tensor, length, steps, BLOCK: tl.constexpr):
    """first, last [rows, length] int32: the ends of the run of equal values that each element of `tensor` is in.

    Rows do not decrease; halving the rest `steps` times leaves one element. One program for BLOCK elements of a row.
    """
    blocks = tl.cdiv(length, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * length
    place = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = place < length
    place = tl.minimum(place, length - 1)
    own = tl.load(tensor + row + place)
    low, low_end, high, high_end = place * 0, place, place, place * 0 + length - 1
    for _ in range(steps):
        middle = (low + low_end) // 2
        below = tl.load(tensor + row + middle) < own
        low, low_end = tl.where(below, tl.minimum(middle + 1, low_end), low), tl.where(below, low_end, middle)
        middle = (high + high_end + 1) // 2
        above = tl.load(tensor + row + middle) > own
        high, high_end = tl.where(above, high, middle), tl.where(above, tl.maximum(middle - 1, high), high_end)
    tl.store(first + row + place, low, mask=inside)
    tl.store(last + row + place, high, mask=inside)


# ---------------------------------------------------------------- claims


@triton.jit
def _asked(
        own, other, own_width, other_width, own_tile, other_tile, b, h, start, q_len, kv_len, scalars, tensors,
        CLAIMS: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """(possible, certain) for pieces that begin `own` and `other` positions after the first of their axes.

    A piece that begins past the end of its axis has no pairs: it is not possible, and certain.
    """
    if TRANSPOSED:
        q, k, q_width, k_width, q_tile, k_tile = other, own, other_width, own_width, other_tile, own_tile
    else:
        q, k, q_width, k_width, q_tile, k_tile = own, other, own_width, other_width, own_tile, other_tile
    exists = (q < q_len) & (k < kv_len)
    q0, q1 = start + q, start + tl.minimum(q + q_width, q_len) - 1
    k1 = tl.minimum(k + k_width, kv_len) - 1
    possible, certain = CLAIMS(b, h, q0, q1, k, k1, q_tile, k_tile, start, scalars, tensors)
    return exists & possible, (exists == 0) | certain


@triton.jit
def _any(x, PIECES: tl.constexpr, TILES: tl.constexpr):
    """Of bool [own pieces, TILES * PIECES], [TILES]: whether one of a tile's pieces holds."""
    return tl.max(tl.reshape(tl.max(x.to(tl.int32), 0), [TILES, PIECES]), 1) > 0


@triton.jit
def _by_pieces(
        tile, first, b, h, start, q_len, kv_len, scalars, tensors, CLAIMS: tl.constexpr, TRANSPOSED: tl.constexpr,
        OWN: tl.constexpr, OTHER: tl.constexpr, OWN_PIECE: tl.constexpr, OTHER_PIECE: tl.constexpr,
        OWN_PIECES: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """(possible, certain) of WIDTH tiles from `first` on, from claims about pieces.

    OWN_PIECES is a power of two, not less than those of a tile of its own axis: what is too much lies past all ends.
    """
    pieces: tl.constexpr = OTHER // OTHER_PIECE
    number = tl.arange(0, OWN_PIECES)
    own = (tl.where(number < OWN // OWN_PIECE, tile * OWN + number * OWN_PIECE, FAR).to(tl.int64))[:, None]
    other = (first * OTHER + tl.arange(0, WIDTH * pieces) * OTHER_PIECE)[None, :]
    possible, certain = _asked(
        own, other, OWN_PIECE, OTHER_PIECE, own, other, b, h, start, q_len, kv_len, scalars, tensors, CLAIMS, TRANSPOSED
    )  # fmt: skip
    return _any(possible, pieces, WIDTH), _any(certain == 0, pieces, WIDTH) == 0


@triton.jit
def _by_pairs(
        tile, other_tile, b, h, start, q_len, kv_len, scalars, tensors, MASK: tl.constexpr, TRANSPOSED: tl.constexpr,
        OWN: tl.constexpr, OTHER: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """(possible, certain), [1] each, of a tile: the mask of its pairs, ROWS rows at a time."""
    some, missing = tl.zeros([1], tl.int32), tl.zeros([1], tl.int32)
    other = (other_tile * OTHER + tl.arange(0, OTHER))[None, :]
    for i in range(OWN // ROWS):
        own = (tile * OWN + i * ROWS + tl.arange(0, ROWS))[:, None]
        if TRANSPOSED:
            q, k = start + other, own
            exists = (other < q_len) & (own < kv_len)
        else:
            q, k = start + own, other
            exists = (own < q_len) & (other < kv_len)
        if not WIDE:
            q, k = q.to(tl.int32), k.to(tl.int32)
        keep = MASK(b, h, q, k, False, scalars, tensors)
        some = tl.maximum(some, _any(exists & keep, OTHER, 1).to(tl.int32))
        missing = tl.maximum(missing, _any(exists & (keep == 0), OTHER, 1).to(tl.int32))
    return some > 0, missing == 0


# ---------------------------------------------------------------- lists


@triton.jit
def _seen(tile, own_tiles, tiles, start, q_len, TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """How many tiles of the other axis hold a pair with q >= k, the first or, if TRANSPOSED, the last ones."""
    if TRANSPOSED:
        seen = tiles - tl.maximum(tile * BN - start, 0) // BM
    else:
        seen = tl.minimum(tiles, (start + tl.minimum((tile + 1) * BM, q_len) - 1) // BN + 1)
    return tl.where(tile < own_tiles, tl.maximum(seen, 0), 0)


@triton.jit
def _room(
        tile, pair, own_tiles, tiles, start, q_len, TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """(first entry, number of entries) of a row, where rows have as many as there are tiles that q >= k holds in."""
    before, all = tl.zeros([1], tl.int64), tl.zeros([1], tl.int64)
    for at in range(0, own_tiles, 64):
        others = at + tl.arange(0, 64).to(tl.int64)
        seen = _seen(others, own_tiles, tiles, start, q_len, TRANSPOSED, BM, BN)
        all += tl.sum(seen)
        before += tl.sum(tl.where(others < tile, seen, 0))
    own = _seen(tl.zeros([1], tl.int64) + tile, own_tiles, tiles, start, q_len, TRANSPOSED, BM, BN)
    return tl.sum(pair * all + before), tl.sum(own)


@triton.jit(do_not_specialize=["q_offset", "parameters", "sizes", "tensors", "results", "heads", "capacity"])
def list_tiles(
        rows, entries, q_offset, parameters, sizes, tensors, results, heads, capacity, CLAIMS: tl.constexpr,
        REFINED: tl.constexpr, MASK: tl.constexpr, TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
        Q_PIECE: tl.constexpr, K_PIECE: tl.constexpr, OWN_PIECES: tl.constexpr, ROWS: tl.constexpr,
        WIDTH: tl.constexpr, WIDE: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    """A row of a list and its entries: one program for a tile of its own axis, keys if TRANSPOSED, else queries.

    capacity > 0: entries are kept for so many tiles in each row or, if CAUSAL, for those of them that hold a pair with
    q >= k, as the mask says. capacity == 0: where each row begins and ends stands in `rows` already. `entries` is None:
    tiles are only counted. REFINED, or MASK for each pair, is asked about what CLAIMS cannot decide; WIDTH tiles are
    decided at a time.
    """
    lengths = scalars_of(sizes, True)
    q_len, kv_len = lengths[3], lengths[4]
    scalars, wide = scalars_of(parameters + sizes, True), captured(tensors + results, True)
    OWN: tl.constexpr = BN if TRANSPOSED else BM
    OTHER: tl.constexpr = BM if TRANSPOSED else BN
    OWN_PIECE: tl.constexpr = K_PIECE if TRANSPOSED else Q_PIECE
    OTHER_PIECE: tl.constexpr = Q_PIECE if TRANSPOSED else K_PIECE
    own_length, length = q_len, kv_len
    if TRANSPOSED:
        own_length, length = kv_len, q_len
    own_tiles, tiles = tl.cdiv(own_length, OWN), tl.cdiv(length, OTHER)
    tile, pair = tl.program_id(0) % own_tiles, tl.program_id(0) // own_tiles
    b, h = pair // heads, pair % heads
    start = first_position(q_offset, b, tl.int64)
    mine = tl.zeros([1], tl.int64) + tile
    b64, h64 = tl.zeros([1], tl.int64) + b, tl.zeros([1], tl.int64) + h
    if MASK is not None:
        narrow, arrays = scalars_of(parameters + sizes, WIDE), captured(tensors, WIDE)
        if WIDE:
            b, h = b.to(tl.int64), h.to(tl.int64)
    row = rows + tl.program_id(0).to(tl.int64) * 4
    first = (tl.program_id(0) * capacity).to(tl.int32)
    last = first + (capacity - 1).to(tl.int32)
    if entries is not None:
        if capacity == 0:
            first, last = tl.load(row), tl.load(row + 3)
        elif CAUSAL:
            begin, room = _room(tile, pair, own_tiles, tiles, start, q_len, TRANSPOSED, BM, BN)
            first, last = begin.to(tl.int32), (begin + room - 1).to(tl.int32)
    masked, full = first * 0, first * 0
    for at in range(0, tiles, WIDTH):
        others = at + tl.arange(0, WIDTH).to(tl.int64)
        possible, certain = _asked(
            mine * OWN, others * OTHER, OWN, OTHER, mine, others, b64, h64, start, q_len, kv_len, scalars, wide, CLAIMS,
            TRANSPOSED
        )  # fmt: skip
        certain = certain & ((others + 1) * OTHER <= length)
        if CAUSAL:
            seen = _seen(mine, own_tiles, tiles, start, q_len, TRANSPOSED, BM, BN)
            possible = possible & ((others >= tiles - seen) if TRANSPOSED else (others < seen))
        if REFINED is not None or MASK is not None:
            if tl.max((possible & (certain == 0)).to(tl.int32)) > 0:
                if MASK is not None:
                    some, whole = _by_pairs(
                        tile, at, b, h, start, q_len, kv_len, narrow, arrays, MASK, TRANSPOSED, OWN, OTHER, ROWS, WIDE
                    )  # fmt: skip
                else:
                    some, whole = _by_pieces(
                        tile, at, b64, h64, start, q_len, kv_len, scalars, wide, REFINED, TRANSPOSED, OWN, OTHER,
                        OWN_PIECE, OTHER_PIECE, OWN_PIECES, WIDTH
                    )  # fmt: skip
                possible = possible & some
                certain = certain | (whole & ((others + 1) * OTHER <= length))
        partial, whole = possible & (certain == 0), possible & certain
        if entries is not None:
            number = others.to(entries.dtype.element_ty)
            place = first + masked + tl.cumsum(partial.to(tl.int32), 0) - 1
            tl.store(entries + place, number, mask=partial)
            place = last - full - tl.cumsum(whole.to(tl.int32), 0) + 1
            tl.store(entries + place, number, mask=whole)
        masked += tl.sum(partial.to(tl.int32))
        full += tl.sum(whole.to(tl.int32))
    tl.store(row, first)
    tl.store(row + 1, masked)
    tl.store(row + 2, full)
    tl.store(row + 3, last)
