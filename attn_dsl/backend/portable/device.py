"""What both the kernels and the emitted functions of a variant call on the device.

Positions are int32, or int64 where the caller found that int32 could overflow. A captured tensor is a tuple
`(pointer, extents, strides)`, extents and strides in elements. Head dimensions that are no power of two are cut into
two chunks of columns (192 = 128 + 64), so a tile of rows is a tuple of one or two blocks.
"""

# ruff: noqa: RET505, RUF005, SIM108
# Triton compiles what follows a `return` under a static condition unless it stands in an `else`, and it knows tuples
# by concatenation only.

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


# ---------------------------------------------------------------- arithmetic of the language


@triton.jit
def floor_divide(x, y):
    """`x // y`, rounding toward minus infinity, for y > 0; the hardware's division rounds toward zero."""
    return tl.where(x < 0, x - (y - 1), x) // y


@triton.jit
def floor_modulo(x, y):
    """`x % y` with the sign of y, for y > 0."""
    return x - floor_divide(x, y) * y


@triton.jit
def tanh_approx(x):
    """The tanh of the hardware (sm_75 and later): relative error below 2 ** -10.9."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def tanh(x):
    """Within some units in the last place: a series near 0, where the quotient would cancel."""
    a = tl.abs(x)
    square = x * x
    series = x + x * square * (-0.33333334 + square * (0.13333334 + square * (-0.05396825 + square * 0.02186949)))
    rest = 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.25, series, tl.where(x < 0, rest - 1.0, 1.0 - rest))


@triton.jit
def log1p(x):
    """log(1 + x); the factor x / ((1 + x) - 1) undoes the rounding of 1 + x."""
    u = 1.0 + x
    exact = u == 1.0
    return tl.where(exact, x, tl.log(u) * (x / tl.where(exact, 1.0, u - 1.0)))


@triton.jit
def power(x, y):
    """`x ** y` of floats: nan for a negative base unless the exponent is an integer."""
    magnitude = tl.exp2(y * tl.log2(tl.abs(x)))
    whole = tl.floor(y) == y
    odd = tl.floor(0.5 * y) * 2.0 != y
    signed = tl.where(whole, tl.where(odd, -magnitude, magnitude), float("nan"))
    return tl.where(y == 0.0, 1.0, tl.where(x < 0.0, signed, magnitude))


@triton.jit
def whole_power(x, N: tl.constexpr):
    """`x ** N` for a literal N >= 0, by multiplication."""
    result = x * 0 + 1
    for _ in tl.static_range(N):
        result = result * x
    return result


@triton.jit
def float_floor_divide(x, y):
    return tl.floor(x / y)


@triton.jit
def float_modulo(x, y):
    """`x % y` with the sign of y."""
    return x - tl.floor(x / y) * y


@triton.jit
def tan(x):
    return tl.sin(x) / tl.cos(x)


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def gelu(x):
    """x times the normal distribution function."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def sign(x):
    return tl.where(x > 0, 1, tl.where(x < 0, -1, 0)).to(x.dtype)


# ---------------------------------------------------------------- arguments
#
# Triton compiles anew for each integer of a tuple that is 1 or a multiple of 16, or that changes its width. None of
# that may happen when a length changes, so integers travel as `plain(v)`, which is odd, not 1 and always 64 bits wide.

HIDDEN: tl.constexpr = tl.constexpr(2**50 + 17)


def plain(value: int) -> int:
    """An integer of a tuple argument, |value| < 2 ** 44, as the kernels expect it."""
    return 32 * value + HIDDEN.value


@triton.jit
def scalar(x, WIDE: tl.constexpr):
    """A scalar of a tuple argument: a number, or what a pointer to one element points to; integers of 32 or 64 bits."""
    if x.dtype.is_ptr():
        if x.dtype.element_ty.is_floating():
            return tl.load(x).to(tl.float32)
        elif x.dtype.element_ty == tl.int1:
            return tl.load(x)
        elif WIDE:
            return tl.load(x).to(tl.int64)
        else:
            return tl.load(x).to(tl.int32)
    elif x.dtype == tl.int64:
        if WIDE:
            return (x - HIDDEN) >> 5
        else:
            return ((x - HIDDEN) >> 5).to(tl.int32)
    else:
        return x


@triton.jit
def scalars_of(items, WIDE: tl.constexpr):
    """The scalars of a tuple argument."""
    result = ()
    for i in tl.static_range(len(items)):
        result = result + (scalar(items[i], WIDE),)
    return result


@triton.jit
def strides_of(items, UNIT: tl.constexpr):
    """(batch, head, row, column) strides in elements; rows and columns of a tile are reached in 32 bits.

    The argument counts the first three in units of UNIT elements, which tells the compiler what they are multiples of.
    """
    batch, head = scalar(items[0], True) * UNIT, scalar(items[1], True) * UNIT
    return batch, head, scalar(items[2], False) * UNIT, scalar(items[3], False)


@triton.jit
def captured(tensors, WIDE: tl.constexpr):
    """The captured tensors of a tuple argument."""
    result = ()
    for i in tl.static_range(len(tensors)):
        result = result + ((tensors[i][0], scalars_of(tensors[i][1], WIDE), scalars_of(tensors[i][2], WIDE)),)
    return result


# ---------------------------------------------------------------- captured tensors


@triton.jit
def place_of(tensor, index, VARYING: tl.constexpr):
    """`tensor[index]` as a pointer and an offset: what is the same for the tile is added to the pointer in 64 bits,
    the rest to the offset in the width of `k`."""
    pointer = tensor[0]
    offset = 0
    for axis in tl.static_range(len(index)):
        if (VARYING >> axis) & 1:
            offset += index[axis] * tensor[2][axis]
        else:
            pointer += index[axis] * tensor[2][axis].to(tl.int64)
    return pointer, offset


@triton.jit
def _unsigned(x):
    return x.to(tl.uint64) if x.dtype == tl.int64 else x.to(tl.uint32)


@triton.jit
def lies_in(tensor, index, CHECKED: tl.constexpr):
    """Whether the checked axes of the index lie in the tensor."""
    keep = True
    for axis in tl.static_range(len(index)):
        if (CHECKED >> axis) & 1:
            # One unsigned comparison: a negative index is a huge one.
            index_here = index[axis] + tensor[1][axis] * 0  # a literal index becomes a number of the device
            keep = keep & (_unsigned(index_here) < _unsigned(tensor[1][axis]))
    return keep


@triton.jit
def element(tensor, index, VARYING: tl.constexpr, CHECKED: tl.constexpr):
    """`tensor[index]`, or 0 where a checked index is out of range (never used: such a pair is under the mask).

    Bit `axis` of VARYING says that the index of the axis varies within the tile, of CHECKED that it is not known to lie
    in the tensor.
    """
    pointer, offset = place_of(tensor, index, VARYING)
    if CHECKED == 0:
        return tl.load(pointer + offset)
    else:
        return tl.load(pointer + offset, mask=lies_in(tensor, index, CHECKED), other=0)


# ---------------------------------------------------------------- gradients of captured tensors

ADD: tl.constexpr = tl.constexpr(0)
"""Float atomics: the order of the additions, and with it the last bits, differ from run to run."""
PEAK: tl.constexpr = tl.constexpr(1)
"""Find the largest magnitude that will be added to a target; adds nothing."""
FIXED: tl.constexpr = tl.constexpr(2)
"""Add in fixed point, value * factor cut to int64: integer addition knows no order, each run gives the same bits."""


@triton.jit
def scatter(
        grad, index, amount, keep, VARYING: tl.constexpr, CHECKED: tl.constexpr, MAY_COINCIDE: tl.constexpr, peaks,
        factors, TARGET: tl.constexpr, MODE: tl.constexpr
):  # fmt: skip
    """grad[index] += amount, where `keep` (None: everywhere) and the checked axes of the index lie in the tensor.

    grad: (pointer to float32, or int64 if MODE is FIXED; extents; strides). peaks: [targets] int32, the bits of a
    float32 >= 0; factors: [targets] float32. MAY_COINCIDE: all places of a tile may be one; it then takes one
    addition.
    """
    if keep is not None:
        amount = tl.where(keep, amount, 0.0)
    if MODE == PEAK:
        largest = tl.abs(amount)
        if VARYING != 0:
            largest = tl.max(largest)
        tl.atomic_max(peaks + TARGET, largest.to(tl.int32, bitcast=True), sem="relaxed")
    else:
        if MODE == FIXED:
            amount = (amount * tl.load(factors + TARGET)).to(tl.int64)
        inside = lies_in(grad, index, CHECKED)
        pointer, offset = place_of(grad, index, VARYING)
        if VARYING == 0:
            tl.atomic_add(pointer, amount, mask=inside, sem="relaxed")
        else:
            amount = tl.broadcast_to(amount, offset.shape)
            if keep is not None:
                inside = inside & keep
            if MAY_COINCIDE:
                lowest = tl.min(offset)
                if lowest == tl.max(offset):
                    ok = tl.max((inside & (amount == amount)).to(tl.int32)) > 0
                    tl.atomic_add(pointer + lowest, tl.sum(amount), mask=ok, sem="relaxed")
                else:
                    tl.atomic_add(pointer + offset, amount, mask=inside, sem="relaxed")
            else:
                tl.atomic_add(pointer + offset, amount, mask=inside, sem="relaxed")


# ---------------------------------------------------------------- tiles


@triton.jit
def _block(
        base, rows, strides, keep, CONTIGUOUS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
        D: tl.constexpr
):  # fmt: skip
    columns = FIRST + tl.arange(0, WIDTH)
    if CONTIGUOUS:
        pointers = base + rows[:, None] * strides[2] + columns[None, :]
    else:
        pointers = base + rows[:, None] * strides[2] + columns[None, :] * strides[3]
    if FIRST + WIDTH > D:
        inside = columns[None, :] < D
        if keep is not None:
            inside = inside & keep[:, None]
        return tl.load(pointers, mask=inside, other=0.0)
    elif keep is not None:
        return tl.load(pointers, mask=keep[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_rows(
        base, rows, strides, keep, CONTIGUOUS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr
):  # fmt: skip
    """Rows of D columns as chunks of D0 and, unless it is 0, D1 columns; 0 where `keep` is false and past D.

    base: pointer to row 0. rows: [R] row numbers, small. strides: as `strides_of` gives them; the last is
    1 if CONTIGUOUS.
    """
    if D1 == 0:
        return (_block(base, rows, strides, keep, CONTIGUOUS, 0, D0, D),)
    else:
        first = _block(base, rows, strides, keep, CONTIGUOUS, 0, D0, D)
        return (first, _block(base, rows, strides, keep, CONTIGUOUS, D0, D1, D))


@triton.jit
def _store_block(base, rows, strides, keep, block, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * strides[2] + columns[None, :]
    inside = keep[:, None]
    if FIRST + WIDTH > D:
        inside = inside & (columns[None, :] < D)
    tl.store(pointers, block.to(base.dtype.element_ty), mask=inside)


@triton.jit
def store_rows(base, rows, strides, keep, tile, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """The converse of `load_rows`, in the storage type; columns stand one behind the other."""
    _store_block(base, rows, strides, keep, tile[0], 0, D0, D)
    if D1 > 0:
        _store_block(base, rows, strides, keep, tile[1], D0, D1, D)


@triton.jit
def zero_rows(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    if D1 == 0:
        return (tl.zeros([ROWS, D0], tl.float32),)
    else:
        return (tl.zeros([ROWS, D0], tl.float32), tl.zeros([ROWS, D1], tl.float32))


@triton.jit
def scale_rows(tile, factor):
    """Each row times its factor, in float32; `factor` is [R, 1] or a scalar."""
    if len(tile) == 1:
        return (tile[0].to(tl.float32) * factor,)
    else:
        return (tile[0].to(tl.float32) * factor, tile[1].to(tl.float32) * factor)


@triton.jit
def round_rows(tile, DTYPE: tl.constexpr):
    if len(tile) == 1:
        return (tile[0].to(DTYPE),)
    else:
        return (tile[0].to(DTYPE), tile[1].to(DTYPE))


@triton.jit
def _dot(x, y, total, PRECISION: tl.constexpr):
    """x y + total. PRECISION is that of float32 operands (`ieee`, `tf32`); `widen` is for Triton's interpreter, which
    multiplies bfloat16 bit patterns as integers unless they are widened first."""
    if PRECISION == "widen":
        return tl.dot(x.to(tl.float32), y.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(x, y, total, input_precision=PRECISION)


@triton.jit
def inner_products(x, y, PRECISION: tl.constexpr):
    """x y^T over the chunks of both, float32 [rows of x, rows of y]."""
    zero = tl.zeros([x[0].shape[0], y[0].shape[0]], tl.float32)
    result = _dot(x[0], tl.trans(y[0]), zero, PRECISION)
    if len(x) == 2:
        result = _dot(x[1], tl.trans(y[1]), result, PRECISION)
    return result


@triton.jit
def weighted_sum(total, weight, tile, PRECISION: tl.constexpr):
    """total + weight tile, chunk by chunk."""
    first = _dot(weight, tile[0], total[0], PRECISION)
    if len(tile) == 1:
        return (first,)
    else:
        return (first, _dot(weight, tile[1], total[1], PRECISION))


# ---------------------------------------------------------------- tile ranges


@triton.jit
def count(segments):
    """How many tiles the segments hold together. A segment is (begin, end), empty where end < begin, or it is part of a
    list (`classify.py`): (entries, first, step, count)."""
    total = 0
    for i in tl.static_range(len(segments)):
        if len(segments[i]) == 4:
            total += segments[i][3]
        else:
            total += tl.maximum(segments[i][1] - segments[i][0], 0).to(tl.int32)
    return total


@triton.jit
def nth(segments, n):
    """The n-th tile of the segments, one after the other; some tile of the axis where lists hold none."""
    tile = n
    passed = 0
    for i in tl.static_range(len(segments)):
        if len(segments[i]) == 4:
            at = n - passed
            held = (at >= 0) & (at < segments[i][3])
            entry = tl.load(segments[i][0] + (segments[i][1] + at * segments[i][2]), mask=held, other=0).to(tl.int32)
            tile = entry if i == 0 else tl.where(held, entry, tile)
            passed += segments[i][3]
        else:
            begin = tl.maximum(segments[i][0], 0).to(tl.int32)
            tile = tl.where(n >= passed, begin + n - passed, tile)
            passed += tl.maximum(segments[i][1] - segments[i][0], 0).to(tl.int32)
    return tile


@triton.jit
def program(tiles, pairs, section):
    """(tile, pair of batch and head) of this program, from a grid of one axis.

    Pairs run in sections whose keys and values fit the cache together; within a section the last tile comes first for
    all pairs, since under a causal mask it is the longest.
    """
    number = tl.program_id(0)
    first = number // (section * tiles) * section
    width = tl.minimum(section, pairs - first)
    rest = number - first * tiles
    return tiles - 1 - rest // width, first + rest % width


@triton.jit
def first_position(q_offset, b, TYPE: tl.constexpr):
    """The position of the first query, from a number or a pointer to [B]."""
    if q_offset.dtype.is_ptr():
        return tl.load(q_offset + b).to(TYPE)
    else:
        return q_offset.to(TYPE)


# ---------------------------------------------------------------- packed sequences
#
# Sequences stand one behind the other, [1, H, rows of all, D] with a batch stride of 0; ends, int32 [B + 1], are their
# cumulative lengths. The ends of queries and of keys stand first in `tensors`. Without knowing the lengths, the host
# launches for `rows // ROWS + B` tiles: sequence b has the tiles from ends[b] // ROWS + b on, which is enough for it.


@triton.jit
def bounds_of(ends, b):
    """(first row, rows) of a sequence."""
    first = tl.load(ends[0] + b * ends[2][0])
    return first.to(tl.int64), tl.load(ends[0] + (b + 1) * ends[2][0]) - first


@triton.jit
def first_tile(ends, b, ROWS: tl.constexpr):
    """The number of the first tile of a sequence among those of all."""
    return tl.load(ends[0] + b * ends[2][0]) // ROWS + b


@triton.jit
def packed_program(ends, batch, heads, ROWS: tl.constexpr):
    """(tile, b, h) of this program: the heads of a tile side by side, the last tile of a sequence first."""
    number = (tl.num_programs(0) - 1 - tl.program_id(0)) // heads
    b = -1
    for first in range(0, batch, 64):
        sequences = first + tl.arange(0, 64)
        begins = tl.load(ends[0] + sequences * ends[2][0], mask=sequences < batch, other=0)
        b += tl.sum(((sequences < batch) & (begins // ROWS + sequences <= number)).to(tl.int32))
    return number - first_tile(ends, b, ROWS), b, tl.program_id(0) % heads


# ---------------------------------------------------------------- pages and scales
#
# A cache in pages is [pages, HK, PAGE, D]; row b of the page table, int32 [B, pages of a sequence], names the pages of
# a batch entry in order. What a table or a scale says of a tile is loaded one tile ahead, since addresses wait for it.


@triton.jit
def slab(tile, b, hk, tensors, BN: tl.constexpr, PAGE: tl.constexpr, SCALED: tl.constexpr):
    """Where a tile of BN keys stands: ([page], [key scale, value scale]), the page if PAGE is not 0, and the scales if
    SCALED. Each is a number where a page holds whole tiles, else [BN].

    The table and the scales stand first in `tensors`. A tile past the end of the table has the last page.
    """
    result = ()
    place = b.to(tl.int64)
    if PAGE > 0:
        table = tensors[0]
        if PAGE >= BN:
            number = tile // (PAGE // BN)
        else:
            number = tile * (BN // PAGE) + tl.arange(0, BN) // PAGE
        number = tl.minimum(number, (table[1][1] - 1).to(tl.int32))
        place = tl.load(table[0] + place * table[2][0] + number * table[2][1]).to(tl.int64)
        result = (place,)
    if SCALED:
        for i in tl.static_range(1 if PAGE > 0 else 0, 3 if PAGE > 0 else 2):
            scale = tensors[i]
            result = result + (tl.load(scale[0] + place * scale[2][0] + hk * scale[2][1]),)
    return result


@triton.jit
def place_rows(base, first, lines, strides, at, BN: tl.constexpr, PAGE: tl.constexpr):
    """(base, rows) with which `load_rows` finds the keys first + lines, a tile of BN keys that stands `at` its slab.

    base: pointer to the first row of the batch entry, where there are pages to that of the first page.
    """
    if PAGE == 0:
        return base + first.to(tl.int64) * strides[2], lines
    elif PAGE >= BN:
        return base + at[0] * strides[0] + (first % PAGE).to(tl.int64) * strides[2], lines
    else:
        return base + (at[0] * strides[0])[:, None], lines % PAGE


@triton.jit
def widened(tile, DTYPE: tl.constexpr):
    """A tile of 8 bits as the products take it; by way of float32, since only sm_90 goes from float16 to bfloat16."""
    if tile[0].dtype.primitive_bitwidth == 8:
        return round_rows(scale_rows(tile, 1.0), DTYPE)
    else:
        return tile


@triton.jit
def along_keys(x, at, LAST: tl.constexpr):
    """x [rows, keys] times a scale of the slab: LAST is 2 for that of the keys, 1 for that of the values."""
    if len(at) < 2:
        return x
    elif at[len(at) - LAST].type.is_block():
        return x * at[len(at) - LAST][None, :]
    else:
        return x * at[len(at) - LAST]


@triton.jit
def own_mask(lines, length, positions, b, h, MASK: tl.constexpr, scalars, tensors):
    """Which lines of a tile there are, `length` of them, that MASK, a part of the mask over one axis, keeps."""
    keep = lines < length
    if MASK is not None:
        keep = keep & MASK(b, h, positions, False, scalars, tensors)
    return keep
