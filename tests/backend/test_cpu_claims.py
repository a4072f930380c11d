"""Claims about tiles by intervals, and tiles of every form against the evaluator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import strategies
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_cpu import _compare_random, compare

from attn_dsl.backend.binding import Call
from attn_dsl.backend.cpu import attention as cpu
from attn_dsl.backend.cpu import claims as cpu_claims
from attn_dsl.backend.cpu import pieces, tiles
from attn_dsl.backend.cpu import problem as cpu_problem
from attn_dsl.backend.cpu.problem import Problem
from attn_dsl.backend.cpu.shapes import TileShape
from attn_dsl.backend.execute import program_for
from attn_dsl.frontend import load
from attn_dsl.ir.evaluate import Environment, evaluate
from attn_dsl.ir.types import DType
from attn_dsl.ir.variant import Variant
from attn_dsl.passes import pipeline

PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
BLOCKED = (pieces, cpu_problem, tiles)
MASKS = st.one_of(strategies.booleans(), strategies.affine_masks())


def _problem(variant: Variant, seed: int, q_len: int, kv_len: int, offset: int) -> tuple[Problem, torch.Tensor]:
    """A problem with random bindings, and its mask pair by pair `[B, H, Q, KV]`."""
    sizes = {**strategies.SIZES, "Q": q_len, "KV": kv_len}
    bindings = {
        name: x.detach() if isinstance(x, torch.Tensor) else x
        for name, x in strategies.bindings(seed, sizes).items()
    }  # fmt: skip
    dtypes = {t.name: DType(str(bindings[t.name].dtype).removeprefix("torch.")) for t in variant.tensors}
    variant = replace(variant, tensors=tuple(replace(t, dtype=dtypes[t.name]) for t in variant.tensors))
    env: Environment = strategies.environment(seed, sizes, offset)
    try:
        mask = evaluate(variant.mask, env).expand(sizes["B"], sizes["H"], q_len, kv_len)
    except (IndexError, ZeroDivisionError):
        assume(False)
    query = torch.zeros(sizes["B"], sizes["H"], q_len, 4)
    key = torch.zeros(sizes["B"], sizes["HK"], kv_len, 4)
    parameters: dict[str, Any] = {p.name: bindings.get(p.name, p.default) for p in variant.parameters}
    tensors = {t.name: bindings[t.name] for t in variant.tensors}
    call = Call(query, key, key, 1.0, offset, sizes, parameters, tensors)
    program = program_for(variant)
    return cpu.problem_of(program.variant, program.schedule, call), mask


@PROPERTY
@given(
    variant=strategies.variants(mask=MASKS, score=st.just(strategies.ir.SCORE)),
    seed=st.integers(0, 100),
    offset=st.integers(0, 9),
    height=st.sampled_from([1, 3, 4, 8]),
)
def test_no_claim_about_a_tile_is_wrong(variant: Variant, seed: int, offset: int, height: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in BLOCKED:
            patch.setattr(module, "BLOCK", 4)
        problem, mask = _problem(variant, seed, 10, 18, offset)
        if problem.claims is None:
            return
        for tile in range(-(-10 // height)):
            codes = problem.claims.codes(tile, height).expand(mask.shape[0], mask.shape[1], -1)
            assert codes.shape[2] == 5
            for block in range(5):
                pairs = mask[:, :, tile * height : (tile + 1) * height, block * 4 : (block + 1) * 4].flatten(2)
                assert not (pairs.any(2) & (codes[:, :, block] == cpu_claims.EMPTY)).any()
                assert not (~pairs.all(2) & (codes[:, :, block] == cpu_claims.FULL)).any()


@PROPERTY
@given(
    variant=strategies.variants(mask=MASKS),
    seed=st.integers(0, 100),
    offset=st.integers(0, 9),
    shape=st.sampled_from([TileShape(4, 8, 2), TileShape(4, 8, 1, 3), TileShape(2, 12, 1, 2), TileShape(8, 4, 4)]),
)
def test_random_variants_agree_in_tiles_of_every_form(
    variant: Variant, seed: int, offset: int, shape: TileShape
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in BLOCKED:
            patch.setattr(module, "BLOCK", 4)
        patch.setattr(cpu_problem, "FEW_PIECES", 1)
        patch.setattr(Problem, "shaped", lambda problem: problem._with(shape))
        _compare_random(variant, seed, 11, 18, offset)


STACKED = {
    "a window": "attention v(w: int = 9)\nmask = 0 <= q - k < w\n",
    "a window and the first keys": "attention v(w: int = 9)\nmask = abs(q - k) < w or k < 3\n",
    "a neighborhood": "attention v(r: int = 4)\nmask = abs(clamp(q, r, KV - 1 - r) - k) <= r\n",
    "a slope": "attention v(w: int = 9)\ntensor a: float32[H]\nscore = score + a[h] * (k - q)\nmask = 0 <= q - k < w\n",
    "a sink": "attention v(w: int = 9)\ntensor a: float32[H]\nmask = 0 <= q - k < w\nsink = a[h]\n",
}


@pytest.mark.parametrize("name", STACKED)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_stacks_of_tile_rows(name: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that stand alike to their keys are taken together, and there are such."""
    for module in BLOCKED:
        monkeypatch.setattr(module, "BLOCK", 4)
    monkeypatch.setattr(Problem, "shaped", lambda problem: problem._with(TileShape(4, 32, 1, 5)))
    stacks: list[int] = []
    built = tiles.Tile.__init__

    def build(self: tiles.Tile, *args: Any) -> None:
        built(self, *args)
        stacks.append(self.stack)

    monkeypatch.setattr(tiles.Tile, "__init__", build)
    make = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 75, 8, generator=make, dtype=torch.float64).requires_grad_()
    key, value = (
        torch.randn(2, kv_heads, 75, 8, generator=make, dtype=torch.float64).requires_grad_() for _ in range(2)
    )
    bindings = {"a": torch.randn(4, generator=make).requires_grad_()} if "tensor" in STACKED[name] else {}
    variant = pipeline.run(load(STACKED[name]), stop_after="simplify").variant
    compare(variant, query, key, value, bindings=bindings)
    assert max(stacks) == 5


def test_integers_that_leave_64_bits_are_compared_all_the_same() -> None:
    """A difference of such numbers has the wrong sign."""
    text = "attention v\ntensor t: int64[KV]\nmask = t[q] <= t[k]\n"
    variant = pipeline.run(load(text), stop_after="simplify").variant
    numbers = torch.tensor([-(2**63) + 1, 2**63 - 1, 0, 5, -7])
    make = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, 5, 4, generator=make, dtype=torch.float64) for _ in range(3))
    compare(variant, query, key, value, bindings={"t": numbers})


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_scattered_blocks_are_gathered(heads: tuple[int, int]) -> None:
    """Each head sees blocks of its own; keys end within a block."""
    seen = "any(r in 0..2: pick[h, q // 64, r] == k // 64) or k // 64 == q // 64"
    text = f"attention v\ntensor pick: int32[H, N, 2]\nmask = {seen}\n"
    variant = pipeline.run(load(text), stop_after="simplify").variant
    make = torch.Generator().manual_seed(0)
    shapes = ((1, heads[0], 700, 8), (1, heads[1], 700, 8), (1, heads[1], 700, 8))
    query, key, value = (torch.randn(s, generator=make, dtype=torch.float64).requires_grad_() for s in shapes)
    pick = torch.randint(0, 11, (heads[0], 11, 2), generator=make, dtype=torch.int32)
    sizes = {"B": 1, "H": heads[0], "HK": heads[1], "Q": 700, "KV": 700, "D": 8, "N": 11}
    call = Call(query.detach(), key.detach(), value.detach(), 1.0, 0, sizes, {}, {"pick": pick})
    program = program_for(variant)
    problem = cpu.problem_of(program.variant, program.schedule, call)
    visits = [visit for tile in tiles.tiles(problem) for visit in tile.visits()]
    assert all(visit.blocks is not None for visit in visits)
    assert sum(visit.keys for visit in visits) < 0.7 * 700 * len(list(tiles.tiles(problem)))
    compare(variant, query, key, value, bindings={"pick": pick})
