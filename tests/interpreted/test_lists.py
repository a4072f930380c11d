"""Lists of tiles, made by the kernels, beside the same claims in torch and every pair."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from list_support import Listed, listed, reference, uniform
from portable_support import compiled, program_of
from torch import Tensor
from variant_cases import Case, Sizes

from tests.passes.test_summaries import EXTENT, RandomReads, tensors

SIZES = Sizes(B=2, H=2, HK=1, Q=72, KV=112, D=16, DV=16, q_offset=40)
READING = {
    "document": {},
    "packed_causal": {},
    "shared_prefix": {"prefix": 37},
    "tree": {},
    "hash_buckets": {},
    "bigbird": {"block": 16, "reach": 1, "globals": 1, "random": 2},
}


def case(name: str, **sizes: int) -> Case:
    const = frozenset({"random"}) if name == "bigbird" else frozenset()
    return Case(name, READING[name], replace(SIZES, **sizes), const)


def assert_same(found: Listed, expected: tuple[Tensor, Tensor]) -> None:
    visited, full = expected
    assert torch.equal(found.visits, visited.long()), "other tiles, or one twice"
    assert torch.equal(found.full, full & visited), "other full tiles"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", READING)
def test_a_list_holds_the_tiles_that_the_claims_keep(name: str, transposed: bool) -> None:
    of = case(name)
    assert_same(listed(of, (32, 16), transposed), reference(of, (32, 16), transposed))


@pytest.mark.parametrize("name", ["hash_buckets", "tree", "bigbird"])
def test_rows_that_are_no_power_of_two(name: str) -> None:
    of = case(name)
    assert_same(listed(of, (48, 16), False), reference(of, (48, 16), False))


@pytest.mark.parametrize("name", ["hash_buckets", "packed_causal"])
def test_a_list_that_is_counted_first_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_dsl.backend.portable.listing.PADDED_BYTES", 0)
    of = case(name)
    found = listed(of, (32, 16), False)
    assert_same(found, reference(of, (32, 16), False))
    assert found.list.entries.numel() == max(1, int(found.list.rows[:, :1, :, 1:3].sum()) if name != "hash_buckets"
                                             else int(found.list.rows[..., 1:3].sum()))  # fmt: skip


def test_a_list_is_kept_once_where_the_mask_is_the_same_for_all_heads() -> None:
    rows = listed(case("document"), (32, 16), False).list.rows
    assert rows.shape == (2, 2, 3, 4) and rows.stride(1) == 0 and rows.stride(0) != 0
    rows = listed(case("bigbird"), (32, 16), False).list.rows
    assert rows.stride(0) == 0 and rows.stride(1) != 0


@pytest.mark.parametrize("block", [5, 16, 24])
def test_blocks_of_any_size_are_told_apart_exactly(block: int) -> None:
    of = Case("bigbird", {**READING["bigbird"], "block": block}, replace(SIZES, H=2, q_offset=0), frozenset({"random"}))
    assert_same(listed(of, (32, 32), False), reference(of, (32, 32), False, exhaustive=True))


def test_query_offsets_by_batch_entry() -> None:
    of, offsets = case("packed_causal"), torch.tensor([0, 40])
    found = listed(of, (16, 32), False, q_offset=offsets)
    for b, offset in enumerate(offsets.tolist()):
        expected = reference(replace(of, sizes=replace(of.sizes, q_offset=offset)), (16, 32), False)
        visits, full = (x[b : b + 1] for x in (found.visits, found.full))
        assert torch.equal(visits, expected[0][b : b + 1].long()) and torch.equal(full, expected[1][b : b + 1])


@pytest.mark.parametrize("seed", range(12))
def test_random_masks_over_random_tensors(seed: int) -> None:
    rng = random.Random(1000 + seed)
    program = compiled(RandomReads(rng).variant())
    bindings: dict[str, Any] = {"a": rng.randint(-5, 15), "w": rng.randint(1, 9), "flag": rng.random() < 0.5}
    bindings |= tensors(rng)
    sizes = Sizes(
        B=1, H=1, HK=1, Q=rng.randint(1, 30), KV=rng.randint(1, EXTENT), D=16, DV=16, q_offset=rng.choice((0, 8))
    )
    for transposed in (False, True):
        found = listed((program, sizes, bindings), (16, 8), transposed)
        expected = reference((program, sizes, bindings), (16, 8), transposed)
        assert_same(found, expected)


@pytest.mark.parametrize(
    ("block", "offset", "parts", "expected"),
    [
        (64, 0, (64, 64), True),
        (64, 0, (64, 128), False),
        (128, 0, (64, 128), True),
        (64, 32, (64, 64), False),
        (48, 0, (64, 64), False),
    ],
)
def test_parts_of_tiles_of_which_the_mask_is_the_same(
    block: int, offset: int, parts: tuple[int, int], expected: bool
) -> None:
    of = replace(case("bigbird"), parameters={**READING["bigbird"], "block": block})
    assert uniform(replace(of, sizes=replace(of.sizes, q_offset=offset)), parts) == expected
    assert not uniform(case("document"), parts) and not uniform(case("hash_buckets"), parts)


@pytest.mark.parametrize("block", [(16, 16), (32, 16), (16, 32), (48, 16)], ids=str)
@pytest.mark.parametrize(
    ("q_len", "kv_len", "start"), [(90, 90, 0), (20, 77, 40), (50, 30, 0), (33, 100, 67), (40, 90, 3)]
)
def test_rows_of_a_causal_list_have_room_for_the_tiles_before_them(
    block: tuple[int, int], q_len: int, kv_len: int, start: int
) -> None:
    program = program_of("attention t()\ntensor seen: bool[B, KV]\nmask = q >= k and seen[b, k]\n")
    seen = torch.ones(2, kv_len, dtype=torch.bool)
    seen[1, 5:40] = False
    sizes = Sizes(B=2, H=1, HK=1, Q=q_len, KV=kv_len, D=16, DV=16, q_offset=start)
    for transposed in (False, True):
        of = (program, sizes, {"seen": seen})
        found, expected = listed(of, block, transposed), reference(of, block, transposed)
        assert_same(found, expected)
        rows, entries = found.list.rows, found.list.entries
        held = torch.zeros(entries.numel() + 1, dtype=torch.int64)
        for first, masked, full, last in rows.flatten(0, 2).tolist():
            assert first >= 0 and last < entries.numel() and masked + full <= last + 1 - first
            held[first : last + 1] += 1
        assert held.max() <= 1, "no two rows share an entry"
        assert entries.numel() < found.visits.numel() + (start > 0 or kv_len < q_len) and entries.dtype is torch.uint8
