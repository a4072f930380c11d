"""The shape of tiles: how many query rows, keys and heads are processed together. What pairs cost was measured on two
Zen cores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attn_dsl.backend.cpu.pieces import BLOCK, seen_keys, steps

if TYPE_CHECKING:
    from attn_dsl.backend.cpu.problem import Problem

KEYS = 640
"""Keys of a tile, where so many are seen."""
CACHE = 5 << 19
"""Bytes of logits in a tile: more leave the cache between operations, fewer pay for more operations."""
ROWS = {512: 1.0, 256: 1.08, 128: 1.17}
"""Query rows of a tile, of all heads that share its keys, and what a pair costs then."""
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


@dataclass(frozen=True)
class TileShape:
    """Query rows, keys and key/value heads that are processed together.

    Or, of one head, up to `depth` consecutive tile rows that stand alike to their keys.
    """

    rows: int
    keys: int
    heads: int
    depth: int = 1


def chosen(problem: Problem) -> TileShape:
    """The tile shape that fits the schedule of the problem.

    A row of tiles computes the whole runs that its rows see: fewer rows waste less, and make more tiles of it.
    """
    if not any(run.masked for run in problem.scheduled(0, 0, 0, problem.q_len)):
        tall = _tall(problem)
        if tall is not None:
            return tall
    found: list[tuple[float, int, int]] = []
    heights = SCATTERED if problem.gathers else ROWS
    for height, cost in list(heights.items())[: 1 if _small(problem) else None]:
        rows = min(max(height // problem.group, 1), problem.q_len)
        if not found or rows < found[-1][1]:
            visited = _visited(problem, rows)
            found.append((visited * cost, rows, visited))
    cost, rows, visited = min(found, key=lambda item: item[0])
    stacked = _stacked(problem)
    if stacked is not None and stacked[0] < cost:
        return stacked[1]
    return _wide(problem, rows, max(visited, BLOCK))


def _stacked(problem: Problem) -> tuple[float, TileShape] | None:
    """The shape of stacks and its cost, if tile rows from all over stand alike to their keys."""
    rows = max(BLOCK // problem.group, 1)
    last = problem.q_len // rows - 2
    if _small(problem) or problem.gathers or problem.schedule.per_head or last < STACK or rows * problem.group != BLOCK:
        return None
    visited, apart = 0, 0
    part, shape = (0, problem.batch, 0, problem.heads), TileShape(rows, KEYS, 1)
    for place in range(1, 2 * SAMPLES, 2):
        tile = last * place // (2 * SAMPLES)
        one, two = (list(problem.rectangles(number, part, shape)) for number in (tile, tile + 1))
        apart += len(one) > 1 or len(two) > 1 or steps(one[0][1], two[0][1], rows) is None
        visited += seen_keys(one[0][1])
    if apart > SAMPLES // 4:
        return None
    visited //= SAMPLES
    keys = min(max(visited, BLOCK), KEYS)
    depth = CACHE // (BLOCK * keys * problem.dtype.itemsize)
    whole = math.ceil(problem.q_len / (rows * depth)) * problem.batch * problem.kv_heads
    if depth < 2 or whole < 4 * problem.threads:
        return None
    return visited * STACKED, TileShape(rows, KEYS, 1, depth)


def _visited(problem: Problem, rows: int) -> int:
    """How many keys a tile of so many rows sees, on average: over four places where the schedule says it."""
    if problem.gathers and problem.claims is not None:
        return int(problem.claims.visited(rows) * BLOCK)
    last = (problem.q_len - 1) // rows
    visited = 0
    for eighths in (1, 3, 5, 7):
        tile, part = last * eighths // 8, (0, problem.batch, 0, problem.heads)
        for (b0, b1, h0, h1), seen in problem.rectangles(tile, part, TileShape(rows, KEYS, 1)):
            visited += (b1 - b0) * (h1 - h0) * seen_keys(seen)
    return visited // (4 * problem.batch * problem.heads)


def _wide(problem: Problem, rows: int, visited: int) -> TileShape:
    """The shape for so many rows of a head; `visited` keys are what a row of tiles sees.

    Fewer rows go with several heads, so long as every thread gets some tiles: a mask is made once for them.
    """
    group, threads = problem.group, problem.threads
    keys = min(KEYS, math.ceil(visited / BLOCK) * BLOCK)
    heads = CACHE // (rows * group * keys * problem.dtype.itemsize)
    tiles = problem.batch * problem.kv_heads * math.ceil(problem.q_len / rows)
    return TileShape(rows, keys, max(min(heads, tiles // (4 * threads)), 1))


def _tall(problem: Problem) -> TileShape | None:
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


def _small(problem: Problem) -> bool:
    """Whether more tiles would cost more than fewer pairs save."""
    return problem.batch * problem.heads * problem.q_len * problem.kv_len < FEW_PAIRS
