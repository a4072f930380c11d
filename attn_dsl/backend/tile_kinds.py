"""Which tiles of a call are empty, partial and full by the claims of `passes/summaries.py`, evaluated in torch.

The same steps that kernels take on a GPU (`portable/classify.py`), for reports, for the CPU and as their reference:
memory grows with the number of tiles, and with the pairs of one row of tiles where a refinement looks at each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_dsl.ir.evaluate import Environment, evaluate
from attn_dsl.ir.nodes import Node
from attn_dsl.ir.types import Type
from attn_dsl.passes.summaries import Claims, Refinement, Summary

_UNUSED = torch.tensor(False, device="cpu")
"""Where values are used, for the evaluator: an index that is out of range under the mask is no error."""


@dataclass(frozen=True)
class Axis:
    """Positions `first, ..., first + length - 1`, cut into tiles of `block`."""

    first: int
    length: int
    block: int

    @property
    def tiles(self) -> int:
        return -(-self.length // self.block)

    def corners(self, block: int | None = None) -> tuple[Tensor, Tensor]:
        """First and last position of each tile, or of each piece of `block` positions, the last one clipped."""
        block = block or self.block
        first = self.first + torch.arange(-(-self.length // block)) * block
        return first, (first + block - 1).clamp(max=self.first + self.length - 1)


@dataclass(frozen=True)
class Kinds:
    """bool [B, H, q tiles, kv tiles], B and H 1 where the mask does not vary with them; `full` only where `visited`."""

    visited: Tensor
    full: Tensor


def grain(divisors: Sequence[int], block: int, first: int) -> int:
    """The largest piece, a power of two that divides a tile, that crosses no multiple of a divisor."""
    found = math.gcd(block, first)
    return functools.reduce(math.gcd, divisors, found) if divisors else block


def tile_kinds(claims: Claims, mask: Node, env: Environment, rows: Axis, columns: Axis) -> Kinds:
    """`env` binds `b` and `h` as [B, 1, 1, 1] and [1, H, 1, 1], parameters, sizes and tensors."""
    env = replace(env, tensors={**env.tensors, **summarized(claims.summaries, env, rows, columns)})
    possible, certain = (_over_tiles(node, env, rows, columns) for node in (claims.possible, claims.certain))
    if claims.refined is not None:
        some, all_ = _refined(claims.refined, mask, env, rows, columns)
        possible, certain = possible & some, certain | all_
    return Kinds(possible, possible & certain)


def summarized(summaries: Sequence[Summary], env: Environment, rows: Axis, columns: Axis) -> dict[str, Tensor]:
    """The tensors of the summaries, [B, H, tiles]."""
    found: dict[str, Tensor] = {}
    for summary in summaries:
        axis = rows if summary.axis == "q" else columns
        tiles = torch.arange(axis.tiles)[:, None] * axis.block + torch.arange(axis.block)
        places = axis.first + tiles.clamp(max=axis.length - 1)
        batch, head = env.indices["b"], env.indices["h"]
        bound = replace(env, indices={**env.indices, summary.axis: places.view(1, 1, *places.shape)})
        values = evaluate(summary.node, bound, _UNUSED)
        values = values.expand(batch.shape[0], head.shape[1], *places.shape)
        low, high = values.amin(-1), values.amax(-1)
        if summary.node.type is Type.FLOAT:
            unordered = values.isnan().any(-1)
            low, high = low.masked_fill(unordered, -torch.inf), high.masked_fill(unordered, torch.inf)
        found |= {summary.low.name: low, summary.high.name: high}
    return found


def _over_tiles(node: Node, env: Environment, rows: Axis, columns: Axis) -> Tensor:
    (q0, q1), (k0, k1) = rows.corners(), columns.corners()
    return _evaluated(node, env, q0, q1, k0, k1)


def _evaluated(node: Node, env: Environment, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
    variables = {
        "q0": q0[:, None], "q1": q1[:, None], "k0": k0, "k1": k1,
        "q_tile": torch.arange(len(q0))[:, None], "k_tile": torch.arange(len(k0)),
    }  # fmt: skip
    bound = replace(env, variables={**env.variables, **variables})
    shape = (env.indices["b"].shape[0], env.indices["h"].shape[1], len(q0), len(k0))
    return evaluate(node, bound, _UNUSED).expand(shape)


def _refined(refined: Refinement, mask: Node, env: Environment, rows: Axis, columns: Axis) -> tuple[Tensor, Tensor]:
    """(whether some pair may be kept, whether all are) by tiles, from pieces or pairs."""
    of = {axis: [int(evaluate(node, env)) for node in refined.divisors[axis]] for axis in ("q", "k")}
    down, across = grain(of["q"], rows.block, rows.first), grain(of["k"], columns.block, 0)
    if refined.elements:
        down = across = 1
    shape = (env.indices["b"].shape[0], env.indices["h"].shape[1])
    some, every = (torch.empty(*shape, rows.tiles, columns.tiles, dtype=torch.bool) for _ in range(2))
    k0, k1 = columns.corners(across)
    for row in range(rows.tiles):
        first = rows.first + row * rows.block
        part = Axis(first, min(rows.block, rows.first + rows.length - first), rows.block)
        q0, q1 = part.corners(down)
        if refined.elements:
            bound = replace(env, indices={**env.indices, "q": q0[:, None], "k": k0})
            possible = certain = evaluate(mask, bound, _UNUSED).expand(*shape, len(q0), len(k0))
        else:
            possible, certain = (_evaluated(node, env, q0, q1, k0, k1) for node in (refined.possible, refined.certain))
        some[:, :, row] = _by_tile(possible.any(2), columns.block // across, False).any(-1)
        every[:, :, row] = _by_tile(certain.all(2), columns.block // across, True).all(-1)
    return some, every


def _by_tile(pieces: Tensor, each: int, fill: bool) -> Tensor:
    missing = -pieces.shape[-1] % each
    whole = torch.nn.functional.pad(pieces, (0, missing), value=fill)
    return whole.view(*whole.shape[:-1], -1, each)
