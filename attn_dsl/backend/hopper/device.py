"""What the Hopper kernels do on registers and barriers, between the tensor-core products.

A warpgroup holds a tile of logits in the registers of its 128 threads: a thread has two rows, and of every eight
columns two neighbours. Reductions over the columns stay in a thread for as long as they can.
"""

# ruff: noqa: RET505, SIM300 (static conditions as Triton knows them)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attn_dsl.backend.portable.device import lies_in, place_of


@gluon.jit
def pin(x):
    """x, for x >= 0, and a store that never happens.

    ptxas knows nothing of the registers that `wgmma.wait_group` waits for, and moves it up at will; it keeps the order
    of memory operations. A branch or a trap in this place would serialize every product of the kernel.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 a; setp.lt.f32 p, $1, 0fBF800000; mov.u32 a, 0; @p st.shared.f32 [a], $1;"
        " mov.f32 $0, $1; }",
        "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def opaque(x):
    """x, of 32 bits, of which the compiler does not know that it has seen it before: what is computed from it is
    computed again, instead of being kept in registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)


@gluon.jit
def pack_pairs(x, DTYPE: gl.constexpr):
    """[M, N] float32 to [M, N // 2] int32, each a pair of neighbours in a 16-bit type."""
    low, high = gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    if DTYPE == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1)  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1)  # fmt: skip


@gluon.jit
def unpack_pairs(x, DTYPE: gl.constexpr):
    """The converse of `pack_pairs`, [M, N] of DTYPE."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [x], dtype=(gl.int16, gl.int16), is_pure=True, pack=1)  # fmt: skip
    return gl.reshape(gl.join(low, high), [x.shape[0], x.shape[1] * 2]).to(DTYPE, bitcast=True)


@gluon.jit
def thread_sums(x):
    """Row sums of [M, N] over the columns of each thread, [M, 4]; `row_sums` adds the four."""
    return gl.sum(gl.sum(gl.reshape(x, [x.shape[0], x.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def row_sums(x, LAYOUT: gl.constexpr):
    """[M, 4] to [M], in the layout of rows of a tile."""
    return gl.convert_layout(gl.sum(x, 1), gl.SliceLayout(1, LAYOUT))


@gluon.jit
def row_max(x, LAYOUT: gl.constexpr):
    """[M, N] to [M], in the layout of rows of a tile; four chains a thread and row rather than one."""
    parts = gl.max(gl.reshape(x, [x.shape[0], x.shape[1] // 16, 2, 4, 2]), 1)
    return gl.convert_layout(gl.max(gl.max(gl.max(parts, 3), 1), 1), gl.SliceLayout(1, LAYOUT))


@gluon.jit
def row_totals(x, k):
    """[M, 4] to the row totals [M] in the layout of k."""
    layout: gl.constexpr = k.type.layout
    return gl.convert_layout(gl.sum(x, 1), layout)


@gluon.jit
def warp_sums(x):
    """The sums of a tile over the rows of each of four warps, [4]."""
    return gl.sum(gl.reshape(x, [4, x.shape[0] // 4 * x.shape[1]]), 1)


@gluon.jit
def add_to(grad, index, amount, VARYING: gl.constexpr, CHECKED: gl.constexpr):
    """grad[index] += amount, where the checked axes of the index lie in the tensor.

    No thread may hold an element of `amount` in several registers, as it does in the layout of a tile with an axis of
    one element: Triton 3.6 adds every one of them.
    grad: (pointer to float32, extents, strides); bits of VARYING and CHECKED stand for axes of the index, as in
    `portable.device.element`.
    """
    pointer, offset = place_of(grad, index, VARYING)
    inside = gl.full(amount.shape, True, gl.int1, amount.type.layout) & lies_in(grad, index, CHECKED)
    offset = gl.full(amount.shape, 0, gl.int32, amount.type.layout) + offset
    gl.atomic_add(pointer + offset, amount, mask=inside, sem="relaxed")


@gluon.jit
def per_row(x, LAYOUT: gl.constexpr):
    """[M] of any row layout as the column [M, 1] of a tile of LAYOUT; each thread keeps what it has."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, LAYOUT), assert_trivial=True), 1)


@gluon.constexpr_function
def _columns_by_owner(keys):
    """The layout of [keys // 8, 4, 2] that is, reshaped, the columns [keys] of a tile."""
    registers = [[0, 0, 1]] + [[2**i, 0, 0] for i in range((keys // 8).bit_length() - 1)]
    lanes = [[0, 1, 0], [0, 2, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0, 0], [0, 0, 0]], [], [keys // 8, 4, 2])


@gluon.jit
def _column_parts(KEYS: gl.constexpr):
    """(what of a column's number is the thread's own, what is a literal): [1, 4, 1] and [KEYS // 8, 1, 2], int32."""
    owner: gl.constexpr = _columns_by_owner(KEYS)
    eights = gl.arange(0, KEYS // 8, layout=gl.SliceLayout(1, gl.SliceLayout(2, owner))) * 8
    pairs = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, owner))) * 2
    ones = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, owner)))
    literal = gl.expand_dims(gl.expand_dims(eights, 1), 2) + gl.expand_dims(gl.expand_dims(ones, 0), 1)
    return gl.expand_dims(gl.expand_dims(pairs, 0), 2), literal


@gluon.jit
def _row_of_tile(x, KEYS: gl.constexpr, LAYOUT: gl.constexpr):
    return gl.convert_layout(gl.reshape(x, [KEYS]), gl.SliceLayout(0, LAYOUT), assert_trivial=True)


@gluon.jit
def columns(first, KEYS: gl.constexpr, LAYOUT: gl.constexpr):
    """first, first + 1, ..., [1, KEYS] int32 along the columns of a tile of LAYOUT: one register and literals."""
    own, literal = _column_parts(KEYS)
    return gl.expand_dims(_row_of_tile((first + own) + literal, KEYS, LAYOUT), 0)


@gluon.jit
def _own_and_literal(first, KEYS: gl.constexpr, LAYOUT: gl.constexpr):
    """`columns` as two summands, [1, KEYS] each: the first is one register, the second are literals."""
    own, literal = _column_parts(KEYS)
    own, literal = gl.broadcast(first + own, literal)
    return (
        gl.expand_dims(_row_of_tile(own, KEYS, LAYOUT), 0),
        gl.expand_dims(_row_of_tile(literal, KEYS, LAYOUT), 0),
    )


@gluon.jit
def up_to(x, high, first, LAYOUT: gl.constexpr):
    """x [M, KEYS] where first + column <= high, else -inf; `high`, of [M, 1] or a number, is at least -1.

    One comparison with a literal an element, and in assembly, lest LLVM make vectors of bits of the comparisons.
    """
    own, literal = _own_and_literal(first, x.shape[1], LAYOUT)
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.le.s32 p, $2, $3; selp.f32 $0, $1, 0fFF800000, p; }",
        "=f,f,r,r", [x, literal, high - own], dtype=gl.float32, is_pure=True, pack=1)  # fmt: skip


@gluon.jit
def between(x, low, high, first, LAYOUT: gl.constexpr):
    """x [M, KEYS] where low <= first + column <= high, else -inf; low >= 0, high >= -1."""
    own, literal = _own_and_literal(first, x.shape[1], LAYOUT)
    return gl.inline_asm_elementwise(
        "{ .reg .pred p, q; setp.ge.s32 p, $2, $3; setp.le.and.s32 q, $2, $4, p; selp.f32 $0, $1, 0fFF800000, q; }",
        "=f,f,r,r,r", [x, literal, low - own, high - own], dtype=gl.float32, is_pure=True, pack=1)  # fmt: skip


@gluon.jit
def bits_up_to(high, first, KEYS: gl.constexpr, LAYOUT: gl.constexpr):
    """Which of a thread's own columns are such that first + column <= high: a word of bits, the least for its first.

    high: [M, 1]; the result is [M, KEYS] int32, one number for all of a thread's elements of a row.
    """
    own, _ = _own_and_literal(first, KEYS, LAYOUT)
    last = high - own
    count = gl.maximum((last >> 3) * 2 + gl.minimum((last & 7) + 1, 2), 0)  # of every eight columns, the first two
    return gl.where(count >= 32, -1, (1 << gl.minimum(count, 31)) - 1)


@gluon.jit
def bits_between(low, high, first, KEYS: gl.constexpr, LAYOUT: gl.constexpr):
    """`bits_up_to`, where low <= first + column <= high."""
    return bits_up_to(high, first, KEYS, LAYOUT) & ~bits_up_to(low - 1, first, KEYS, LAYOUT)


@gluon.jit
def repeated_bits(low, high, PERIOD: gl.constexpr, KEYS: gl.constexpr, LAYOUT: gl.constexpr):
    """`bits_between`, where low <= column % PERIOD <= high; PERIOD is 32, 64 or 128 and divides KEYS."""
    bits = bits_between(gl.maximum(low, 0), gl.minimum(high, PERIOD - 1), 0, KEYS, LAYOUT)
    if PERIOD < KEYS:
        bits |= bits << (PERIOD // 4)
    if 2 * PERIOD < KEYS:
        bits |= bits << (PERIOD // 2)
    return bits


@gluon.jit
def kept(x, bits, LAYOUT: gl.constexpr):
    """x [M, KEYS], of at most 128 columns, where its bit is set, else -inf: a test and a choice an element."""
    _, column = _own_and_literal(0, x.shape[1], LAYOUT)
    bit = 1 << ((column >> 3) * 2 + (column & 1))
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 b; and.b32 b, $2, $3; setp.ne.u32 p, b, 0; selp.f32 $0, $1, 0fFF800000, p; }",
        "=f,f,r,r", [x, bits, bit], dtype=gl.float32, is_pure=True, pack=1)  # fmt: skip


@gluon.jit
def ramp(slope, first, ROWS: gl.constexpr, KEYS: gl.constexpr, LAYOUT: gl.constexpr):
    """slope * (first + column), [ROWS, KEYS] float32 in LAYOUT: one multiply-add with a literal for each column."""
    own, literal = _column_parts(KEYS)
    slope = opaque(slope)  # else its products with the literals would be kept in registers
    line = gl.fma(slope, literal.to(gl.float32), slope * (first + own).to(gl.float32))
    line = gl.expand_dims(_row_of_tile(line, KEYS, LAYOUT), 0)
    return gl.broadcast(line, gl.zeros([ROWS, KEYS], gl.float32, LAYOUT))[0]


@gluon.jit
def wait_turn(GROUP: gl.constexpr):
    """Ping-pong: wait until the warpgroup before this one has issued its products."""
    if GROUP == 0:
        gl.inline_asm_elementwise("bar.sync 9, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    elif GROUP == 1:
        gl.inline_asm_elementwise("bar.sync 10, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    else:
        gl.inline_asm_elementwise("bar.sync 11, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def pass_turn(GROUP: gl.constexpr, GROUPS: gl.constexpr):
    """The converse: let the next of GROUPS warpgroups issue its products."""
    if (GROUP + 1) % GROUPS == 0:
        gl.inline_asm_elementwise("bar.arrive 9, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    elif (GROUP + 1) % GROUPS == 1:
        gl.inline_asm_elementwise("bar.arrive 10, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    else:
        gl.inline_asm_elementwise("bar.arrive 11, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def meet(GROUPS: gl.constexpr):
    """Wait until all warpgroups that multiply have come here."""
    if GROUPS == 2:
        gl.inline_asm_elementwise("bar.sync 12, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    else:
        gl.inline_asm_elementwise("bar.sync 12, 384; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
