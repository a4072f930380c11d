"""Backward passes whose sums of dQ have an order, over lists of tiles and strips of a grid, in the interpreter."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from gluon_interpreter import Machine
from gpu_support import larger
from hopper_on_cpu import take_over
from portable_support import Problem, Result, differentiated
from variant_cases import Case

from attn_dsl.backend import operators, order
from attn_dsl.backend.execute import HOPPER, Options, portable_call, run_forward
from attn_dsl.backend.hopper import launch_backward
from attn_dsl.backend.hopper.backward_rows import count_listed_turns
from attn_dsl.backend.hopper.configs_backward import KEYS
from attn_dsl.backend.hopper.launch_backward import refusal
from attn_dsl.backend.portable.host import described

LISTED: dict[str, dict[str, Any]] = {
    "bigbird": {"block": 64, "reach": 1, "globals": 1, "random": 2},
    "packed_causal": {}, "hash_buckets": {}, "tree": {},
}  # fmt: skip
DISJOINT = ("hash_buckets", "tree")
"""Whose query tiles have sums of two tiles of keys at most, which have no order."""
INPUTS = ("query", "key", "value")


@pytest.fixture(autouse=True)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine(zlib.crc32(request.node.name.encode()))
    take_over(monkeypatch, found)
    return found


def problem_of(name: str, **sizes: int) -> Problem:
    given = {"B": 1, "H": 2, "HK": 1, "Q": 450, "KV": 450} | sizes
    case = replace(larger(name, **given).sizes)
    constants = frozenset({"random"} & LISTED[name].keys())
    problem = Problem.of(Case(name, LISTED[name], case, constants), torch.bfloat16)
    if name == "packed_causal":  # one document, so that a query tile has sums of four tiles of keys
        problem.all_bindings["doc"].zero_()
    return problem


def alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 0.02 * expected.abs().max())


def called(problem: Problem, *, deterministic: bool) -> Result:
    """By the Hopper kernels, with gradients of the inputs."""
    upstream = problem.upstream()
    leaves = {name: getattr(problem, name).clone().requires_grad_() for name in INPUTS}
    call = problem.program.binder.bind(*leaves.values(), problem.scale, problem.q_offset, problem.all_bindings)
    out, lse = operators.attention(problem.program, call, Options(HOPPER, deterministic=deterministic))
    return differentiated(out, lse, leaves, upstream)


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Those of dQ in float32, as the kernels leave them: what 16 bits would hide."""
    found: list[torch.Tensor] = []
    made = launch_backward._Scratch.made

    def kept(scratch: Any, device: torch.device) -> Any:
        buffers = made(scratch, device)
        found.append(buffers.sums)
        return buffers

    monkeypatch.setattr(launch_backward._Scratch, "made", kept)
    return found


@pytest.mark.parametrize("name", LISTED)
def test_lists_are_summed_in_an_order(name: str, sums: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(name, D=64, DV=64)
    found, exact = [], []
    for seed, (deterministic, resident) in enumerate(((False, 5), (True, 1), (True, 5))):
        take_over(monkeypatch, Machine(seed, resident=resident))
        found.append(called(problem, deterministic=deterministic).grads)
        exact.append(sums[-1])
    assert all(alike(found[0][x], found[1][x]) and torch.equal(found[1][x], found[2][x]) for x in INPUTS)
    assert torch.equal(exact[1], exact[2]) and (name in DISJOINT or not torch.equal(exact[0], exact[1]))


def test_strips_of_a_grid_are_summed_in_an_order(sums: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "BY_STRIPS_OF_KEYS", True)
    sizes = {"B": 1, "H": 1, "HK": 1, "Q": 720, "KV": 720, "D": 64, "DV": 64}
    case = Case("natten2d", {"width": 24, "height": 30, "r": 9}, replace(larger("natten2d", **sizes).sizes))
    problem = Problem.of(case, torch.bfloat16)
    inputs = [getattr(problem, name) for name in INPUTS]
    call = problem.program.binder.bind(*inputs, None, 0, problem.all_bindings)
    outputs = run_forward(problem.program, call, Options(HOPPER))
    upstream = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found, exact = [], []
    for seed, (deterministic, resident) in enumerate(((False, 5), (True, 1), (True, 5))):
        take_over(monkeypatch, Machine(seed, resident=resident))
        strips = order.strips_of_keys(problem.program, call, Options(HOPPER, deterministic=deterministic))
        assert strips is not None and strips.ordered == deterministic
        found.append(strips.backward(call, outputs, upstream, None))
        exact.append(sums[-1])
    for usual, first, second in ((x.query, y.query, z.query) for x, y, z in [found]):
        assert alike(usual, first) and torch.equal(first, second)
    assert torch.equal(exact[1], exact[2]) and not torch.equal(exact[0], exact[1])


def test_lists_are_not_refused_where_an_order_is_asked_for() -> None:
    problem = problem_of("packed_causal")
    inputs = (getattr(problem, name) for name in INPUTS)
    call = problem.program.binder.bind(*inputs, None, 0, problem.all_bindings)
    bound = portable_call(problem.program, call, Options(HOPPER))
    assert refusal(problem.program.hopper_backward, bound, frozenset(), ordered=True) is None


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8])
@pytest.mark.parametrize(("tiles", "key_tiles"), [(3, 2), (130, 37), (200, 16)])
def test_turns_of_a_list_are_what_earlier_tiles_of_keys_visit(
    machine: Machine, tiles: int, key_tiles: int, kind: torch.dtype
) -> None:
    batch, heads, queries, width = 2, 3, 64, 128
    generator = torch.Generator().manual_seed(tiles)
    visited = torch.rand(batch, 1, key_tiles, tiles, generator=generator) < 0.2
    rows = torch.zeros(batch, 1, key_tiles, 4, dtype=torch.int32)
    entries = torch.zeros(batch * key_tiles * tiles, dtype=kind)
    for at, (row, seen) in enumerate(zip(rows.view(-1, 4), visited.view(-1, tiles), strict=True)):
        found = seen.nonzero().flatten()[torch.randperm(int(seen.sum()), generator=generator)]
        masked, first, last = len(found) // 3, at * tiles, (at + 1) * tiles - 1
        row.copy_(torch.tensor([first, masked, len(found) - masked, last]))
        entries[first : first + masked] = found[:masked].to(kind)
        entries[last - len(found) + masked + 1 : last + 1] = found[masked:].flip(0).to(kind)
    made = rows.expand(batch, heads, -1, -1), entries
    turns = torch.full((batch * heads, key_tiles, tiles), -1, dtype=torch.int32)
    sizes = (batch, heads, heads, tiles * queries - 5, key_tiles * KEYS - 9, 64)
    options = {"KEYS": KEYS, "QUERIES": queries, "WIDTH": width, "LINES": 16, "CHUNK": 8, "num_warps": 4}
    programs = batch * heads * -(-tiles // width)
    machine.run(count_listed_turns, programs, (turns, described(made), sizes, 0), options)
    earlier = visited.int().cumsum(2) - visited.int()
    assert torch.equal(turns.view(batch, heads, key_tiles, tiles), earlier.expand(-1, heads, -1, -1).int())
