"""The Hopper kernels through the public API, against the evaluator: `pytest -m gpu` on this file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_support import larger, within_budget
from portable_support import Problem, Result, differentiated
from variant_cases import SHIPPED, Case

import attn_dsl
from attn_dsl.backend import operators
from attn_dsl.backend.binding import Call
from attn_dsl.backend.execute import DECODE, GPU, HOPPER, Options, Program, portable_call, reordered
from attn_dsl.backend.gpu import route

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
    pytest.mark.usefixtures("one_length"),
]

LATE = "attention late(start: int = 150)\nmask = k >= start and q >= k\n"
ROWS = """attention rows(start: int = 70, const slope: float = 0.02)
tensor bias: float32[H, Q]
tensor sinks: float32[H]
score = score + bias[h, q] - slope * q
mask = q >= k and k >= start
sink = sinks[h]
"""
TEXTS: dict[str, tuple[str, dict[str, float]]] = {"late": (LATE, {}), "rows": (ROWS, {}), "far": (ROWS, {"slope": 0.5})}
"""In `far`, every row is all sink, and the gradient of its bias is 0 but for rounding: logits of 0.5 * 333 and more."""


def attention_of(case: Case) -> attn_dsl.Attention:
    return attn_dsl.compile(case.name, **case.constants)


def backend_of(program: Program, call: Call) -> str:
    """That of the forward pass; `explain` also compiles what the backward pass takes."""
    ordered = reordered(program, call, Options(GPU))
    if ordered is not None:
        program, call = ordered.program, ordered.call
    return route(program, portable_call(program, call, Options(GPU)), decodes=ordered is None).backend


def called(
    attention: attn_dsl.Attention, problem: Problem, upstream: tuple[torch.Tensor, torch.Tensor] | None
) -> Result:
    """The call as a user makes it: with gradients of everything, or without any; few queries have to ask for Hopper."""
    leaves, bindings = problem.leaves() if upstream else ({}, dict(problem.bindings))
    query, key, value = (leaves.get(name, getattr(problem, name)) for name in ("query", "key", "value"))
    options: dict[str, Any] = {"scale": problem.scale, "q_offset": problem.q_offset, **bindings}
    bound = attention._binder.bind(query, key, value, problem.scale, problem.q_offset, bindings)
    backend = backend_of(attention._executable, bound)
    if backend == DECODE:
        out, lse = operators.attention(attention._executable, bound, Options(HOPPER))
    else:
        assert backend == HOPPER, attention.explain(query, key, value, **options)
        out, lse = attention(query, key, value, return_lse=True, **options)
    return differentiated(out, lse, leaves, upstream)


def check(case: Case, dtype: torch.dtype = torch.bfloat16, *, gradients: bool = False) -> None:
    """`gradients` of everything, too, whose kernels take long to compile: `test_hopper_backward.py` has them."""
    problem = Problem.of(case, dtype, "cuda")
    agree(attention_of(case), problem, gradients=gradients)


def agree(attention: attn_dsl.Attention, problem: Problem, *, logits: float = 8.0, gradients: bool = False) -> None:
    upstream = problem.upstream() if gradients else None
    truth, eager = problem.truth(upstream), problem.truth(upstream, problem.query.dtype)
    if gradients:
        within_budget(called(attention, problem, upstream), truth, eager, 1.1, logits)
    bare = called(attention, problem, None)  # parameters are numbers here
    assert torch.equal(bare.lse.isinf(), truth.lse.isinf())
    within_budget(bare, replace(truth, grads={}), replace(eager, grads={}), 1.1)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_variant_stays_within_the_error_budget(name: str) -> None:
    check(larger(name, D=128, DV=128), gradients=True)


@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (192, 128), (192, 192), (256, 256), (64, 256)], ids=str)
@pytest.mark.parametrize("name", ["causal", "alibi"])
def test_head_dimensions(name: str, dims: tuple[int, int]) -> None:
    check(larger(name, D=dims[0], DV=dims[1]))


@pytest.mark.parametrize(
    "lengths", [(1, 1), (1, 500, 499), (65, 127), (129, 1000, 871), (700, 90), (1537, 1537)], ids=str
)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_lengths_and_offsets(dim: int, lengths: tuple[int, ...]) -> None:
    q_len, kv_len, *start = lengths
    sizes = {"Q": q_len, "KV": kv_len, "q_offset": start[0] if start else 0, "D": dim, "DV": dim}
    check(larger("causal", **sizes))
    check(larger("noop", **sizes))


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", TEXTS)
def test_rows_that_see_nothing_and_leading_tiles_that_are_empty(name: str, dim: int) -> None:
    case = larger("causal", D=dim, DV=dim)
    text, constants = TEXTS[name]
    attention = attn_dsl.compile(text, **constants)
    query, key, value = (x.cuda() for x in case.inputs(0, torch.bfloat16))
    tensors = {"bias": torch.randn(4, 333, device="cuda"), "sinks": torch.randn(4, device="cuda")}
    bindings = tensors if text is ROWS else {}
    problem = Problem(attention._executable, query, key, value, bindings)
    agree(attention, problem, logits=170.0 if name == "far" else 8.0, gradients=dim != 256)


def test_groups_offsets_by_batch_and_half_precision() -> None:
    case = larger("causal", H=8, HK=1, Q=200, KV=700, D=128, DV=128)
    problem = Problem.of(case, torch.float16, "cuda")
    agree(attention_of(case), replace(problem, q_offset=torch.tensor([500, 3], device="cuda")))


def test_rows_with_room_between_them() -> None:
    case = larger("causal", D=128, DV=128)
    problem = Problem.of(case, torch.bfloat16, "cuda")

    def apart(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x.transpose(1, 2), (0, 8)).contiguous()[..., :-8].transpose(1, 2)

    spread = replace(problem, query=apart(problem.query), key=apart(problem.key), value=apart(problem.value))
    found = called(attention_of(case), spread, None)
    truth = called(attention_of(case), problem, None)
    assert torch.equal(found.out, truth.out) and torch.equal(found.lse, truth.lse)


@pytest.mark.parametrize("growth", [0.0, 60.0])  # with the second, tiles come again
def test_a_thousand_launches_give_the_same_bits(growth: float) -> None:
    attention = attn_dsl.compile("causal")
    query, key, value = (torch.randn(2, 8, 1000, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    key *= 1 + growth * torch.linspace(0, 1, 1000, device="cuda", dtype=torch.bfloat16).view(-1, 1)
    first, first_lse = attention(query, key, value, return_lse=True)
    differs = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        out, lse = attention(query, key, value, return_lse=True)
        differs += (out != first).sum() + (lse != first_lse).sum()
    assert differs.item() == 0


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_logits_that_leave_the_first_tiles_far_behind(dim: int) -> None:
    case = larger("causal", H=3, HK=3, Q=900, KV=900, D=dim, DV=dim)
    attention, problem = attention_of(case), Problem.of(case, torch.bfloat16, "cuda")
    query, key = problem.query, problem.key
    ramp = torch.arange(900, device="cuda").view(-1, 1) / 64
    leap = torch.where(torch.arange(900, device="cuda").view(-1, 1) < 300, 1.0, 60.0)
    one = key.clone()
    one[:, 1, 5] = 50 * query[:, 1, 700]  # seen by all, in a full tile; the rest of the heads stays as it is
    low = -query.mean(2, keepdim=True) + 0.01 * key
    for keys, queries in ((key * ramp, query), (key * leap, query), (one, query), (low, query * 100)):
        hard = replace(problem, query=queries.to(query.dtype), key=keys.to(query.dtype))
        truth, eager = hard.truth(None), hard.truth(None, query.dtype)
        found, again = called(attention, hard, None), called(attention, hard, None)
        assert torch.equal(found.out, again.out) and torch.equal(found.lse, again.lse)
        assert not found.out.isnan().any() and not found.lse.isnan().any()
        error, allowed = ((x.out.double() - truth.out).norm() for x in (found, eager))
        assert error <= 1.1 * allowed + 1e-3 * truth.out.norm(), f"{error:.3g}, eager {allowed:.3g}"
        assert ((found.lse.double() - truth.lse) / truth.lse.abs().clamp(min=1)).abs().max() < 1e-4


def test_what_does_not_fit_runs_on_portable_kernels_and_says_why() -> None:
    attention = attn_dsl.compile("causal")
    query, key, value = (torch.randn(2, 4, 130, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    whole = attention(query, key, value)
    refused = {
        "broadcast": (query, key[:1], value[:1]),
        "contiguous": (query.mT.contiguous().mT, key, value),
        "float32": (query.float(), key.float(), value.float()),
    }
    for reason, inputs in refused.items():
        text = attention.explain(*inputs)
        assert text.startswith("backend    portable") and reason in text, text
        if reason != "broadcast":
            assert (attention(*inputs).float() - whole.float()).abs().max() < 0.05
        else:
            assert not attention(*inputs).isnan().any()
    shifted = torch.cat([query.flatten().new_zeros(1), query.flatten()])[1:].view_as(query)
    assert (attention(shifted, key, value).float() - whole.float()).abs().max() < 0.05


def test_either_backend_can_be_asked_for() -> None:
    program = attn_dsl.compile("alibi")._executable
    case = larger("alibi", D=128, DV=128)
    query, key, value = (x.cuda() for x in case.inputs(0, torch.bfloat16))
    bindings = {name: x.cuda() for name, x in case.tensors().items()}
    bound = program.binder.bind(query, key, value, None, 0, bindings)
    both = [operators.attention(program, bound, Options(backend)) for backend in ("gpu", "hopper", "portable")]
    assert torch.equal(both[0][0], both[1][0]) and torch.equal(both[0][1], both[1][1])
    assert (both[1][1] - both[2][1]).abs().max() < 1e-2


def test_a_second_process_asks_neither_compiler_nor_assembler(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    from attn_dsl.backend.hopper import check as assembler
    from attn_dsl.backend.hopper.forward import attention_forward

    query, key, value = (torch.randn(1, 2, 130, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    known = attn_dsl.compile("noop")
    known(query, key, value)
    fresh = Program(known._executable.variant, known._executable._proof)
    attention_forward.device_caches.clear()  # what Triton knows of this process
    found: list[bool] = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda *, cache_hit, **_: found.append(cache_hit))
    monkeypatch.delattr(assembler, "inspect")
    operators.attention(fresh, fresh.binder.bind(query, key, value, None, 0, {}), Options("hopper"))
    assert found == [True]


def test_a_call_can_be_captured_in_a_graph() -> None:
    attention = attn_dsl.compile("causal")
    query, key, value = (torch.randn(2, 4, 300, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    expected = attention(query, key, value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(query, key, value)
    query.copy_(torch.randn_like(query))
    graph.replay()
    assert not torch.equal(out, expected) and torch.equal(out, attention(query, key, value))


def test_streams_and_graphs_side_by_side_take_no_tile_from_each_other() -> None:
    attention = attn_dsl.compile("causal")
    inputs = [torch.randn(2, 16, 1111, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    expected = attention(*inputs)
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    outs = []
    for graph in graphs:
        with torch.cuda.graph(graph):
            outs.append(attention(*inputs))
    streams = [torch.cuda.Stream() for _ in range(4)]
    eager: list[torch.Tensor] = []
    for _ in range(50):
        for stream, graph in zip(streams, [*graphs, None, None], strict=True):
            with torch.cuda.stream(stream):
                if graph is None:
                    eager.append(attention(*inputs))
                else:
                    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in [*outs, *eager])


@pytest.mark.parametrize("text", ["t5_bias", "natten1d", "prefix_lm", "sliding_window"])
@pytest.mark.parametrize("dim", [64, 256])
def test_bounds_of_rows_and_saturated_tiles_over_many_tiles(text: str, dim: int) -> None:
    check(larger(text, Q=900, KV=900, D=dim, DV=dim), gradients=dim == 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cap", [0.5, 20.0, 33.0, 50.0])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_soft_caps_with_and_without_a_maximum_of_rows(dim: int, cap: float, dtype: torch.dtype) -> None:
    case = larger("softcap", Q=700, KV=700, D=dim, DV=dim)
    check(replace(case, parameters={"cap": cap}), dtype)
