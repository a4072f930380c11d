"""Claims against brute force: never unsound, and exact where they say so."""

from __future__ import annotations

import random

import pytest

from attn_dsl.passes.prove import prove
from attn_dsl.passes.schedule import derive_schedule
from tests.passes.random_masks import RandomMask
from tests.passes.tiles import Grid

MASKS = 1000
CHUNK = 25


def draw(seed: int) -> Grid:
    rng = random.Random(seed)
    kind = ("affine", "boolean", "general", "general")[seed % 4]
    variant = RandomMask(rng).variant(kind)
    return Grid(
        variant,
        q_len=rng.randint(1, 20),
        kv_len=rng.randint(1, 20),
        block_m=rng.choice((1, 2, 3, 4, 7, 8)),
        block_n=rng.choice((1, 2, 3, 4, 7, 8)),
        q_offset=rng.choice((0, 0, 3, 11)),
        parameters={"a": rng.randint(-5, 15), "w": rng.randint(1, 9), "flag": rng.random() < 0.5},
    )


@pytest.mark.parametrize("first", range(0, MASKS, CHUNK))
def test_random_masks_are_classified_soundly(first: int) -> None:
    for seed in range(first, first + CHUNK):
        check(seed)


def check(seed: int) -> None:
    """Reproduce one failure with `python -c "from tests.passes.test_prove import check; check(SEED)"`."""
    grid = draw(seed)
    proof = prove(grid.variant)
    empty, full = grid.exhaustive()
    proved_empty, proved_full = grid.claimed(proof)
    assert not (proved_empty & ~empty).any(), f"seed {seed}: a tile proved EMPTY is not"
    assert not (proved_full & ~full).any(), f"seed {seed}: a tile proved FULL is not"
    if all(side.claim.exact for side in proof.visit):
        assert (proved_empty == empty).all(), f"seed {seed}: EMPTY is called exact and is not"
    if all(side.claim.exact for side in proof.masked):
        assert (proved_full == full).all(), f"seed {seed}: FULL is called exact and is not"
    if seed % 4 == 0:
        assert proof.exact, f"seed {seed}: a conjunction of affine comparisons is not exact"
    for padded in (False, True):
        schedule = derive_schedule(grid.variant, proof, padded=padded)
        for axis in ("kv", "q"):
            visits, masked = grid.scheduled(schedule, axis, padded)
            where = f"seed {seed}, {axis} ranges, padded={padded}"
            assert (visits <= 1).all(), f"{where}: a tile is visited twice"
            assert not ((visits == 0) & ~empty).any(), f"{where}: a tile with a kept pair is not visited"
            assert not ((visits == 1) & ~masked & ~full).any(), f"{where}: a tile without mask is not full"
            if proof.exact and not padded:
                assert ((visits == 0) == empty).all(), f"{where}: an empty tile is visited"
                assert (masked == ~(empty | full)).all(), f"{where}: a full tile is masked"
