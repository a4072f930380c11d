"""Leading tiles that see, or are seen by, everything: as many as the mask says, and none where it says nothing."""

from __future__ import annotations

import pytest

from attn_dsl.frontend import load
from attn_dsl.passes import pipeline
from attn_dsl.passes.leading import leading, leading_tiles

SIZES = {"B": 1, "H": 1, "HK": 1, "Q": 1000, "KV": 1000, "D": 64}


def tiles(text: str, axis: str, n: int, block: int = 128, q_offset: int = 0) -> int | None:
    source = f"attention a(n: int = 4)\ntensor seen: int32[KV]\nmask = {text}\n"
    variant = pipeline.run(load(source), stop_after="simplify").variant
    end = leading(variant, axis)
    return None if end is None else leading_tiles(end, block, q_offset, SIZES, {"n": n})


@pytest.mark.parametrize("n", [-5, 0, 1, 64, 128, 129, 999, 5000])
def test_global_positions_are_in_the_first_tiles(n: int) -> None:
    expected = max(0, -(-min(n, 1000) // 128))
    text = "abs(q - k) <= 9 or k < n or q < n"
    assert tiles(text, "q", n) == expected
    assert tiles(text, "k", n) == expected


def test_blocks_of_positions_count_as_positions() -> None:
    assert tiles("abs(q - k) <= 9 or q // 64 < n", "q", 3, block=64) == 3
    assert tiles("abs(q - k) <= 9 or q // 64 < n", "q", 3, block=128) == 2


def test_a_later_first_query_has_fewer_tiles_before_the_end() -> None:
    assert tiles("q >= k or q < n", "q", 300, q_offset=200) == 1


@pytest.mark.parametrize(
    "text", ["q >= k", "q >= k and q < n", "q >= k or q >= n", "q >= k or seen[k] == 3", "q >= k or q == n"]
)
def test_other_masks_have_no_leading_tiles(text: str) -> None:
    for axis in ("q", "k"):
        assert not tiles(text, axis, 5)
