"""Orders that data tells: which masks ask for one, and that a variant over sorted positions means what it meant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attn_dsl.frontend import load
from attn_dsl.ir.evaluate import Environment, evaluate
from attn_dsl.ir.infix import infix
from attn_dsl.ir.variant import Nondecreasing, Variant
from attn_dsl.passes import pipeline
from attn_dsl.passes.order_by_data import Sorted, sorts

HEADER = (
    "attention t(window: int = 9)\ntensor seg: int32[KV, B]\ntensor pos: float32[H, KV]\ntensor big: float32[B, KV]\n"
)


def variant_of(text: str) -> Variant:
    return pipeline.run(load(text), {}, stop_after="simplify").variant


def masked(mask: str) -> Variant:
    return variant_of(f"{HEADER}score = score + pos[h, k] - 0.5 * (q - k)\nmask = {mask}\n")


def test_hash_buckets_become_packed_sequences() -> None:
    (order,) = sorts(variant_of("hash_buckets"))
    made = order.reordered()
    assert infix(made.mask) == "sorted_bucket[b, h, q] == sorted_bucket[b, h, k] and k <= q"
    assert [(t.name, t.promises) for t in made.tensors] == [("sorted_bucket", (Nondecreasing(2),))]


@pytest.mark.parametrize(
    "mask",
    [
        "seg[q, b] != seg[k, b]",
        "seg[q, b] == seg[k, b] or q == k",
        "seg[q, b] == seg[k + 1, b]",
        "seg[q, b] == seg[k, 0]",
        "seg[q, 0] == seg[k, 0]",
        "big[b, q] == big[b, k]",
        "seg[q, b] == q",
    ],
)
def test_no_order_where_pairs_of_unlike_elements_may_count(mask: str) -> None:
    assert not list(sorts(masked(mask)))


def test_a_tensor_that_is_promised_to_be_sorted_asks_for_no_sort() -> None:
    assert not list(sorts(variant_of("document")))


@pytest.mark.parametrize("mask", ["q >= k", "q < k", "abs(q - k) < window", "q % 3 == k % 2", "q != k", "true"])
@pytest.mark.parametrize("seed", range(3))
def test_masks_and_scores_keep_their_meaning(mask: str, seed: int) -> None:
    (order,) = sorts(masked(f"seg[q, b] == seg[k, b] and {mask}"))
    generator = torch.Generator().manual_seed(seed)
    length, b, h = 23, 1, 2
    seg = torch.randint(-2, 4, (length, 2), generator=generator, dtype=torch.int32)
    tensors = {"seg": seg, "pos": torch.randn(3, length, generator=generator), "big": torch.zeros(2, length)}
    elements, places = torch.sort(seg, dim=0, stable=True)
    made = order.reordered()
    moved = tensors | {order.sorted_name: elements, order.order_name: places.int()}
    at = places[:, b]
    for name in ("mask", "score"):
        before = values(order, order.variant, name, tensors, length, b, h)
        after = values(order, made, name, moved, length, b, h)
        kept = values(order, order.variant, "mask", tensors, length, b, h)[at][:, at]
        found = after if name == "mask" else torch.where(kept, after, 0.0)
        wanted = before[at][:, at] if name == "mask" else torch.where(kept, before[at][:, at], 0.0)
        assert torch.equal(found, wanted)


def values(
    order: Sorted, variant: Variant, name: str, tensors: dict[str, Tensor], length: int, b: int, h: int
) -> Tensor:
    line = torch.arange(length)
    env = Environment(
        indices={"b": torch.tensor(b), "h": torch.tensor(h), "hk": torch.tensor(h), "q": line[:, None], "k": line},
        parameters={"window": 9},
        sizes={"B": 2, "H": 3, "HK": 3, "Q": length, "KV": length, "D": 1},
        tensors={tensor.name: tensors[tensor.name] for tensor in variant.tensors},
        score=torch.zeros(length, length),
    )
    return evaluate(getattr(variant, name), env).expand(length, length)


def test_names_of_the_variant_are_not_taken_twice() -> None:
    text = "attention t(sorted_seg: int)\ntensor seg: int32[KV]\nmask = seg[q] == seg[k] and q - k < sorted_seg\n"
    (order,) = sorts(variant_of(text))
    assert order.sorted_name == "sorted_seg_" and order.order_name == "order_seg"
