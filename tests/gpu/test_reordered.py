"""Calls in another order of positions, on a GPU through the public API, against the evaluator: `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch
from gpu_support import SEGMENTS
from portable_support import Problem, assert_close, differentiated, program_of

import attn_dsl
from attn_dsl.backend import order, sorting
from attn_dsl.backend.execute import Options
from attn_dsl.backend.hopper import launch_boxes
from attn_dsl.backend.portable.launch_sort import sorted_positions
from attn_dsl.passes.order_by_data import BLOCK, ENDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("one_length"),
]


def rows(batch: int, heads: int, length: int, *, rows_first: bool = False, dim: int = 64) -> torch.Tensor:
    shape = (batch, length, heads, dim) if rows_first else (batch, heads, length, dim)
    x = torch.randn(shape, device="cuda").to(torch.bfloat16)
    return x.transpose(1, 2) if rows_first else x


def agrees(problem: Problem) -> None:
    attention = attn_dsl.compile(problem.program.variant.name)
    upstream = problem.upstream()
    leaves, bindings = problem.leaves()
    inputs = leaves["query"], leaves["key"], leaves["value"]
    assert "order      " in attention.explain(*inputs, q_offset=problem.q_offset, **bindings)
    out, lse = attention(*inputs, q_offset=problem.q_offset, return_lse=True, **bindings)
    truth = problem.truth(upstream)
    assert_close(differentiated(out, lse, leaves, upstream), truth, 3e-2)
    for _ in range(3):  # repeated: by what the first of these prepared, then by the tape that the second leaves
        leaves, bindings = problem.leaves()
        inputs = leaves["query"], leaves["key"], leaves["value"]
        again, lse = attention(*inputs, q_offset=problem.q_offset, return_lse=True, **bindings)
        assert torch.equal(again, out)
        assert_close(differentiated(again, lse, leaves, upstream), truth, 3e-2)
    with torch.no_grad():
        for _ in range(3):  # the second and third are replayed
            again = attention(*inputs, q_offset=problem.q_offset, **bindings)
            assert torch.equal(again, out)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "rows_first"),
    [
        (2, 4, 4, 1024, False),
        (2, 4, 2, 1024, True),
        (2, 4, 2, 1001, False),
        (2, 2, 2, 1001, False),
        (1, 4, 1, 999, True),
    ],
)
def test_a_dilated_window(batch: int, heads: int, kv_heads: int, length: int, rows_first: bool) -> None:
    query = rows(batch, heads, length, rows_first=rows_first)
    key, value = (rows(batch, kv_heads, length, rows_first=rows_first) for _ in range(2))
    agrees(Problem(program_of("dilated_window"), query, key, value, {"window": 600, "dilation": 4}))


@pytest.mark.parametrize(
    ("length", "dim", "rows_first"),
    [(1024, 64, False), (777, 64, True), (1024, 128, False), (777, 128, True), (900, 80, False), (600, 256, False),
     (16500, 64, False)],
)  # fmt: skip
def test_hash_buckets(length: int, dim: int, rows_first: bool) -> None:
    """Of more than 16384 positions, whose order is int32, with fewer heads."""
    batch, heads = (2, 4) if length < 10000 else (1, 1)
    inputs = (rows(batch, heads, length, dim=dim, rows_first=rows_first) for _ in range(3))
    bucket = torch.randint(0, 16, (batch, heads, length), device="cuda", dtype=torch.int32)
    agrees(Problem(program_of("hash_buckets"), *inputs, {"bucket": bucket}))


@pytest.mark.parametrize("dim", [64, 128])
def test_heads_that_share_an_order_with_a_term_of_rows(dim: int) -> None:
    query, key, value = (rows(2, heads, 1001, dim=dim) for heads in (4, 2, 2))
    attention = attn_dsl.compile(SEGMENTS)
    segment = torch.randint(0, 9, (2, 1001), device="cuda", dtype=torch.int32)
    bindings = {"segment": segment, "bias": torch.randn(4, 1001, device="cuda")}
    truth = Problem(program_of(SEGMENTS), query, key, value, bindings).truth()
    for _ in range(3):
        out, lse = attention(query, key, value, return_lse=True, **bindings)
        assert torch.allclose(out.double(), truth.out, atol=3e-2)
        assert torch.allclose(lse.double(), truth.lse, atol=3e-2)


def test_gradients_of_results_may_be_of_another_kind_in_each_call() -> None:
    attention = attn_dsl.compile("hash_buckets")
    bucket = torch.randint(0, 16, (2, 2, 600), device="cuda", dtype=torch.int32)
    leaves = [rows(2, 2, 600).requires_grad_() for _ in range(3)]
    dense, of_lse = rows(2, 2, 600), torch.randn(2, 2, 600, device="cuda")
    apart = torch.empty(2 * 2 * 600 * 64 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(2, 2, 600, 64).copy_(dense)
    kinds = [dense, dense.transpose(1, 2).contiguous().transpose(1, 2), apart]
    found = []
    for _ in range(3):  # the second prepares what the third repeats
        for grad_out in kinds:
            for given in ((grad_out,), (grad_out, of_lse)):
                results = attention(*leaves, bucket=bucket, return_lse=True)
                found.append(torch.autograd.grad(results[: len(given)], leaves, given))
    for i, grads in enumerate(found[2:]):
        for x, y in zip(grads, found[i % 2], strict=True):
            assert torch.allclose(x.float(), y.float(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("by_strips", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "height", "radius", "dim"),
    [(2, 2, 48, 40, 6, 128), (4, 2, 41, 33, 3, 64), (2, 2, 70, 40, 9, 128), (2, 1, 90, 35, 5, 128)],
)
def test_a_neighborhood_in_boxes_of_a_grid(
    heads: int,
    kv_heads: int,
    width: int,
    height: int,
    radius: int,
    dim: int,
    by_strips: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setattr(order, "GAIN", 100.0)
    monkeypatch.setattr(order, "BY_STRIPS_OF_KEYS", by_strips)
    if heads != kv_heads:  # the backward pass takes batch entries one after the other
        monkeypatch.setattr(launch_boxes, "SUMS", 1)
    query, key, value = (rows(2, h, width * height, dim=dim) for h in (heads, kv_heads, kv_heads))
    bindings = {"width": width, "height": height, "r": radius}
    program = program_of("natten2d")
    agrees(Problem(program, query, key, value, bindings))
    call = program.binder.bind(query, key, value, None, 0, bindings)
    assert (order.strips_of_keys(program, call, Options("gpu")) is not None) is by_strips


def test_a_bucket_that_changes_is_sorted_anew() -> None:
    attention = attn_dsl.compile("hash_buckets")
    query, key, value = (rows(1, 2, 1024) for _ in range(3))
    bucket = torch.randint(0, 16, (1, 2, 1024), device="cuda", dtype=torch.int32)
    attention(query, key, value, bucket=bucket)
    bucket.copy_(torch.randint(0, 16, (1, 2, 1024), device="cuda"))
    problem = Problem(program_of("hash_buckets"), query, key, value, {"bucket": bucket})
    out = attention(query, key, value, bucket=bucket)
    assert torch.allclose(out.double(), problem.truth().out, atol=3e-2)
    assert order.ordered(attention._executable, attention._binder.bind(query, key, value, None, 0, {"bucket": bucket}),
                         order.Options("gpu")) is not None  # fmt: skip


@pytest.mark.parametrize("length", [1000, 8192, 16384])
@pytest.mark.parametrize("span", [1, 64, 2**31 - 1])
def test_positions_are_sorted_by_kernels(length: int, span: int) -> None:
    bucket = torch.randint(0, span, (2, 3, length), device="cuda", dtype=torch.int32)
    elements, order_of = torch.sort(bucket, dim=-1, stable=True)
    found, ends = sorted_positions(bucket, BLOCK, ENDS)
    assert found is not None and torch.equal(found.long(), order_of)
    for end in ENDS:
        expected = sorting.encoded(end, sorting._places(end, elements))
        assert all(torch.equal(x, y) for x, y in zip(ends[end], expected, strict=True))


@pytest.mark.parametrize("held", [False, True])
def test_a_graph_sorts_for_itself_unless_a_schedule_is_held(held: bool) -> None:
    attention = attn_dsl.compile("hash_buckets")
    inputs = [rows(1, 2, 1024) for _ in range(3)]
    bucket, other = (torch.randint(0, 16, (1, 2, 1024), device="cuda", dtype=torch.int32) for _ in range(2))
    first, second = (attention(*inputs, bucket=x).clone() for x in (bucket, other))
    attention(*inputs, bucket=bucket)
    schedule = attention.schedule(*inputs, bucket=bucket) if held else None
    if schedule is not None:
        assert "positions sorted by `bucket`" in schedule.text()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(*inputs, bucket=bucket, schedule=schedule)
    for _ in range(100):  # what was made before is forgotten by all but the schedule
        attention(*inputs, bucket=other.clone())
    graph.replay()
    assert torch.equal(out, first)
    bucket.copy_(other)
    graph.replay()
    assert torch.equal(out, first if held else second)


def test_a_graph_replays_both_passes_over_strips_of_a_grid() -> None:
    attention, leaves = attn_dsl.compile("natten2d"), [rows(2, 2, 90 * 40, dim=128).requires_grad_() for _ in range(3)]
    upstream = rows(2, 2, 90 * 40, dim=128)

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(attention(*leaves, width=90, height=40, r=5), leaves, upstream)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            gradients()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    for a, b in zip(found, gradients(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)
