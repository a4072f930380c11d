"""Schedules that a caller holds, on the CPU, where nothing is stored; `tests/gpu/test_lists.py` has the rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attn_dsl
from attn_dsl.errors import BindingError


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.randn(3, 2, 4, 20, 8)
    return query, key, value


def documents() -> Tensor:
    return torch.arange(20, dtype=torch.int32).div(7, rounding_mode="floor").repeat(2, 1)


def test_a_call_takes_the_schedule_of_its_tensors() -> None:
    attention, given, doc = attn_dsl.compile("packed_causal"), inputs(), documents()
    schedule = attention.schedule(*given, doc=doc)
    assert schedule.bytes == 0 and "closed form" in schedule.text()
    assert torch.equal(attention(*given, doc=doc, schedule=schedule), attention(*given, doc=doc))


def test_a_schedule_for_something_else_is_refused() -> None:
    attention, given, doc = attn_dsl.compile("packed_causal"), inputs(), documents()
    schedule = attention.schedule(*given, doc=doc)
    with pytest.raises(BindingError, match="another `doc`"):
        attention(*given, doc=doc.clone(), schedule=schedule)
    with pytest.raises(BindingError, match="another `q_offset`"):
        attention(*given, doc=doc, q_offset=3, schedule=schedule)
    with pytest.raises(BindingError, match="another `Q`"):
        attention(given[0][:, :, :5], *given[1:], doc=doc, schedule=schedule)
    with pytest.raises(BindingError, match="made for `packed_causal`"):
        attn_dsl.compile("document")(*given, doc=doc, schedule=schedule)
    doc[0, 3] = 0
    with pytest.raises(BindingError, match="held before"):
        attention(*given, doc=doc, schedule=schedule)


def test_tensors_that_the_mask_does_not_read_may_change() -> None:
    attention = attn_dsl.compile(
        "attention biased\ntensor bias: float32[H]\nscore = score + bias[h] * k\nmask = q >= k\n"
    )
    given, bias = inputs(), torch.randn(4)
    schedule = attention.schedule(*given, bias=bias)
    bias.add_(1.0)
    attention(*given, bias=bias, schedule=schedule)
    attention(*given, bias=torch.randn(4), schedule=schedule)


def test_promises_are_checked_on_request() -> None:
    attention, given, doc = attn_dsl.compile("packed_causal"), inputs(), documents()
    with pytest.raises(BindingError, match="nondecreasing"):
        attention.schedule(*given, doc=doc.flip(-1), validate=True)
