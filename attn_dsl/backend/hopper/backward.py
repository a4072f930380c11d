"""The backward kernel: five products in one pass over the transposed ranges.

A program takes tile after tile of 128 keys of one batch and key head, 64 for each of two warpgroups, and goes through
the query tiles that see them, one query head of the group after the other; a third, single warp loads, and runs ahead
into the next tile of keys. With the tiles turned around, so that probabilities and their gradients are left operands in
registers, one step of a warpgroup is

    issue S^T = K Q^T;  issue dP^T = V dO^T
    wait for S:   P = 2 ** (logit - lse)                            while dP runs
    issue dV += P^T dO;  wait for dP:   dS = P (dP - delta)         while dV runs
    dS to shared memory;  issue dQ = dS K, half of it each;  issue dK += dS^T Q
    wait for dQ:  add it to a float32 buffer by the copy engine     while dK runs

The logit is factor * r + slope * (k - q) in base 2, r the bare product or what the variant makes of it
(`emit_backward.py`). lse and delta = rowsum(dO * O) - dLSE come with the tiles of Q and dO, prepared by
`backward_rows.py`, which also turns the buffer into dQ. Where nobody has cleared it, who first reaches a tile stores,
and the others add once that is done. One loop serves masked and full tiles, with a branch around the mask: two would
keep the addresses of shared memory in registers, and spill.

Gradients of captured tensors are sums of P (dP - delta) times what `emit_shares.py` says, made as soon as dP is there.

After FlashAttention-3 (Shah et al. 2024, section 3.2), with dV issued before dS is formed.
"""

# ruff: noqa: RET505, RUF005, SIM102, SIM300 (static conditions and lists as Triton knows them)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from attn_dsl.backend.hopper.channels import Board, board, corner, flat
from attn_dsl.backend.hopper.device import (
    bits_between,
    columns,
    kept,
    opaque,
    repeated_bits,
    thread_sums,
    warp_sums,
)
from attn_dsl.backend.hopper.forward import NEVER, Problem, _at, in_sections
from attn_dsl.backend.hopper.versions import async_add, async_load, async_store, reinterpret, thread_barrier
from attn_dsl.backend.portable.device import captured, count, nth, scalars_of

KEYS = gl.constexpr(64)
"""Of one warpgroup."""
CLAIMED, STORED = gl.constexpr(1), gl.constexpr(2)
"""Bits of a tile of dQ: somebody is about to store it; and has, of the first half, of the second one bit further."""


@aggregate
class Shape:
    """What is known when the kernel is compiled: tile shapes, ways, and register layouts.

    QUERIES of a tile are 64, or 128 where D and DV are 64. Each warpgroup makes HALF columns of 64 rows of a tile's dQ:
    half of the columns, or, of a tile of 128 queries, half of the rows.

    WHOLE       no tile of keys sticks out
    POSITIONAL  the score of a pair that does not count may be anything
    ASK         of each tile whether it is full, and leave out the mask there
    ORDERED     programs add to dQ in an order of their own
    CLEARED     zeros stand where dQ is summed; else who first reaches a tile stores
    LATE        dP begins when P is done, which leaves P and the mask more registers
    HOLD        keys stay in registers for their product with queries, where bare scores leave room
    PERIOD      columns of a box of queries, in a grid
    PARTS       the mask is the same for all pairs of a warpgroup's part of a tile
    WIDE        ranges are computed in 64 bits
    FRESH, KEPT so many inner factors of shares are computed with the gradient, and given by the score
    """

    D: gl.constexpr
    DV: gl.constexpr
    QUERIES: gl.constexpr
    HALF: gl.constexpr
    GRAD_STAGES: gl.constexpr
    WHOLE: gl.constexpr
    POSITIONAL: gl.constexpr
    ASK: gl.constexpr
    ORDERED: gl.constexpr
    CLEARED: gl.constexpr
    CLAIMS: gl.constexpr
    LATE: gl.constexpr
    PARTS: gl.constexpr
    WIDE: gl.constexpr
    FRESH: gl.constexpr
    KEPT: gl.constexpr
    PERIOD: gl.constexpr
    HOLD: gl.constexpr
    LOGITS: gl.constexpr
    KEY_GRAD: gl.constexpr
    VALUE_GRAD: gl.constexpr
    QUERY_GRAD: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, D, DV, QUERIES, GRAD_STAGES, WHOLE, POSITIONAL, ASK, ORDERED, CLEARED, LATE, PARTS,
                 WIDE, FRESH, KEPT, PERIOD, HOLD):  # fmt: skip
        half = D if QUERIES == 128 else D // 2
        self.D = gl.constexpr(D)
        self.DV = gl.constexpr(DV)
        self.QUERIES = gl.constexpr(QUERIES)
        self.HALF = gl.constexpr(half)
        self.GRAD_STAGES = gl.constexpr(GRAD_STAGES)
        self.WHOLE = gl.constexpr(WHOLE)
        self.POSITIONAL = gl.constexpr(POSITIONAL)
        self.ASK = gl.constexpr(ASK)
        self.ORDERED = gl.constexpr(ORDERED)
        self.CLEARED = gl.constexpr(CLEARED)
        self.CLAIMS = gl.constexpr(not CLEARED and not ORDERED)
        self.LATE = gl.constexpr(LATE)
        self.PARTS = gl.constexpr(PARTS)
        self.WIDE = gl.constexpr(WIDE)
        self.FRESH = gl.constexpr(FRESH)
        self.KEPT = gl.constexpr(KEPT)
        self.PERIOD = gl.constexpr(PERIOD)
        self.HOLD = gl.constexpr(HOLD)
        self.LOGITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUERIES, 16]))
        self.KEY_GRAD = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16]))
        self.VALUE_GRAD = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16]))
        self.QUERY_GRAD = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, half, 16]))


@aggregate
class Functions:
    """The emitted functions of the variant (`emit_backward.py`); None for one that it does not need."""

    FACTOR: gl.constexpr
    GAIN: gl.constexpr
    UNIFORM: gl.constexpr
    KEYS: gl.constexpr
    COLUMNS: gl.constexpr
    SCORE: gl.constexpr
    DERIVATIVE: gl.constexpr
    PLAIN: gl.constexpr
    PLAIN_FACTOR: gl.constexpr
    SHIFT: gl.constexpr
    SLOPE: gl.constexpr
    BOUNDS: gl.constexpr
    MASK: gl.constexpr
    FULL: gl.constexpr
    Q_RANGES: gl.constexpr
    FRESH: gl.constexpr
    ADD_KEY_SUMS: gl.constexpr
    ADD_PAIRS: gl.constexpr
    ADD_TILE: gl.constexpr
    QUERY_BOX: gl.constexpr
    KEY_BOX: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, FACTOR, GAIN, UNIFORM, KEYS, COLUMNS, SCORE, DERIVATIVE, PLAIN, PLAIN_FACTOR, SHIFT, SLOPE,
                 BOUNDS, MASK, FULL, Q_RANGES, FRESH, ADD_KEY_SUMS, ADD_PAIRS, ADD_TILE, QUERY_BOX,
                 KEY_BOX):  # fmt: skip
        self.FACTOR = gl.constexpr(FACTOR)
        self.GAIN = gl.constexpr(GAIN)
        self.UNIFORM = gl.constexpr(UNIFORM)
        self.KEYS = gl.constexpr(KEYS)
        self.COLUMNS = gl.constexpr(COLUMNS)
        self.SCORE = gl.constexpr(SCORE)
        self.DERIVATIVE = gl.constexpr(DERIVATIVE)
        self.PLAIN = gl.constexpr(PLAIN)
        self.PLAIN_FACTOR = gl.constexpr(PLAIN_FACTOR)
        self.SHIFT = gl.constexpr(SHIFT)
        self.SLOPE = gl.constexpr(SLOPE)
        self.BOUNDS = gl.constexpr(BOUNDS)
        self.MASK = gl.constexpr(MASK)
        self.FULL = gl.constexpr(FULL)
        self.Q_RANGES = gl.constexpr(Q_RANGES)
        self.FRESH = gl.constexpr(FRESH)
        self.ADD_KEY_SUMS = gl.constexpr(ADD_KEY_SUMS)
        self.ADD_PAIRS = gl.constexpr(ADD_PAIRS)
        self.ADD_TILE = gl.constexpr(ADD_TILE)
        self.QUERY_BOX = gl.constexpr(QUERY_BOX)
        self.KEY_BOX = gl.constexpr(KEY_BOX)


@aggregate
class Ring:
    """Tiles of rows and a number for each row, [places, 1, rows], in shared memory: `full` is the producer's word."""

    tiles: gl.shared_memory_descriptor
    numbers: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, tiles, numbers, full):
        self.tiles = tiles
        self.numbers = numbers
        self.full = full

    @gluon.jit
    def tile(self, at):
        """[rows, columns] of the tile that is number `at` of all."""
        return flat(self.tiles.index(at % self.tiles.shape[0]))

    @gluon.jit
    def row(self, at, LAYOUT: gl.constexpr):
        """[1, rows] float32, the numbers of tile `at`."""
        return self.numbers.index(at % self.tiles.shape[0]).load(LAYOUT)

    @gluon.jit
    def wait(self, at):
        mbarrier.wait(self.full.index(at % self.tiles.shape[0]), (at // self.tiles.shape[0]) & 1)

    @gluon.jit
    def load(self, at, rows, begin, numbers, pair, first):
        """Fill the place of tile `at` with rows from `begin` on and numbers from `first` on."""
        place = at % self.tiles.shape[0]
        full = self.full.index(place)
        mbarrier.expect(full, rows.block_type.nbytes + numbers.block_type.nbytes)
        async_load(rows, corner(begin), full, self.tiles.index(place))
        async_load(numbers, [pair, first], full, self.numbers.index(place))


@aggregate
class Memory:
    """Descriptors of tensors in global memory, and buffers in shared memory; what comes twice is one for each group.

    lse, delta, dq, `turns` and `done` begin with pair `first` of batch and key head, the first of the launch. `turns`
    [pairs, key tiles, query tiles] and `done` [pairs, query tiles, group] int32: how many programs add to a tile of dQ
    before this one, and how many have. With CLAIMS, `done` is [pairs, query tiles], of bits: CLAIMED, and STORED <<
    group for each half; `found` is what the producer found there, for each tile of dO. The launch is for so many
    `pairs` of batch and key head. `exchange` holds dS^T of two steps, [group, step], `sums` half a tile of dQ. `free`:
    the consumers' word that they are done with a tile of dO, and with the tile of Q before.
    """

    query: tma.tensor_descriptor
    key: tma.tensor_descriptor
    value: tma.tensor_descriptor
    grad: tma.tensor_descriptor
    lse: tma.tensor_descriptor
    delta: tma.tensor_descriptor
    dq: tma.tensor_descriptor
    dk: tma.tensor_descriptor
    dv: tma.tensor_descriptor
    turns: gl.tensor
    done: gl.tensor
    pairs: gl.tensor
    first: gl.tensor
    board: Board
    queries: Ring
    grads: Ring
    keys: gl.shared_memory_descriptor
    values: gl.shared_memory_descriptor
    loaded: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    exchange: gl.shared_memory_descriptor
    sums: gl.shared_memory_descriptor
    found: gl.shared_memory_descriptor
    shares: gl.tuple

    @gluon.constexpr_function
    def __init__(self, query, key, value, grad, lse, delta, dq, dk, dv, turns, done, pairs, first, board, queries,
                 grads, keys, values, loaded, free, exchange, sums, found,
                 shares):  # fmt: skip
        self.query = query
        self.key = key
        self.value = value
        self.grad = grad
        self.lse = lse
        self.delta = delta
        self.dq = dq
        self.dk = dk
        self.dv = dv
        self.turns = turns
        self.done = done
        self.pairs = pairs
        self.first = first
        self.board = board
        self.queries = queries
        self.grads = grads
        self.keys = keys
        self.values = values
        self.loaded = loaded
        self.free = free
        self.exchange = exchange
        self.sums = sums
        self.found = found
        self.shares = shares


@aggregate
class Head:
    """What the pairs of a warpgroup's keys with one query head have in common.

    pair: number of batch and head within the launch; turns: where its key tile begins in the table of that name.
    k: [64, 1] positions, of which `own` is the first; k0: the first of both warpgroups. `uniform`, `keys`: what the
    emitted functions of these names gave; `bounds`: what `_bounds` gave. `shares`: the gradients of captured tensors,
    [copies, ...] each, and `copy` the one that this program adds to.
    """

    b: gl.tensor
    h: gl.tensor
    pair: gl.tensor
    turns: gl.tensor
    k: gl.tensor
    own: gl.tensor
    k0: gl.tensor
    start: gl.tensor
    q_len: gl.tensor
    kv_len: gl.tensor
    factor: gl.tensor
    plain_factor: gl.tensor
    gain: gl.tensor
    slope: gl.tensor
    uniform: gl.tuple
    keys: gl.tuple
    bounds: gl.tuple
    scalars: gl.tuple
    tensors: gl.tuple
    shares: gl.tuple
    copy: gl.tensor

    @gluon.constexpr_function
    def __init__(self, b, h, pair, turns, k, own, k0, start, q_len, kv_len, factor, plain_factor, gain, slope, uniform,
                 keys, bounds, scalars, tensors, shares, copy):  # fmt: skip
        self.b = b
        self.h = h
        self.pair = pair
        self.turns = turns
        self.k = k
        self.own = own
        self.k0 = k0
        self.start = start
        self.q_len = q_len
        self.kv_len = kv_len
        self.factor = factor
        self.plain_factor = plain_factor
        self.gain = gain
        self.slope = slope
        self.uniform = uniform
        self.keys = keys
        self.bounds = bounds
        self.scalars = scalars
        self.tensors = tensors
        self.shares = shares
        self.copy = copy


# ---------------------------------------------------------------- which tiles


@gluon.jit
def _following(memory, total):
    """The number of another tile of keys, not less than `total` where there is none.

    All are counted, the first one of a program, too: a number is taken by a program that runs when all smaller ones
    are, and no program takes a smaller one later.
    """
    programs = gl.num_programs(0)
    return memory.board.following(total + programs) - programs


@gluon.jit
def _place(memory, problem, number):
    """(key tile, batch, key head) of a number.

    The first tile of keys comes first: under a causal mask it has the most queries. ORDERED: tiles of a head add to a
    tile of dQ in the order of their numbers, in which they are taken; so none waits for one that is not yet begun.
    """
    tiles, heads = gl.cdiv(problem.sizes[4], 2 * KEYS), problem.sizes[2]
    tile, pair = in_sections(number, tiles, memory.pairs, problem.section, problem.lead, LAST_FIRST=False)
    pair += memory.first
    return tile, pair // heads, pair % heads


@gluon.jit
def _own(memory, problem, b, hk):
    """The number, within the launch, of the first query head of a key head."""
    return (b * problem.sizes[2] + hk - memory.first) * (problem.sizes[1] // problem.sizes[2])


@gluon.jit
def _visits(shape, f, problem, tile, b, h, start):
    """(segments of query tiles, how many tiles they hold)."""
    first = tile * (2 * KEYS)
    if shape.WIDE:
        first, b, h, start = first.to(gl.int64), b.to(gl.int64), h.to(gl.int64), start.to(gl.int64)
    scalars = scalars_of(problem.parameters, shape.WIDE) + problem.sizes + scalars_of(problem.extents, shape.WIDE)
    tensors = captured(problem.tensors, shape.WIDE)
    found = f.Q_RANGES(
        b, h, first, first + (2 * KEYS - 1), start, shape.QUERIES, scalars + (problem.scale,), tensors
    )  # fmt: skip
    segments = ()
    for i in gl.static_range(len(found)):
        if len(found[i]) == 4:  # of a list: the masked tiles, then the full ones
            segments = segments + (found[i],)
        else:
            segments = segments + ((_narrowed(found[i][0]), _narrowed(found[i][1])),)
    return segments, count(segments) + 0 * tile


@gluon.jit
def _number(shape, tiles, n):
    """The number, of a program's tiles of queries, of the n-th that it takes.

    ORDERED: the last comes first. Under a causal mask that is where the first tiles of keys, which are the longest and
    start first, are ahead of all others, which then wait for nobody.
    """
    return tiles - 1 - n if shape.ORDERED else n


@gluon.jit
def _narrowed(bound):
    """A bound of a range as int32: ranges may be bounded by what is larger than any position."""
    bound = bound + gl.to_tensor(0)
    if bound.dtype == gl.int64:
        return gl.minimum(gl.maximum(bound, 0), 2**31 - 1).to(gl.int32)
    else:
        return bound


# ---------------------------------------------------------------- producer


@gluon.jit
def _load_keys(f, memory, part, tensor, buffers, b, hk, first, scalars, tensors):
    mbarrier.expect(memory.loaded.index(part), 2 * tensor.block_type.nbytes)
    for group in gl.static_range(2):
        begin = _at(f.KEY_BOX, b, hk, first + group * KEYS, scalars, tensors)
        async_load(tensor, corner(begin), memory.loaded.index(part), buffers.index(group))


@gluon.jit
def _produce(shape, f, memory, problem):
    """Load what the consumers will want, in the order in which they want it."""
    scalars, tensors = problem.scalars(), problem.captured()
    group = problem.sizes[1] // problem.sizes[2]
    total = memory.pairs * gl.cdiv(problem.sizes[4], 2 * KEYS)
    passed = 0
    turn = 0
    number = _following(memory, total)
    while number < total:
        tile, b, hk = _place(memory, problem, number)
        memory.board.write(turn, tile, b, hk, 0)
        start, own = problem.start(b), _own(memory, problem, b, hk)
        begun = passed
        for member in range(group):
            h = hk * group + member
            segments, tiles = _visits(shape, f, problem, tile, b, h, start)
            for n in range(tiles):
                at = passed + n
                i = nth(segments, _number(shape, tiles, n))
                first = i * shape.QUERIES
                begin = _at(f.QUERY_BOX, b, h, first, scalars, tensors)
                _await_room(shape, memory, at)
                memory.queries.load(at, memory.query, begin, memory.lse, own + member, first)
                memory.grads.load(at, memory.grad, begin, memory.delta, own + member, first)
                if at == begun:  # a tile of keys that no query sees is not loaded
                    _await_end(shape, memory, at)
                    _load_keys(f, memory, 0, memory.key, memory.keys, b, hk, tile * (2 * KEYS), scalars, tensors)
                    _load_keys(f, memory, 1, memory.value, memory.values, b, hk, tile * (2 * KEYS), scalars, tensors)
                if shape.CLAIMS:
                    _claim(shape, memory, (own + member) * gl.cdiv(problem.sizes[3], shape.QUERIES) + i, at)
            passed += tiles
        number = _following(memory, total)
        turn += 1
    memory.board.write(turn, -1, 0, 0, 0)


@gluon.jit
def _claim(shape, memory, place, at):
    """Tell the consumers, before they have the gradient of tile `at`, what stands in `done` at a place: theirs if 0.

    Programs claim what they visit in the order in which they visit it. So nobody waits for one that waits for him: who
    found a tile claimed did so before he claimed any later one.
    """
    bits = gl.atomic_or(memory.done + place, CLAIMED, sem="relaxed")
    at = at % shape.GRAD_STAGES
    memory.found.index(at).store(gl.full([1], bits, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(memory.grads.full.index(at), count=1)


@gluon.jit
def _await_room(shape, memory, at):
    """Wait until there is room for tile `at`."""
    mbarrier.wait(memory.free.index(at % shape.GRAD_STAGES), ((at // shape.GRAD_STAGES) & 1) ^ 1)


@gluon.jit
def _await_end(shape, memory, passed):
    """Wait until both warpgroups are done with so many steps, all that were begun, but for the last product of dK."""
    _await_room(shape, memory, passed - 1 + shape.GRAD_STAGES)


# ---------------------------------------------------------------- products


@gluon.jit
def _zero(at):
    """0, which the compiler does not know: what depends on it is found in each step, not kept in registers."""
    return opaque(at) >> 31


@gluon.jit
def _issue_turned(shape, left, right):
    """left right^T, [64, QUERIES]."""
    zero = gl.zeros([KEYS, shape.QUERIES], gl.float32, shape.LOGITS)
    return warpgroup_mma(left, right.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _issue_sum(weights, tile, total, LAYOUT: gl.constexpr):
    """total + weights tile, the weights in the registers where they are."""
    operand: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    return warpgroup_mma(gl.convert_layout(weights, operand), tile, total, is_async=True)


@gluon.jit
def _tell_other(GROUP: gl.constexpr, at):
    """Tell the other warpgroup that this one's dS of step `at` is there; a barrier for each, in two steps by turns."""
    gl.inline_asm_elementwise(
        "bar.arrive $1, 256; mov.u32 $0, 0;", "=r,r", [9 + 2 * GROUP + at % 2], dtype=gl.int32, is_pure=False,
        pack=1)  # fmt: skip


@gluon.jit
def _hear(OTHER: gl.constexpr, at):
    """Wait for the other warpgroup's dS of step `at`."""
    gl.inline_asm_elementwise(
        "bar.sync $1, 256; mov.u32 $0, 0;", "=r,r", [9 + 2 * OTHER + at % 2], dtype=gl.int32, is_pure=False,
        pack=1)  # fmt: skip


@gluon.jit
def _issue_query_grad(shape, memory, at, GROUP: gl.constexpr):
    """This warpgroup's half of dQ: from the dS of its own keys, then, once told of it, from the other's."""
    own, other = memory.exchange.index(2 * GROUP + at % 2), memory.exchange.index(2 * (1 - GROUP) + at % 2)
    zero = _zero(at)
    own_keys = memory.keys.index(GROUP + zero).reshape([KEYS, shape.D])
    other_keys = memory.keys.index(1 - GROUP + zero).reshape([KEYS, shape.D])
    if shape.QUERIES == 128:
        own, other = own.slice(64 * GROUP, 64, dim=1), other.slice(64 * GROUP, 64, dim=1)
    else:
        own_keys = own_keys.slice(shape.HALF * GROUP, shape.HALF, dim=1)
        other_keys = other_keys.slice(shape.HALF * GROUP, shape.HALF, dim=1)
    zero = gl.zeros([64, shape.HALF], gl.float32, shape.QUERY_GRAD)
    half = warpgroup_mma(own.permute((1, 0)), own_keys, zero, use_acc=False, is_async=True)
    _hear(1 - GROUP, at)
    return warpgroup_mma(other.permute((1, 0)), other_keys, half, is_async=True)


@gluon.jit
def _add_query_grad(shape, memory, head, half, i, turn, bits, last, GROUP: gl.constexpr):
    """Add half a tile of dQ to the buffer, which keeps the order of the registers: 16 bytes a lane, no conflicts.

    ORDERED: once `turn` programs have added to it. CLAIMS: who claimed the tile, `bits` being 0, stores, and the others
    wait for that if these do not say that it is done. `last` is what this gave for the step before.
    """
    x = gl.permute(gl.reshape(half, [4, 2, 8, shape.HALF // 8, 4, 2]), (3, 0, 2, 4, 1, 5))
    tile = head.pair * gl.cdiv(head.q_len, shape.QUERIES) + i
    place = tile * 2 + GROUP
    if shape.ORDERED:
        _tell(memory, last, 0)
        _await(memory.done + place, turn)
        last = (place, turn)
    elif shape.CLAIMS:
        _tell_stored(memory, last[0], STORED << GROUP, 0)
        _await_stored(memory.done + tile, gl.where(bits == 0, -1, bits), STORED << GROUP)
        last = (gl.where(bits == 0, tile, -1), turn)
    else:
        tma.store_wait(0)  # the copy engine has read what was there
    memory.sums.index(GROUP).store(gl.reshape(x, [2 * shape.HALF, 32]))
    fence_async_shared()
    begin = [place * (2 * shape.HALF), 0]
    if shape.CLEARED:
        async_add(memory.dq, begin, memory.sums.index(GROUP))
    elif bits == 0:
        async_store(memory.dq, begin, memory.sums.index(GROUP))
    else:
        async_add(memory.dq, begin, memory.sums.index(GROUP))
    return last


@gluon.jit
def _await_copies(BEHIND: gl.constexpr):
    """Wait until the copy engine has written what the thread gave it, but for the last so many tiles."""
    if BEHIND == 0:
        gl.inline_asm_elementwise(
            "cp.async.bulk.wait_group 0; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip
    else:
        gl.static_assert(BEHIND == 2)
        gl.inline_asm_elementwise(
            "cp.async.bulk.wait_group 2; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def _tell(memory, last, BEHIND: gl.constexpr):
    """Let the next program add where this one did: `last` is (place in `done`, turn), the place negative for nowhere.

    When the copy engine has finished, its sum stands in memory, and the others may know; it takes no fence. All threads
    store the same number: a choice among them would cost the products their uniform registers.
    """
    _await_copies(BEHIND)
    thread_barrier()
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ge.s32 p, $2, 0; @p st.relaxed.gpu.global.u32 [$1], $3; mov.u32 $0, 0; }",
        "=r,l,r,r", [(memory.done + last[0]).to(gl.int64), last[0], last[1] + 1], dtype=gl.int32, is_pure=False,
        pack=1)  # fmt: skip


@gluon.jit
def _tell_stored(memory, tile, BIT: gl.constexpr, BEHIND: gl.constexpr):
    """Set a bit of the tile of dQ that the step before stored half of; the tile is negative if it added.

    As in `_tell`, what the copy engine stored stands in memory when it has finished.
    """
    if BEHIND == 0:
        gl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ge.s32 p, $1, 0; @p cp.async.bulk.wait_group 0; @!p cp.async.bulk.wait_group.read 0;"
            " mov.u32 $0, 0; }", "=r,r", [tile], dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip
    else:
        _await_copies(BEHIND)
    thread_barrier()
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ge.s32 p, $2, 0; @p red.relaxed.gpu.global.or.b32 [$1], $3; mov.u32 $0, 0; }",
        "=r,l,r,r", [(memory.done + tile).to(gl.int64), tile, gl.to_tensor(BIT)], dtype=gl.int32, is_pure=False,
        pack=1)  # fmt: skip


@gluon.jit
def _bits_of(place):
    """The number at a place, which others change."""
    return gl.inline_asm_elementwise(
        "ld.relaxed.gpu.global.u32 $0, [$1];", "=r,l", [place.to(gl.int64)], dtype=gl.int32, is_pure=False,
        pack=1)  # fmt: skip


@gluon.jit
def _await_stored(place, bits, BIT: gl.constexpr):
    """Wait until a bit is set at a place, if it is not among `bits`, which were read there."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 v, m; mov.u32 v, $2; AGAIN: and.b32 m, v, $3; setp.ne.u32 p, m, 0; @p bra DONE;"
        " ld.relaxed.gpu.global.u32 v, [$1]; bra AGAIN; DONE: mov.u32 $0, 0; }",
        "=r,l,r,r", [place.to(gl.int64), bits, gl.to_tensor(BIT)], dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def _await(place, turn):
    """Wait until the number at a place is `turn`."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 v; AGAIN: ld.relaxed.gpu.global.u32 v, [$1]; setp.ne.u32 p, v, $2;"
        " @p bra AGAIN; mov.u32 $0, 0; }",
        "=r,l,r", [place.to(gl.int64), turn], dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


# ---------------------------------------------------------------- one step


@gluon.jit
def _narrow(x, DTYPE: gl.constexpr):
    """float32 to 16 bits, two at a time; the compiler would take the pairs apart where both forms are used."""
    if DTYPE == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.bfloat16, is_pure=True, pack=2)  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.float16, is_pure=True, pack=2)  # fmt: skip


@gluon.jit
def _widen(x):
    """16 bits to float32."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], dtype=gl.float32, is_pure=True,
            pack=2)  # fmt: skip
    else:
        return x.to(gl.float32)


@gluon.jit
def _counts_throughout(shape, f, head, first, full):
    """Whether all pairs of the program's keys with the query tile from position `first` on are known to count.

    full: what a list says of the mask, or None.
    """
    last = first + (shape.QUERIES - 1)
    result = last >= first  # true, as a number of the device
    if full is not None:
        result = full
    elif f.FULL is not None:
        result = f.FULL(
            head.b, head.h, first, last, head.k0, head.k0 + (2 * KEYS - 1), head.start, shape.QUERIES, head.scalars,
            head.tensors
        )  # fmt: skip
    if not shape.WHOLE:
        result = result & (head.k0 + 2 * KEYS <= head.kv_len)
    if shape.POSITIONAL:
        result = result & (last < head.start + head.q_len)
    return result


@gluon.jit
def _end_of_part(f, head, first):
    """The end of the keys that count of the warpgroup's part of the tile from query `first` on: 0 if it is masked."""
    keys, found = (), ()
    if f.KEYS is not None:
        keys = f.KEYS(head.b, head.h, head.own, False, head.uniform, head.scalars, head.tensors)
    if f.COLUMNS is not None:
        found = f.COLUMNS(head.b, head.h, first, False, head.uniform, head.scalars, head.tensors)
    mask = f.MASK(head.b, head.h, first, head.own, False, head.uniform, keys, found, head.scalars, head.tensors)
    return gl.where(mask, head.kv_len, 0)


@gluon.jit
def _counting(shape, f, head, first, q, found):
    """Which pairs count, [64, QUERIES] or what spreads to that."""
    if shape.PARTS:
        return head.k < _end_of_part(f, head, first)
    else:
        keep = head.k < head.kv_len
        if f.COLUMNS is not None and f.SCORE is None:  # for the mask alone: full tiles do without
            found = f.COLUMNS(head.b, head.h, q, False, head.uniform, head.scalars, head.tensors)
        if f.MASK is not None:
            mask = f.MASK(head.b, head.h, q, head.k, False, head.uniform, head.keys, found, head.scalars, head.tensors)
            keep = mask if shape.WHOLE else keep & mask
        if shape.POSITIONAL:
            keep = keep & (q < head.start + head.q_len)
        return keep


@gluon.jit
def _bounds(shape, f, b, h, k, start, q_len, kv_len, uniform, keys, scalars, tensors):
    """(low, high, bits): the queries in boxes that a row of keys sees, and which columns of a box they are in."""
    if f.BOUNDS is None:
        return ()
    else:
        low, high, left, right = f.BOUNDS(b, h, k, False, uniform, keys, scalars, tensors)
        zero = 0 * k
        high = gl.minimum(high + zero, start + q_len - 1)
        if not shape.WHOLE:
            high = gl.where(k < kv_len, high, -1)
        bits = repeated_bits(left + zero, right + zero, shape.PERIOD, shape.QUERIES, shape.LOGITS)
        return (low + zero, high, bits)


@gluon.jit
def _within_bounds(shape, f, head, x, first, q, found):
    """x, of queries in boxes, where pairs count, else -inf."""
    bits = head.bounds[2] & bits_between(head.bounds[0], head.bounds[1], first, shape.QUERIES, shape.LOGITS)
    x = kept(x, bits, shape.LOGITS)
    if f.MASK is not None:
        mask = f.MASK(head.b, head.h, q, head.k, False, head.uniform, head.keys, found, head.scalars, head.tensors)
        x = gl.where(mask, x, NEVER)
    return x


@gluon.jit
def _logits(shape, f, FUNCTION: gl.constexpr, head, s, factor, lse, first, q, found):
    """(logit - lse, the derivative of the score, what shares keep), from the bare products s."""
    x, derivative, kept = s, 1.0, ()
    if FUNCTION is not None:
        x = FUNCTION(s, head.b, head.h, q, head.k, False, head.uniform, head.keys, found, head.scalars, head.tensors,
                     first, head.k0)  # fmt: skip
        if f.DERIVATIVE:
            derivative = x[1]
        for i in gl.static_range(shape.KEPT):
            kept = kept + (x[i + 1 + f.DERIVATIVE],)
        if f.DERIVATIVE or shape.KEPT > 0:
            x = x[0]
    return x * factor - lse, derivative, kept


@gluon.jit
def _weights(shape, f, x, derivative, kept, DTYPE: gl.constexpr):
    """(P^T, P^T times the derivative, P^T times what is kept) of narrow numbers, from logits less lse."""
    p = gl.exp2(x)
    steep = p
    if f.DERIVATIVE:
        steep = p * derivative
        if shape.POSITIONAL:
            steep = gl.where(p == 0.0, 0.0, steep)
    weighted = ()
    for i in gl.static_range(shape.KEPT):
        share = p * kept[i]
        if shape.POSITIONAL:
            share = gl.where(p == 0.0, 0.0, share)
        weighted = weighted + (_narrow(share, DTYPE),)
    return _narrow(p, DTYPE), _narrow(steep, DTYPE), weighted


@gluon.jit
def _probabilities(shape, f, head, s, lse, i, full, shift, DTYPE: gl.constexpr):
    """`_weights` for query tile i, from the bare products s; `full` as in `_counts_throughout`, or, where there are
    PLAIN scores, what that gave; `shift` is what then comes to their logits."""
    first = head.start + i * shape.QUERIES
    q = columns(opaque(first), shape.QUERIES, shape.LOGITS)
    found = ()
    if f.COLUMNS is not None and f.SCORE is not None:
        found = f.COLUMNS(head.b, head.h, q, False, head.uniform, head.scalars, head.tensors)
    if f.SLOPE is not None:  # the row's own part, slope * (q - first), is in lse
        lse = lse - head.slope * (head.k - first).to(gl.float32)
    if f.PLAIN is not None:
        if full:
            weights, steep, weighted = _weigh(
                shape, f, f.PLAIN, False, head, s, head.plain_factor, lse - shift, first, q, found, DTYPE
            )
        else:
            weights, steep, weighted = _weigh(
                shape, f, f.SCORE, True, head, s, head.factor, lse, first, q, found, DTYPE
            )
        return weights, steep, weighted
    else:
        x, derivative, kept = _logits(shape, f, f.SCORE, head, s, head.factor, lse, first, q, found)
        if f.BOUNDS is not None:
            x = _within_bounds(shape, f, head, x, first, q, found)
        elif f.MASK is None and shape.WHOLE and not shape.POSITIONAL:
            pass  # every pair counts
        elif (f.MASK is not None and f.FULL is None and full is None) or not shape.ASK:
            x = gl.where(_counting(shape, f, head, first, q, found), x, NEVER)
        else:  # in one loop for all tiles: registers do not suffice for two
            if not _counts_throughout(shape, f, head, first, full):
                x = gl.where(_counting(shape, f, head, first, q, found), x, NEVER)
        return _weights(shape, f, x, derivative, kept, DTYPE)


@gluon.jit
def _weigh(
        shape, f, FUNCTION: gl.constexpr, MASKED: gl.constexpr, head, s, factor, lse, first, q, found,
        DTYPE: gl.constexpr
):  # fmt: skip
    """`_weights` from the bare products, by one of the scores."""
    x, derivative, kept = _logits(shape, f, FUNCTION, head, s, factor, lse, first, q, found)
    if MASKED:
        x = gl.where(_counting(shape, f, head, first, q, found), x, NEVER)
    return _weights(shape, f, x, derivative, kept, DTYPE)


@gluon.jit
def _add_shares(shape, f, head, i, full, weights, weighted, upstream, totals):
    """Add what the pairs of query tile i have for captured tensors, from dP - delta: (totals over queries after that,
    what `_add_tile` is to add), [64, 4] for each amount."""
    if f.ADD_KEY_SUMS is None and f.ADD_PAIRS is None:
        return totals, ()
    else:
        first = head.start + i * shape.QUERIES
        q = columns(opaque(first), shape.QUERIES, shape.LOGITS)
        grad = _widen(weights) * upstream
        amounts = (grad,)
        if f.FRESH is not None:
            factors = f.FRESH(head.b, head.h, q, head.k, False, head.uniform, head.scalars, head.tensors)
            for n in gl.static_range(len(factors)):
                amounts = amounts + (grad * factors[n],)
        for n in gl.static_range(shape.KEPT):
            amounts = amounts + (_widen(weighted[n]) * upstream,)
        parts = _nothing(shape, f.ADD_PAIRS)
        if f.ADD_PAIRS is not None:
            if full:
                parts = _thread_sums(amounts)
            else:
                f.ADD_PAIRS(amounts, head.b, head.h, q, head.k, head.uniform, head.scalars, head.tensors, head.shares,
                            head.copy)  # fmt: skip
        result = ()
        if f.ADD_KEY_SUMS is not None:
            for n in gl.static_range(len(amounts)):
                result = result + (totals[n] + thread_sums(amounts[n]),)
        return result, parts


@gluon.jit
def _add_tile(shape, f, head, i, full, parts):
    """Add to the one entry that a full tile has, as products run: the sum over the lanes of a warp takes a while."""
    if f.ADD_TILE is not None:
        if full:
            first = head.start + i * shape.QUERIES
            sums = ()
            for n in gl.static_range(len(parts)):
                sums = sums + (warp_sums(parts[n]),)
            f.ADD_TILE(sums, head.b, head.h, first, head.k0, head.uniform, head.scalars, head.tensors, head.shares,
                       head.copy)  # fmt: skip


@gluon.jit
def _thread_sums(amounts):
    result = ()
    for n in gl.static_range(len(amounts)):
        result = result + (thread_sums(amounts[n]),)
    return result


@gluon.jit
def _nothing(shape, ADD: gl.constexpr):
    """Sums of nothing, [64, 4] for each amount, if there is something to ADD."""
    sums = ()
    if ADD is not None:
        for _ in gl.static_range(1 + shape.FRESH + shape.KEPT):
            sums = sums + (thread_sums(gl.zeros([KEYS, shape.QUERIES], gl.float32, shape.LOGITS)),)
    return sums


@gluon.jit
def _step(shape, f, memory, head, own_keys, at, i, full, dk, dv, last, totals, GROUP: gl.constexpr):
    """(dK, dV, last, totals) with query tile i, number `at` of all; `full` as in `_counts_throughout`. `own_keys`, the
    warpgroup's [64, D], are in registers or shared memory."""
    DTYPE: gl.constexpr = memory.keys.dtype
    if f.PLAIN is not None:
        full = _counts_throughout(shape, f, head, head.start + i * shape.QUERIES, None)
    shift = 0.0
    if f.SHIFT is not None:  # loaded while the first product runs, whether it is wanted or not
        first = head.start + i * shape.QUERIES
        shift = f.SHIFT(head.b, head.h, first, head.k0, head.uniform, head.scalars, head.tensors) * head.factor
    turn = i
    if shape.ORDERED:
        turn = gl.load(memory.turns + head.turns + i)
    elif shape.CLAIMS:  # read when the step begins, lest the end of it wait
        turn = _bits_of(memory.done + (head.pair * gl.cdiv(head.q_len, shape.QUERIES) + i))
    memory.queries.wait(at)
    zero = 0 if shape.QUERIES == 128 else _zero(at)  # there, registers suffice
    if not shape.HOLD:
        own_keys = memory.keys.index(GROUP + zero).reshape([KEYS, shape.D])
    products = _issue_turned(shape, own_keys, memory.queries.tile(at))
    values = memory.values.index(GROUP + zero).reshape([KEYS, shape.DV])
    if shape.LATE:
        s = warpgroup_mma_wait(0, deps=[products])
    else:
        memory.grads.wait(at)
        upstream = _issue_turned(shape, values, memory.grads.tile(at))
        s = warpgroup_mma_wait(1, deps=[products])
    lse = memory.queries.row(at, shape.LOGITS)
    weights, steep, weighted = _probabilities(shape, f, head, s, lse, i, full, shift, DTYPE)
    if shape.LATE:
        memory.grads.wait(at)
        upstream = _issue_turned(shape, values, memory.grads.tile(at))
    dv_next = _issue_sum(weights, memory.grads.tile(at), dv, shape.VALUE_GRAD)
    dp = warpgroup_mma_wait(1, deps=[upstream])
    change = dp - memory.grads.row(at, shape.LOGITS)
    ds = _widen(steep) * change
    if f.GAIN is not None:
        ds = ds * head.gain
    ds = _narrow(ds, DTYPE)
    totals, parts = _add_shares(shape, f, head, i, full, weights, weighted, change, totals)
    if f.ADD_KEY_SUMS is not None or f.ADD_PAIRS is not None:
        # A wait that is over: ptxas moves nothing across its loop; else it would put the sums off, and spill.
        memory.grads.wait(at)

    memory.exchange.index(2 * GROUP + at % 2).store(ds)
    fence_async_shared()
    _tell_other(GROUP, at)
    half = _issue_query_grad(shape, memory, at, GROUP)
    dk_next = _issue_sum(ds, memory.queries.tile(at), dk, shape.KEY_GRAD)
    _add_tile(shape, f, head, i, full, parts)
    half, dv = warpgroup_mma_wait(1, deps=[half, dv_next])
    bits = turn
    if shape.CLAIMS:
        found = memory.found.index(at % shape.GRAD_STAGES).load(gl.BlockedLayout([1], [32], [4], [0]))
        bits = gl.max(found, 0)
        bits = gl.where(bits == 0, 0, bits | turn)
    mbarrier.arrive(memory.free.index(at % shape.GRAD_STAGES), count=1)
    last = _add_query_grad(shape, memory, head, half, i, turn, bits, last, GROUP)
    dk = warpgroup_mma_wait(0, deps=[dk_next])
    return dk, dv, last, totals


# ---------------------------------------------------------------- consumers


@gluon.jit
def _consume(shape, f, memory, problem, GROUP: gl.constexpr):
    """Take the warpgroup's 64 keys of key tile after key tile."""
    passed = 0
    seen = 0
    turn = 0
    memory.board.wait(0)
    tile, b, hk = memory.board.read(0)
    while tile >= 0:
        dk, dv, last, steps = _attend(shape, f, memory, problem, tile, b, hk, passed, seen, GROUP)
        passed += steps
        seen += (steps > 0).to(gl.int32)
        _store(shape, f, memory, problem, dk, dv, last, passed, turn, GROUP)
        memory.board.release(turn)
        turn += 1
        memory.board.wait(turn)
        tile, b, hk = memory.board.read(turn)
    tma.store_wait(0)


@gluon.jit
def _attend(shape, f, memory, problem, tile, b, hk, passed, seen, GROUP: gl.constexpr):
    """(dK, dV, `last` of `_add_query_grad`, steps) of the warpgroup's 64 keys, after `passed` steps and `seen` tiles of
    keys with any."""
    scalars, tensors = problem.scalars(), problem.captured()
    start, own = problem.start(b), _own(memory, problem, b, hk)
    line = tile * (2 * KEYS) + GROUP * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, shape.LOGITS))
    k = gl.expand_dims(line, 1)
    dk = gl.zeros([KEYS, shape.D], gl.float32, shape.KEY_GRAD)
    dv = gl.zeros([KEYS, shape.DV], gl.float32, shape.VALUE_GRAD)
    own_keys = memory.keys.index(GROUP).reshape([KEYS, shape.D])
    if shape.HOLD:  # there is no mask, and so no tile without queries
        _await_keys(memory, seen)
        own_keys = own_keys.load(gl.DotOperandLayout(0, shape.LOGITS, 2))
    group = problem.sizes[1] // problem.sizes[2]
    steps = 0
    last = (0 * tile - 1, 0 * tile)
    for member in range(group):
        h = hk * group + member
        segments, tiles = _visits(shape, f, problem, tile, b, h, start)
        factor = f.FACTOR(b, h, scalars, tensors)
        uniform, keys, slope, gain, plain_factor = (), (), factor, factor, factor
        if f.PLAIN is not None:
            plain_factor = f.PLAIN_FACTOR(b, h, scalars, tensors) + gl.to_tensor(0.0)
        if f.GAIN is not None:
            gain = f.GAIN(b, h, scalars, tensors) + gl.to_tensor(0.0)
        if f.UNIFORM is not None:
            uniform = f.UNIFORM(b, h, scalars, tensors)
        if f.KEYS is not None:
            keys = f.KEYS(b, h, k, False, uniform, scalars, tensors)
        if f.SLOPE is not None:
            slope = f.SLOPE(b, h, scalars, tensors)
        q_len, kv_len = problem.sizes[3], problem.sizes[4]
        pair = own + member
        turns = (pair * gl.cdiv(kv_len, 2 * KEYS) + tile).to(gl.int64) * gl.cdiv(q_len, shape.QUERIES)
        shares = captured(memory.shares, False)
        copy = 0 * tile
        if len(shares) > 0:
            copy = tile % shares[0][1][0]
        bounds = _bounds(shape, f, b, h, k, start, q_len, kv_len, uniform, keys, scalars, tensors)
        head = Head(b, h, pair, turns, k, tile * (2 * KEYS) + GROUP * KEYS, tile * (2 * KEYS), start, q_len, kv_len,
                    factor, plain_factor, gain, slope, uniform, keys, bounds, scalars, tensors, shares,
                    copy)  # fmt: skip
        totals = _nothing(shape, f.ADD_KEY_SUMS)
        if tiles > 0:
            _await_keys(memory, seen)
        tma.store_wait(1)  # the copy engine has read the dV of the tile before
        for n in range(tiles):
            number = _number(shape, tiles, n)
            i = nth(segments, number)
            full = None
            if len(segments) == 2 and len(segments[0]) == 4:
                full = number >= segments[0][3]
            dk, dv, last, totals = _step(
                shape, f, memory, head, own_keys, passed + steps + n, i, full, dk, dv, last, totals, GROUP
            )  # fmt: skip
        steps += tiles
        if f.ADD_KEY_SUMS is not None:
            f.ADD_KEY_SUMS(totals, b, h, 0, line, uniform, scalars, tensors, shares, copy)
    return dk, dv, last, steps


@gluon.jit
def _await_keys(memory, seen):
    """Wait for keys and values, after those of `seen` tiles."""
    mbarrier.wait(memory.loaded.index(0), seen & 1)
    mbarrier.wait(memory.loaded.index(1), seen & 1)


@gluon.jit
def _store(shape, f, memory, problem, dk, dv, last, passed, turn, GROUP: gl.constexpr):
    """Let the copy engine write dV from where the warpgroup's dS was, and dK from where its half of dQ was; it goes on
    reading them when this is done."""
    DTYPE: gl.constexpr = memory.keys.dtype
    tile, b, hk = memory.board.read(turn)  # again, rather than kept in registers through the loop
    begin = corner(_at(f.KEY_BOX, b, hk, tile * (2 * KEYS) + GROUP * KEYS, problem.scalars(), problem.captured()))
    count: gl.constexpr = 4 * shape.QUERIES // shape.DV
    block: gl.constexpr = [count] + memory.dv.block_type.shape
    staging = reinterpret(memory.exchange, DTYPE, block, memory.dv.layout).index(GROUP * (count // 2))
    _await_end(shape, memory, passed)  # the other warpgroup has read its dS
    staging.reshape([KEYS, shape.DV]).store(dv.to(DTYPE))
    fence_async_shared()
    async_store(memory.dv, begin, staging)
    tma.store_wait(1)  # the copy engine has read the last half of dQ
    staging = reinterpret(memory.sums.index(GROUP), DTYPE, memory.dk.block_type.shape, memory.dk.layout)
    staging.reshape([KEYS, shape.D]).store((dk * problem.scale).to(DTYPE))
    fence_async_shared()
    async_store(memory.dk, begin, staging)
    if shape.ORDERED:
        _tell(memory, last, 2)
    elif shape.CLAIMS:
        _tell_stored(memory, last[0], STORED << GROUP, 2)


# ---------------------------------------------------------------- kernel


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def _ring(rows, numbers, PLACES: gl.constexpr, ARRIVALS: gl.constexpr):
    tiles = gl.allocate_shared_memory(rows.dtype, [PLACES] + rows.block_type.shape, rows.layout)
    line = gl.allocate_shared_memory(numbers.dtype, [PLACES] + numbers.block_type.shape, numbers.layout)
    return Ring(tiles, line, _barriers(PLACES, ARRIVALS))


@gluon.jit(do_not_specialize=["q_offset", "parameters", "B", "H", "HK", "Q", "KV", "DIM", "extents", "tensors",
                              "shares", "scale", "section", "lead", "pairs", "first"])  # fmt: skip
def attention_backward(query, key, value, grad, lse, delta, dq, dk, dv, turns, done, counter, q_offset, parameters, B,
                       H, HK, Q, KV, DIM, extents, tensors, shares, scale, section, lead, pairs, first,
                       FACTOR: gl.constexpr, GAIN: gl.constexpr, UNIFORM: gl.constexpr, KEY_TERMS: gl.constexpr,
                       COLUMNS: gl.constexpr, SCORE: gl.constexpr, DERIVATIVE: gl.constexpr, PLAIN: gl.constexpr,
                       PLAIN_FACTOR: gl.constexpr, SHIFT: gl.constexpr, SLOPE: gl.constexpr, MASK: gl.constexpr,
                       FULL: gl.constexpr, Q_RANGES: gl.constexpr, FRESH: gl.constexpr, ADD_KEY_SUMS: gl.constexpr,
                       ADD_PAIRS: gl.constexpr, ADD_TILE: gl.constexpr, WHOLE: gl.constexpr, POSITIONAL: gl.constexpr,
                       ASK: gl.constexpr, ORDERED: gl.constexpr, CLEARED: gl.constexpr, LATE: gl.constexpr,
                       PARTS: gl.constexpr, WIDE: gl.constexpr, FRESHES: gl.constexpr, KEPT: gl.constexpr,
                       D: gl.constexpr, DV: gl.constexpr, QUERIES: gl.constexpr, QUERY_STAGES: gl.constexpr,
                       GRAD_STAGES: gl.constexpr, REGISTERS: gl.constexpr, BOUNDS: gl.constexpr = None,
                       QUERY_BOX: gl.constexpr = None, KEY_BOX: gl.constexpr = None):  # fmt: skip
    """dk [B, HK, KV, DIM], dv [B, HK, KV, .], and what is added to `dq`, float32 in the order of `backward_rows.py`.

    query and grad are tensor descriptors of blocks of QUERIES rows, key, value, dk and dv of 64; lse and delta,
    [pairs, Q rounded up] float32, of QUERIES numbers. `section` and `lead` as in `_place`. `shares`: gradients
    of captured tensors, float32 [copies, ...], which are added to. Programs are as many as run at a time; they share
    tiles of 128 keys of so many `pairs` of batch and key head, from pair `first` on (`Memory`). `counter` is a zero, as
    is what it counts from (`Board`). QUERY_BOX, KEY_BOX: tensors are grids [., ., Y, X, .], of which a tile is
    a box; B, H, HK, Q and KV are those of strips.
    """
    BARE: gl.constexpr = MASK is None and BOUNDS is None and SCORE is None
    shape = Shape(D, DV, QUERIES, GRAD_STAGES, WHOLE, POSITIONAL, ASK, ORDERED, CLEARED, LATE, PARTS, WIDE,
                  FRESHES, KEPT, query.block_type.shape[3],
                  BARE and WHOLE and QUERIES == 128 and not ORDERED)  # fmt: skip
    f = Functions(FACTOR, GAIN, UNIFORM, KEY_TERMS, COLUMNS, SCORE, DERIVATIVE, PLAIN, PLAIN_FACTOR, SHIFT, SLOPE,
                  BOUNDS, MASK, FULL, Q_RANGES, FRESH, ADD_KEY_SUMS, ADD_PAIRS, ADD_TILE, QUERY_BOX,
                  KEY_BOX)  # fmt: skip
    problem = Problem(q_offset, parameters, (B, H, HK, Q, KV, DIM), extents, tensors, scale, section, lead)
    gl.static_assert(QUERY_STAGES > GRAD_STAGES, "a tile of Q is free a step after that of dO")
    queries = _ring(query, lse, QUERY_STAGES, 1)
    grads = _ring(grad, delta, GRAD_STAGES, 2 if shape.CLAIMS else 1)
    keys = gl.allocate_shared_memory(key.dtype, [2] + key.block_type.shape, key.layout)
    values = gl.allocate_shared_memory(value.dtype, [2] + value.block_type.shape, value.layout)
    exchange = gl.allocate_shared_memory(key.dtype, [4, KEYS, QUERIES], gl.NVMMASharedLayout(128, 16, rank=2))
    sums = gl.allocate_shared_memory(gl.float32, [2] + dq.block_type.shape, dq.layout)
    found = gl.allocate_shared_memory(gl.int32, [GRAD_STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    memory = Memory(query, key, value, grad, lse, delta, dq, dk, dv, turns, done, pairs, first, board(counter, 2),
                    queries, grads, keys, values, _barriers(2, 1), _barriers(GRAD_STAGES, 2), exchange, sums, found,
                    shares)  # fmt: skip
    fence_async_shared()
    # The tuples stand in place: assigned to a name, their constants would become tensors.
    gl.warp_specialize([
        (_consume, (shape, f, memory, problem, 0)),
        (_consume, (shape, f, memory, problem, 1)),
        (_produce, (shape, f, memory, problem)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
