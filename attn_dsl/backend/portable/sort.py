"""Positions in the order of what a tensor holds, stable, and the runs of equal elements: two kernels.

A row is cut into sections. `count_bins` counts the elements of each by their value modulo the number of bins, which
tells apart the values of a row that spans less. `sort_positions` sorts a section in registers; how many elements of
other sections come before one, the counts say, or, where values span more, each other section, which it sorts too.
"""

import triton
import triton.language as tl

from attn_dsl.backend.portable.device import scalar


@triton.jit
def _section(tensor, strides, rows, length, SECTION: tl.constexpr):
    """(row, section, sections, pointer to the row, stride) of this program."""
    sections = tl.cdiv(length, SECTION)
    row, section = tl.program_id(0) // sections, tl.program_id(0) % sections
    inner = scalar(rows, False)
    base = tensor + (row // inner) * scalar(strides[0], True) + (row % inner) * scalar(strides[1], True)
    return row.to(tl.int64), section, sections, base, scalar(strides[2], True)


@triton.jit
def _read(row, stride, first, length, SECTION: tl.constexpr):
    """(lines, whether they are inside, elements) of a section; what is outside repeats the last one."""
    lines = tl.arange(0, SECTION)
    places = tl.minimum(first + lines, length - 1)
    return lines, first + lines < length, tl.load(row + places * stride)


# ---------------------------------------------------------------- a bitonic sort
#
# Elements stand in [2, 2, ..., 2], whose first axes Triton gives to registers and whose last ones to the threads of a
# warp. The low bits of the rank of an element are the first axes, those above them the last ones on: neighbours are in
# one thread, and half the steps with them, where in `tl.sort` they are in two.


@triton.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@triton.constexpr_function
def _axis(bit, own, axes):
    """That of a bit of the rank; `own` bits number what a thread has."""
    return own - 1 - bit if bit < own else axes - 1 - (bit - own)


@triton.jit
def _bit(AXIS: tl.constexpr, AXES: tl.constexpr):
    """0 and 1 along an axis."""
    return tl.reshape(tl.arange(0, 2), [1] * AXIS + [2] + [1] * (AXES - AXIS - 1))


@triton.jit
def _exchanged(x, STAGE: tl.constexpr, BIT: tl.constexpr, OWN: tl.constexpr):
    """Pairs whose ranks differ in a bit put in order, or in the converse where the bit STAGE of their ranks is set."""
    AXES: tl.constexpr = len(x.shape)
    AXIS: tl.constexpr = _axis(BIT, OWN, AXES)
    if BIT < OWN + 5:
        other = tl.sum(x, AXIS, keep_dims=True) - x
    else:  # another warp has it
        across = tl.arange(0, x.numel) ^ (1 << (BIT - OWN))
        other = tl.reshape(tl.gather(tl.reshape(x, [x.numel]), across, 0), x.shape)
    second = _bit(AXIS, AXES)
    if STAGE < AXES:
        second = second ^ _bit(_axis(STAGE, OWN, AXES), AXES)
    return tl.where(second != 0, tl.maximum(x, other), tl.minimum(x, other))


@triton.jit
def _sorted(x, THREADS: tl.constexpr):
    """As `tl.sort` gives it."""
    EACH: tl.constexpr = x.numel // THREADS
    AXES: tl.constexpr = _log2(x.numel)
    h = tl.reshape(x, [2] * AXES)
    for stage in tl.static_range(1, AXES + 1):
        for step in tl.static_range(stage):
            h = _exchanged(h, stage, stage - 1 - step, _log2(EACH))
    rank = tl.arange(0, x.numel)
    return tl.gather(tl.reshape(h, [x.numel]), rank % EACH * THREADS + rank // EACH, 0)


# ---------------------------------------------------------------- counts


@triton.jit
def _bin(x, BINS: tl.constexpr):
    return x.to(tl.int32) & (BINS - 1)


@triton.jit(do_not_specialize=["strides", "rows", "length"])
def count_bins(
        tensor, counts, ranges, strides, rows, length, SECTION: tl.constexpr, BINS: tl.constexpr
):  # fmt: skip
    """What each section of SECTION positions holds, a program for each; `tensor` as `sort_positions` takes it.

    counts    [rows, sections, BINS]    int16, elements by their value modulo BINS
    ranges    [rows, sections, 2]       the lowest and the highest element, in the tensor's type
    """
    length = scalar(length, False)
    _, section, _, base, stride = _section(tensor, strides, rows, length, SECTION)
    _, inside, x = _read(base, stride, section * SECTION, length, SECTION)
    own = tl.program_id(0).to(tl.int64)
    found = tl.histogram(_bin(x, BINS), BINS, mask=inside)
    tl.store(counts + own * BINS + tl.arange(0, BINS), found.to(tl.int16))
    tl.store(ranges + own * 2, tl.min(x).to(x.dtype))
    tl.store(ranges + own * 2 + 1, tl.max(x).to(x.dtype))


# ---------------------------------------------------------------- places


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


@triton.jit
def _search(values, x, SECTION: tl.constexpr):
    """How many of SECTION sorted values are less than each x, and how many are at most that."""
    less, upto = tl.zeros(x.shape, tl.int32), tl.zeros(x.shape, tl.int32)
    step = tl.full((), SECTION, tl.int32)
    while step > 0:  # by halves, and one more, since the numbers reach SECTION
        half = tl.maximum(step // 2, 1)
        less += tl.where(tl.gather(values, less + half - 1, 0) < x, half, 0)
        upto += tl.where(tl.gather(values, upto + half - 1, 0) <= x, half, 0)
        step //= 2
    return less, upto


@triton.jit
def _counted(key, total, before, own, low, length, SECTION: tl.constexpr, BINS: tl.constexpr):
    """(lines, places, first and last places of their runs) of a section, sorted: [SECTION] each.

    key: bins times SECTION, and lines, sorted. total, before, own: [BINS], counts of the row, of the sections before
    this one, and of this one.
    """
    number = tl.arange(0, BINS)
    both = tl.cumsum(total * 65536 + own, 0)  # two sums in one number
    first, start = (both >> 16) - total, (both & 65535) - own
    # The bin of the lowest value comes first; those in front of it hold what is above.
    above = number < _bin(low, BINS)
    first += tl.where(above, length, 0) - tl.sum(tl.where(above, total, 0))
    group = tl.minimum(key // SECTION, BINS - 1)
    found = tl.gather(first * 65536 + (first + before - start), group, 0)  # the latter may be less than 0
    shift = (found << 16) >> 16
    begin = (found - shift) >> 16
    return key % SECTION, shift + tl.arange(0, SECTION), begin, begin + tl.gather(total, group, 0) - 1


@triton.jit
def _searched(
        x, lines, inside, row, stride, section, sections, highest, length, SECTION: tl.constexpr, THREADS: tl.constexpr
):  # fmt: skip
    """The same of values that span more than the bins, from the elements of all sections."""
    less, upto, mine = tl.zeros_like(lines), tl.zeros_like(lines), tl.zeros_like(lines)
    before = tl.zeros_like(lines)
    for s in range(sections):
        _, there, y = _read(row, stride, s * SECTION, length, SECTION)
        under, up = _search(_sorted(tl.where(there, y, highest.to(y.dtype)), THREADS), x, SECTION)
        up = tl.minimum(up, length - s * SECTION)  # what is not there was made the highest
        less += under
        upto += up
        before += tl.where(s < section, up, tl.where(s > section, under, 0))
        mine = tl.where(s == section, under, mine)
    # Of a section, elements are equal that have equal numbers of lesser ones.
    line = _sorted(tl.where(inside, mine, SECTION) * SECTION + lines, THREADS) % SECTION
    place = tl.gather(before, line, 0) + tl.arange(0, SECTION)
    return line, place, tl.gather(less, line, 0), tl.gather(upto, line, 0) - 1


@triton.jit(do_not_specialize=["strides", "rows", "length"])
def sort_positions(
        tensor, counts, ranges, order, first_codes, first_blocks, last_codes, last_blocks, strides, rows, length,
        SECTION: tl.constexpr, SECTIONS: tl.constexpr, BINS: tl.constexpr, THREADS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The elements of `tensor` [rows 0, rows 1, length] decide where each position goes in its row.

    counts, ranges              as `count_bins` makes them
    order     [rows, length]    the positions, equal elements in the order given
    codes     [rows, length]    uint8, the first or last place of the run that a place is in, if it lies in the block of
                                BLOCK places; else 0 for a first, BLOCK - 1 for a last place
    blocks    [rows, blocks]    int32, that of the first or last place of each block

    What is not wanted is None. One program for a section of SECTION positions, THREADS the threads that it has; a row
    has at most SECTIONS of them, and less than 2 ** 15 positions.
    """
    length = scalar(length, False)
    row, section, sections, base, stride = _section(tensor, strides, rows, length, SECTION)
    begin = section * SECTION
    lines, inside, x = _read(base, stride, begin, length, SECTION)
    found = counts + row * sections * BINS + tl.arange(0, BINS)
    known = ranges + (row * sections + tl.minimum(tl.arange(0, SECTIONS), sections - 1)) * 2
    total, before, own = tl.zeros([BINS], tl.int32), tl.zeros([BINS], tl.int32), tl.zeros([BINS], tl.int32)
    for s in tl.static_range(SECTIONS):
        held = tl.load(found + s * BINS, mask=s < sections, other=0).to(tl.int32)
        total += held
        before += tl.where(s < section, held, 0)
        own += tl.where(s == section, held, 0)
    lows, highs = tl.load(known), tl.load(known + 1)
    key = _sorted(tl.where(inside, _bin(x, BINS), BINS) * SECTION + lines, THREADS)  # while the rest is on its way
    lowest, highest = tl.min(lows), tl.max(highs)
    low, high = lowest.to(tl.int64), highest.to(tl.int64)
    if (high - low >= 0) & (high - low < BINS):  # a span of 64 bits may be less than 0
        line, place, first, last = _counted(key, total, before, own, low, length, SECTION, BINS)
    else:
        line, place, first, last = _searched(
            x, lines, inside, base, stride, section, sections, highest, length, SECTION, THREADS
        )
    there = tl.arange(0, SECTION) < length - begin
    ends = first_codes, first_blocks, last_codes, last_blocks
    _store(order, *ends, row, begin + line, place, first, last, there, length, BLOCK)
