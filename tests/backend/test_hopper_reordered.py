"""Calls in another order of positions by the Hopper kernels, in the interpreter of Gluon: the first of their kind, and
those that are repeated."""

from __future__ import annotations

import os
import zlib
from dataclasses import replace

import pytest
import torch
from gluon_interpreter import Machine
from gpu_support import SEGMENTS, within_budget
from hopper_on_cpu import take_over
from portable_support import Problem, differentiated, program_of
from torch import Tensor

import attn_dsl
from attn_dsl.backend import gpu, operators, order, replay
from attn_dsl.backend.execute import HOPPER, Options, portable_call
from attn_dsl.backend.hopper import launch, launch_boxes
from attn_dsl.backend.layouts import Classes, Grid, Permutation
from attn_dsl.backend.replay_order import Forward

INPUTS = ("query", "key", "value")


@pytest.fixture(autouse=True)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine(zlib.crc32(request.node.name.encode()) + int(os.environ.get("SEED", "0")))
    take_over(monkeypatch, found)
    monkeypatch.setattr(order, "GAIN", 100.0)
    monkeypatch.setattr(order, "SHORT", 1)
    for name in ("hash_buckets", SEGMENTS, "dilated_window", "natten2d"):
        program_of(name).choices.clear()
        program_of(name).strips_of_keys.clear()
    return found


def rows(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(batch, heads, length, dim, generator=torch.Generator().manual_seed(length + heads)).to(dtype)


def agree(problem: Problem, layout: type, **options: bool) -> None:
    """By the first call of a kind, and by those that are repeated."""
    upstream, chosen, program = problem.upstream(), Options(HOPPER, **options), problem.program
    truth, eager = problem.truth(upstream), problem.truth(upstream, problem.query.dtype)
    for repeats in (False, True):
        leaves, bindings = problem.leaves()
        call = program.binder.bind(*(leaves[name] for name in INPUTS), None, 0, bindings)
        found = order.ordered(program, call, chosen)
        assert found is not None and isinstance(found.layout, layout)
        if not repeats:
            within_budget(
                differentiated(*operators.attention(program, call, chosen), leaves, upstream), truth, eager, 1.1
            )
            continue
        forward = replay._forward(program, call, chosen)
        assert isinstance(forward, Forward)
        repeated = replay.Differentiable.of(program, call, chosen, forward)
        assert repeated is not None
        for _ in range(2):
            leaves, bindings = problem.leaves()
            tensors = [bindings[name] for name in program.tensor_names]
            results = repeated.run(*(leaves[name] for name in INPUTS), tensors, 0)
            within_budget(differentiated(*results, leaves, upstream), truth, eager, 1.1)


@pytest.mark.parametrize(
    ("batch", "heads", "length", "dim", "dtype"),
    [
        (1, 2, 300, 64, torch.bfloat16),
        (2, 1, 140, 64, torch.bfloat16),
        (2, 2, 200, 128, torch.bfloat16),
        (1, 2, 129, 80, torch.float16),
    ],
)
def test_hash_buckets(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    bucket = torch.randint(0, 5, (batch, heads, length), generator=generator, dtype=torch.int32)
    inputs = (rows(batch, heads, length, dim, dtype) for _ in range(3))
    agree(Problem(program_of("hash_buckets"), *inputs, {"bucket": bucket}), Permutation)


def test_heads_that_share_an_order_with_a_term_of_rows() -> None:
    query, key, value = (rows(2, heads, 150, 64).transpose(1, 2).contiguous().transpose(1, 2) for heads in (4, 2, 2))
    segment = torch.randint(0, 4, (2, 150), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    bias = torch.randn(4, 150, generator=torch.Generator().manual_seed(2))
    agree(Problem(program_of(SEGMENTS), query, key, value, {"segment": segment, "bias": bias}), Permutation)


@pytest.mark.parametrize("repeats", [False, True])
def test_a_forward_pass_finds_rows_and_puts_them_back_without_another_launch(
    repeats: bool, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    run = machine.run
    monkeypatch.setattr(machine, "run", lambda kernel, *given: (names.append(kernel.__name__), run(kernel, *given))[1])
    program, x = program_of("hash_buckets"), rows(1, 2, 200, 64)
    bucket = torch.randint(0, 5, (1, 2, 200), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    call = program.binder.bind(x, x, x, None, 0, {"bucket": bucket})
    if repeats:
        forward = replay._forward(program, call, Options(HOPPER))
        assert forward is not None
        forward.run(x, x, x, [bucket], 0)
    else:
        operators.attention(program, call, Options(HOPPER))
    assert "permute_rows" not in names and names[-1] == "attention_forward"


@pytest.mark.parametrize(
    ("name", "batch", "heads", "length", "dims", "dtype", "shared"),
    [
        ("causal", 2, 3, 200, (64, 64), torch.bfloat16, (2, 3)),
        ("causal", 2, 2, 257, (128, 128), torch.bfloat16, (1, 2)),
        ("causal", 2, 2, 65, (96, 80), torch.float16, (2, 1)),
        ("noop", 1, 2, 130, (128, 192), torch.bfloat16, (1, 1)),
        ("noop", 1, 2, 192, (256, 256), torch.float16, (1, 2)),
        (SEGMENTS, 2, 2, 190, (64, 64), torch.float16, (2, 2)),
        ("causal", 1, 1, 700, (64, 64), torch.bfloat16, (1, 1)),
    ],
)
def test_rows_are_read_and_written_where_they_are_to_the_last_bit(
    name: str, batch: int, heads: int, length: int, dims: tuple[int, int], dtype: torch.dtype, shared: tuple[int, int]
) -> None:
    query, key, value = (rows(batch, heads, length, dim, dtype) for dim in (dims[0], *dims))
    key = (key * torch.arange(length).view(-1, 1) / 64).to(dtype)  # so that long rows need their tiles twice
    generator = torch.Generator().manual_seed(length)
    tensors = {
        "segment": torch.randint(0, 3, (batch, length), generator=generator, dtype=torch.int32),
        "bias": torch.randn(heads, length, generator=generator),
    }
    program = program_of(name)
    bindings = {tensor.name: tensors[tensor.name] for tensor in program.variant.tensors}
    call = portable_call(program, program.binder.bind(query, key, value, None, 0, bindings), Options(HOPPER))
    config = program.hopper.choice(call).config
    here = launch.forward(program.hopper, call, config=config)
    for kind, strided in ((torch.int16, False), (torch.int64, True)):
        of_queries, of_keys = (torch.rand(*shared, length, generator=generator).argsort(-1) for _ in range(2))
        moved = [x.new_empty(batch, length, heads, x.shape[3]).transpose(1, 2) for x in (query, key, value)]
        for x, y, places in zip(moved, (query, key, value), (of_queries, of_keys, of_keys), strict=True):
            x.scatter_(2, places.expand(batch, heads, length).unsqueeze(-1).expand(y.shape), y)
        caller = dict(zip(INPUTS, moved if strided else [x.contiguous() for x in moved], strict=True))
        order_of_rows = of_queries.to(kind), of_keys.to(kind)
        moved_call = replace(call, **caller, rows=order_of_rows)
        there = launch.forward(program.hopper, moved_call, config=config)
        assert (there[2] is there[1]) is (here[2] is here[1])
        for x, y in zip(here, there, strict=True):
            index = of_queries.expand(batch, heads, length)
            back = y.gather(2, index if y.dim() == 3 else index.unsqueeze(-1).expand(y.shape))
            assert torch.equal(x, back)


def test_rows_that_cannot_be_copied_16_bytes_at_a_time_are_copied_before() -> None:
    program, (heads, length, dim) = program_of("hash_buckets"), (2, 140, 64)
    query, key, value = (rows(1, n, length, dim) for n in (heads, 1, heads))
    bucket = torch.randint(0, 3, (1, heads, length), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    apart = torch.empty(query.numel() + 1, dtype=query.dtype)[1:].view(query.shape).copy_(query)
    wide = torch.empty(1, heads, length, dim + 1, dtype=value.dtype)[..., 1:].copy_(value)
    odd, even = (apart, key.expand_as(query), wide), (query, key.expand_as(query).contiguous(), value)
    found: list[tuple[Tensor, ...]] = []
    for inputs in (even, odd):
        call = program.binder.bind(*inputs, None, 0, {"bucket": bucket})
        found.append(operators.attention(program, call, Options(HOPPER)))
        repeated = replay._forward(program, call, Options(HOPPER))
        assert repeated is not None
        found.append(repeated.run(*inputs, [bucket], 0))
    for results in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results, found[0], strict=True))


@pytest.mark.parametrize(("batch", "heads", "kv_heads", "length"), [(1, 2, 1, 200), (2, 1, 1, 129)])
def test_a_dilated_window(batch: int, heads: int, kv_heads: int, length: int) -> None:
    inputs = rows(batch, heads, length, 64), *(rows(batch, kv_heads, length, 64) for _ in range(2))
    agree(Problem(program_of("dilated_window"), *inputs, {"window": 150, "dilation": 3}), Classes)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "width", "height", "radius", "by_strips", "deterministic"),
    [
        (1, 1, 1, 20, 14, 3, False, False),
        (1, 2, 2, 20, 14, 3, True, False),
        (1, 1, 1, 20, 14, 3, True, True),
        (2, 2, 1, 21, 9, 2, True, False),
    ],
)
def test_a_neighborhood_in_boxes_of_a_grid(
    batch: int,
    heads: int,
    kv_heads: int,
    width: int,
    height: int,
    radius: int,
    by_strips: bool,
    deterministic: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(order, "BY_STRIPS_OF_KEYS", by_strips)
    if heads != kv_heads:  # the backward pass takes batch entries one after the other
        monkeypatch.setattr(launch_boxes, "SUMS", 1)
    inputs = rows(batch, heads, width * height, 64), *(rows(batch, kv_heads, width * height, 64) for _ in range(2))
    problem = Problem(program_of("natten2d"), *inputs, {"width": width, "height": height, "r": radius})
    agree(problem, Grid, deterministic=deterministic)
    call = problem.program.binder.bind(*inputs, None, 0, problem.bindings)
    options = Options(HOPPER, deterministic=deterministic)
    assert (order.strips_of_keys(problem.program, call, options) is not None) is by_strips


def test_explain_says_which_order_was_taken_and_why() -> None:
    query = rows(1, 2, 300, 64)
    bucket, cut = torch.zeros(1, 2, 300, dtype=torch.int32), query[:, :, :-1]
    given = {
        "hash_buckets": (
            {"bucket": bucket},
            query,
            "sorted by `bucket`, since pairs with unlike elements are not kept",
        ),
        "dilated_window": ({"window": 64, "dilation": 3}, query, "3 residue classes of `dilation`: "),
        "natten2d": ({"width": 20, "height": 15, "r": 2}, query, "2 strips of the grid of `width` columns"),
    }
    copied = {"hash_buckets": "`query`, `key`, `value` copied"}
    for name, (bindings, x, why) in given.items():
        attention = attn_dsl.compile(name)
        text = gpu.explain(attention._program, attention._binder.bind(x, x, x, None, 0, bindings))
        first = text.splitlines()[0]
        assert first.startswith("order      ") and why.replace("`", "") in first.replace("`", ""), first
        assert copied.get(name, "nothing copied") in first
        assert "backend    hopper" in text and "backward   " in text
    attention = attn_dsl.compile("hash_buckets")
    other = attention._binder.bind(cut, query, query, None, 1, {"bucket": bucket})
    assert "as given" in gpu.explain(attention._program, other).splitlines()[0]
