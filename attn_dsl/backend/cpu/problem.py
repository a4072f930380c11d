"""A call as the tile loops take it: its numbers, its tile shape, and the runs of keys that each row of tiles visits.

The schedule's integer functions give the runs, in closed form. No memory grows with the length squared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from attn_dsl.backend.cpu.claims import EMPTY, PARTIAL, Claims
from attn_dsl.backend.cpu.functions import ScheduleFunctions, TileFunctions
from attn_dsl.backend.cpu.workers import operations_on, spread

T = TypeVar("T")

BLOCK = 64
"""Keys in a tile of the schedule. Runs are made of these, up to `TileShape.keys` long."""
KEYS = 640
"""Keys of a tile, where so many are seen."""
CACHE = 5 << 19
"""Bytes of logits in a tile: more leave the cache between operations, fewer pay for more operations."""
FEW_PIECES = 4
"""Keys in more pieces than these are gathered."""
ROWS = {512: 1.0, 256: 1.08, 128: 1.17}
"""Query rows of a tile, of all heads that share its keys, and what a pair costs then. Measured on two Zen cores."""
SCATTERED = {**ROWS, 64: 1.3}
"""The same, where tensors tell which keys are seen."""
STACK = 8
"""Tile rows below which they are not stacked."""
SAMPLES = 8
"""Places at which it is asked whether tile rows stand alike; at three of four they must."""
STACKED = 1.12
"""What rows of stacks cost for each pair, as in `ROWS`; a matrix of a stack has as many rows as a block has keys."""
TALL = (2048, 1024)
"""The same, where all rows see the same keys."""
CELLS = 3 << 17
"""Logits in such a tile."""
FEW_PAIRS = 200_000
"""Below so many pairs tiles are as tall as they may be."""
FEW_OPERATIONS = 50_000_000
"""Below so many floating-point operations threads cost more than they bring."""


@dataclass(frozen=True)
class TileShape:
    """Query rows, keys and key/value heads that are processed together.

    Or, of one head, up to `depth` consecutive tile rows that stand alike to their keys.
    """

    rows: int
    keys: int
    heads: int
    depth: int = 1

    @staticmethod
    def of(problem: Problem, rows: int, visited: int) -> TileShape:
        """The shape for so many rows of a head; `visited` keys are what a row of tiles sees.

        Fewer rows go with several heads, so long as every thread gets some tiles: a mask is made once for them.
        """
        group, threads = problem.group, problem.threads
        keys = min(KEYS, math.ceil(visited / BLOCK) * BLOCK)
        heads = CACHE // (rows * group * keys * problem.dtype.itemsize)
        tiles = problem.batch * problem.kv_heads * math.ceil(problem.q_len / rows)
        return TileShape(rows, keys, max(min(heads, tiles // (4 * threads)), 1))

    @staticmethod
    def tall(problem: Problem) -> TileShape | None:
        """The shape where all rows see the same keys, and so none waste any: one head, and as many rows as there are.

        A tall product is the fastest, if every thread gets some tiles.
        """
        group, matrices = problem.group, problem.batch * problem.kv_heads
        for rows in TALL:
            if rows <= problem.q_len * group and rows % group == 0:
                rows //= group
                if matrices * math.ceil(problem.q_len / rows) >= 4 * problem.threads:
                    return TileShape(rows, CELLS // (rows * group), 1)
        return None


Part = tuple[int, int, int, int]
"""The heads `[h0, h1)` of the batches `[b0, b1)`, as `(b0, b1, h0, h1)`: whole groups, or a part of one."""


class Run(NamedTuple):
    """The keys `[begin, end)`; unless `masked`, every row sees them all."""

    begin: int
    end: int
    masked: bool


Ranges = tuple[tuple[int, int], ...]
"""Ranges of keys `[begin, end)`, ascending."""


class Piece(NamedTuple):
    """The keys `[begin, end)`, taken together; every row sees them all but in the ranges `masked`."""

    begin: int
    end: int
    masked: Ranges

    def moved(self, keys: int) -> Piece:
        """The piece so many keys further on."""
        return Piece(self.begin + keys, self.end + keys, tuple((a + keys, b + keys) for a, b in self.masked))


Seen = tuple[Piece, ...] | Tensor
"""The keys that some heads see alike; or codes `[heads, blocks]` of what each sees of each block."""


@dataclass(frozen=True)
class Problem:
    """A checked call. `dtype` is that of the arithmetic: float32, or float64 for float64 inputs."""

    functions: TileFunctions
    schedule: ScheduleFunctions
    shape: TileShape
    threads: int
    """How many are worth their while."""
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    scale: float
    offsets: tuple[int, ...]
    """Position of the first query: one for all batches, or one for each."""
    scalars: tuple[Any, ...]
    names: tuple[str, ...]
    """Of the captured tensors."""
    tensors: tuple[Tensor, ...]

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def small(self) -> bool:
        """Whether more tiles would cost more than fewer pairs save."""
        return self.batch * self.heads * self.q_len * self.kv_len < FEW_PAIRS

    @property
    def keeps_masks(self) -> bool:
        """Whether the mask of a tile is the same for all tiles that stand alike to their keys."""
        mask = self.functions.mask
        return mask is not None and mask.alike and len(self.offsets) == 1

    @cached_property
    def descending(self) -> bool:
        """Whether tiles hold their last row first, as what works along antidiagonals wants it."""
        mask = self.functions.mask
        return self.functions.by_distance or (mask is not None and mask.by_distance and not self.keeps_masks)

    def shaped(self) -> Problem:
        """The problem with the tile shape that fits its schedule.

        A row of tiles computes the whole runs that its rows see: fewer rows waste less, and make more tiles of it.
        """
        if not any(run.masked for run in self._scheduled(0, 0, 0, self.q_len)):
            tall = TileShape.tall(self)
            if tall is not None:
                return self._with(tall)
        found: list[tuple[float, int, int]] = []
        heights = SCATTERED if self.gathers else ROWS
        for height, cost in list(heights.items())[: 1 if self.small else None]:
            rows = min(max(height // self.group, 1), self.q_len)
            if not found or rows < found[-1][1]:
                visited = self._visited(rows)
                found.append((visited * cost, rows, visited))
        cost, rows, visited = min(found, key=lambda item: item[0])
        stacked = self._stacked()
        if stacked is not None and stacked[0] < cost:
            return self._with(stacked[1])
        return self._with(TileShape.of(self, rows, max(visited, BLOCK)))

    def _stacked(self) -> tuple[float, TileShape] | None:
        """The shape of stacks and its cost, if tile rows from all over stand alike to their keys."""
        rows = max(BLOCK // self.group, 1)
        last = self.q_len // rows - 2
        if self.small or self.gathers or self.schedule.per_head or last < STACK or rows * self.group != BLOCK:
            return None
        visited, apart = 0, 0
        part, shape = (0, self.batch, 0, self.heads), TileShape(rows, KEYS, 1)
        for place in range(1, 2 * SAMPLES, 2):
            tile = last * place // (2 * SAMPLES)
            one, two = (list(self.rectangles(number, part, shape)) for number in (tile, tile + 1))
            apart += len(one) > 1 or len(two) > 1 or not alike(one[0][1], two[0][1], rows)
            visited += seen_keys(one[0][1])
        if apart > SAMPLES // 4:
            return None
        visited //= SAMPLES
        keys = min(max(visited, BLOCK), KEYS)
        depth = CACHE // (BLOCK * keys * self.dtype.itemsize)
        whole = math.ceil(self.q_len / (rows * depth)) * self.batch * self.kv_heads
        if depth < 2 or whole < 4 * self.threads:
            return None
        return visited * STACKED, TileShape(rows, KEYS, 1, depth)

    def _with(self, shape: TileShape) -> Problem:
        """The problem with a tile shape; what was computed of it holds for any."""
        result = replace(self, shape=shape)
        result.__dict__.update({**self.__dict__, "shape": shape})
        return result

    def _visited(self, rows: int) -> int:
        """How many keys a tile of so many rows sees, on average: over four places where the schedule says it."""
        if self.gathers and self.claims is not None:
            return int(self.claims.visited(rows) * BLOCK)
        last = (self.q_len - 1) // rows
        visited = 0
        for eighths in (1, 3, 5, 7):
            tile, part = last * eighths // 8, (0, self.batch, 0, self.heads)
            for (b0, b1, h0, h1), seen in self.rectangles(tile, part, TileShape(rows, KEYS, 1)):
                visited += (b1 - b0) * (h1 - h0) * seen_keys(seen)
        return visited // (4 * self.batch * self.heads)

    def spread(self, work: Callable[[Iterator[T]], None], items: Iterator[T], pieces: int) -> None:
        """Run `work` over so many independent items: on all threads or, where the items are too few, with torch's."""
        if pieces < self.threads:
            with operations_on(self.threads):
                work(items)
        else:
            spread(work, items, self.threads)

    @cached_property
    def lists(self) -> tuple[Any, ...]:
        """The captured tensors that the schedule reads, as nested lists."""
        return tuple(t.tolist() if i in self.schedule.slots else None for i, t in enumerate(self.tensors))

    @cached_property
    def masks(self) -> dict[tuple[int, int, int, int], Tensor]:
        """Limits of masks over `q - k` that have been evaluated, by what they depend on."""
        return {}

    @cached_property
    def limits(self) -> dict[tuple[Any, ...], Tensor]:
        """Limits of other masks, by run, rows and batches: those of the last tiles."""
        return {}

    @cached_property
    def rows(self) -> Tensor:
        """Positions of the queries: `[1 or B, 1, Q, 1]`."""
        return (torch.tensor(self.offsets).view(-1, 1) + torch.arange(self.q_len)).view(-1, 1, self.q_len, 1)

    @cached_property
    def keys(self) -> Tensor:
        """Positions of the keys, up to whole blocks (past the end the last one again): `[1, 1, 1, KV...]`."""
        return torch.arange(self.padded_keys).clamp_(max=self.kv_len - 1).view(1, 1, 1, -1)

    @property
    def padded_keys(self) -> int:
        return math.ceil(self.kv_len / BLOCK) * BLOCK

    @cached_property
    def claims(self) -> Claims | None:
        """What is proved of the tiles of this call; None without a mask."""
        mask = self.functions.mask
        if mask is None:
            return None
        b, h = torch.arange(self.batch).view(-1, 1, 1, 1), torch.arange(self.heads).view(1, -1, 1, 1)
        given = self.scalars, self.tensors
        rows = [_four(x, self.rows) for x in mask.row_sides(b, h, self.rows, *given)]
        keys = [_four(x, self.keys) for x in mask.key_sides(b, h, self.keys, *given)]
        numbers = dict(zip(self.functions.scalars, self.scalars, strict=True))
        return Claims(mask, rows, keys, numbers, dict(zip(self.names, self.tensors, strict=True)), BLOCK,
                      self.padded_keys // BLOCK)  # fmt: skip

    @cached_property
    def integers(self) -> torch.dtype | None:
        """In which integers masks are computed; None where they may leave 64 bits."""
        return torch.int64 if self.claims is None else self.claims.integers()

    @cached_property
    def sides(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The sides of the mask, for all rows and for all keys."""
        if self.claims is None:
            return (), ()
        return [self.narrow(x) for x in self.claims.rows], [self.narrow(x) for x in self.claims.keys]

    def narrow(self, x: Tensor) -> Tensor:
        """Integers in the dtype of `integers`."""
        return x.to(self.integers or torch.int64) if x.dtype is torch.int64 else x

    @property
    def gathers(self) -> bool:
        """Whether tiles may see keys by number instead of in runs."""
        return self.functions.mask is not None and self.functions.mask.reads_positions

    @cached_property
    def steps(self) -> Tensor:
        return torch.arange(self.q_len + self.kv_len)

    def parts(self) -> list[Part]:
        """All heads, in parts that share no key/value head, for every thread one if there are so many."""
        heads = min(max(self.shape.heads, self.shape.depth), math.ceil(self.batch * self.kv_heads / self.threads))
        shape = replace(self.shape, heads=heads)
        return list(replace(self, shape=shape).chunks(0, self.batch, 0, self.heads))

    def rectangles(self, tile: int, part: Part, shape: TileShape) -> Iterator[tuple[Part, Seen]]:
        """The part, cut into parts that see the same keys in a row of tiles; or with what each head sees."""
        start, stop = tile * shape.rows, min((tile + 1) * shape.rows, self.q_len)
        b0, b1, h0, h1 = part
        if self.gathers:
            assert self.claims is not None
            decided = self.claims.codes(tile, shape.rows)
            for b in range(b0, b1):
                codes = decided[min(b, decided.shape[0] - 1)]
                codes = codes[h0:h1] if codes.shape[0] > 1 else codes
                pieces = self._pieces_of(codes[0], shape.keys) if codes.shape[0] == 1 else ()
                if 0 < len(pieces) <= FEW_PIECES or not (pieces or codes.any()):
                    yield (b, b + 1, h0, h1), pieces
                else:
                    yield (b, b + 1, h0, h1), codes.expand(h1 - h0, -1)
            return
        if not self.schedule.per_head:
            per_batch = self.schedule.per_batch or len(self.offsets) > 1
            rows = [self._pieces(b, h0, start, stop, shape.keys) for b in (range(b0, b1) if per_batch else (b0,))]
            for low, high in _equal(rows) if per_batch else [(0, b1 - b0)]:
                yield (b0 + low, b0 + high, h0, h1), rows[low]
            return
        for b in range(b0, b1):
            heads = [self._pieces(b, h, start, stop, shape.keys) for h in range(h0, h1)]
            for first, last in _equal(heads):
                for low, high in _cut(h0 + first, h0 + last, self.group):
                    yield (b, b + 1, low, high), heads[low - h0]

    def chunks(self, b0: int, b1: int, h0: int, h1: int, limit: int | None = None) -> Iterator[Part]:
        """The rectangle in pieces of at most `limit` key/value heads; `shape.heads` unless given."""
        limit = self.shape.heads if limit is None else limit
        groups = max((h1 - h0) // self.group, 1)
        if groups > limit // 2 or b1 - b0 == 1:
            step = limit * self.group
            for b in range(b0, b1):
                yield from ((b, b + 1, h, min(h + step, h1)) for h in range(h0, h1, step))
        else:
            several = limit // groups
            yield from ((b, min(b + several, b1), h0, h1) for b in range(b0, b1, several))

    def _pieces_of(self, codes: Tensor, keys: int) -> tuple[Piece, ...]:
        """What `codes [blocks]` say, in pieces of at most so many keys."""
        found, begin = [], 0
        for code, blocks in itertools.groupby(codes.tolist()):
            end = begin + BLOCK * sum(1 for _ in blocks)
            if code != EMPTY:
                found.append(Run(begin, min(end, self.kv_len), code == PARTIAL))
            begin = end
        return cut(found, keys)

    def _pieces(self, b: int, h: int, start: int, stop: int, keys: int) -> tuple[Piece, ...]:
        """What the rows `[start, stop)` of a head visit, ascending, in pieces of at most so many keys."""
        return cut(self._scheduled(b, h, start, stop), keys)

    def _scheduled(self, b: int, h: int, start: int, stop: int) -> list[Run]:
        """The runs that the schedule leaves when it is asked block by block, ascending."""
        runs = self._ranges(b, h, start, stop)
        return joined(sorted(block for run in runs for block in self._decided(run, b, h, start, stop)))

    def _ranges(self, b: int, h: int, start: int, stop: int) -> Iterator[Run]:
        """The schedule's ranges, of whole blocks."""
        offset = self.offsets[b] if len(self.offsets) > 1 else self.offsets[0]
        place = b, h, offset + start, offset + stop - 1, offset, BLOCK, self.scalars, self.lists
        for begin, end, masked in self.schedule.kv_ranges(*place):
            if begin < end:
                yield Run(begin * BLOCK, min(end * BLOCK, self.kv_len), masked)

    def _decided(self, run: Run, b: int, h: int, start: int, stop: int) -> Iterator[Run]:
        """The run without the blocks that are proved empty, those proved full unmasked."""
        skip, full = self.schedule.kv_skip, self.schedule.kv_full
        if skip is None and (full is None or not run.masked):
            yield run
            return
        offset = self.offsets[b] if len(self.offsets) > 1 else self.offsets[0]
        for begin in range(run.begin, run.end, BLOCK):
            end = min(begin + BLOCK, run.end)
            place = (b, h, offset + start, offset + stop - 1, begin, end - 1, offset, self.scalars, self.lists)
            if skip is None or not skip(*place):
                yield Run(begin, end, run.masked and not (full is not None and full(*place)))


def alike(one: Seen, two: Seen, rows: int) -> bool:
    """Whether a tile row stands to its keys as the one `rows` queries before: the same keys, or so many further on."""
    if isinstance(one, Tensor) or isinstance(two, Tensor) or len(one) != len(two):
        return False
    return all(b in (a, a.moved(rows)) for a, b in zip(one, two, strict=True))


def seen_keys(seen: Seen) -> int:
    """How many keys a tile computes."""
    if isinstance(seen, Tensor):
        return int((seen > EMPTY).sum(-1).amax()) * BLOCK
    return sum(piece.end - piece.begin for piece in seen)


def _four(x: Any, like: Tensor) -> Tensor:
    """A side as a tensor of four axes; it may be a number."""
    side: Tensor = torch.as_tensor(x)
    return side if side.dim() == like.dim() else side.view(1, 1, 1, 1)


def cut(runs: Iterable[Run], keys: int) -> tuple[Piece, ...]:
    """The runs in pieces of at most so many keys, near ones joined."""
    result: list[Piece] = []
    for begin, end, masked in (part for run in runs for part in parts(run, keys)):
        ranges: Ranges = ((begin, end),) if masked else ()
        if result and result[-1].end == begin and end - result[-1].begin <= keys:
            first, _, before = result.pop()
            begin, ranges = first, _linked(before, ranges)
        result.append(Piece(begin, end, ranges))
    return tuple(result)


def joined(runs: Iterable[Run]) -> list[Run]:
    """Adjacent runs of one kind made one."""
    result: list[Run] = []
    for run in runs:
        if result and result[-1].end == run.begin and result[-1].masked == run.masked:
            result[-1] = Run(result[-1].begin, run.end, run.masked)
        else:
            result.append(run)
    return result


def parts(run: Run, keys: int) -> Iterator[Run]:
    """The run in parts of at most `keys`, about equal, that begin at blocks."""
    count = -(-(run.end - run.begin) // keys)
    step = math.ceil((run.end - run.begin) / (count * BLOCK)) * BLOCK
    for begin in range(run.begin, run.end, step):
        yield Run(begin, min(begin + step, run.end), run.masked)


def _linked(before: Ranges, after: Ranges) -> Ranges:
    """Ranges and those that follow, adjacent ones made one."""
    if before and after and before[-1][1] == after[0][0]:
        return (*before[:-1], (before[-1][0], after[0][1]), *after[1:])
    return before + after


def _equal(rows: Sequence[tuple[Piece, ...]]) -> Iterator[tuple[int, int]]:
    """The half-open ranges of equal neighbours."""
    begin = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[begin]:
            yield begin, i
            begin = i


def _cut(h0: int, h1: int, group: int) -> Iterator[tuple[int, int]]:
    """`[h0, h1)` cut into whole groups of heads, in one piece, and parts of groups at its ends."""
    low, high = min(-(-h0 // group) * group, h1), max(h1 // group * group, h0)
    if high <= low and h0 // group == (h1 - 1) // group:
        yield h0, h1
        return
    yield from ((a, b) for a, b in ((h0, low), (low, high), (high, h1)) if a < b)
