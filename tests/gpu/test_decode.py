"""The decode kernel on a GPU, against the evaluator: `pytest -m gpu tests/gpu/test_decode.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_support import larger, within_budget
from portable_support import Problem, Result
from variant_cases import SHIPPED

import attn_dsl
from attn_dsl.backend import operators
from attn_dsl.backend.execute import Options, portable_call
from attn_dsl.backend.portable import launch_decode

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def decoded(problem: Problem, splits: int | None = None) -> Result:
    inputs = problem.query, problem.key, problem.value
    call = problem.program.binder.bind(*inputs, problem.scale, problem.q_offset, problem.all_bindings)
    bound = portable_call(problem.program, call, Options("decode"))
    kernels = problem.program.kernels
    out, lse, _ = launch_decode.forward(kernels, bound, layout=launch_decode.layout_of(kernels, bound, splits))
    return Result(out, lse)


def check(problem: Problem, *splits: int | None) -> None:
    factor = 10.0 if problem.query.dtype is torch.float32 else 1.1
    truth, eager = problem.truth(), problem.truth(dtype=problem.query.dtype)
    for number in splits or (None, 1, 5):
        within_budget(decoded(problem, number), truth, eager, factor)


def short(name: str, tokens: int = 4, length: int = 333, **sizes: int) -> Problem:
    shape = {"H": 8, "Q": tokens, "KV": length, "q_offset": length - tokens - 2, **sizes}
    dtype = torch.bfloat16
    return Problem.of(larger(name, **shape), dtype, "cuda")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_variant_stays_within_the_error_budget(name: str) -> None:
    check(short(name))


@pytest.mark.parametrize("tokens", [1, 8, 16, 64])
def test_query_tokens(tokens: int) -> None:
    check(short("causal", tokens, 1000, D=128, DV=128))


@pytest.mark.parametrize("dims", [(16, 16), (80, 80), (121, 121), (192, 128), (256, 256)], ids=str)
def test_head_dimensions(dims: tuple[int, int]) -> None:
    check(short("causal", D=dims[0], DV=dims[1]), None)


def test_float32_and_float16() -> None:
    for dtype in (torch.float32, torch.float16):
        check(Problem.of(larger("alibi", H=8, Q=3, KV=500, q_offset=490), dtype, "cuda"))


def test_rows_that_see_nothing() -> None:
    problem = replace(short("sliding_window", 64), q_offset=600, bindings={"window": 300})
    check(problem)
    found = decoded(problem, 3)
    empty = found.lse == -torch.inf
    assert empty.any() and not empty.all() and (found.out[empty] == 0).all()


def cache(batch: int = 3, room: int = 4096) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    shapes = ((batch, 32, 1, 128), (batch, 8, room, 128), (batch, 8, room, 128))
    query, key, value = (
        torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for shape in shapes
    )
    return query, key, value


@pytest.mark.parametrize("name", ["causal", "sliding_window"])
def test_one_cuda_graph_serves_lengths_that_grow(name: str) -> None:
    attention = attn_dsl.compile(name)
    bindings = {} if name == "causal" else {"window": 500}
    query, key, value = cache()
    lengths = torch.tensor([1, 17, 4000], dtype=torch.int32, device="cuda")

    def step() -> torch.Tensor:
        return attention(query, key, value, q_offset=lengths - 1, kv_len=lengths, **bindings)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    assert "decode, since" in attention.explain(query, key, value, q_offset=lengths - 1, kv_len=lengths, **bindings)
    for grown in ([1, 17, 4000], [2, 18, 4001], [64, 65, 4096], [1000, 3, 129]):
        lengths.copy_(torch.tensor(grown, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        for i, length in enumerate(grown):
            one = slice(i, i + 1)
            inputs = (x.float() for x in (query[one], key[one, :, :length], value[one, :, :length]))
            expected = attention(*inputs, q_offset=length - 1, **bindings)
            torch.testing.assert_close(out[one].float(), expected, atol=4e-3, rtol=2e-2)


def test_nothing_waits_for_the_gpu() -> None:
    attention = attn_dsl.compile("causal")
    query, key, value = cache()
    lengths = torch.tensor([1, 17, 4000], dtype=torch.int32, device="cuda")
    attention(query, key, value, q_offset=lengths - 1, kv_len=lengths)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            attention(query, key, value, q_offset=lengths - 1, kv_len=lengths)
            attention(query, key, value, q_offset=100, kv_len=101)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_same_bits_in_every_run_and_through_every_door() -> None:
    attention = attn_dsl.compile("causal")
    query, key, value = cache()
    call = attention._binder.bind(query, key, value, None, 4095, {})
    first, _ = operators.attention(attention._executable, call, Options("decode"))
    for _ in range(3):
        assert torch.equal(attention(query, key, value, q_offset=4095), first)


def test_gradients_of_short_calls() -> None:
    problem = Problem.of(larger("alibi", H=8, Q=4, KV=333, q_offset=329), torch.bfloat16, "cuda")
    upstream = problem.upstream()
    leaves, bindings = problem.leaves()
    attention = attn_dsl.compile("alibi")
    out, lse = attention(
        leaves["query"], leaves["key"], leaves["value"], q_offset=329, return_lse=True, slope=bindings["slope"]
    )
    grads = [given.to(x.dtype) for given, x in zip(upstream, (out, lse), strict=True)]
    found = torch.autograd.grad((out, lse), list(leaves.values()), grads)
    result = Result(out.detach(), lse.detach(), dict(zip(leaves, found, strict=True)))
    within_budget(result, problem.truth(upstream), problem.truth(upstream, torch.bfloat16), 1.1)
