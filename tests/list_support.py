"""Lists of tiles of small calls, and what they should hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from portable_support import program_of
from torch import Tensor
from variant_cases import Case, Sizes

from attn_dsl.backend.execute import Options, Program, portable_call
from attn_dsl.backend.portable.host import Call
from attn_dsl.backend.portable.listing import Lists, Shape, Source, TileList
from attn_dsl.backend.tile_kinds import Axis, tile_kinds
from attn_dsl.ir.evaluate import Environment, evaluate
from attn_dsl.passes.summaries import derive_claims

Problem = Case | tuple[Program, Sizes, Mapping[str, Any]]


@dataclass(frozen=True)
class Listed:
    """A list, how often it names each tile, and which it says are full: [B, H, q tiles, kv tiles], or transposed."""

    list: TileList
    visits: Tensor
    full: Tensor


def parts(problem: Problem) -> tuple[Program, Sizes, dict[str, Any]]:
    if not isinstance(problem, Case):
        program, sizes, bindings = problem
        return program, sizes, dict(bindings)
    program = program_of(problem.name, tuple(problem.constants.items()))
    defaults = {p.name: p.default for p in program.variant.parameters}
    return program, problem.sizes, {**defaults, **problem.arguments, **problem.tensors()}


def listed(
    problem: Problem,
    block: tuple[int, int],
    transposed: bool,
    q_offset: int | Tensor | None = None,
    device: str = "cpu",
) -> Listed:
    """By the kernels."""
    s = parts(problem)[1]
    program, call = _call(problem, q_offset, device)
    made = _lists(program).make(Source.of(call), Shape(*block, transposed), program.kernels.wide(call))
    own, other = -(-s.Q // block[0]), -(-s.KV // block[1])
    if transposed:
        own, other = other, own
    visits = torch.zeros(s.B, s.H, own, other, dtype=torch.int64)
    full = torch.zeros(s.B, s.H, own, other, dtype=torch.bool)
    entries = made.entries.tolist()
    for b in range(s.B):
        for h in range(s.H):
            for tile, (first, masked, whole, last) in enumerate(made.rows[b, h].tolist()):
                for n in range(masked):
                    visits[b, h, tile, entries[first + n]] += 1
                for n in range(whole):
                    visits[b, h, tile, entries[last - n]] += 1
                    full[b, h, tile, entries[last - n]] = True
    return Listed(made, visits, full)


def uniform(problem: Problem, part: tuple[int, int]) -> bool:
    """Whether the mask is the same for all pairs of each part of a tile."""
    program, call = _call(problem)
    return _lists(program).uniform(Source.of(call), *part)


def _lists(program: Program) -> Lists:
    return Lists(program.variant, program.kernels.extents, derive_claims(program.variant, program._proof))


def _call(problem: Problem, q_offset: int | Tensor | None = None, device: str = "cpu") -> tuple[Program, Call]:
    program, s, bindings = parts(problem)
    bindings = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in bindings.items()}
    shapes = (s.B, s.H, s.Q, s.D), (s.B, s.HK, s.KV, s.D), (s.B, s.HK, s.KV, s.DV)
    query, key, value = (torch.zeros(shape, device=device) for shape in shapes)
    bound = program.binder.bind(query, key, value, None, s.q_offset if q_offset is None else q_offset, bindings)
    return program, portable_call(program, bound, Options("portable"))


def reference(
    problem: Problem, block: tuple[int, int], transposed: bool, exhaustive: bool = False
) -> tuple[Tensor, Tensor]:
    """(visited, full) by the claims in torch or, `exhaustive`, by looking at every pair; a tile that sticks out over
    the axis that is visited is not full."""
    program, s, bindings = parts(problem)
    variant = program.variant
    tensors = {t.name: bindings[t.name] for t in variant.tensors}
    sizes = {"B": s.B, "H": s.H, "HK": s.HK, "Q": s.Q, "KV": s.KV, "D": s.D}
    bound = program.binder.bind(
        *(torch.zeros(x) for x in ((s.B, s.H, s.Q, 1), (s.B, s.HK, s.KV, 1), (s.B, s.HK, s.KV, 1))),
        None,
        s.q_offset,
        bindings,
    )
    head = torch.arange(s.H).view(1, -1, 1, 1)
    env = Environment(
        indices={"b": torch.arange(s.B).view(-1, 1, 1, 1), "h": head, "hk": head // (s.H // s.HK)},
        parameters={p.name: bindings[p.name] for p in variant.parameters},
        sizes={**bound.sizes, **sizes},
        tensors=tensors,
        variables={"q_offset": torch.tensor(s.q_offset)},
    )
    rows, columns = Axis(s.q_offset, s.Q, block[0]), Axis(0, s.KV, block[1])
    if exhaustive:
        q = s.q_offset + torch.arange(s.Q)[:, None]
        indices = {**env.indices, "q": q, "k": torch.arange(s.KV)}
        keep = evaluate(variant.mask, replace(env, indices=indices), torch.tensor(False)).expand(s.B, s.H, s.Q, s.KV)
        visited = _of_tiles(keep, block, lambda tile: tile.any(-1).any(-1))
        full = _of_tiles(keep, block, lambda tile: tile.all(-1).all(-1))
    else:
        kinds = tile_kinds(derive_claims(variant, program._proof), variant.mask, env, rows, columns)
        shape = (s.B, s.H, rows.tiles, columns.tiles)
        visited, full = kinds.visited.expand(shape).clone(), kinds.full.expand(shape).clone()
    if transposed:
        visited, full = visited.transpose(2, 3), full.transpose(2, 3)
    length, width = (s.Q, block[0]) if transposed else (s.KV, block[1])
    if length % width:
        full = full.clone()
        full[..., -1] = False
    return visited, full


def _of_tiles(keep: Tensor, block: tuple[int, int], what: Callable[[Tensor], Tensor]) -> Tensor:
    lines = (line.split(block[1], -1) for line in keep.split(block[0], -2))
    return torch.stack([torch.stack([what(tile) for tile in line], -1) for line in lines], -2)
