"""Masks as intervals of keys: equal to the mask pair by pair, and found where there is one."""

from __future__ import annotations

import random

import pytest
import torch

from attn_dsl.backend.hopper.bounds import bounds, box_bounds, column_bounds
from attn_dsl.frontend import load
from attn_dsl.ir.evaluate import Environment, evaluate
from attn_dsl.ir.infix import infix
from attn_dsl.ir.nodes import TRUE, Node
from attn_dsl.passes import pipeline
from tests.passes.random_masks import RandomMask

FOUND = {
    "q >= k": (None, "q"),
    "q > k": (None, "q - 1"),
    "k < n": (None, "n - 1"),
    "0 <= q - k < n": ("q - n + 1", "q"),
    "abs(q - k) <= n": ("q - n", "q + n"),
    "abs(k - q) < n": ("-n + q + 1", "n + q - 1"),
    "q >= k or k < n": (None, "max(q, n - 1)"),
    "k >= n or k + 3 > q": ("min(n, q - 2)", None),
    "q - 2 == k": ("q - 2", "q - 2"),
    "k >= 5 or q > 7": ("0 if 7 < q else 5", None),
}
REST = [
    "q >= 2 * k",
    "(q - k) % 3 == 0",
    "k != q",
    "abs(q - k) >= n",
    "q >= k or q + 3 < k",
    "(q - k) % 3 == 0 or q > 7",
]


def masks(text: str) -> Node:
    return pipeline.run(load(f"attention a(n: int = 4)\nmask = {text}\n"), stop_after="simplify").variant.mask


def agree(mask: Node, parameters: dict[str, int | bool]) -> None:
    length = 24
    q, k = torch.arange(length)[:, None] + 3, torch.arange(length)[None, :]
    env = Environment(indices={"q": q, "k": k}, parameters=parameters, sizes={"KV": length, "Q": length})
    seen, rest = bounds(mask)
    found = evaluate(rest, env).expand(length, length)
    inside = torch.ones(length, length, dtype=torch.bool)
    if seen.low is not None:
        inside = inside & (evaluate(seen.low, env) <= k)
    if seen.high is not None:
        inside = inside & (k <= evaluate(seen.high, env))
    if seen.head is not None:
        inside = inside | (k <= evaluate(seen.head, env))
    found = found & inside
    for bound in (seen.low, seen.high, seen.head):
        assert bound is None or "k" not in bound.depends
    assert torch.equal(found, evaluate(mask, env).expand(length, length)), infix(mask)


@pytest.mark.parametrize("text", FOUND)
def test_an_interval_is_found(text: str) -> None:
    mask = masks(text)
    seen, rest = bounds(mask)
    low, high = FOUND[text]
    assert rest is TRUE
    for bound, expected in ((seen.low, low), (seen.high, high)):
        assert (bound is None) == (expected is None)
    for n in (-3, 0, 4, 50):
        agree(mask, {"n": n})
    assert [None if x is None else infix(x) for x in (seen.low, seen.high)] == [low, high]


@pytest.mark.parametrize("text", REST)
def test_what_is_no_interval_stays_a_mask_of_pairs(text: str) -> None:
    mask = masks(text)
    seen, rest = bounds(mask)
    assert (seen.low, seen.high, rest) == (None, None, mask)


@pytest.mark.parametrize(
    "text",
    [
        "abs(q - k) <= 2 or k < n",
        "abs(q - k) <= 2 or k < n or q < n",
        "(abs(q - k) <= 2 or k < n) and q >= k",
        "0 <= q - k < 3 or q % 5 == 0 or k < 2 or k < n",
    ],
)
def test_an_interval_and_all_before_a_key(text: str) -> None:
    mask = masks(text)
    seen, rest = bounds(mask)
    assert seen.low is not None and seen.high is not None and seen.head is not None and rest is TRUE
    for n in (-3, 0, 1, 4, 50):
        agree(mask, {"n": n})


@pytest.mark.parametrize("text", ["k % 8 <= q % 4", "k % 8 >= n and q % 3 > k % 8 and q >= k", "n <= k % 8"])
def test_columns_of_a_box_have_bounds(text: str) -> None:
    mask, length = masks(text), 24
    found, rest = column_bounds(mask, 8)
    assert found is not None
    q, k = torch.arange(length)[:, None], torch.arange(length)[None, :]
    for n in (-3, 0, 4, 50):
        env = Environment(indices={"q": q, "k": k}, parameters={"n": n}, sizes={"KV": length, "Q": length})
        left, right = (evaluate(bound, env) for bound in found)
        kept = evaluate(rest, env).expand(length, length) & (left <= k % 8) & (k % 8 <= right)
        assert torch.equal(kept, evaluate(mask, env).expand(length, length))


BOXED = [
    "abs(clamp(q // 8 - 1, n, 9 - n) - k // 4) <= 2 and abs(clamp(q % 8 + 3, n, 7) - k % 4) <= n",
    "q // 8 >= k % 3 and k < q % 8 and 8 <= q and k % 3 != n",
    "min(q // 8, k % 3) >= n and max(q % 8, k % 5) < 4 and max(n - q % 8, k % 7) > 2",
    "(q - k) % 3 == 0 and q // 8 + n > k // 8",
    "-max(3 - q // 8, n) >= k - 9",
]


@pytest.mark.parametrize("text", BOXED)
def test_queries_in_boxes_have_bounds(text: str) -> None:
    mask, length = masks(text), 48
    found, rest = box_bounds(mask, 8)
    assert "3 ==" in text or rest is TRUE
    q, k = torch.arange(length)[:, None], torch.arange(length)[None, :]
    for n in (-3, 0, 1, 2, 4, 50):
        env = Environment(indices={"q": q, "k": k}, parameters={"n": n}, sizes={"KV": length, "Q": length})
        low, high, left, right = (evaluate(x, env) for x in (found.low, found.high, found.left, found.right))
        kept = (low <= q) & (q <= high) & (left <= q % 8) & (q % 8 <= right) & evaluate(rest, env)
        assert torch.equal(kept.expand(length, length), evaluate(mask, env).expand(length, length)), (n, infix(mask))


def test_other_remainders_have_no_bounds() -> None:
    for text in ("k % 7 <= q", "k % 8 <= q - k", "k // 8 <= q"):
        assert column_bounds(masks(text), 8)[0] is None


def test_an_interval_beside_a_mask_of_pairs() -> None:
    mask = masks("q >= k and (q - k) % n == 0 and k >= q - 9")
    seen, rest = bounds(mask)
    assert seen.low is not None and seen.high is not None and rest is not TRUE
    agree(mask, {"n": 4})


@pytest.mark.parametrize("kind", ["affine", "boolean", "general"])
@pytest.mark.parametrize("seed", range(40))
def test_random_masks_are_their_bounds_and_the_rest(seed: int, kind: str) -> None:
    rng = random.Random(seed)
    mask = pipeline.run(RandomMask(rng).variant(kind), stop_after="simplify").variant.mask
    for _ in range(3):
        agree(mask, {"a": rng.randint(-9, 20), "w": rng.randint(1, 9), "flag": rng.random() < 0.5})
