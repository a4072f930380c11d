"""How the work of a call is spread: the tiles that each tile of queries or keys visits, and when the last one is done.

No kernel runs. Ranges in closed form and claims about tensors (`passes/summaries.py`) are evaluated for all tiles at
once, in torch; a model of the time that a tile takes (`Rate`) and the order in which the multiprocessors take tiles
give the time of the whole.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_dsl.backend.tile_kinds import Axis, tile_kinds
from attn_dsl.ir.evaluate import Environment, Scalar, evaluate
from attn_dsl.ir.nodes import FALSE, Node, Param, Size, Var, post_order
from attn_dsl.passes.fold import numbers
from attn_dsl.passes.monotone import Q_OFFSET
from attn_dsl.passes.schedule import BLOCK, TileRanges
from attn_dsl.passes.summaries import Claims


@dataclass(frozen=True)
class Visits:
    """Tiles of the other axis that each tile of one axis visits, with and without a mask: int64 [B, H, tiles] each."""

    masked: Tensor
    full: Tensor

    @property
    def total(self) -> Tensor:
        return self.masked + self.full

    def expanded(self, batch: int, heads: int) -> Visits:
        """For all batch entries and heads, where one stood for those that are alike."""
        shape = (batch, heads, self.masked.shape[2])
        return Visits(self.masked.expand(shape), self.full.expand(shape))


@dataclass(frozen=True)
class Rate:
    """Cycles that a program of a multiprocessor takes: for each tile that it owns, and for each that it visits."""

    own: float
    masked: float
    full: float

    def times(self, visits: Visits) -> Tensor:
        """float64 [B, H, tiles]. A tile that visits none takes the time of one that is masked."""
        least = (visits.total == 0).double()
        return self.own + self.masked * (visits.masked + least) + self.full * visits.full


def in_ranges(ranges: TileRanges, env: Environment, rows: Axis, columns: Axis, *, transposed: bool = False) -> Visits:
    """By ranges in closed form. `env` binds `b` and `h` as [B, 1, 1, 1] and [1, H, 1, 1], parameters, sizes, tensors.

    Visited are tiles of keys or, if `transposed`, of queries. A tile of its own axis counts as whole, as it does for
    kernels; where claims about single tiles are left, each is asked.
    """
    own, other = (columns, rows) if transposed else (rows, columns)
    first = own.first + torch.arange(own.tiles) * own.block
    low, high = ("k0", "k1") if transposed else ("q0", "q1")
    known = {low: first[:, None], high: first[:, None] + own.block - 1, "block": torch.tensor(other.block)}
    env = replace(env, variables={**env.variables, **known})
    shape = (env.indices["b"].shape[0], env.indices["h"].shape[1], own.tiles)
    tile = torch.arange(other.tiles)
    kinds = torch.zeros(2, *shape, dtype=torch.int64)
    for segment in ranges.segments:
        begin, end = (evaluate(x, env, _UNUSED).expand(*shape, 1) for x in (segment.begin, segment.end))
        begin, end = begin.clamp(min=0), end.clamp(max=other.tiles)
        if ranges.skip is FALSE and ranges.full is FALSE:
            kinds[0 if segment.masked else 1] += (end - begin).clamp(min=0)[..., 0]
            continue
        inside = (begin <= tile) & (tile < end) & ~_of_tiles(ranges.skip, env, other, transposed)
        full = inside & (_of_tiles(ranges.full, env, other, transposed) | (not segment.masked))
        kinds[0] += (inside & ~full).sum(-1)
        kinds[1] += full.sum(-1)
    return Visits(kinds[0], kinds[1])


_UNUSED = torch.tensor(False, device="cpu")


def _of_tiles(node: Node, env: Environment, other: Axis, transposed: bool) -> Tensor:
    low, high = ("q0", "q1") if transposed else ("k0", "k1")
    first, last = other.corners()
    return evaluate(node, replace(env, variables={**env.variables, low: first, high: last}), _UNUSED)


def in_lists(
    claims: Claims, mask: Node, env: Environment, rows: Axis, columns: Axis, *, transposed: bool = False
) -> Visits:
    """By claims about what tensors hold, as lists are made; arguments as those of `in_ranges`."""
    kinds = tile_kinds(claims, mask, env, rows, columns)
    axis = 2 if transposed else 3
    return Visits((kinds.visited & ~kinds.full).sum(axis), kinds.full.sum(axis))


FORWARD: dict[int, dict[tuple[int, int], Rate]] = {
    64: {(192, 128): Rate(5200, 2850, 2190)},
    128: {(128, 128): Rate(5200, 3000, 2317), (128, 64): Rate(5200, 1880, 1448)},
}
"""Of the Hopper forward kernel, by padded head dimension and tile, rows x keys, measured on an H200
(benchmarks/results/h200.md): full steps from noop, tiles from causal and a window, masked steps from documents and a
window, whose times at 1.755 GHz this gives within 4 percent. Where there is no power to save, clocks are higher."""
BACKWARD: dict[int, dict[tuple[int, int], Rate]] = {
    64: {(128, 128): Rate(6800, 4900, 4690), (64, 128): Rate(6800, 2720, 2605)},
    128: {(64, 128): Rate(6800, 4212, 3960)},
}
"""The same of the Hopper backward kernel, whose programs own keys and visit queries; tiles are queries x keys."""
NOMINAL = 4096
"""Positions for which tile shapes are compared, so that a choice depends on nothing but what the mask says."""
GAIN = 0.95
"""Of the time of the first tile shape: another one must take less."""


def better_tile(
    rates: Mapping[tuple[int, int], Rate],
    ranges: TileRanges,
    parameters: Mapping[str, Scalar],
    *,
    transposed: bool = False,
) -> tuple[int, int] | None:
    """The tile that takes least by the model, where that is less than `GAIN` of the first; else None.

    What a tile amidst `NOMINAL` positions visits stands for all. None, too, where ranges depend on what is not among
    `parameters`, on tensors or on heads, or do not say all.
    """
    if len(rates) < 2 or ranges.skip is not FALSE or ranges.full is not FALSE:
        return None
    low, high = ("k0", "k1") if transposed else ("q0", "q1")
    bounds = [x for segment in ranges.segments for x in (segment.begin, segment.end)]
    nodes = [node for node in post_order(*bounds) if isinstance(node, Param | Size)]
    lengths = {"B": 1, "H": 1, "HK": 1, "Q": NOMINAL, "KV": NOMINAL}
    given: Mapping[str, Scalar] = {**parameters, **lengths}

    def time(tile: tuple[int, int]) -> float:
        """Of a position that programs own; infinite where it is not known."""
        other, own = tile if transposed else tile[::-1]
        first = NOMINAL // 2 // own * own
        known: dict[Node, Scalar] = {node: given[node.name] for node in nodes if node.name in given}
        known |= {Var(low): first, Var(high): first + own - 1, BLOCK: other, Q_OFFSET: 0}
        found = numbers(bounds, known)
        rate, total = rates[tile], rates[tile].own
        for segment, begin, end in zip(ranges.segments, found[::2], found[1::2], strict=True):
            if begin is None or end is None:
                return math.inf
            tiles = min(end, NOMINAL // other) - max(begin, 0)
            total += max(tiles, 0) * (rate.masked if segment.masked else rate.full)
        return total / own

    times = {tile: time(tile) for tile in rates}
    first, best = next(iter(rates)), min(times, key=lambda tile: times[tile])
    return best if times[best] < GAIN * times[first] else None


def in_sections(tiles: int, pairs: int, section: int, lead: int = 0, *, last_first: bool = False) -> Iterator[int]:
    """Places in [pairs, tiles] in the order in which kernels take them (`hopper.forward.in_sections`)."""
    yield from (pair * tiles + tile for tile in range(lead) for pair in range(pairs))
    rest = range(tiles - 1, lead - 1, -1) if last_first else range(lead, tiles)
    for first in range(0, pairs, section):
        yield from (pair * tiles + tile for tile in rest for pair in range(first, min(first + section, pairs)))


def makespan(times: Iterable[float], machine: int) -> float:
    """When the last is done of tiles that so many multiprocessors take one by one, each as soon as it is free."""
    ends = [0.0] * machine
    for time in times:
        heapq.heapreplace(ends, ends[0] + time)
    return max(ends)


def longest_first(times: Sequence[float], machine: int) -> float:
    """The same, the longest first: within a third of the best order that there is (Graham 1969)."""
    return makespan(sorted(times, reverse=True), machine)
