"""Orders that data tells: which masks ask for one, and that a variant over sorted positions means what it meant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attn_dsl.backend import sorting
from attn_dsl.frontend import load
from attn_dsl.ir.evaluate import Environment, evaluate
from attn_dsl.ir.infix import infix
from attn_dsl.ir.nodes import K, Q
from attn_dsl.ir.variant import Variant
from attn_dsl.passes import pipeline
from attn_dsl.passes.order_by_data import BLOCK, ENDS, Sorted, sorts

HEADER = (
    "attention t(window: int = 9)\ntensor seg: int32[KV, B]\ntensor pos: float32[H, KV]\ntensor big: float32[B, KV]\n"
)


def variant_of(text: str) -> Variant:
    return pipeline.run(load(text), {}, stop_after="simplify").variant


def masked(mask: str) -> Variant:
    return variant_of(f"{HEADER}score = score + pos[h, k] - 0.5 * (q - k)\nmask = {mask}\n")


def test_hash_buckets_become_packed_sequences() -> None:
    (order,) = sorts(variant_of("hash_buckets"))
    assert infix(order.shown) == "k <= q and first_bucket[b, h, q] <= k"
    for side, end in ((Q, "first"), (K, "last")):
        made = order.reordered(side)
        assert [t.name for t in made.tensors] == [f"{end}_bucket", f"{end}_bucket_by_block"], (
            "the other end says nothing"
        )


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
    for side in (Q, K):
        made = order.reordered(side)
        known = sorting.sort(order, seg, [tensor.name for tensor in made.tensors])
        at = known.order[:, b]
        moved = tensors | sorting.read(order, seg, known, [tensor.name for tensor in made.tensors])
        for name in ("mask", "score"):
            before = values(order, order.variant, name, tensors, length, b, h)
            after = values(order, made, name, moved, length, b, h)
            kept = values(order, order.variant, "mask", tensors, length, b, h)[at][:, at]
            found = after if name == "mask" else torch.where(kept, after, 0.0)
            wanted = before[at][:, at] if name == "mask" else torch.where(kept, before[at][:, at], 0.0)
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("length", [1, 255, 256, 257, 700])
def test_ends_of_runs_are_told_by_eight_bits_and_blocks(length: int) -> None:
    (order,) = sorts(variant_of("hash_buckets"))
    generator = torch.Generator().manual_seed(length)
    for values_of in (1, 3, length):
        elements = torch.randint(0, values_of, (2, length), generator=generator).sort(-1).values
        place = torch.arange(length)
        same = elements[:, :, None] == elements[:, None, :]
        wanted = {"first": torch.where(same, place, length).amin(-1), "last": torch.where(same, place, -1).amax(-1)}
        for end in ENDS:
            codes, blocks = sorting.encoded(end, wanted[end])
            assert codes.dtype is torch.uint8 and blocks.shape == (2, -(-length // BLOCK))
            named = dict(zip(order.end_names[end], (codes, blocks), strict=True))
            env = Environment(
                indices={"b": torch.zeros(1, dtype=torch.long), "h": torch.tensor([[0], [1]]), "q": place}, sizes={},
                parameters={}, tensors={name: x[None] for name, x in named.items()},
            )  # fmt: skip
            assert torch.equal(evaluate(order.end(end, Q), env).expand(2, -1), wanted[end])


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
    text = "attention t(first_seg: int)\ntensor seg: int32[KV]\nmask = seg[q] == seg[k] and q - k < first_seg\n"
    (order,) = sorts(variant_of(text))
    assert order.end_names["first"] == ("first_seg_", "first_seg_by_block") and order.order_name == "order_seg"
