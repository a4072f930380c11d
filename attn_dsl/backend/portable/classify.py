"""Which tiles a kernel visits, found on the device: summaries of what a mask reads, and lists of tiles.

A list has a row for each tile of one axis, its own, and names tiles of the other. One program streams over those, asks
the emitted claims (`emit_lists.py`) about each, and keeps what is not EMPTY. Nothing is stored of an empty tile.

    rows     [B, H, tiles, 4] int32    first, masked, full, last
    entries  [...] int32 or uint8      masked tiles at first, first + 1, ..., full ones at last, last - 1, ...

Where the mask does not vary with `b` or `h`, B or H is 1 here, and a stride of 0 in the kernels. They read lists by
`kv_list` and `q_list`, which stand in for the emitted ranges.
"""

# ruff: noqa: RUF005, SIM102 (tuples and static conditions as Triton knows them)

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
def _kept(x):
    """As a summary is kept, in a type that holds every value of a term."""
    return x.to(tl.float32 if x.dtype.is_floating() else tl.int64)


@triton.jit
def _extremes(
        tile, first, length, b, h, scalars, tensors, TERMS: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
        WIDE: tl.constexpr
):  # fmt: skip
    """(low, high, ...), the least and the greatest of each term in a tile of positions; int64 or float32.

    SPAN is a power of two, not less than BLOCK: the last position of the tile is looked at more often.
    """
    positions = first + tl.minimum(tile * BLOCK + tl.minimum(tl.arange(0, SPAN), BLOCK - 1), length - 1)
    if not WIDE:
        positions = positions.to(tl.int32)
    terms = TERMS(b, h, positions, False, scalars, tensors)
    found = ()
    for i in tl.static_range(len(terms)):
        value = terms[i] + tl.zeros([SPAN], terms[i].dtype)
        found = found + (_kept(_smallest(value)), _kept(_largest(value)))
    return found


@triton.jit(do_not_specialize=["q_offset", "parameters", "sizes", "tensors", "results", "heads"])
def summarize_tiles(
        place, q_offset, parameters, sizes, tensors, results, heads, TERMS: tl.constexpr, OF_KEYS: tl.constexpr,
        BLOCK: tl.constexpr, SPAN: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The `results`, [batch, heads, tiles] each: least and greatest value of each term of one axis.

    One program for a tile, of each batch entry and head that terms vary with. `place` is the first of the results,
    which says where to run.
    """
    scalars, tensors = scalars_of(parameters + sizes, WIDE), captured(tensors, WIDE)
    results = captured(results, True)
    lengths = scalars_of(sizes, True)
    length = lengths[4] if OF_KEYS else lengths[3]
    tile, b, h = _own(tl.cdiv(length, BLOCK), heads)
    first = first_position(q_offset, b, tl.int64)
    if OF_KEYS:
        first = first * 0
    if WIDE:
        b, h = b.to(tl.int64), h.to(tl.int64)
    found = _extremes(tile.to(tl.int64), first, length, b, h, scalars, tensors, TERMS, BLOCK, SPAN, WIDE)
    for i in tl.static_range(len(found)):
        tl.store(_place(results[i], b, h) + tile, found[i])


@triton.jit
def _own(tiles, heads):
    """(tile, b, h) of this program, one of `tiles` of each head; in 32 bits, where divisions are short."""
    tiles = tiles.to(tl.int32)
    pair = tl.program_id(0) // tiles
    return tl.program_id(0) - pair * tiles, pair // heads, pair % heads


@triton.jit
def _place(tensor, b, h):
    """Of the first element that a head has."""
    return tensor[0] + b.to(tl.int64) * tensor[2][0] + h.to(tl.int64) * tensor[2][1]


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
        own, other, own_width, other_width, own_values, other_values, b, h, start, q_len, kv_len, scalars, tensors,
        CLAIMS: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """(possible, certain) for pieces that begin `own` and `other` positions after the first of their axes.

    values: their summaries. A piece that begins past the end of its axis has no pairs: it is not possible, and certain.
    """
    if TRANSPOSED:
        q, k, q_width, k_width, q_values, k_values = other, own, other_width, own_width, other_values, own_values
    else:
        q, k, q_width, k_width, q_values, k_values = own, other, own_width, other_width, own_values, other_values
    exists = (q < q_len) & (k < kv_len)
    q0, q1 = start + q, start + tl.minimum(q + q_width, q_len) - 1
    k1 = tl.minimum(k + k_width, kv_len) - 1
    possible, certain = CLAIMS(b, h, q0, q1, k, k1, start, q_values, k_values, scalars, tensors)
    return exists & possible, (exists == 0) | certain


@triton.jit
def _joined(possible, certain, PIECES: tl.constexpr, TILES: tl.constexpr):
    """(possible, certain) of tiles [TILES] from those of pieces, [own pieces, TILES * PIECES]."""
    counts = tl.sum(possible.to(tl.int32) + (certain == 0).to(tl.int32) * 65536, 0)  # two sums in one number
    counts = tl.sum(tl.reshape(counts, [TILES, PIECES]), 1)
    return (counts & 65535) > 0, counts < 65536


@triton.jit
def _pieces(
        tile, at, first, OWN: tl.constexpr, OTHER: tl.constexpr, OWN_PIECE: tl.constexpr, OTHER_PIECE: tl.constexpr,
        ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Where pieces begin, [ROWS, 1] of a tile from number `at` on, and [1, n] of WIDTH tiles from `first` on.

    What is no more of the tile lies past all ends.
    """
    number = at + tl.arange(0, ROWS)
    own = (tl.where(number < OWN // OWN_PIECE, tile * OWN + number * OWN_PIECE, FAR).to(tl.int64))[:, None]
    return own, (first * OTHER + tl.arange(0, WIDTH * (OTHER // OTHER_PIECE)) * OTHER_PIECE)[None, :]


@triton.jit
def _by_pieces(
        tile, first, b, h, start, q_len, kv_len, scalars, tensors, CLAIMS: tl.constexpr, TRANSPOSED: tl.constexpr,
        OWN: tl.constexpr, OTHER: tl.constexpr, OWN_PIECE: tl.constexpr, OTHER_PIECE: tl.constexpr,
        ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """(possible, certain) of WIDTH tiles from `first` on, from claims about pieces, of which a tile has up to ROWS."""
    own, other = _pieces(tile, 0, first, OWN, OTHER, OWN_PIECE, OTHER_PIECE, ROWS, WIDTH)
    possible, certain = _asked(
        own, other, OWN_PIECE, OTHER_PIECE, (), (), b, h, start, q_len, kv_len, scalars, tensors, CLAIMS, TRANSPOSED
    )  # fmt: skip
    return _joined(possible, certain, OTHER // OTHER_PIECE, WIDTH)


@triton.jit
def _by_mask(
        tile, first, b, h, start, q_len, kv_len, scalars, tensors, MASK: tl.constexpr, TRANSPOSED: tl.constexpr,
        OWN: tl.constexpr, OTHER: tl.constexpr, OWN_PIECE: tl.constexpr, OTHER_PIECE: tl.constexpr,
        OWN_PIECES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The same from the mask of one pair of each piece, which is that of all; ROWS of the OWN_PIECES at a time."""
    some, missing = tl.zeros([WIDTH], tl.int32), tl.zeros([WIDTH], tl.int32)
    for at in range(0, OWN_PIECES, ROWS):
        own, other = _pieces(tile, at, first, OWN, OTHER, OWN_PIECE, OTHER_PIECE, ROWS, WIDTH)
        if TRANSPOSED:
            q, k = other, own
        else:
            q, k = own, other
        exists = (q < q_len) & (k < kv_len)
        q = start + q
        if not WIDE:
            q, k = q.to(tl.int32), k.to(tl.int32)
        keep = MASK(b, h, q, k, False, scalars, tensors)
        possible, certain = _joined(exists & keep, (exists == 0) | keep, OTHER // OTHER_PIECE, WIDTH)
        some = tl.maximum(some, possible.to(tl.int32))
        missing = tl.maximum(missing, (certain == 0).to(tl.int32))
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
    """(first, last) entry of a row, where rows have as many as there are tiles that q >= k holds in: fewer than
    2 ** 31 in all."""
    before, all = tl.zeros([1], tl.int32), tl.zeros([1], tl.int32)
    for at in range(0, own_tiles, 64):
        others = at + tl.arange(0, 64).to(tl.int64)
        seen = _seen(others, own_tiles, tiles, start, q_len, TRANSPOSED, BM, BN).to(tl.int32)
        all += tl.sum(seen)
        before += tl.sum(tl.where(others < tile, seen, 0))
    own = _seen(tl.zeros([1], tl.int64) + tile, own_tiles, tiles, start, q_len, TRANSPOSED, BM, BN).to(tl.int32)
    first = tl.sum(pair * all + before)
    return first, first + tl.sum(own) - 1


@triton.jit(do_not_specialize=["q_offset", "parameters", "sizes", "tensors", "results", "heads", "capacity"])
def list_tiles(
        rows, entries, q_offset, parameters, sizes, tensors, results, heads, capacity, TERMS: tl.constexpr,
        CLAIMS: tl.constexpr, REFINED: tl.constexpr, MASK: tl.constexpr, TRANSPOSED: tl.constexpr, BM: tl.constexpr,
        BN: tl.constexpr, Q_PIECE: tl.constexpr, K_PIECE: tl.constexpr, OWN_PIECES: tl.constexpr, ROWS: tl.constexpr,
        SPAN: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    """A row of a list and its entries: one program for a tile of its own axis, keys if TRANSPOSED, else queries.

    capacity > 0: entries are kept for so many tiles in each row or, if CAUSAL, for those of them that hold a pair with
    q >= k, as the mask says. capacity == 0: where each row begins and ends stands in `rows` already. `entries` is None:
    tiles are only counted.

    CLAIMS are asked by summaries: of the own axis those of TERMS, found here in SPAN positions, of the other one the
    `results`. What they cannot decide, and everything where there are none, REFINED decides by its claims about pieces,
    or MASK by one pair of each; WIDTH tiles are decided at a time.
    """
    lengths = scalars_of(sizes, True)
    q_len, kv_len = lengths[3], lengths[4]
    OWN: tl.constexpr = BN if TRANSPOSED else BM
    OTHER: tl.constexpr = BM if TRANSPOSED else BN
    OWN_PIECE: tl.constexpr = K_PIECE if TRANSPOSED else Q_PIECE
    OTHER_PIECE: tl.constexpr = Q_PIECE if TRANSPOSED else K_PIECE
    own_length, length = q_len, kv_len
    if TRANSPOSED:
        own_length, length = kv_len, q_len
    own_tiles, tiles = tl.cdiv(own_length, OWN), tl.cdiv(length, OTHER)
    tile, b, h = _own(own_tiles, heads)
    start = first_position(q_offset, b, tl.int64)
    mine = tl.zeros([1], tl.int64) + tile
    b64, h64 = tl.zeros([1], tl.int64) + b, tl.zeros([1], tl.int64) + h
    scalars, wide = scalars_of(parameters + sizes, True), captured(tensors, True)
    narrow, arrays = scalars_of(parameters + sizes, WIDE), captured(tensors, WIDE)
    results = captured(results, True)
    if WIDE:
        b, h = b.to(tl.int64), h.to(tl.int64)
    own_values = ()
    if TERMS is not None:
        begin = start
        if TRANSPOSED:
            begin = start * 0
        found = _extremes(tile.to(tl.int64), begin, own_length, b, h, narrow, arrays, TERMS, OWN, SPAN, WIDE)
        for i in tl.static_range(len(found)):
            own_values = own_values + (tl.zeros([1], found[i].dtype) + found[i],)
    row = rows + tl.program_id(0).to(tl.int64) * 4
    first = (tl.program_id(0) * capacity).to(tl.int32)
    last = first + (capacity - 1).to(tl.int32)
    if entries is not None:
        if capacity == 0:
            first, last = tl.load(row), tl.load(row + 3)
        elif CAUSAL:
            pair = tl.program_id(0) // own_tiles.to(tl.int32)
            first, last = _room(tile, pair, own_tiles, tiles, start, q_len, TRANSPOSED, BM, BN)
    masked, full = first * 0, first * 0
    for at in range(0, tiles, WIDTH):
        others = at + tl.arange(0, WIDTH).to(tl.int64)
        possible, certain = others < tiles, others < 0
        if CLAIMS is not None:
            other_values = ()
            for i in tl.static_range(len(results)):
                value = tl.load(_place(results[i], b, h) + others, mask=others < tiles, other=0)
                other_values = other_values + (value,)
            possible, certain = _asked(
                mine * OWN, others * OTHER, OWN, OTHER, own_values, other_values, b64, h64, start, q_len, kv_len,
                scalars, wide, CLAIMS, TRANSPOSED
            )  # fmt: skip
        inside = (others + 1) * OTHER <= length
        certain = certain & inside
        if CAUSAL:
            seen = _seen(mine, own_tiles, tiles, start, q_len, TRANSPOSED, BM, BN)
            possible = possible & ((others >= tiles - seen) if TRANSPOSED else (others < seen))
        if REFINED is not None or MASK is not None:
            if tl.max((possible & (certain == 0)).to(tl.int32)) > 0:
                if MASK is not None:
                    some, whole = _by_mask(
                        tile, at, b, h, start, q_len, kv_len, narrow, arrays, MASK, TRANSPOSED, OWN, OTHER, OWN_PIECE,
                        OTHER_PIECE, OWN_PIECES, ROWS, WIDTH, WIDE
                    )  # fmt: skip
                else:
                    some, whole = _by_pieces(
                        tile, at, b64, h64, start, q_len, kv_len, scalars, wide, REFINED, TRANSPOSED, OWN, OTHER,
                        OWN_PIECE, OTHER_PIECE, OWN_PIECES, WIDTH
                    )  # fmt: skip
                possible = possible & some
                certain = certain | (whole & inside)
        partial, whole = possible & (certain == 0), possible & certain
        counts = partial.to(tl.int32) + whole.to(tl.int32) * 65536  # two counts in one number
        if entries is not None:
            number = others.to(entries.dtype.element_ty)
            sums = tl.cumsum(counts, 0)
            tl.store(entries + (first + masked + (sums & 65535) - 1), number, mask=partial)
            tl.store(entries + (last - full - (sums >> 16) + 1), number, mask=whole)
        count = tl.sum(counts)
        masked += count & 65535
        full += count >> 16
    tl.store(row, first)
    tl.store(row + 1, masked)
    tl.store(row + 2, full)
    tl.store(row + 3, last)
