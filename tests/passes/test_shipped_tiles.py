"""The tiles of every shipped variant whose mask is affine, against an exhaustive look at every pair."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from variant_cases import SHIPPED

from attn_dsl.backend.counts import Call, count_kept, count_tiles
from attn_dsl.frontend import load
from attn_dsl.ir.evaluate import Environment, evaluate
from attn_dsl.ir.variant import Variant
from attn_dsl.report import report

READ_TENSORS_AT_POSITIONS = {"bigbird", "document", "hash_buckets", "packed_causal", "shared_prefix", "tree"}
NEIGHBORHOODS = {"natten2d", "natten3d"}
"""Of two or three nested coordinates: some empty tiles are not proved so, and are visited."""
AFFINE = [name for name in SHIPPED if name not in READ_TENSORS_AT_POSITIONS]
SHAPES = {1000: (10, 10, 10), 2048: (16, 16, 8), 4095: (15, 21, 13)}
WIDTHS = {1000: 40, 2048: 64, 4095: 65}
BLOCKS = ((128, 128), (64, 128), (128, 64))
ROWS = 8


def parameters(name: str, length: int) -> dict[str, int | float]:
    """Such that the mask has edges, whole tiles and holes at that length."""
    (x, y, z), width = SHAPES[length], WIDTHS[length]
    return {
        "prefix_lm": {"prefix": 300},
        "longformer": {"reach": 150, "globals": 40},
        "sliding_window": {"window": 400},
        "gemma2_local": {"window": 333},
        "gpt_oss": {"window": 128},
        "dilated_window": {"window": 700, "dilation": 4},
        "sparse_strided": {"stride": 160},
        "sparse_fixed": {"stride": 200, "summary": 24},
        "natten1d": {"r": 100},
        "natten2d": {"width": width, "height": length // width, "r": 3},
        "natten3d": {"width": x, "height": y, "depth": z, "r": 2},
        "block_diffusion": {"length": length // 2, "block": 50},
    }.get(name, {})


def tensors(variant: Variant, length: int) -> dict[str, Tensor]:
    return {"length": torch.tensor([length - 77])} if variant.name == "padded" else {}


def dense(call: Call) -> Tensor:
    """The mask of one head, bool [Q, KV], some rows at a time."""
    zero, k = torch.zeros((), dtype=torch.int64), torch.arange(call.kv_len)[None, :]
    found = torch.empty(call.q_len, call.kv_len, dtype=torch.bool)
    for first in range(0, call.q_len, ROWS):
        q = torch.arange(first, min(first + ROWS, call.q_len))[:, None]
        env = Environment(
            indices={"b": zero, "h": zero, "q": q, "k": k},
            parameters=call.parameters,
            sizes={"Q": call.q_len, "KV": call.kv_len},
            tensors=call.tensors,
        )
        found[first : first + ROWS] = evaluate(call.variant.mask, env)
    return found


def tiles(mask: Tensor, block: tuple[int, int]) -> dict[str, int]:
    """Counts by looking at every pair."""
    counts = {"empty": 0, "partial": 0, "full": 0}
    for rows in mask.split(block[0]):
        for tile in rows.split(block[1], dim=1):
            counts["full" if bool(tile.all()) else "partial" if bool(tile.any()) else "empty"] += 1
    return counts


@pytest.mark.parametrize("length", SHAPES)
@pytest.mark.parametrize("name", AFFINE)
def test_the_counts_are_those_of_an_exhaustive_classification(name: str, length: int) -> None:
    variant = load(name)
    small = report(variant, 8, 8, parameters=parameters(name, length), tensors=tensors(variant, length))
    call = replace(small.call, q_len=length, kv_len=length)
    mask = dense(call)
    for block in BLOCKS:
        counted, expected = count_tiles(replace(call, block=block), small.schedule), tiles(mask, block)
        found = {kind: getattr(counted, kind) for kind in expected}
        if name in NEIGHBORHOODS:
            assert found["full"] == expected["full"] and expected["partial"] <= found["partial"], block
            assert found["partial"] <= 1.3 * expected["partial"], block
        else:
            assert found == expected, block
    if length == 1000:
        assert count_kept(call, small.proof, small.schedule, count_tiles(call, small.schedule)) == int(mask.sum())


def test_causal_at_2048_has_16_partial_120_full_and_120_empty_tiles() -> None:
    counted = report(load("causal"), 2048, 2048).tiles
    assert counted is not None
    assert (counted.partial, counted.full, counted.empty) == (16, 120, 120)
