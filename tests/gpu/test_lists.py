"""Data-dependent masks on a GPU: lists of tiles beside every pair, and calls that find, hold and forget them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_support import within_budget
from list_support import listed, reference
from portable_support import Problem, differentiated
from torch import Tensor
from variant_cases import Case, Sizes

import attn_dsl
from attn_dsl.backend.kept import Holder
from attn_dsl.errors import BindingError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("one_length"),
]

LONG = Sizes(B=2, H=4, HK=2, Q=900, KV=900, D=128, DV=128)
CONST = frozenset({"random"})


def name_of(case: Case) -> str:
    return f"{case.id}-{case.parameters.get('block', '')}-{case.sizes.D}"


def bigbird(block: int, **sizes: int) -> Case:
    return Case("bigbird", {"block": block, "reach": 1, "globals": 1, "random": 2}, replace(LONG, **sizes), CONST)


READING = [
    Case("document", {}, LONG),
    Case("packed_causal", {}, replace(LONG, Q=400, q_offset=500)),
    Case("shared_prefix", {"prefix": 200}, LONG),
    Case("tree", {}, LONG),
    Case("hash_buckets", {}, LONG),
    bigbird(64),
    bigbird(128),
    bigbird(50),
    bigbird(64, Q=448, q_offset=448),
    bigbird(64, D=64, DV=64),
    Case("tree", {}, replace(LONG, D=64, DV=64)),
]


@pytest.mark.parametrize("case", READING, ids=name_of)
def test_masks_of_many_tiles_stay_within_the_error_budget(case: Case) -> None:
    problem = Problem.of(case, torch.bfloat16, "cuda")
    upstream = problem.upstream()
    truth, eager = problem.truth(upstream), problem.truth(upstream, torch.bfloat16)
    leaves, bindings = problem.leaves()
    inputs = leaves["query"], leaves["key"], leaves["value"]
    attention = attn_dsl.compile(case.name, **case.constants)
    out, lse = attention(*inputs, q_offset=problem.q_offset, return_lse=True, **bindings)
    within_budget(differentiated(out, lse, leaves, upstream), truth, eager, 1.1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", READING, ids=name_of)
def test_lists_hold_what_the_claims_keep(case: Case, transposed: bool) -> None:
    block = (128, 64) if transposed else (192, 64)
    found, expected = listed(case, block, transposed, device="cuda"), reference(case, block, transposed)
    assert torch.equal(found.visits, expected[0].long()) and torch.equal(found.full, expected[1] & expected[0])


@pytest.fixture
def documents() -> tuple[attn_dsl.Attention, tuple[Tensor, ...], Tensor, Tensor]:
    """(attention, inputs, a document tensor, another one)."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (2, 4, 1000, 128)
    inputs = tuple(torch.randn(shape, device="cuda", generator=generator).to(torch.bfloat16) for _ in range(3))
    first, second = (
        torch.randint(0, n, (2, 1000), device="cuda", generator=generator, dtype=torch.int32).sort(-1).values
        for n in (5, 9)
    )
    return attn_dsl.compile("packed_causal"), inputs, first.contiguous(), second.contiguous()


def test_a_change_in_place_is_noticed(documents: Any) -> None:
    attention, inputs, doc, other = documents
    before, expected = attention(*inputs, doc=doc), attention(*inputs, doc=other)
    assert torch.equal(attention(*inputs, doc=doc), before)
    doc.copy_(other)
    assert torch.equal(attention(*inputs, doc=doc), expected)


def test_a_new_tensor_at_the_same_address_is_another(documents: Any) -> None:
    attention, inputs, doc, other = documents
    expected = attention(*inputs, doc=other)
    for source in (doc, other, doc, other):
        given = source.clone()
        out = attention(*inputs, doc=given)
        assert torch.equal(out, expected) == (source is other)
        del given


def test_a_graph_without_a_schedule_follows_its_tensors(documents: Any) -> None:
    attention, inputs, doc, other = documents
    expected = attention(*inputs, doc=other)
    attention(*inputs, doc=doc)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(*inputs, doc=doc)
    doc.copy_(other)
    graph.replay()
    assert torch.equal(out, expected)


def test_a_schedule_is_held_by_who_captures_a_graph(documents: Any) -> None:
    attention, inputs, doc, other = documents
    expected = attention(*inputs, doc=doc)
    schedule = attention.schedule(*inputs, doc=doc)
    assert 0 < schedule.bytes < 2**20 and "masked" in schedule.text()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(*inputs, doc=doc, schedule=schedule)
    for _ in range(100):  # what was made before is forgotten by all but the schedule
        attention(*inputs, doc=other.clone())
    graph.replay()
    assert torch.equal(out, expected)
    with pytest.raises(BindingError, match="another `doc`"):
        attention(*inputs, doc=other, schedule=schedule)
    doc.add_(0)
    with pytest.raises(BindingError, match="held before"):
        attention(*inputs, doc=doc, schedule=schedule)


def test_layers_share_a_list(documents: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, inputs, doc, _ = documents
    leaf = inputs[0].clone().requires_grad_()
    attention(leaf, *inputs[1:], doc=doc).sum().backward()  # compiles what there is to compile
    lists = attention._executable.kernels.lists
    made: list[Any] = []
    make = lists.make
    monkeypatch.setattr(lists, "make", lambda *arguments: made.append(arguments) or make(*arguments))
    doc = doc.clone()
    for _ in range(3):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        attention(*leaves, doc=doc).sum().backward()
    assert len(made) == 2, "one for the forward pass, one for the backward"


def test_a_long_mask_is_scheduled_in_little_time_and_memory() -> None:
    length = 2**20
    query = torch.empty(1, 1, length, 64, device="cuda", dtype=torch.bfloat16)
    doc = (torch.arange(length, device="cuda", dtype=torch.int32) // 10000).view(1, -1)
    attention = attn_dsl.compile("packed_causal")
    holder = Holder()
    with holder.active():
        attention(query, query, query, doc=doc)
    assert 0 < holder.bytes < 2**26
