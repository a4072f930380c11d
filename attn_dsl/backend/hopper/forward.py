"""The forward kernel: a producer warp loads, two or three warpgroups of 64 query rows each multiply and exponentiate.

The producer fills rings of key and value tiles by the bulk copy engine. A consumer keeps its probabilities in
registers, where they are the left operand of the second product. One step of its loop, with S = Q K^T and O = P V:

    issue S(i);  issue O += P(i-1) V(i-1);  wait for S(i);  softmax(i) while O runs;  wait for O;  rescale O

Softmax runs online, in base 2: the logit is factor * (r + slope * (k - q0)), with r the bare product or what the
variant makes of it (`emit.py`) and q0 the first query of the tile; m is the running maximum of the logits, l the
running sum of 2 ** (logit - m), spread over the four threads that share a row. A program takes query tile after query
tile, each as soon as it is done with the one before; loads run ahead across their borders.

With FROZEN, only masked tiles and the first one move m, which they put 32 above the largest logit; full tiles neither
look for a maximum nor rescale anything. Weights between 2 ** -126 and 2 ** 127 are as exact as those near 1, so what
comes out is right as long as the sums stay far from these ends. A warpgroup sees that from its row sums, which only
grow; else the query tile comes again, and every key tile moves m. With HOLD, masked tiles but the first leave m
where it is, too, which is 0 in rows that have seen nothing.

After FlashAttention-3 (Shah et al. 2024, section 3), in what overlaps with what.
"""

# ruff: noqa: RET505, RUF005, E741 (static conditions and tuples as Triton knows them; l is the row sum)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from attn_dsl.backend.hopper.channels import LINES, SWIZZLED, Board, Ring, board, boxes, corner, ring
from attn_dsl.backend.hopper.device import (
    between,
    bits_between,
    bits_up_to,
    columns,
    kept,
    pack_pairs,
    pass_turn,
    per_row,
    pin,
    ramp,
    repeated_bits,
    row_max,
    row_sums,
    thread_sums,
    unpack_pairs,
    up_to,
    wait_turn,
)
from attn_dsl.backend.hopper.versions import async_store
from attn_dsl.backend.portable.device import LN2, LOG2E, captured, count, first_position, nth, scalars_of

NEVER = gl.constexpr(float("-inf"))
HEADROOM = gl.constexpr(32.0)
"""A maximum that is to stay is set so much higher, in base 2; logits may then pass the true one by twice as much."""
LEAST, MOST = gl.constexpr(2.0**-64), gl.constexpr(2.0**32)
"""A row sum between these, and the output with values up to 2 ** 80, lost nothing to overflow or underflow."""


@gluon.constexpr_function
def _output_layout(width):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])


@gluon.constexpr_function
def _lines_layout(width):
    """Of [rows, width] in 16 bits, lines as long as can be: 16 bytes a lane."""
    across = min(width // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])


@gluon.constexpr_function
def _width(WIDTHS, i):
    return WIDTHS[i]


@gluon.jit
def _block(tile, WIDTHS: gl.constexpr, i: gl.constexpr):
    """The i-th block of columns of a tile in shared memory."""
    if len(WIDTHS) == 1:
        return tile
    elif i == 0:
        return tile.slice(0, _width(WIDTHS, 0), 1)
    else:
        return tile.slice(_width(WIDTHS, 0), _width(WIDTHS, 1), 1)


@gluon.jit
def _zeros(ROWS: gl.constexpr, WIDTH: gl.constexpr):
    layout: gl.constexpr = _output_layout(WIDTH)
    return gl.zeros([ROWS, WIDTH], gl.float32, layout)


@gluon.jit
def _column(x, acc):
    layout: gl.constexpr = acc.type.layout
    return per_row(x, layout)


@gluon.jit
def _scaled(acc, factor):
    """Blocks of columns, their rows multiplied by `factor` [ROWS]."""
    result = ()
    for i in gl.static_range(len(acc)):
        result = result + (acc[i] * _column(factor, acc[i]),)
    return result


@aggregate
class Shape:
    """What is known when the kernel is compiled: tile shapes, the ways of `configs.Config`, and register layouts."""

    D: gl.constexpr  # widths of the one or two blocks of columns that are multiplied, powers of two
    DV: gl.constexpr
    ROWS: gl.constexpr  # of one warpgroup
    GROUPS: gl.constexpr
    KEYS: gl.constexpr
    STAGES: gl.constexpr
    PIN: gl.constexpr
    CARRY_WIDE: gl.constexpr
    PING_PONG: gl.constexpr
    OWN_OUTPUT: gl.constexpr
    AHEAD: gl.constexpr
    HOLD: gl.constexpr  # only where no term affine in k lifts logits above those of the first tile
    RESCALE_LATE: gl.constexpr
    PARTS: gl.constexpr  # the mask is the same for all pairs of a warpgroup's part of a tile
    FROZEN: gl.constexpr  # 16-bit floats must have the exponents of float32
    PERIOD: gl.constexpr  # columns of a box of keys, in a grid
    PAGE: gl.constexpr  # keys of a page; 0 where keys stand in one piece
    PACKED: gl.constexpr  # sequences stand one behind the other
    SORTED: gl.constexpr  # whether rows of queries differ by batch, by head, those of keys, columns of both; or None
    LOGITS: gl.constexpr
    WEIGHTS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, D, DV, GROUPS, KEYS, STAGES, PIN, CARRY_WIDE, PING_PONG, OWN_OUTPUT, AHEAD, HOLD,
                 RESCALE_LATE, PARTS, FROZEN, PERIOD, PAGE, PACKED, SORTED):  # fmt: skip
        self.D = gl.constexpr(D)
        self.DV = gl.constexpr(DV)
        self.ROWS = gl.constexpr(64)
        self.GROUPS = gl.constexpr(GROUPS)
        self.KEYS = gl.constexpr(KEYS)
        self.STAGES = gl.constexpr(STAGES)
        self.PIN = gl.constexpr(PIN)
        self.CARRY_WIDE = gl.constexpr(CARRY_WIDE)
        self.PING_PONG = gl.constexpr(PING_PONG)
        self.OWN_OUTPUT = gl.constexpr(OWN_OUTPUT)
        self.AHEAD = gl.constexpr(AHEAD)
        self.HOLD = gl.constexpr(HOLD)
        self.RESCALE_LATE = gl.constexpr(RESCALE_LATE)
        self.PARTS = gl.constexpr(PARTS)
        self.FROZEN = gl.constexpr(FROZEN)
        self.PERIOD = gl.constexpr(PERIOD)
        self.PAGE = gl.constexpr(PAGE)
        self.PACKED = gl.constexpr(PACKED)
        self.SORTED = gl.constexpr(SORTED)
        self.LOGITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16]))
        self.WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, _output_layout(DV[0]), 2))

    @gluon.jit
    def of_queries(self, turn, GROUP: gl.constexpr):
        """(place, round) of the queries of a warpgroup."""
        if self.AHEAD:
            return turn % 2 * self.GROUPS + GROUP, turn // 2
        else:
            return GROUP, turn


@aggregate
class Functions:
    """The emitted functions of the variant (`emit.py`); None for one that it does not need."""

    FACTOR: gl.constexpr
    UNIFORM: gl.constexpr
    ROWS: gl.constexpr
    RESIDUE: gl.constexpr
    PLAIN: gl.constexpr
    SHIFT: gl.constexpr
    PEAK: gl.constexpr
    SLOPE: gl.constexpr
    LOW: gl.constexpr
    HIGH: gl.constexpr
    HEAD: gl.constexpr
    COLUMNS: gl.constexpr
    MASK: gl.constexpr
    ROW_TERM: gl.constexpr
    SINK: gl.constexpr
    KV_RANGES: gl.constexpr
    QUERY_BOX: gl.constexpr
    KEY_BOX: gl.constexpr
    LENGTH: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, FACTOR, UNIFORM, ROWS, RESIDUE, PLAIN, SHIFT, PEAK, SLOPE, LOW, HIGH, HEAD, COLUMNS, MASK, ROW_TERM, SINK,
        KV_RANGES, QUERY_BOX, KEY_BOX, LENGTH
    ):  # fmt: skip
        self.FACTOR = gl.constexpr(FACTOR)
        self.UNIFORM = gl.constexpr(UNIFORM)
        self.ROWS = gl.constexpr(ROWS)
        self.RESIDUE = gl.constexpr(RESIDUE)
        self.PLAIN = gl.constexpr(PLAIN)
        self.SHIFT = gl.constexpr(SHIFT)
        self.PEAK = gl.constexpr(PEAK)
        self.SLOPE = gl.constexpr(SLOPE)
        self.LOW = gl.constexpr(LOW)
        self.HIGH = gl.constexpr(HIGH)
        self.HEAD = gl.constexpr(HEAD)
        self.COLUMNS = gl.constexpr(COLUMNS)
        self.MASK = gl.constexpr(MASK)
        self.ROW_TERM = gl.constexpr(ROW_TERM)
        self.SINK = gl.constexpr(SINK)
        self.KV_RANGES = gl.constexpr(KV_RANGES)
        self.QUERY_BOX = gl.constexpr(QUERY_BOX)
        self.KEY_BOX = gl.constexpr(KEY_BOX)
        self.LENGTH = gl.constexpr(LENGTH)


@aggregate
class Memory:
    """Descriptors of `[B, H, S, D]` or, of a grid, `[B, H, Y, X, D]` in global memory, and buffers in shared memory.

    `queries` has a place for each warpgroup, filled once a query tile, or two, filled by turns; `keys` and `values` are
    rings of key tiles.
    """

    query: tma.tensor_descriptor
    key: tma.tensor_descriptor
    value: tma.tensor_descriptor
    out: tma.tensor_descriptor
    lse: gl.tensor
    shifted: gl.tensor
    order: gl.tuple
    queries: Ring
    keys: Ring
    values: Ring
    staging: gl.shared_memory_descriptor
    board: Board

    @gluon.constexpr_function
    def __init__(self, query, key, value, out, lse, shifted, order, queries, keys, values, staging, board):
        self.query = query
        self.key = key
        self.value = value
        self.out = out
        self.lse = lse
        self.shifted = shifted
        self.order = order
        self.queries = queries
        self.keys = keys
        self.values = values
        self.staging = staging
        self.board = board


@aggregate
class Problem:
    """The arguments of the kernel but its tensors: decoded anew in each warp rather than kept in registers."""

    q_offset: gl.tensor
    parameters: gl.tuple
    sizes: gl.tuple
    extents: gl.tuple
    tensors: gl.tuple
    scale: gl.tensor
    section: gl.tensor
    lead: gl.tensor

    @gluon.constexpr_function
    def __init__(self, q_offset, parameters, sizes, extents, tensors, scale, section, lead):
        self.q_offset = q_offset
        self.parameters = parameters
        self.sizes = sizes
        self.extents = extents
        self.tensors = tensors
        self.scale = scale
        self.section = section
        self.lead = lead

    @gluon.jit
    def scalars(self):
        """In the order of `printer.Signature`, and the softmax scale."""
        return scalars_of(self.parameters, False) + self.sizes + scalars_of(self.extents, False) + (self.scale,)

    @gluon.jit
    def captured(self):
        return captured(self.tensors, False)

    @gluon.jit
    def start(self, b):
        """The position of the first query."""
        return first_position(self.q_offset, b, gl.int32)


@aggregate
class Tile:
    """What the elements of a query tile of one warpgroup have in common.

    q: [rows, 1] positions, of which `first` is the first; q0: that of the first query of all warpgroups. `uniform`,
    `rows`: what the emitted functions of these names gave, `rows` for the first alone where the mask goes by parts.
    """

    b: gl.tensor
    h: gl.tensor
    q: gl.tensor
    first: gl.tensor
    q0: gl.tensor
    kv_len: gl.tensor
    factor: gl.tensor
    slope: gl.tensor
    uniform: gl.tuple
    rows: gl.tuple
    scalars: gl.tuple
    tensors: gl.tuple

    @gluon.constexpr_function
    def __init__(self, b, h, q, first, q0, kv_len, factor, slope, uniform, rows, scalars, tensors):
        self.b = b
        self.h = h
        self.q = q
        self.first = first
        self.q0 = q0
        self.kv_len = kv_len
        self.factor = factor
        self.slope = slope
        self.uniform = uniform
        self.rows = rows
        self.scalars = scalars
        self.tensors = tensors


@aggregate
class Visits:
    """The key tiles that a query tile visits: segments, masked and full, and how many tiles they hold.

    A query tile that sees nothing visits one tile all the same, where the mask is false throughout.
    """

    masked: gl.tuple
    full: gl.tuple
    masked_tiles: gl.tensor
    tiles: gl.tensor

    @gluon.constexpr_function
    def __init__(self, masked, full, masked_tiles, tiles):
        self.masked = masked
        self.full = full
        self.masked_tiles = masked_tiles
        self.tiles = tiles

    @gluon.jit
    def nth(self, n):
        """The number of the n-th key tile: masked ones first."""
        if len(self.full) == 0:
            return nth(self.masked, n)
        elif len(self.masked) == 0:
            return nth(self.full, n)
        else:
            return gl.where(n < self.masked_tiles, nth(self.masked, n), nth(self.full, n - self.masked_tiles))


# ---------------------------------------------------------------- which tiles


@gluon.jit
def in_sections(number, tiles, pairs, section, lead, LAST_FIRST: gl.constexpr):
    """(tile, pair) of a number, for so many pairs of batch and head with so many tiles each.

    The `lead` first tiles of all pairs come before all others. Those run in sections of pairs whose keys and values fit
    the cache together; within a section the first tiles come first or, if LAST_FIRST, the last.
    """
    if number < lead * pairs:
        tile, pair = number // pairs, number % pairs
    else:
        number -= lead * pairs
        first = number // (section * (tiles - lead)) * section
        width = gl.minimum(section, pairs - first)
        rest = number - first * (tiles - lead)
        tile, pair = tiles - 1 - rest // width if LAST_FIRST else lead + rest // width, first + rest % width
    return tile, pair


@gluon.jit
def _place(number, tiles, sizes, section, lead):
    """(tile, batch, head) of a number: the last tiles of a section are the longest under a causal mask."""
    tile, pair = in_sections(number, tiles, sizes[0] * sizes[1], section, lead, LAST_FIRST=True)
    return tile, pair // sizes[1], pair % sizes[1]


@gluon.jit
def _place_packed(number, tiles, ends, sizes, ROWS: gl.constexpr):
    """As `_place`, of packed sequences: the heads of a tile side by side, the last tile of a sequence first.

    Sequence b has the tiles from ends[b] // ROWS + b on, of which the last may hold no row of it.
    """
    counted = tiles - 1 - number // sizes[1]
    b = -1
    for first in range(0, sizes[0], 32):
        sequences = first + gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
        begins = gl.load(ends[0] + sequences * ends[2][0], mask=sequences < sizes[0], other=0)
        b += gl.sum(((sequences < sizes[0]) & (begins // ROWS + sequences <= counted)).to(gl.int32), 0)
    return counted - (_first_row(ends, b) // ROWS + b), b, number % sizes[1]


@gluon.jit
def _first_row(ends, b):
    """Where a packed sequence begins."""
    return gl.load(ends[0] + b * ends[2][0])


@gluon.jit
def _rows(shape, problem, tensors, b):
    """(the number of the first query among those of a head in memory, how many there are) of a batch entry."""
    if shape.PACKED:
        first = _first_row(tensors[0], b)
        return first, _first_row(tensors[0], b + 1) - first
    else:
        return 0, problem.sizes[3]


@gluon.jit
def _visits(shape, f, tile, b, h, start, scalars, tensors):
    q0 = start + tile * (shape.GROUPS * shape.ROWS)
    q1 = q0 + (shape.GROUPS * shape.ROWS - 1)
    masked, full = f.KV_RANGES(b, h, q0, q1, start, shape.KEYS, scalars, tensors)
    masked_tiles = count(masked) + 0 * tile  # a tensor, even where there is no segment
    return Visits(masked, full, masked_tiles, gl.maximum(masked_tiles + count(full), 1))


# ---------------------------------------------------------------- producer


@gluon.jit
def _at(BOX: gl.constexpr, b, h, row, scalars, tensors):
    """Where a tile begins whose first row is `row` of a head: in a grid, what BOX makes of it, (head, y, x)."""
    if BOX is None:
        return (b, h, row)
    else:
        return (b,) + BOX(b, h, row, scalars, tensors)


@gluon.jit
def _query_at(shape, f, problem, b, h, row, scalars, tensors):
    """Where a tile of queries begins, as `_at`."""
    if shape.PACKED:
        return (0, h, _rows(shape, problem, tensors, b)[0] + row)
    else:
        return _at(f.QUERY_BOX, b, h, row, scalars, tensors)


@gluon.jit
def _pages(shape, table, b, row):
    """The page of a batch entry in which the key tile that begins at `row` stands, or pages, one in each lane.

    Where the table names none, it is the last one.
    """
    number = row // shape.PAGE
    if shape.PAGE < shape.KEYS:
        number += gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    number = gl.minimum(number, table[1][1] - 1)
    return gl.load(table[0] + (b * table[2][0] + number * table[2][1]))


@gluon.jit
def _load(shape, f, memory, problem, VALUES: gl.constexpr, at, b, hk, row, scalars, tensors):
    """Fill a place with the tile of keys or VALUES that begins at `row`, number `at` of all.

    A page table stands first in `tensors`, and is read before the place is free.
    """
    place, round = at % shape.STAGES, at // shape.STAGES
    ring = memory.values if VALUES else memory.keys
    descriptor = memory.value if VALUES else memory.key
    if shape.PACKED:
        ring.load(place, round, descriptor, (0, hk, row))
    elif shape.SORTED is not None:
        begin = _begin_of_order(b, hk, problem.sizes[2], problem.sizes[4], shape.SORTED[2], shape.SORTED[3])
        source = memory.order[4] if VALUES else memory.order[3]
        width: gl.constexpr = shape.SORTED[5] if VALUES else shape.SORTED[4]
        _collect(ring, place, round, descriptor, source, memory.order[1] + begin, b, hk, row, problem.sizes[4], width)
    elif shape.PAGE == 0:
        ring.load(place, round, descriptor, _at(f.KEY_BOX, b, hk, row, scalars, tensors))
    elif shape.PAGE < shape.KEYS:
        ring.gather(place, round, descriptor, _pages(shape, tensors[0], b, row), hk)
    else:
        ring.load(place, round, descriptor, (_pages(shape, tensors[0], b, row), hk, row % shape.PAGE))


@gluon.jit
def _load_queries(shape, f, memory, problem, turn, tile, b, h, scalars, tensors, GROUP: gl.constexpr):
    """Fill the place of a warpgroup's queries."""
    row = (tile * shape.GROUPS + GROUP) * shape.ROWS
    place, round = shape.of_queries(turn, GROUP)
    if shape.SORTED is not None:
        begin = _begin_of_order(b, h, problem.sizes[1], problem.sizes[3], shape.SORTED[0], shape.SORTED[1])
        _collect(memory.queries, place, round, memory.query, memory.order[2], memory.order[0] + begin, b, h, row,
                 problem.sizes[3], shape.SORTED[4])  # fmt: skip
    else:
        memory.queries.load(place, round, memory.query, _query_at(shape, f, problem, b, h, row, scalars, tensors))


@gluon.jit
def _collect(ring, place, round, descriptor, source, order, b, h, row, length, WIDTH: gl.constexpr):
    """Fill a place with the tile that begins at `row` of those that `order` names, of [., ., length, WIDTH]."""
    at = row + gl.arange(0, ring.tiles.shape[3], layout=gl.SliceLayout(1, LINES))
    inside = at < length
    number = gl.load(order + at, mask=inside, other=0).to(gl.uint32).to(gl.int64)
    head = b * descriptor.strides[0] + h * descriptor.strides[1]
    ring.collect(place, round, source + head + number * descriptor.strides[2], inside, WIDTH)


@gluon.jit
def _produce(shape, f, memory, problem):
    """Load what the consumers will want, in the order in which they want it: S(i) comes before O += P(i-1) V(i-1)."""
    scalars, tensors = problem.scalars(), problem.captured()
    sizes = problem.sizes
    group = sizes[1] // sizes[2]
    rows: gl.constexpr = shape.GROUPS * shape.ROWS
    if shape.PACKED:
        tiles = memory.query.shape[2] // rows + sizes[0]
        total = sizes[1] * tiles
    else:
        tiles = gl.cdiv(sizes[3], rows)
        total = sizes[0] * sizes[1] * tiles
    number = gl.program_id(0)
    passed = 0
    turn = 0
    again, tile, b, h = 0, 0, 0, 0
    while (number < total) | (again != 0):
        if again == 0:
            if shape.PACKED:
                tile, b, h = _place_packed(number, tiles, tensors[0], sizes, rows)
            else:
                tile, b, h = _place(number, tiles, sizes, problem.section, problem.lead)
        first_key = 0
        if shape.PACKED:
            first_key = _first_row(tensors[1], b)
        memory.board.write(turn, tile, b, h, again)
        visits = _visits(shape, f, tile, b, h, problem.start(b), scalars, tensors)
        hk = h // group
        row = first_key + visits.nth(0) * shape.KEYS
        _load(shape, f, memory, problem, False, passed, b, hk, row, scalars, tensors)
        for g in gl.static_range(shape.GROUPS):
            _load_queries(shape, f, memory, problem, turn, tile, b, h, scalars, tensors, g)
        for n in range(1, visits.tiles):
            at = passed + n
            following = first_key + visits.nth(n) * shape.KEYS
            _load(shape, f, memory, problem, False, at, b, hk, following, scalars, tensors)
            _load(shape, f, memory, problem, True, at - 1, b, hk, row, scalars, tensors)
            row = following
        if again == 0:
            number = memory.board.following(total)  # while the consumers have two tiles of keys left
        turn += 1
        passed += visits.tiles
        _load(shape, f, memory, problem, True, passed - 1, b, hk, row, scalars, tensors)
        if shape.FROZEN:
            moving = 1 if shape.HOLD else gl.maximum(visits.masked_tiles, 1)
            awaited = (number >= total) & (visits.tiles > moving)
            again, tile, b, h = memory.board.failed(turn, awaited)
    memory.board.write(turn, -1, 0, 0, 0)


# ---------------------------------------------------------------- consumers


@gluon.jit
def _residue(shape, f, FUNCTION: gl.constexpr, tile, s, j, INSIDE: gl.constexpr):
    """What an emitted function makes of the bare products; terms affine in k are in them already if there is none."""
    if FUNCTION is None:
        return s
    else:
        k0 = j * shape.KEYS
        k = columns(k0, shape.KEYS, shape.LOGITS)
        x = FUNCTION(s, tile.b, tile.h, tile.q, k, INSIDE, tile.uniform, tile.rows, tile.scalars, tile.tensors,
                     tile.q0, k0)  # fmt: skip
        if f.SLOPE is not None:
            x += ramp(tile.slope, j * shape.KEYS - tile.q0, shape.ROWS, shape.KEYS, shape.LOGITS)
        return x


@gluon.jit
def _masked(shape, f, tile, x, j):
    """x where the mask keeps the pair, else -inf."""
    first = j * shape.KEYS
    high = tile.kv_len - 1
    if shape.PARTS:
        keep = f.MASK(tile.b, tile.h, tile.first, first, False, tile.uniform, tile.rows, tile.scalars, tile.tensors)
        high = gl.where(keep, high, -1)
    elif f.MASK is not None:
        k = columns(first, shape.KEYS, shape.LOGITS)
        keep = f.MASK(tile.b, tile.h, tile.q, k, False, tile.uniform, tile.rows, tile.scalars, tile.tensors)
        x = gl.where(keep, x, NEVER)
    end, low = high, gl.full([shape.ROWS, 1], 0, gl.int32, shape.LOGITS)
    if f.HIGH is not None:
        bound = f.HIGH(tile.b, tile.h, tile.q, False, tile.uniform, tile.rows, tile.scalars, tile.tensors)
        high = gl.maximum(gl.minimum(bound, high), -1)
    if f.LOW is not None:
        bound = f.LOW(tile.b, tile.h, tile.q, False, tile.uniform, tile.rows, tile.scalars, tile.tensors)
        low = gl.maximum(bound, 0)
    if f.HEAD is not None or f.COLUMNS is not None:  # as bits, which cost the same whatever they say
        bits = bits_between(low, high + low * 0, first, shape.KEYS, shape.LOGITS)
        if f.HEAD is not None:
            head = f.HEAD(tile.b, tile.h, tile.q, False, tile.uniform, tile.rows, tile.scalars, tile.tensors)
            bits |= bits_up_to(gl.minimum(head + low * 0, end), first, shape.KEYS, shape.LOGITS)
        if f.COLUMNS is not None:
            left, right = f.COLUMNS(
                tile.b, tile.h, tile.q, False, tile.uniform, tile.rows, tile.scalars, tile.tensors
            )  # fmt: skip
            bits &= repeated_bits(left + low * 0, right + low * 0, shape.PERIOD, shape.KEYS, shape.LOGITS)
        return kept(x, bits, shape.LOGITS)
    elif f.LOW is None:
        return up_to(x, high, first, shape.LOGITS)
    else:
        return between(x, low, high, first, shape.LOGITS)


@gluon.jit
def _softmax(shape, f, tile, s, m, l, j, MASKED: gl.constexpr, MOVES: gl.constexpr, FIRST: gl.constexpr):
    """(2 ** (logit - m), the decay of what was summed before, m, l) for key tile j, from the bare products s.

    `factor` is positive, so the largest logit of a row is the largest residue. A row that has seen nothing keeps
    m = -inf and weights of 0.
    """
    shift = 0.0
    if MASKED:
        x = _masked(shape, f, tile, _residue(shape, f, f.RESIDUE, tile, s, j, False), j)
    else:
        x = _residue(shape, f, f.PLAIN, tile, s, j, True)
        if f.SHIFT is not None:
            shift = tile.factor * f.SHIFT(
                tile.b, tile.h, tile.q0, j * shape.KEYS, tile.uniform, tile.scalars, tile.tensors
            )
    if f.PEAK is not None:  # logits are bounded: one number is the maximum of every row, and nothing ever decays
        peak = f.PEAK(tile.b, tile.h, tile.scalars, tile.tensors) * tile.factor
        p = gl.exp2(x * tile.factor - (peak - shift))
        sums = thread_sums(p)
        if not FIRST:
            sums += l
        decay, m = m, gl.full([shape.ROWS], peak, gl.float32, gl.SliceLayout(1, shape.LOGITS))
    elif not MOVES:
        base = gl.where(m == NEVER, 0.0, m)
        p = gl.exp2(x * tile.factor - gl.expand_dims(base - shift, 1))
        sums = l + thread_sums(p)
        decay = m
    else:
        peak = row_max(x, shape.LOGITS) * tile.factor + shift
        if shape.FROZEN:
            peak += HEADROOM
        if not FIRST:
            peak = gl.maximum(m, peak)
        base = peak
        if MASKED or f.RESIDUE is not None:
            base = gl.where(peak == NEVER, 0.0, peak)
        p = gl.exp2(x * tile.factor - gl.expand_dims(base - shift, 1))
        sums = thread_sums(p)
        decay = gl.exp2(m - base)
        if not FIRST:
            spread: gl.constexpr = sums.type.layout
            sums += l * per_row(decay, spread)
        m = peak
    if shape.PIN:
        sums = pin(sums)
    return p, decay, m, sums


@gluon.jit
def _carried(shape, p, DTYPE: gl.constexpr):
    """The weights as they cross the loop's back edge; a plain 16-bit tensor would cost two permutes a pair there."""
    if shape.CARRY_WIDE:
        return p
    else:
        return pack_pairs(p, DTYPE)


@gluon.jit
def _weights(shape, p, DTYPE: gl.constexpr):
    """The carried weights as the left operand of the second product, in the registers where they are."""
    if shape.CARRY_WIDE:
        return gl.convert_layout(p.to(DTYPE), shape.WEIGHTS)
    else:
        return gl.convert_layout(unpack_pairs(p, DTYPE), shape.WEIGHTS)


@gluon.jit
def _product(shape, queries, keys, s, ADD: gl.constexpr):
    """Issue Q K^T, added to s if ADD."""
    for i in gl.static_range(len(shape.D)):
        right = _block(keys, shape.D, i).permute((1, 0))
        s = warpgroup_mma(_block(queries, shape.D, i), right, s, use_acc=ADD or i > 0, is_async=True)
    return s


@gluon.jit
def _issue_logits(shape, f, FUNCTION: gl.constexpr, memory, tile, at, j, turn, GROUP: gl.constexpr):
    """Issue S(i) for key tile j, number `at` of all.

    A term slope * (k - q0) is what the accumulator starts with, unless the score makes something else of the product.
    """
    queries = memory.queries.tile(shape.of_queries(turn, GROUP)[0])
    place = at % shape.STAGES
    if f.SLOPE is not None and FUNCTION is None:
        initial = ramp(tile.slope, j * shape.KEYS - tile.q0, shape.ROWS, shape.KEYS, shape.LOGITS)
        memory.keys.wait(place, at // shape.STAGES)
        return _product(shape, queries, memory.keys.tile(place), initial, True)
    else:
        memory.keys.wait(place, at // shape.STAGES)
        zero = gl.zeros([shape.ROWS, shape.KEYS], gl.float32, shape.LOGITS)
        return _product(shape, queries, memory.keys.tile(place), zero, False)


@gluon.jit
def _issue_output(shape, memory, p, acc, at):
    """Issue O += P V for the key tile that is number `at` of all."""
    place = at % shape.STAGES
    memory.values.wait(place, at // shape.STAGES)
    values = memory.values.tile(place)
    result = ()
    for i in gl.static_range(len(acc)):
        result = result + (warpgroup_mma(_left(p, acc[i]), _block(values, shape.DV, i), acc[i], is_async=True),)
    return result


@gluon.jit
def _left(p, acc):
    layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    return gl.convert_layout(p, layout, assert_trivial=True)


@gluon.jit
def _waited(output, x):
    """(O, x) when the products of the output are done, x being computed before."""
    if len(output) == 1:
        acc, x = warpgroup_mma_wait(0, deps=[output[0], x])
        return (acc,), x
    else:
        first, second, x = warpgroup_mma_wait(0, deps=[output[0], output[1], x])
        return (first, second), x


@gluon.jit
def _clip(shape, memory, tile, at, j, GROUP: gl.constexpr):
    """Let values past the end of the batch entry's keys be 0: times a weight of 0, what is there may be something else.

    All warpgroups come here for the same tiles.
    """
    left = tile.kv_len - j * shape.KEYS
    if left < shape.KEYS:
        memory.values.wait(at % shape.STAGES, at // shape.STAGES)
        memory.values.clip(at % shape.STAGES, left, GROUP, shape.GROUPS)


@gluon.jit
def _step(shape, f, memory, tile, at, j, turn, p, acc, m, l, late, MASKED: gl.constexpr, MOVES: gl.constexpr,
          GROUP: gl.constexpr):  # fmt: skip
    """Key tile j, number `at` of all, given the weights p of the tile before; whether it MOVES the maximum."""
    decays: gl.constexpr = f.PEAK is None and MOVES
    narrow = _weights(shape, p, memory.keys.tiles.dtype)
    if shape.PING_PONG:
        wait_turn(GROUP)
    if MASKED:
        logits = _issue_logits(shape, f, f.RESIDUE, memory, tile, at, j, turn, GROUP)
    else:
        logits = _issue_logits(shape, f, f.PLAIN, memory, tile, at, j, turn, GROUP)
    if shape.RESCALE_LATE and decays:
        acc = _scaled(acc, late)
    output = _issue_output(shape, memory, narrow, acc, at - 1)
    if shape.PING_PONG:
        pass_turn(GROUP, shape.GROUPS)
    s = warpgroup_mma_wait(len(shape.DV), deps=[logits])
    memory.keys.release(at % shape.STAGES)
    p, decay, m, l = _softmax(shape, f, tile, s, m, l, j, MASKED, MOVES, False)
    # p among the dependences: the registers of the old weights are read until then, so p must not be narrowed before.
    acc, p = _waited(output, p)
    p = _carried(shape, p, memory.keys.tiles.dtype)
    memory.values.release((at - 1) % shape.STAGES)
    if not shape.RESCALE_LATE and decays:
        acc = _scaled(acc, decay)
    if MASKED and f.LENGTH is not None:
        _clip(shape, memory, tile, at, j, GROUP)
    return p, acc, m, l, decay if shape.RESCALE_LATE and decays else late


@gluon.jit
def _open(shape, f, memory, tile, visits, passed, turn, GROUP: gl.constexpr):
    """(weights, m, l) of the first key tile of a query tile."""
    m = gl.full([shape.ROWS], NEVER, gl.float32, gl.SliceLayout(1, shape.LOGITS))
    j = visits.nth(0)
    own, round = shape.of_queries(turn, GROUP)
    memory.queries.wait(own, round)
    if shape.PING_PONG:
        wait_turn(GROUP)
    logits = _issue_logits(shape, f, f.RESIDUE, memory, tile, passed, j, turn, GROUP)
    if shape.PING_PONG:
        pass_turn(GROUP, shape.GROUPS)
    s = warpgroup_mma_wait(0, deps=[logits])
    memory.keys.release(passed % shape.STAGES)
    p, _, m, l = _softmax(shape, f, tile, s, m, 0.0, j, True, True, True)
    p = _carried(shape, p, memory.keys.tiles.dtype)
    if f.LENGTH is not None:
        _clip(shape, memory, tile, passed, j, GROUP)
    return p, m, l


@gluon.jit
def _proceed(shape, f, memory, tile, visits, careful, passed, turn, p, m, l, GROUP: gl.constexpr):
    """(weights of the last key tile, O of those before it, m, l) of a query tile, given what `_open` found.

    So many key tiles as `careful` are treated as masked ones and may move the maximum.
    """
    acc = ()
    for i in gl.static_range(len(shape.DV)):
        acc = acc + (_zeros(shape.ROWS, _width(shape.DV, i)),)
    late = gl.full([shape.ROWS], 1.0, gl.float32, gl.SliceLayout(1, shape.LOGITS))
    if len(visits.masked) > 0 or shape.FROZEN:
        for n in range(1, careful):
            j = visits.nth(n)
            p, acc, m, l, late = _step(shape, f, memory, tile, passed + n, j, turn, p, acc, m, l, late, True, True,
                                       GROUP)  # fmt: skip
    if shape.RESCALE_LATE and shape.FROZEN:
        acc = _scaled(acc, late)
    if shape.HOLD and len(visits.masked) > 0:
        m = gl.where((m == NEVER) & (careful < visits.tiles), 0.0, m)
        for n in range(careful, visits.masked_tiles):
            j = nth(visits.masked, n)
            p, acc, m, l, late = _step(shape, f, memory, tile, passed + n, j, turn, p, acc, m, l, late, True, False,
                                       GROUP)  # fmt: skip
    if len(visits.full) > 0:
        for n in range(gl.maximum(careful, visits.masked_tiles if shape.HOLD else 1), visits.tiles):
            j = nth(visits.full, n - visits.masked_tiles)
            p, acc, m, l, late = _step(shape, f, memory, tile, passed + n, j, turn, p, acc, m, l, late, False,
                                       not shape.FROZEN, GROUP)  # fmt: skip
    if shape.OWN_OUTPUT:
        memory.queries.release(shape.of_queries(turn, GROUP)[0])
    if shape.RESCALE_LATE and f.PEAK is None and not shape.FROZEN:
        acc = _scaled(acc, late)
    return p, acc, m, l


@gluon.jit
def _inside(shape, problem, tile, b, tensors, GROUP: gl.constexpr):
    """Which of the warpgroup's rows a batch entry has, [ROWS]."""
    first = (tile * shape.GROUPS + GROUP) * shape.ROWS
    local = gl.arange(0, shape.ROWS, layout=gl.SliceLayout(1, shape.LOGITS))
    return local < _rows(shape, problem, tensors, b)[1] - first


@gluon.jit
def _finish(shape, f, memory, problem, m, l, tile, b, h, keep, scalars, tensors, GROUP: gl.constexpr):
    """Store the log-sum-exp of the warpgroup's rows; return what their output is to be multiplied by, [ROWS]."""
    sizes = problem.sizes
    first = (tile * shape.GROUPS + GROUP) * shape.ROWS
    local = gl.arange(0, shape.ROWS, layout=gl.SliceLayout(1, shape.LOGITS))
    begin = _rows(shape, problem, tensors, b)[0]
    inside = _inside(shape, problem, tile, b, tensors, GROUP) & keep
    lead = 0.0  # what the loop's logits lack for a row, in base 2, since their row term is counted from the row itself
    if f.SLOPE is not None:
        lead = f.SLOPE(b, h, scalars, tensors) * (local + GROUP * shape.ROWS).to(gl.float32)
    row_term = gl.zeros([shape.ROWS], gl.float32, gl.SliceLayout(1, shape.LOGITS))
    if f.ROW_TERM is not None:
        q = gl.expand_dims(problem.start(b) + first + local, 1)
        uniform = ()
        if f.UNIFORM is not None:
            uniform = f.UNIFORM(b, h, scalars, tensors)
        term = gl.expand_dims(row_term, 1) + f.ROW_TERM(b, h, q, False, uniform, scalars, tensors)
        rows: gl.constexpr = gl.SliceLayout(1, shape.LOGITS)
        row_term = gl.convert_layout(gl.reshape(term, [shape.ROWS]), rows, assert_trivial=True)
    decay = 1.0
    if f.SINK is not None:  # a logit without a value
        sink = (f.SINK(b, h, scalars, tensors) - row_term) * LOG2E + lead
        peak = gl.maximum(m, sink)
        base = gl.where(peak == NEVER, 0.0, peak)
        decay = gl.exp2(m - base)
        l = l * decay + gl.exp2(sink - base)
        m = peak
    empty = (l == 0.0) | (row_term == NEVER)
    inverse = gl.where(empty, 0.0, decay / gl.where(empty, 1.0, l))
    result = gl.where(empty, NEVER, (m + gl.log2(gl.where(empty, 1.0, l)) - lead) * LN2)
    if shape.PACKED:
        place = (begin + first + local).to(gl.int64) * sizes[1] + h
    elif shape.SORTED is not None:
        place = (b * sizes[1] + h).to(gl.int64) * sizes[3] + _target(shape, memory, problem, b, h, first + local)
    else:
        place = (b * sizes[1] + h).to(gl.int64) * sizes[3] + first + local
    if f.ROW_TERM is not None:
        gl.store(memory.shifted + place, result, mask=inside)
        result += row_term
    gl.store(memory.lse + place, result, mask=inside)
    return inverse


@gluon.jit
def _target(shape, memory, problem, b, h, row):
    """The rows of the caller's tensors that rows of a head are, int64; 0 for those that it has not."""
    begin = _begin_of_order(b, h, problem.sizes[1], problem.sizes[3], shape.SORTED[0], shape.SORTED[1])
    return gl.load(memory.order[0] + (begin + row), mask=row < problem.sizes[3], other=0).to(gl.int64)


@gluon.jit
def _begin_of_order(b, h, heads, length, BY_BATCH: gl.constexpr, BY_HEAD: gl.constexpr):
    """Where the rows of a head begin in a dense tensor of rows [., ., length], int64."""
    pair = b * BY_BATCH
    if BY_HEAD:
        pair = pair * heads + h
    return pair.to(gl.int64) * length


@gluon.jit
def _grows(shape, f, tile, visits):
    """Whether the term affine in k alone lifts logits of full tiles too far above those of the first tile visited."""
    if f.SLOPE is None or len(visits.full) == 0:
        return False
    else:
        lift = tile.factor * tile.slope * shape.KEYS
        anchor = visits.nth(0)
        first = nth(visits.full, 0)
        last = nth(visits.full, gl.maximum(visits.tiles - visits.masked_tiles, 1) - 1)
        return gl.maximum(lift * (first - anchor), lift * (last - anchor)) > HEADROOM


@gluon.jit
def _judge(memory, l, inside, frozen, turn, GROUP: gl.constexpr):
    """Whether the warpgroup's result counts: it is right, and has not been stored in an earlier turn.

    What stands past the end of a batch entry, or belongs to the next packed sequence, has no say in that.
    """
    bad = gl.where(((l >= LEAST) & (l <= MOST)) | (inside == 0), 0, 1)
    failed = gl.where(frozen, gl.max(bad, 0), 0)
    memory.board.fail(turn, GROUP, failed)
    again = memory.board.again(turn)
    return (failed == 0) & ((again == 0) | ((again >> GROUP) & 1 != 0))


@gluon.jit
def _consume(shape, f, memory, problem, GROUP: gl.constexpr):
    """Take the warpgroup's 64 rows of query tile after query tile."""
    scalars, tensors = problem.scalars(), problem.captured()
    passed = 0
    turn = 0
    if shape.PING_PONG and GROUP == shape.GROUPS - 1:
        pass_turn(GROUP, shape.GROUPS)  # group 0 begins
    memory.board.wait(0)
    tile, b, h = memory.board.read(0)
    while tile >= 0:
        start = problem.start(b)
        visits = _visits(shape, f, tile, b, h, start, scalars, tensors)
        context = _context(shape, f, problem, tile, b, h, start, scalars, tensors, GROUP)
        careful = _careful(shape, f, memory, context, visits, turn)
        p, m, l = _open(shape, f, memory, context, visits, passed, turn, GROUP)
        p, acc, m, l = _proceed(shape, f, memory, context, visits, careful, passed, turn, p, m, l, GROUP)
        passed += visits.tiles
        output = _issue_output(shape, memory, _weights(shape, p, memory.keys.tiles.dtype), acc, passed - 1)
        l = row_sums(l, shape.LOGITS)
        tile, b, h = memory.board.read(turn)  # again, rather than kept in registers through the loop
        keep = True
        if shape.FROZEN:
            inside = _inside(shape, problem, tile, b, tensors, GROUP)
            keep = _judge(memory, l, inside, visits.tiles > gl.maximum(careful, 1), turn, GROUP)
        inverse = _finish(shape, f, memory, problem, m, l, tile, b, h, keep, scalars, tensors, GROUP)
        acc, inverse = _waited(output, inverse)
        memory.values.release((passed - 1) % shape.STAGES)
        tile, b, h = memory.board.read(turn)
        _store(shape, f, memory, problem, _scaled(acc, inverse), tile, b, h, keep, scalars, tensors, GROUP)
        memory.board.release(turn)
        turn += 1
        memory.board.wait(turn)
        tile, b, h = memory.board.read(turn)
    tma.store_wait(0)
    if shape.PING_PONG and GROUP == 0:
        wait_turn(GROUP)  # leave the barrier as it was found


@gluon.jit
def _careful(shape, f, memory, context, visits, turn):
    """So many key tiles of a turn may move the maximum, beside the first one: all of them if it comes again."""
    careful = visits.masked_tiles
    if shape.FROZEN:
        if shape.HOLD:
            careful = 1
        again = memory.board.again(turn)
        careful = gl.where((again != 0) | _grows(shape, f, context, visits), visits.tiles, careful)
    return careful


@gluon.jit
def _context(shape, f, problem, tile, b, h, start, scalars, tensors, GROUP: gl.constexpr):
    factor = gl.maximum(f.FACTOR(b, h, scalars, tensors), 1e-37)
    first = (tile * shape.GROUPS + GROUP) * shape.ROWS
    q = start + first + gl.arange(0, shape.ROWS, layout=gl.SliceLayout(1, shape.LOGITS))
    q = gl.expand_dims(q, 1)
    q0 = start + tile * (shape.GROUPS * shape.ROWS)
    uniform, rows, slope = (), (), factor
    if f.UNIFORM is not None:
        uniform = f.UNIFORM(b, h, scalars, tensors)
    if f.ROWS is not None:
        rows = f.ROWS(b, h, start + first if shape.PARTS else q, False, uniform, scalars, tensors)
    if f.SLOPE is not None:
        slope = f.SLOPE(b, h, scalars, tensors) / factor
    kv_len = problem.sizes[4]
    if f.LENGTH is not None:
        kv_len = gl.minimum(kv_len, f.LENGTH(b, h, scalars, tensors))
    return Tile(b, h, q, start + first, q0, kv_len, factor, slope, uniform, rows, scalars, tensors)


@gluon.jit
def _store(shape, f, memory, problem, acc, tile, b, h, keep, scalars, tensors, GROUP: gl.constexpr):
    """Write the output [ROWS, DV] of a turn's tile, by way of shared memory."""
    lines = _lines(shape, memory, problem, tile, b, h, GROUP)
    staging = memory.staging.index(GROUP)
    if shape.OWN_OUTPUT:
        tma.store_wait(0)  # of the tile before
    blocks = staging.reshape([shape.ROWS, memory.out.block_type.shape[len(memory.out.block_type.shape) - 1]])
    for i in gl.static_range(len(acc)):
        _block(blocks, shape.DV, i).store(acc[i].to(memory.keys.tiles.dtype))
    if shape.SORTED is not None:
        if keep:
            for i in gl.static_range(len(lines)):
                _scatter(shape, problem, _block(blocks, shape.DV, i), lines[i], tile, GROUP, i * _width(shape.DV, 0))
    else:
        fence_async_shared()
        _copy(shape, f, memory, problem, staging, tile, b, h, keep, scalars, tensors, GROUP)
    if not shape.OWN_OUTPUT:
        tma.store_wait(0)
        memory.queries.release(GROUP)


@gluon.jit
def _copy(shape, f, memory, problem, staging, tile, b, h, keep, scalars, tensors, GROUP: gl.constexpr):
    """Let the copy engine write the warpgroup's block of a tile."""
    row = (tile * shape.GROUPS + GROUP) * shape.ROWS
    first = _query_at(shape, f, problem, b, h, row, scalars, tensors)
    whole = keep
    if shape.PACKED:
        left = _rows(shape, problem, tensors, b)[1] - row
        whole = keep & (left >= shape.ROWS)
    if whole:
        async_store(memory.out, corner(first), staging)
    elif shape.PACKED and keep:  # the next sequence begins within the block
        width, heads = memory.out.shape[3], problem.sizes[1]
        place = (first[2].to(gl.int64) * heads + h) * width
        _store_rows(tensors[len(tensors) - 1][0] + place, left, width, heads, memory.staging, GROUP)


@gluon.jit
def _lines(shape, memory, problem, tile, b, h, GROUP: gl.constexpr):
    """Where the rows of the warpgroup's block of a tile are written, for each block of columns; none where they stay in
    their order."""
    result = ()
    if shape.SORTED is not None:
        for i in gl.static_range(len(shape.DV)):
            result = result + (_lines_of(shape, memory, problem, tile, b, h, GROUP, _width(shape.DV, i)),)
    return result


@gluon.jit
def _lines_of(shape, memory, problem, tile, b, h, GROUP: gl.constexpr, WIDTH: gl.constexpr):
    """Pointers [ROWS], for a block of so many columns."""
    layout: gl.constexpr = gl.SliceLayout(1, _lines_layout(WIDTH))
    row = (tile * shape.GROUPS + GROUP) * shape.ROWS + gl.arange(0, shape.ROWS, layout=layout)
    head = (b * problem.sizes[1] + h).to(gl.int64) * problem.sizes[3]
    return memory.order[5] + (head + _target(shape, memory, problem, b, h, row)) * shape.SORTED[5]


@gluon.jit
def _scatter(shape, problem, block, lines, tile, GROUP: gl.constexpr, FIRST: gl.constexpr):
    """Write the rows of the warpgroup's block of a tile, each to its line, from column FIRST on."""
    layout: gl.constexpr = _lines_layout(block.shape[1])
    row = (tile * shape.GROUPS + GROUP) * shape.ROWS + gl.arange(0, shape.ROWS, layout=gl.SliceLayout(1, layout))
    column = FIRST + gl.arange(0, block.shape[1], layout=gl.SliceLayout(0, layout))
    inside = gl.expand_dims(row < problem.sizes[3], 1) & gl.expand_dims(column < shape.SORTED[5], 0)
    gl.store(gl.expand_dims(lines, 1) + gl.expand_dims(column, 0), block.load(layout), mask=inside)


@gluon.jit
def _store_rows(out, left, width, heads, blocks, GROUP: gl.constexpr):
    """Write the `left` first rows of the warpgroup's block, `width` columns of each, to `out` and what follows in rows
    of all heads."""
    rows: gl.constexpr = 16
    count: gl.constexpr = blocks.shape[3] // rows
    chunks: gl.constexpr = blocks.shape[4] // SWIZZLED
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.expand_dims(gl.arange(0, rows, layout=gl.SliceLayout(1, layout)), 1)
    column = gl.expand_dims(gl.arange(0, SWIZZLED, layout=gl.SliceLayout(0, layout)), 0)
    parts = boxes(blocks, rows)
    for i in range(gl.cdiv(gl.maximum(left, 0), rows)):
        for chunk in gl.static_range(chunks):
            part = parts.index((GROUP * chunks + chunk) * count + i).reshape([rows, SWIZZLED]).load(layout)
            inside = (row < left - i * rows) & (column < width - chunk * SWIZZLED)
            gl.store(out + ((row + i * rows) * (heads * width) + (column + chunk * SWIZZLED)), part, mask=inside)


# ---------------------------------------------------------------- kernel


@gluon.jit(do_not_specialize=["q_offset", "parameters", "B", "H", "HK", "Q", "KV", "DIM", "extents", "tensors", "scale",
                              "section", "lead", "order"])  # fmt: skip
def attention_forward(query, key, value, out, lse, shifted, counter, q_offset, parameters, B, H, HK, Q, KV, DIM,
                      extents, tensors, scale, section, lead, order,
                      FACTOR: gl.constexpr, UNIFORM: gl.constexpr, ROWS: gl.constexpr, RESIDUE: gl.constexpr,
                      PLAIN: gl.constexpr, SHIFT: gl.constexpr, PEAK: gl.constexpr, SLOPE: gl.constexpr,
                      LOW: gl.constexpr, HIGH: gl.constexpr, HEAD: gl.constexpr, COLUMNS: gl.constexpr,
                      MASK: gl.constexpr, ROW_TERM: gl.constexpr, SINK: gl.constexpr, KV_RANGES: gl.constexpr,
                      D: gl.constexpr, DV: gl.constexpr, GROUPS: gl.constexpr, KEYS: gl.constexpr,
                      STAGES: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
                      PIN: gl.constexpr, CARRY_WIDE: gl.constexpr, PING_PONG: gl.constexpr,
                      OWN_OUTPUT: gl.constexpr, AHEAD: gl.constexpr, HOLD: gl.constexpr,
                      RESCALE_LATE: gl.constexpr, PARTS: gl.constexpr, FROZEN: gl.constexpr,
                      QUERY_BOX: gl.constexpr = None, KEY_BOX: gl.constexpr = None, LENGTH: gl.constexpr = None,
                      PAGE: gl.constexpr = 0, PACKED: gl.constexpr = False, SORTED: gl.constexpr = None):  # fmt: skip
    """out [B, H, Q, .], lse [B, H, Q] float32 and, where ROW_TERM is given, `shifted` [B, H, Q]: lse without row terms.

    query [B, H, Q, DIM], key [B, HK, KV, DIM], value [B, HK, KV, .] and out are tensor descriptors of blocks of 64 rows
    (query, out) or KEYS rows; D and DV are as in `Shape`, not less than the tensors' own. `q_offset` is a number or a
    pointer to [B], `section` and `lead` as in `_place`, `counter` a zero (see `Board`). Positions are 32-bit.
    QUERY_BOX, KEY_BOX: query, key, value and out are grids [., ., Y, X, .], of which a tile is a box (`_at`). LENGTH:
    how many keys a batch entry has; what lies past them is not even multiplied by 0. PAGE: key and value are pages
    [pages, HK, PAGE, .], in blocks [1, 1, PAGE, SWIZZLED] where these are smaller than a tile. PACKED: sequences stand
    one behind the other, [1, H, ., .], and so do lse and `shifted`, [rows of all, H]; their ends stand first in
    `tensors`, and `out` once more behind them. SORTED: row i of queries is row `rows[b, h, i]` of query, `out`, lse and
    `shifted`, of which all but query are dense; row i of keys is row `key_rows[b, hk, i]` of key and value. `order` is
    (rows [B, H, Q], key_rows [B, HK, KV], query, key, value, out): dense integers, batch and heads as they are or 1.
    """
    holds: gl.constexpr = HOLD and FROZEN and SLOPE is None
    shape = Shape(D, DV, GROUPS, KEYS, STAGES, PIN, CARRY_WIDE, PING_PONG, OWN_OUTPUT, AHEAD, holds, RESCALE_LATE,
                  PARTS, FROZEN, key.block_type.shape[3], PAGE, PACKED, SORTED)  # fmt: skip
    f = Functions(FACTOR, UNIFORM, ROWS, RESIDUE, PLAIN, SHIFT, PEAK, SLOPE, LOW, HIGH, HEAD, COLUMNS, MASK, ROW_TERM,
                  SINK, KV_RANGES, QUERY_BOX, KEY_BOX, LENGTH)  # fmt: skip
    problem = Problem(q_offset, parameters, (B, H, HK, Q, KV, DIM), extents, tensors, scale, section, lead)
    copied: gl.constexpr = SORTED is not None
    queries = ring(query, GROUPS * (2 if AHEAD else 1), 1, COPIED=copied)
    if PAGE > 0 and PAGE < KEYS:
        keys = ring(key, STAGES, GROUPS, KEYS, query.block_type.shape[3])
        values = ring(value, STAGES, GROUPS, KEYS, out.block_type.shape[3])
    else:
        keys = ring(key, STAGES, GROUPS, COPIED=copied)
        values = ring(value, STAGES, GROUPS, COPIED=copied)
    if OWN_OUTPUT:
        staging = gl.allocate_shared_memory(out.dtype, [GROUPS] + out.block_type.shape, out.layout)
    else:
        staging = queries.tiles
    producers: gl.constexpr = 4 if copied else 1
    turns = board(counter, GROUPS, producers)
    fence_async_shared()
    memory = Memory(query, key, value, out, lse, shifted, order, queries, keys, values, staging, turns)
    # The tuples stand in place: assigned to a name, their constants would become tensors.
    if GROUPS == 2:
        gl.warp_specialize([
            (_consume, (shape, f, memory, problem, 0)),
            (_consume, (shape, f, memory, problem, 1)),
            (_produce, (shape, f, memory, problem)),
        ], [4, producers], [REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (shape, f, memory, problem, 0)),
            (_consume, (shape, f, memory, problem, 1)),
            (_consume, (shape, f, memory, problem, 2)),
            (_produce, (shape, f, memory, problem)),
        ], [4, 4, producers], [REGISTERS, REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
