"""Tiles that the schedule leaves unmasked have a uniform look-up, by brute force."""

from __future__ import annotations

import pytest
import torch

from attn_dsl.frontend import load
from attn_dsl.ir.nodes import Const
from attn_dsl.passes.schedule import derive_schedule
from attn_dsl.passes.specialize import specialize
from tests.passes.tiles import Grid

TEXTS = {
    "both sides": "table[h, clamp(k - q, -reach, reach) + reach]",
    "one side": "table[h, min(abs(k - q), reach)]",
    "far side": "table[h, min(q - k, reach)]",
    "steps of two": "table[h, clamp(2 * q - 2 * k, -1, 1) + 1]",
    "two look-ups": "table[h, clamp(k - q, -reach, reach) + reach] + table[h, max(q - k, 3)]",
}


def grid(term: str, block_m: int, block_n: int, offset: int) -> Grid:
    text = f"attention a(reach: int = 5)\ntensor table: float32[H, N]\nscore = score + {term}\nmask = q >= k or k < 9\n"
    return Grid(load(text), 40, 53, block_m, block_n, offset, {"reach": 5}, sizes={"N": 99})


@pytest.mark.parametrize("axis", ["kv", "q"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", [(4, 4, 0), (8, 3, 0), (5, 8, 11), (1, 1, 0)])
@pytest.mark.parametrize("term", TEXTS.values(), ids=TEXTS.keys())
def test_unmasked_tiles_are_uniform(term: str, shape: tuple[int, int, int], padded: bool, axis: str) -> None:
    g = grid(term, *shape)
    uniform = specialize(g.variant.score)
    assert uniform is not None
    schedule = derive_schedule(g.variant, padded=padded, saturations=uniform.saturations)
    visits, masked = g.scheduled(schedule, axis, padded)
    empty, full = g.exhaustive()
    assert (visits <= 1).all() and not ((visits == 0) & ~empty).any()
    free = (visits == 1) & ~masked
    assert not (free & ~full).any()
    q = g.q_offset + torch.arange(g.q_len)[:, None]
    for saturation in uniform.saturations:
        value = g.value(saturation.node, q=q, k=torch.arange(g.kv_len)[None, :])
        for row, column in free.nonzero().tolist():
            tile = value[row * g.block_m : (row + 1) * g.block_m, column * g.block_n : (column + 1) * g.block_n]
            assert (tile == tile[0, 0]).all(), (row, column)


def test_most_tiles_of_a_long_row_are_uniform() -> None:
    g = Grid(load("t5_bias"), 4096, 4096, 128, 128, 0, {"reach": 128}, sizes={})
    uniform = specialize(g.variant.score)
    assert uniform is not None
    visits, masked = g.scheduled(derive_schedule(g.variant, saturations=uniform.saturations), "kv")
    assert int(visits.sum()) == 1024
    assert int(masked.sum()) == 32 + 2 * 31  # the diagonal and its neighbors: |k - q| < 128 + 127


def test_a_score_without_a_saturating_look_up_stays_whole() -> None:
    for name in ("noop", "alibi", "relative_bias", "softcap"):
        assert specialize(load(name).score) is None
    assert specialize(Const(0.0)) is None
