"""Masks by the runs of nondecreasing tensors, against the masks as written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attn_dsl.frontend import load
from attn_dsl.ir.infix import infix
from attn_dsl.ir.nodes import K, Load, Q, post_order
from attn_dsl.passes.runs import by_runs, runs_of
from attn_dsl.passes.simplify import simplify
from tests.passes.tiles import Grid

DECLARED = "tensor t: int32[KV] nondecreasing over KV\ntensor u: int32[KV]\n"
MASKS = (
    "t[q] == t[k]",
    "q >= k and t[q] == t[k]",
    "q <= k and t[q] == t[k]",
    "q > k and t[k] != t[q]",
    "q >= k and (k < 3 or t[q] == t[k])",
    "t[q] == t[k] and u[q] == u[k]",
    "not (q < k and t[q] == t[k])",
    "(t[q] == t[k] if q < 9 else q >= k) and q >= k",
    "q >= k or t[q] == t[k]",
)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("position", [Q, K], ids=["queries", "keys"])
def test_a_mask_by_runs_keeps_the_same_pairs(mask: str, position: object) -> None:
    variant = simplify(load(f"attention runs\n{DECLARED}mask = {mask}\n"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        length = 25
        t = torch.randint(0, 6, (length,), generator=generator, dtype=torch.int32).sort().values
        u = torch.randint(0, 3, (length,), generator=generator, dtype=torch.int32)
        runs = runs_of(variant)
        (own,) = runs
        rewritten = by_runs(variant, runs, position)  # type: ignore[arg-type]
        ends = {
            own.first.name: torch.searchsorted(t, t), own.last.name: torch.searchsorted(t, t, right=True) - 1
        }  # fmt: skip
        grid = Grid(variant, length, length, 4, 4, tensors={"t": t, "u": u})
        assert torch.equal(replace(grid, variant=rewritten, tensors={**grid.tensors, **ends}).dense(), grid.dense())
        loads = {node.tensor for node in post_order(rewritten.mask) if isinstance(node, Load)}
        assert "t" not in loads, infix(rewritten.mask)


def test_causal_documents_read_one_end_of_their_run() -> None:
    variant = simplify(load("packed_causal"))
    runs = runs_of(variant)
    for position, end in ((Q, "first"), (K, "last")):
        loads = [node for node in post_order(by_runs(variant, runs, position).mask) if isinstance(node, Load)]
        assert len(loads) == 1 and loads[0].tensor.startswith(end)


def test_without_the_promise_nothing_is_rewritten() -> None:
    variant = simplify(load("hash_buckets"))
    assert runs_of(variant) == () and by_runs(variant, (), Q) is variant
