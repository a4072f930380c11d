"""Backward, with the logits computed again tile by tile (FlashAttention-2, algorithm 2).

With p the probabilities, dP = dO V^T and delta = rowsum(dO * O) - dLSE:

    dS = p (dP - delta),   dV = p^T dO,   dQ = scale dX K,   dK = scale dX^T Q,   dX = dS d score / d s

and dS times the score's other partial derivatives goes to the captured tensors and parameters. One pass over the tiles
yields everything; sums go in the order of the tiles, so that results are
the same in every run with as many threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attn_dsl.backend.cpu.elementary import clip
from attn_dsl.backend.cpu.forward import LOG2E, LOWEST, filled, masked, seen_keys
from attn_dsl.backend.cpu.functions import Derivative
from attn_dsl.backend.cpu.problem import Problem
from attn_dsl.backend.cpu.relative import sum_antidiagonals
from attn_dsl.backend.cpu.scratch import scratch
from attn_dsl.backend.cpu.tiles import Tile, Visit, tiles


@dataclass
class Gradients:
    """What `differentiate` adds to, in the dtype of the arithmetic; of tensors and parameters those wanted."""

    query: Tensor
    key: Tensor
    value: Tensor
    tensors: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)

    def apart(self) -> Gradients:
        """The same query, key and value, of which threads write different heads; tensors and parameters of its own."""
        tensors = {name: torch.zeros_like(tensor) for name, tensor in self.tensors.items()}
        parameters = {name: torch.zeros_like(tensor) for name, tensor in self.parameters.items()}
        return Gradients(self.query, self.key, self.value, tensors, parameters)

    def add(self, share: Gradients) -> None:
        for name, tensor in share.tensors.items():
            self.tensors[name] += tensor
        for name, tensor in share.parameters.items():
            self.parameters[name] += tensor


@dataclass(frozen=True)
class Saved:
    """What the forward left: key and value as in `attend`, `out [B, H, Q, DV]`, `lse [B, H, Q]`, `sink [B, H]`."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    sink: Tensor | None


def differentiate(problem: Problem, saved: Saved, d_out: Tensor, d_lse: Tensor | None, gradients: Gradients) -> None:
    """Add to `gradients`: query [B, H, Q, D], key [B * HK, KV, D], value [B * HK, KV, DV], zero at first."""
    out, lse = saved.out.to(problem.dtype), saved.lse
    delta = (d_out.to(problem.dtype) * out).sum(-1)
    delta.masked_fill_(lse == -math.inf, 0.0)
    if d_lse is not None:
        delta -= d_lse
    careful = not all(bool(x.isfinite().all()) for x in (saved.query, saved.key, saved.value))
    parts = problem.parts()
    shares = [gradients.apart() for _ in range(min(problem.threads, len(parts)))]

    def work(numbers: Iterator[int]) -> None:
        for number in numbers:
            for part in parts[number :: len(shares)]:
                for tile in tiles(problem, part):
                    _tile_backward(tile, saved, d_out, delta, shares[number], careful=careful)

    problem.spread(work, iter(range(len(shares))), len(shares))
    for share in shares:
        gradients.add(share)
    if saved.sink is not None and problem.functions.sink_grad is not None:
        weight = torch.exp(saved.sink.unsqueeze(-1) - lse).masked_fill_(lse == -math.inf, 0.0)
        _sink_backward(problem, problem.functions.sink_grad, -(weight * delta).sum(-1), gradients)


def _tile_backward(
    tile: Tile, saved: Saved, d_out: Tensor, delta: Tensor, gradients: Gradients, *, careful: bool
) -> None:
    scale = tile.problem.scale
    rows, d_rows = tile.gather("query", saved.query, scale), tile.gather("d_out", d_out)
    # 2^(log2(e) (s - lse)) is the probability; where nothing was seen every logit is minus infinity.
    shift = tile.gather("lse", saved.lse.unsqueeze(-1))
    shift = shift.clamp_(min=LOWEST).mul_(-LOG2E)
    delta_rows = tile.gather("delta", delta.unsqueeze(-1))
    d_query, scores = torch.zeros_like(rows), tile.problem.functions.scored
    for visit in tile.visits():
        k, v, q = visit.of("key", saved.key[tile.kv], 1), visit.of("value", saved.value[tile.kv], 1), rows
        if careful and (keep := visit.keep()) is not None:
            k, v, q = seen_keys(tile, keep, k), seen_keys(tile, keep, v), _seen_rows(tile, keep, q)
        shape = (*rows.shape[:2], k.shape[1])
        s = torch.bmm(q, k.transpose(1, 2), out=scratch("logits", shape, rows.dtype))
        s, slope, partials = _scored(tile, visit, s)
        s = masked(tile, visit, s, careful=careful or (scores and math.isnan(s.sum().item())))
        p = torch.add(shift, s, alpha=LOG2E, out=s).exp2_()
        visit.add(gradients.value[tile.kv], p.transpose(1, 2), d_rows)
        ds = torch.bmm(d_rows, v.transpose(1, 2), out=scratch("d_logits", shape, rows.dtype))
        ds.sub_(delta_rows).mul_(p)
        _collect(tile, visit, tile.places(ds), partials, gradients)
        if slope is not None:
            ds = unmasked(visit, tile.places(ds).mul_(slope)).reshape(shape)
        elif careful:
            ds = unmasked(visit, tile.places(ds)).reshape(shape)
        d_query.baddbmm_(ds, k)
        visit.add(gradients.key[tile.kv], ds.transpose(1, 2), q)
    tile.scatter(gradients.query, d_query.mul_(scale))


def _scored(tile: Tile, visit: Visit, s: Tensor) -> tuple[Tensor, Tensor | float | None, Sequence[Tensor | float]]:
    """The score, its derivative by the incoming logit (None where that is 1), and its other partials."""
    functions = tile.problem.functions
    if not functions.scored:
        return s, None, ()
    relative = tile.relative(functions.grad_relative, visit) if functions.by_distance else ()
    score, slope, *partials = functions.score_grad.function(tile.places(s), *tile.arguments(visit), relative)
    logits = filled(score, tile.places(s))
    if any(logits is x for x in (slope, *partials)):
        logits = logits.clone()  # exp is its own derivative, and logits are overwritten
    return logits.reshape(s.shape), None if functions.score_grad.linear else slope, partials


def unmasked(visit: Visit, x: Tensor) -> Tensor:
    """`x` with zero under the mask. Weights are zero there already, so only inf and nan need it: look, then act."""
    if visit.limits and not x.sum().isfinite():
        for begin, end, bound in visit.limits:
            x[..., begin:end].masked_fill_(bound < 0, 0.0)
    return x


def _seen_rows(tile: Tile, keep: Tensor, rows: Tensor) -> Tensor:
    """Query rows `[matrices, shared * rows, D]`, zero where they see no key of the run."""
    seen = keep.any(3).expand(*tile.lead, tile.rows)
    return rows.masked_fill(~seen.reshape(tile.matrices, -1, 1), 0.0)


def _collect(tile: Tile, visit: Visit, ds: Tensor, partials: Sequence[Tensor | float], gradients: Gradients) -> None:
    """Add `ds * partial` of the tile to the gradients of tensors and parameters that are wanted."""
    derivative = tile.problem.functions.score_grad
    targets = [target for target in derivative.loads if target.tensor in gradients.tensors]
    if targets:
        plain = iter(derivative.indices(*tile.arguments(visit)))
        distant = iter(tile.by_distance(derivative.relative_indices, visit))
        for target, partial in zip(derivative.loads, partials, strict=False):
            index = next(distant if target.relative else plain)
            if target.tensor in gradients.tensors:
                grad = _times(visit, ds, partial)
                if target.relative and visit.blocks is None:
                    grad = sum_antidiagonals(grad)
                _add_at(gradients.tensors[target.tensor], index, grad)
    for name, partial in zip(derivative.parameters, partials[len(derivative.loads) :], strict=True):
        if name in gradients.parameters:
            gradients.parameters[name] += _times(visit, ds, partial).sum()


def _times(visit: Visit, ds: Tensor, partial: Tensor | float) -> Tensor:
    if isinstance(partial, float) and partial == 1.0:
        return unmasked(visit, ds)
    return unmasked(visit, ds * partial)


def _add_at(into: Tensor, index: Sequence[Tensor | int], grad: Tensor) -> None:
    """`into[index] += grad`, summed first over what the index does not depend on."""
    places = tuple(torch.as_tensor(clip(i, extent)) for i, extent in zip(index, into.shape, strict=True))
    shape = torch.broadcast_shapes(*(place.shape for place in places))  # type: ignore[no-untyped-call]
    grad = grad.sum_to_size(shape)
    if shape:
        into.index_put_(places, grad, accumulate=True)
    else:
        into[places] += grad


def _sink_backward(problem: Problem, derivative: Derivative, d_sink: Tensor, gradients: Gradients) -> None:
    """From the gradient `[B, H]` of the sink's logit to what its expression reads."""
    b = torch.arange(problem.batch).view(-1, 1, 1, 1)
    h = torch.arange(problem.heads).view(1, -1, 1, 1)
    _, _, *partials = derivative.function(b, h, problem.scalars, problem.tensors)
    indices = derivative.indices(b, h, None, None, problem.scalars, problem.tensors)
    grad = d_sink.view(problem.batch, problem.heads, 1, 1)
    for target, index, partial in zip(derivative.loads, indices, partials, strict=False):
        if target.tensor in gradients.tensors:
            _add_at(gradients.tensors[target.tensor], index, grad * partial)
    for name, partial in zip(derivative.parameters, partials[len(derivative.loads) :], strict=True):
        if name in gradients.parameters:
            gradients.parameters[name] += (grad * partial).sum()
