"""What is made of tensors is found again while they are as they were, and in CUDA graphs where somebody holds it."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from attn_dsl.backend import kept
from attn_dsl.backend.kept import Holder, Store

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@dataclass(frozen=True)
class Total:
    value: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.value,)

    @property
    def bytes(self) -> int:
        return self.value.nbytes

    def text(self) -> str:
        return f"total {int(self.value)}"


def total(store: Store[Total], x: Tensor, place: str = "here", device: torch.device = CPU) -> Total:
    return store.find((place,), (x,), device, lambda: Total(x.sum()))


def test_what_was_made_is_found_until_the_tensor_changes() -> None:
    store, x = Store[Total](), torch.ones(4)
    first = total(store, x)
    assert total(store, x) is first and total(store, x, "elsewhere") is not first
    x[0] = 5
    assert total(store, x) is not first and total(store, x).value == 8
    assert total(store, x.clone()) is not total(store, x)
    assert total(store, x[:2]) is not total(store, x), "a part of the same memory"


def test_what_is_made_does_not_keep_the_tensor_nor_outlive_it() -> None:
    store, x = Store[Total](), torch.ones(4)
    total(store, x)
    storage = kept._weak(x.untyped_storage())
    del x
    gc.collect()
    assert storage.expired()
    total(store, torch.zeros(2), "other")
    assert len(store._kept) == 1


def test_tensors_that_do_not_count_their_changes_are_read_each_time() -> None:
    with torch.inference_mode():
        store, x = Store[Total](), torch.ones(4)
        assert total(store, x) is not total(store, x)


def test_few_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "KEPT", 2)
    store, x = Store[Total](), torch.ones(4)
    first = total(store, x, "a")
    total(store, x, "b"), total(store, x, "c")
    assert len(store._kept) == 2 and total(store, x, "a") is not first


def test_a_graph_reads_what_is_held_and_makes_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    store, x, holder = Store[Total](), torch.ones(4), Holder()
    loose = total(store, x, "loose")
    with holder.active():
        held = total(store, x, "held")
    assert holder.bytes == 4 and [made.text() for made in holder.held.values()] == ["total 4"]
    before = dict(store._kept)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert total(store, x, "held", CUDA) is held
    assert total(store, x, "loose", CUDA) is not loose
    assert total(store, x, "new", CUDA) is not total(store, x, "new", CUDA)
    assert store._kept == before, "what a graph makes is the graph's"
    del holder
    gc.collect()
    assert total(store, x, "held", CUDA) is not held
