"""Masks of several ranges: window or global, window or prefix or sinks, several windows."""

from __future__ import annotations

import pytest
import torch

from attn_dsl.frontend import load
from attn_dsl.ir.nodes import FALSE
from attn_dsl.passes.prove import prove
from attn_dsl.passes.schedule import MAX_MIDDLES, derive_schedule
from attn_dsl.passes.simplify import simplify
from tests.passes.test_summaries import kinds
from tests.passes.tiles import Grid

MASKS = {
    "window or global": ("abs(q - k) <= 5 or k < 3 or q < 3", 2),
    "causal window or sinks": ("q >= k and (q - k < 6 or k < 4)", 1),
    "window or prefix or sinks": ("abs(q - k) <= 3 or k < 9 or (q >= k and k < 14)", 1),
    "window or prefix or suffix": ("abs(q - k) <= 3 or k < 6 or k >= KV - 5", 1),
    "two windows": ("abs(q - k) <= 2 or 17 <= q - k <= 20", 2),
    "two windows that overlap": ("0 <= q - k < 9 or 5 <= q - k <= 20", 2),
    "three windows": ("abs(q - k) <= 1 or 11 <= q - k <= 12 or 23 <= q - k <= 24", 3),
    "four windows and sinks": (
        "k < 2 or abs(q - k) <= 1 or 9 <= q - k <= 10 or 19 <= q - k <= 20 or 30 <= q - k <= 31",
        4,
    ),
}


@pytest.mark.parametrize("block", [(4, 4), (8, 4), (4, 8)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_ranges_are_merged_without_overlap(name: str, block: tuple[int, int]) -> None:
    text, middles = MASKS[name]
    variant = simplify(load(f"attention ranges\nmask = {text}\n"))
    proof = prove(variant)
    for lengths in ((37, 37, 0), (16, 43, 27)):
        q_len, kv_len, offset = lengths
        grid = Grid(variant, q_len, kv_len, *block, q_offset=offset)
        empty, full = grid.exhaustive()
        for padded in (False, True):
            schedule = derive_schedule(variant, proof, padded=padded)
            for axis in ("kv", "q"):
                visits, masked = grid.scheduled(schedule, axis, padded)
                assert (visits <= 1).all(), "a tile is visited twice"
                assert ((visits == 0) <= empty).all(), "a tile with a kept pair is not visited"
                assert ((visits == 1) & ~masked <= full).all(), "a tile without mask is not full"
                if not padded:  # a whole tile may see something from queries that are not there
                    assert ((visits == 0) == empty).all(), "an empty tile is visited"
            assert (schedule.kv.skip is FALSE) == (middles <= MAX_MIDDLES)


@pytest.mark.parametrize("block", [(4, 4), (8, 4)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_a_list_holds_exactly_the_tiles_that_are_not_empty(name: str, block: tuple[int, int]) -> None:
    variant = simplify(load(f"attention ranges\nmask = {MASKS[name][0]}\n"))
    grid = Grid(variant, 37, 41, *block)
    found, (empty, full) = kinds(grid), grid.exhaustive()
    assert torch.equal(found.visited[0, 0], ~empty) and torch.equal(found.full[0, 0], full & ~empty)
