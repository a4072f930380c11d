"""The CPU backend behind the API: say what a checked call does, show its text."""

from __future__ import annotations

from typing import Any

import torch

from attn_dsl.backend.binding import Call
from attn_dsl.backend.cpu.attention import problem_of
from attn_dsl.backend.cpu.functions import schedule_functions, tile_functions
from attn_dsl.backend.cpu.pieces import BLOCK
from attn_dsl.backend.cpu.problem import Problem
from attn_dsl.backend.cpu.tiles import tiles
from attn_dsl.errors import BindingError
from attn_dsl.passes.pipeline import Program
from attn_dsl.passes.schedule import Schedule

name = "cpu"


def explain(program: Program, call: Call) -> str:
    """Which tiles the call visits and why. The schedule's functions are run for it, not the attention."""
    problem = problem_of(program.variant, _schedule(program), call)
    shape, functions = problem.shape, problem.functions
    visited = {False: 0, True: 0}
    for tile in tiles(problem):
        heads = (tile.b1 - tile.b0) * (tile.h1 - tile.h0)
        for visit in tile.visits():
            masked = sum(limit.end - limit.begin for limit in visit.limits)
            visited[True] += heads * tile.rows * masked
            visited[False] += heads * tile.rows * (visit.keys - masked)
    pairs = problem.batch * problem.heads * problem.q_len * problem.kv_len
    share = {masked: f"{100 * count / pairs:.1f}%" for masked, count in visited.items()}
    never = f"{100 - 100 * sum(visited.values()) / pairs:.1f}%"
    per = [what for what, differs in (("batch", _per_batch(problem)), ("head", problem.schedule.per_head)) if differs]
    lines = [
        f"backend    cpu: the tensors are on the CPU; {str(problem.dtype)[6:]} arithmetic, {problem.threads} threads",
        f"tiles      {shape.rows} rows x {shape.keys} keys x {shape.heads} key/value heads; chosen for the cache",
        f"schedule   closed form, keys in blocks of {BLOCK}"
        + (f"; it differs for each {' and '.join(per)}" if per else ", the same for all batches and heads"),
        f"pairs      {share[False]} in unmasked runs, {share[True]} in masked runs, {never} never visited",
    ]
    if functions.mask is None:
        pass
    elif functions.mask.reads_positions:
        lines.append(
            "mask       reads tensors at positions: blocks are decided by the least and greatest of what it reads there"
        )
    elif functions.mask.by_distance:
        lines.append("mask       depends on q - k: rows + keys - 1 comparisons a tile")
    else:
        lines.append("mask       evaluated for each pair of a masked run")
    if functions.score is None:
        lines.append("score      unchanged")
    else:
        lines.append("score      evaluated tile by tile" + _factors(functions, problem))
    return "\n".join(lines)


def source(program: Program, dtype: torch.dtype) -> str:
    """The emitted Python: the schedule's functions, then those of the tiles."""
    arithmetic = torch.float64 if dtype is torch.float64 else torch.float32
    schedule = schedule_functions(program.variant, _schedule(program))
    return f"{schedule.source}\n\n{tile_functions(program.variant, arithmetic).source}"


def _schedule(program: Program) -> Schedule:
    if program.schedule is None:
        raise BindingError("the program has no schedule: run the pass `schedule` first")
    return program.schedule


def _per_batch(problem: Problem) -> bool:
    return problem.schedule.per_batch or len(problem.offsets) > 1


def _factors(functions: Any, problem: Problem) -> str:
    before, after = functions.before(problem.scalars), functions.after(problem.scalars)
    return "" if (before, after) == (1.0, 1.0) else "; its constant factors go into the scale and the exponential"
