"""Masks as intervals of keys: equal to the mask pair by pair, and found where there is one."""

from __future__ import annotations

import random

import pytest
import torch

from attn_dsl.backend.hopper.bounds import bounds
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
}
REST = ["q >= 2 * k", "(q - k) % 3 == 0", "k != q", "abs(q - k) >= n", "q >= k or q + 3 < k", "k >= 5 or q > 7"]


def masks(text: str) -> Node:
    return pipeline.run(load(f"attention a(n: int = 4)\nmask = {text}\n"), stop_after="simplify").variant.mask


def agree(mask: Node, parameters: dict[str, int | bool]) -> None:
    length = 24
    q, k = torch.arange(length)[:, None] + 3, torch.arange(length)[None, :]
    env = Environment(indices={"q": q, "k": k}, parameters=parameters, sizes={"KV": length, "Q": length})
    seen, rest = bounds(mask)
    found = evaluate(rest, env).expand(length, length)
    if seen.low is not None:
        found = found & (evaluate(seen.low, env) <= k)
    if seen.high is not None:
        found = found & (k <= evaluate(seen.high, env))
    for bound in (seen.low, seen.high):
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
