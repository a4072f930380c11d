"""Which keys a row of tiles sees: runs of one kind, as schedules name them, and pieces, as tiles take them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from attn_dsl.backend.cpu.claims import EMPTY

BLOCK = 64
"""Keys in a tile of the schedule. Runs are made of these, pieces are up to `TileShape.keys` long."""


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


def steps(one: Seen, two: Seen, rows: int) -> tuple[int, ...] | None:
    """By how much each piece moves to the tile row that begins `rows` queries later: not at all, or by as much.

    None where the later one does not stand so to its keys.
    """
    if isinstance(one, Tensor) or isinstance(two, Tensor) or len(one) != len(two):
        return None
    if not all(b in (a, a.moved(rows)) for a, b in zip(one, two, strict=True)):
        return None
    return tuple(b.begin - a.begin for a, b in zip(one, two, strict=True))


def seen_keys(seen: Seen) -> int:
    """How many keys a tile computes."""
    if isinstance(seen, Tensor):
        return int((seen > EMPTY).sum(-1).amax()) * BLOCK
    return sum(piece.end - piece.begin for piece in seen)


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
