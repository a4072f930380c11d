"""The tiles of every shipped variant that reads tensors at positions, against an exhaustive look at every pair."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from list_support import reference
from variant_cases import Case, Sizes

SIZES = Sizes(B=2, H=2, HK=2, Q=1000, KV=1000, D=8, DV=8)
BLOCKS = ((128, 128), (64, 128), (64, 64))
CASES = {
    "document": {},
    "packed_causal": {},
    "shared_prefix": {"prefix": 200},
    "tree": {},
    "hash_buckets": {},
    "bigbird": {"block": 64, "reach": 1, "globals": 1, "random": 2},
}


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_counts_are_those_of_an_exhaustive_classification(name: str, block: tuple[int, int]) -> None:
    case = Case(name, CASES[name], SIZES, frozenset({"random"}) if name == "bigbird" else frozenset())
    for offset in (0, 200):
        of = replace(case, sizes=replace(SIZES, Q=SIZES.Q - offset, q_offset=offset))
        (visited, full), (kept, whole) = reference(of, block, False), reference(of, block, False, exhaustive=True)
        assert not (kept & ~visited).any(), "a tile with a kept pair is not visited"
        assert not (full & ~whole).any(), "a tile without mask is not full"
        assert torch.equal(visited, kept), "an empty tile is visited"
        assert torch.equal(full & visited, whole & kept), "a full tile is masked"
