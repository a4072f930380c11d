"""What the producer and the consumers of a Hopper kernel hand each other: rings of tiles, and a board of turns."""

# ruff: noqa: RET505, RUF005 (static conditions and tuples as Triton knows them)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.core import _aggregate as aggregate

from attn_dsl.backend.hopper.device import meet
from attn_dsl.backend.hopper.versions import async_load, copy_rows, reinterpret

SWIZZLED = gl.constexpr(64)
"""Columns of 16 bits that a tile in shared memory keeps side by side."""

TOGETHER = gl.constexpr(4)
"""Pages whose numbers are found side by side."""
LINES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
"""Of rows that a warpgroup copies, 16 bytes a thread."""


@gluon.jit
def corner(first):
    """Coordinates of a block of whole rows that begins at (batch, head, row) or, in a grid, (batch, head, y, x)."""
    if len(first) == 3:
        return [first[0], first[1], first[2], 0]
    else:
        return [first[0], first[1], first[2], first[3], 0]


@gluon.jit
def flat(tile):
    """[rows, columns] of a block of rows or a box of a grid."""
    if len(tile.shape) == 4:
        return tile.reshape([tile.shape[2], tile.shape[3]])
    else:
        return tile.reshape([tile.shape[2] * tile.shape[3], tile.shape[4]])


@gluon.jit
def boxes(tiles, ROWS: gl.constexpr):
    """Tiles [n, 1, 1, ., .] as boxes [m, 1, 1, ROWS, SWIZZLED]: in a tile, so many columns of all its rows stand
    together."""
    count: gl.constexpr = tiles.shape[0] * tiles.shape[3] * tiles.shape[4] // (ROWS * SWIZZLED)
    return reinterpret(tiles, tiles.dtype, [count, 1, 1, ROWS, SWIZZLED], tiles.layout)


@aggregate
class Ring:
    """Tiles in shared memory with two barriers each: `full` is the producer's word, `free` that of the consumers.

    COPIED: by the threads of a producer that is a warpgroup (`collect`), not by the copy engine.
    """

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    COPIED: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, tiles, full, free, COPIED):
        self.tiles = tiles
        self.full = full
        self.free = free
        self.COPIED = gl.constexpr(COPIED)

    @gluon.jit
    def tile(self, place):
        """[rows, columns] of a place."""
        return flat(self.tiles.index(place))

    @gluon.jit
    def wait(self, place, round):
        """Until the place is filled for the `round`-th time, from 0."""
        mbarrier.wait(self.full.index(place), round & 1)
        if self.COPIED:
            fence_async_shared()  # products read what threads wrote

    @gluon.jit
    def release(self, place):
        mbarrier.arrive(self.free.index(place), count=1)

    @gluon.jit
    def load(self, place, round, descriptor, first):
        """Fill the place for the `round`-th time, with what begins at `first`, once its consumers have freed it."""
        mbarrier.wait(self.free.index(place), (round & 1) ^ 1)
        mbarrier.expect(self.full.index(place), descriptor.block_type.nbytes)
        async_load(descriptor, corner(first), self.full.index(place), self.tiles.index(place))

    @gluon.jit
    def gather(self, place, round, descriptor, pages, head):
        """As `load`, from the rows of pages, whose numbers the first lanes of the warp have, one each."""
        rows: gl.constexpr = descriptor.block_type.shape[2]
        count: gl.constexpr = self.tiles.shape[3] // rows
        chunks: gl.constexpr = self.tiles.shape[4] // SWIZZLED
        lane = gl.arange(0, 32, layout=pages.type.layout)
        parts = boxes(self.tiles, rows)
        mbarrier.wait(self.free.index(place), (round & 1) ^ 1)
        mbarrier.expect(self.full.index(place), count * chunks * descriptor.block_type.nbytes)
        some: gl.constexpr = min(count, TOGETHER)
        for top in range(0, self.tiles.shape[3], some * descriptor.shape[2]):  # the step is an argument: no unrolling
            i = top // rows
            numbers = ()
            for n in gl.static_range(some):
                numbers = numbers + (gl.sum(gl.where(lane == i + n, pages, 0), 0),)
            for n in gl.static_range(some):
                for chunk in gl.static_range(chunks):
                    box = parts.index((place * chunks + chunk) * count + i + n)
                    async_load(descriptor, [numbers[n], head, 0, chunk * SWIZZLED], self.full.index(place), box)

    @gluon.jit
    def collect(self, place, round, lines, inside, WIDTH: gl.constexpr):
        """As `load`, from rows of WIDTH columns that begin at `lines` [rows], of which those not `inside` are 0."""
        columns: gl.constexpr = self.tiles.shape[4]
        column = gl.expand_dims(gl.arange(0, columns, layout=gl.SliceLayout(0, LINES)), 0)
        keep = gl.expand_dims(inside, 1)
        if columns > WIDTH:
            keep = keep & (column < WIDTH)
        mbarrier.wait(self.free.index(place), (round & 1) ^ 1)
        source = gl.multiple_of(gl.expand_dims(lines, 1) + column, [1, 16])  # bytes, as for the copy engine
        copy_rows(self.tile(place), source, mask=keep)
        async_copy.mbarrier_arrive(self.full.index(place), increment_count=False)

    @gluon.jit
    def clip(self, place, left, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
        """Let the rows of a tile from `left` on be 0, for products of all consumers: each does its part of them."""
        rows: gl.constexpr = 16
        count: gl.constexpr = self.tiles.shape[3] // rows
        chunks: gl.constexpr = self.tiles.shape[4] // SWIZZLED
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        line = gl.expand_dims(gl.arange(0, rows, layout=gl.SliceLayout(1, layout)), 1)
        parts = boxes(self.tiles, rows)
        for i in range(gl.maximum(left, 0) // rows + CONSUMER, count, CONSUMERS):
            for chunk in gl.static_range(chunks):
                box = parts.index((place * chunks + chunk) * count + i).reshape([rows, SWIZZLED])
                box.store(gl.where(line < left - i * rows, box.load(layout), 0.0))
        fence_async_shared()
        meet(CONSUMERS)


@gluon.jit
def ring(descriptor, PLACES: gl.constexpr, CONSUMERS: gl.constexpr, ROWS: gl.constexpr = 0, COLUMNS: gl.constexpr = 0,
         COPIED: gl.constexpr = False):  # fmt: skip
    """A ring of tiles that are blocks of a descriptor or, where ROWS are given, put together from them."""
    if ROWS == 0:
        shape: gl.constexpr = [PLACES] + descriptor.block_type.shape
    else:
        shape: gl.constexpr = [PLACES, 1, 1, ROWS, COLUMNS]
    tiles = gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)
    full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(PLACES):
        mbarrier.init(full.index(i), count=128 if COPIED else 1)
        mbarrier.init(free.index(i), count=CONSUMERS)
    return Ring(tiles, full, free, COPIED)


@aggregate
class Board:
    """Where the producer writes which query tile comes next, a turn ahead: tile, batch and head, or a tile of -1.

    Consumers may fail: a turn then comes again, for those whose bits are set in `again` (0: it is new to all).

    `counter`, in global memory, counts the tiles that were handed out beside the first one of each program. It is zero
    before the kernel and after it: as many tiles are asked for as there are, and who asks last resets it. WARPS: of the
    producer.
    """

    counter: gl.tensor
    words: gl.shared_memory_descriptor
    failures: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    CONSUMERS: gl.constexpr
    WARPS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, counter, words, failures, full, free, CONSUMERS, WARPS):
        self.counter = counter
        self.words = words
        self.failures = failures
        self.full = full
        self.free = free
        self.CONSUMERS = gl.constexpr(CONSUMERS)
        self.WARPS = gl.constexpr(WARPS)

    @gluon.jit
    def following(self, tiles):
        """The number of another query tile, not less than `tiles` where there is none."""
        taken = gl.atomic_add(self.counter, 1, sem="relaxed")
        if taken == tiles - 1:
            gl.store(self.counter, 0)
        return taken + gl.num_programs(0)

    @gluon.jit
    def write(self, turn, tile, b, h, again):
        place = turn % 2
        mbarrier.wait(self.free.index(place), ((turn // 2) & 1) ^ 1)
        self.words.index(place * 4).store(_word_of(tile, self.WARPS))
        self.words.index(place * 4 + 1).store(_word_of(b, self.WARPS))
        self.words.index(place * 4 + 2).store(_word_of(h, self.WARPS))
        self.words.index(place * 4 + 3).store(_word_of(again, self.WARPS))
        mbarrier.arrive(self.full.index(place), count=1)

    @gluon.jit
    def failed(self, turn, awaited):
        """(bits of the consumers that failed, tile, batch, head): of the turn before the last or, if none did there and
        its word is awaited, of the last. What failed is forgotten.
        """
        bits = self._failed(turn)
        if awaited & (bits == 0):
            turn += 1  # it has the place of the last one
            bits = self._failed(turn)
        tile, b, h = [_read_by(self.words, turn % 2 * 4 + i, self.WARPS) for i in (0, 1, 2)]
        return bits, tile, b, h

    @gluon.jit
    def _failed(self, turn):
        place = turn % 2
        mbarrier.wait(self.free.index(place), ((turn // 2) & 1) ^ 1)
        bits = 0
        for i in gl.static_range(self.CONSUMERS):
            bits |= _read_by(self.failures, place * self.CONSUMERS + i, self.WARPS) << i
            self.failures.index(place * self.CONSUMERS + i).store(_word_of(0, self.WARPS))
        return bits

    @gluon.jit
    def fail(self, turn, CONSUMER: gl.constexpr, failed):
        """A consumer's word on a turn, 1 or 0, before it releases it."""
        warpgroup: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        self.failures.index(turn % 2 * self.CONSUMERS + CONSUMER).store(gl.full([1], failed, gl.int32, warpgroup))

    @gluon.jit
    def wait(self, turn):
        mbarrier.wait(self.full.index(turn % 2), (turn // 2) & 1)

    @gluon.jit
    def read(self, turn):
        """(tile, batch, head) of a turn that was waited for and not yet released."""
        return self._word(turn, 0), self._word(turn, 1), self._word(turn, 2)

    @gluon.jit
    def _word(self, turn, n: gl.constexpr):
        warpgroup: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        return gl.max(self.words.index(turn % 2 * 4 + n).load(warpgroup), 0)

    @gluon.jit
    def again(self, turn):
        """Bits of the consumers for which the turn is repeated, 0 if it is new."""
        return self._word(turn, 3)

    @gluon.jit
    def release(self, turn):
        mbarrier.arrive(self.free.index(turn % 2), count=1)


@gluon.jit
def _word_of(x, WARPS: gl.constexpr):
    return gl.full([1], x, gl.int32, gl.BlockedLayout([1], [32], [WARPS], [0]))


@gluon.jit
def _read_by(words, i, WARPS: gl.constexpr):
    return gl.max(words.index(i).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


@gluon.jit
def board(counter, CONSUMERS: gl.constexpr, WARPS: gl.constexpr = 1):
    words = gl.allocate_shared_memory(gl.int32, [8, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    failures = gl.allocate_shared_memory(gl.int32, [2 * CONSUMERS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in gl.static_range(2 * CONSUMERS):
        failures.index(i).store(gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [4], [0])))
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=CONSUMERS)
    return Board(counter, words, failures, full, free, CONSUMERS, WARPS)
