"""Forward: a running softmax over the runs of each tile row (Dao et al., FlashAttention-2, 2023, algorithm 1).

Base-2 exponentials throughout, since torch's `exp2` is several times as fast as its `exp`:

    w = 2^(log2(e) (s - m)),   one multiply-add and one exp2 a tile, m the row maximum of the first keys seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from attn_dsl.backend.cpu.problem import Problem
from attn_dsl.backend.cpu.scratch import scratch
from attn_dsl.backend.cpu.tiles import Tile, Visit, tiles

LARGE = 1e30
"""A sum of weights that is larger calls for the careful way."""
TINY = 1e-38
"""A row sum is zero or at least one."""
LOG2E = math.log2(math.e)
LOWEST = -1e38
"""In place of the maximum of a row that has seen nothing, since minus infinity less itself is no number."""


def attend(problem: Problem, query: Tensor, key: Tensor, value: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """`(out [B, H, Q, DV], lse [B, H, Q])`, out in the dtype of `query`, lse in that of the arithmetic.

    query [B, H, Q, D]; key [B * HK, KV, D] and value [B * HK, KV, DV] in the dtype of the arithmetic; sink [B, H].
    """
    shape = (problem.batch, problem.heads, problem.q_len)
    out = torch.empty((*shape, value.shape[-1]), dtype=query.dtype)
    lse = torch.empty(shape, dtype=problem.dtype)
    before, after = logit_factors(problem)

    def work(items: Iterator[Tile]) -> None:
        for tile in items:
            rows = tile.gather("query", query, problem.scale * before)
            k, v = key[tile.kv], value[tile.kv]
            state = _attend(tile, rows, k, v, after, careful=False)
            if not (state[1].amax().item() < LARGE and math.isfinite(state[2].sum().item())):
                state = _attend(tile, rows, k, v, after, careful=True)
            _finish(tile, state, sink, out, lse)

    whole = problem.chunks(0, problem.batch, 0, problem.heads)
    count = math.ceil(problem.q_len / problem.shape.rows) * sum(1 for _ in whole)
    problem.spread(work, tiles(problem, stacks=True), count)
    return out, lse


State = tuple[Tensor, Tensor, Tensor]
"""Row maximum and row sum `[matrices, rows, 1]`, weighted values `[matrices, rows, DV]`."""


def logit_factors(problem: Problem) -> tuple[float, float]:
    """Factors that the score applies to the logit before and behind its core; a last one must be positive."""
    return float(problem.functions.before(problem.scalars)), float(problem.functions.after(problem.scalars))


def _attend(tile: Tile, rows: Tensor, key: Tensor, value: Tensor, after: float, *, careful: bool) -> State:
    """The softmax state over all visits.

    Once every row has seen a key, its maximum so far is kept for good: any shift does that does not overflow, and the
    caller sees a sum that is too large. `careful` follows the maximum to the end, and what no row of a tile sees does
    not even meet a weight of zero.
    """
    matrices, height = rows.shape[:2]
    factor = after if after > 0 else 1.0
    state: State | None = None
    shift, settled = rows, False
    for visit in tile.visits():
        if state is not None and not settled and not careful:
            settled = state[0].amin().item() > -math.inf
        k, v = visit.of("key", key, tile.stack), visit.of("value", value, tile.stack)
        if careful and (keep := visit.keep()) is not None:
            k, v = seen_keys(tile, keep, k), seen_keys(tile, keep, v)
        s = torch.bmm(rows, k.transpose(1, 2), out=scratch("logits", (matrices, height, k.shape[1]), rows.dtype))
        s = _scored(tile, visit, s, 1.0 if after > 0 else after)
        s = masked(tile, visit, s, careful=careful)
        if not settled:
            highest = s.amax(2, keepdim=True)
            if state is not None:
                highest = torch.maximum(state[0], highest, out=highest)
            shift = highest.mul(-LOG2E * factor).clamp_(max=-LOWEST)
        torch.add(shift, s, alpha=LOG2E * factor, out=s).exp2_()
        if state is None:
            weighted = scratch("weighted", (matrices, height, v.shape[2]), rows.dtype)
            state = highest, s.sum(2, keepdim=True), torch.bmm(s, v, out=weighted)
        else:
            peak, total, weighted = state
            if not settled:
                shrink = torch.add(shift, peak, alpha=LOG2E * factor).exp2_()
                total.mul_(shrink)
                weighted.mul_(shrink)
                state = highest, total, weighted
            total.add_(s.sum(2, keepdim=True))
            weighted.baddbmm_(s, v)
    if state is None:
        nothing = rows.new_zeros((matrices, height, 1))
        return nothing - math.inf, nothing, rows.new_zeros((matrices, height, value.shape[2]))
    return state[0].mul_(factor), state[1], state[2]


def _scored(tile: Tile, visit: Visit, s: Tensor, after: float) -> Tensor:
    """The score's core, for all pairs of the tile; `s` is overwritten or not."""
    functions = tile.problem.functions
    if functions.score is not None:
        relative = tile.relative(functions.score_relative, visit) if functions.by_distance else ()
        places = tile.arguments(visit) if functions.score_places else (None,) * 4 + tile.captured
        scored = functions.score(tile.places(s), *places, relative)
        s = filled(scored, tile.places(s)).reshape(s.shape)
    return s.mul_(after) if after != 1.0 else s


def filled(value: Tensor | float, like: Tensor) -> Tensor:
    """A value that may lack axes, or be a number, in the shape of `like`; it never is part of a captured tensor."""
    if not isinstance(value, Tensor):
        return torch.full_like(like, value)
    if value.shape == like.shape and value.is_contiguous():
        return value
    return torch.empty_like(like, memory_format=torch.contiguous_format).copy_(value)


def masked(tile: Tile, visit: Visit, s: Tensor, *, careful: bool) -> Tensor:
    """Logits with minus infinity under the mask. The fast way leaves a nan a nan, whence the careful one."""
    for begin, end, bound in visit.limits:
        places = tile.places(s)[..., begin:end]
        if careful:
            places.masked_fill_(bound < 0, -math.inf)
        else:
            torch.minimum(places, bound, out=places)
    return s


def seen_keys(tile: Tile, keep: Tensor, rows: Tensor) -> Tensor:
    """Rows of keys or values `[matrices, keys, D]`, zero where the tile sees none of them."""
    seen = keep.any(2).expand(*tile.lead, -1)
    seen = seen.reshape(tile.matrices, tile.shared, -1).any(1)
    return rows.masked_fill(~seen.unsqueeze(-1), 0.0)


def _finish(tile: Tile, state: State, sink: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """Let the sink join the denominator, then write the rows; a row that saw nothing gives 0 and minus infinity."""
    peak, total, weighted = state
    if sink is not None:
        logits = sink[tile.b0 : tile.b1, tile.h0 : tile.h1].expand(*tile.lead).reshape(tile.matrices, tile.shared, 1)
        logits = logits.expand(-1, -1, tile.rows).reshape(peak.shape)
        highest = torch.maximum(peak, logits)
        shift = highest.clamp(min=LOWEST)
        shrink = torch.exp(peak - shift)
        total, weighted = total * shrink + torch.exp(logits - shift), weighted.mul_(shrink)
        peak = highest
    tile.scatter(lse, torch.add(peak, total.log()))
    tile.scatter(out, weighted.div_(total.clamp_(min=TINY)))
