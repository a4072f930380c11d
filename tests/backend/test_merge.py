"""Merging partial results: equal to attention over all keys, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attn_dsl.backend.merge import merge
from attn_dsl.errors import BindingError


def attend(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    logits = torch.where(keep, query @ key.mT, -math.inf)
    lse = logits.logsumexp(-1)
    weights = torch.where(keep, torch.exp(logits - lse.clamp(min=-1e30).unsqueeze(-1)), 0.0)
    return weights @ value, lse


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 4, generator=generator, dtype=torch.float64) for n in (5, 9, 9))
    keep = torch.rand(2, 5, 9, generator=generator) < 0.5
    keep[0, 1] = False  # a row that sees nothing
    keep[0, 2, :3] = False  # a row that the first part does not see
    return query, key, value, keep


@pytest.mark.parametrize("cuts", [(9,), (3, 9), (3, 4, 9), (1, 2, 3, 4, 5, 6, 7, 8, 9)])
def test_parts_merge_into_the_whole(cuts: tuple[int, ...]) -> None:
    query, key, value, keep = inputs()
    key.requires_grad_()
    starts = (0, *cuts[:-1])
    parts = [attend(query, key[:, a:b], value[:, a:b], keep[:, :, a:b]) for a, b in zip(starts, cuts, strict=True)]
    out, lse = merge(*parts)
    whole, whole_lse = attend(query, key, value, keep)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, whole_lse)
    assert lse[0, 1] == -math.inf and not out[0, 1].any()


def test_gradients_flow_through_the_merge_and_stay_finite_where_nothing_is_seen() -> None:
    out = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    other = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    lse = torch.randn(3, 4, dtype=torch.float64)
    lse[0] = -math.inf
    lse_other = torch.randn(3, 4, dtype=torch.float64)
    lse_other[:2] = -math.inf
    lse, lse_other = lse.requires_grad_(), lse_other.requires_grad_()
    merged, total = merge((out, lse), (other, lse_other))
    loss = merged.sin().sum() + torch.where(total == -math.inf, 0.0, total).sum()
    for grad in torch.autograd.grad(loss, (out, other, lse, lse_other)):
        assert grad.isfinite().all()
    finite = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    outs = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b, x, y: merge((a, x), (b, y)), (*outs, *finite))


def test_half_precision_outputs_keep_their_dtype_and_are_summed_in_that_of_lse() -> None:
    out = torch.ones(2, 3, 4, dtype=torch.bfloat16)
    merged, lse = merge(*[(out, torch.zeros(2, 3))] * 300)
    assert merged.dtype is torch.bfloat16 and lse.dtype is torch.float32
    torch.testing.assert_close(merged, out)


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BindingError, match="part 1 is out"):
        merge((torch.zeros(2, 3, 4), torch.zeros(2, 3)), (torch.zeros(2, 5, 4), torch.zeros(2, 5)))
    with pytest.raises(BindingError, match="at least one"):
        merge()
