"""The Hopper backward kernel through the public API, against the evaluator: `pytest -m gpu` on this file."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_support import larger, within_budget
from portable_support import Problem, Result
from torch import Tensor
from variant_cases import SHIPPED, Case

import attn_dsl
from attn_dsl.backend import operators
from attn_dsl.backend.execute import Options, Program

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
    pytest.mark.usefixtures("one_length"),
]

launch_backward = pytest.importorskip("attn_dsl.backend.hopper.launch_backward")
INPUTS = ("query", "key", "value")
HEAVY = {"natten2d", "natten3d", "bigbird"}
"""Variants whose masks take so many registers that there may be no good configuration for them."""
ROWS = """attention rows(start: int = 70)
tensor bias: float32[H, Q]
tensor sinks: float32[H]
score = score + bias[h, q] - 0.5 * q
mask = q >= k and k >= start
sink = sinks[h]
"""
TEXTS = {
    "late": "attention late(start: int = 150)\nmask = k >= start and q >= k\n",
    "rows": ROWS,
    "negated": "attention negated\nscore = 0.25 * k - 2 * score\nmask = q >= k\n",
    "columns": "attention columns\ntensor bias: float32[H, KV]\nscore = silu(score) + bias[h, k]\n",
    "poison": "attention poison\nscore = score + 1.0 / (Q - q) + 1.0 / (KV - k)\nmask = k - q != 3\n",
    "under": "attention under\nscore = score + log(1.0 + q - k)\nmask = q >= k\n",
}


def differentiated(
    attention: attn_dsl.Attention, problem: Problem, upstream: tuple[Tensor, Tensor], *, backend: str | None = "hopper"
) -> Result:
    """Outputs and the gradients of query, key and value, as a user finds them."""
    leaves = [getattr(problem, name).detach().requires_grad_() for name in INPUTS]
    options: dict[str, Any] = {"scale": problem.scale, "q_offset": problem.q_offset, **problem.all_bindings}
    if backend is not None:
        explained = attention.explain(*leaves, **options)
        assert f"\nbackward   {backend}" in explained, explained
    out, lse = attention(*leaves, return_lse=True, **options)
    grads = upstream[0].to(out.dtype), torch.where(lse.isinf(), 0.0, upstream[1]).to(lse.dtype)
    found = torch.autograd.grad((out, lse), leaves, grads)
    return Result(out.detach(), lse.detach(), dict(zip(INPUTS, found, strict=True)))


def agree(attention: attn_dsl.Attention, problem: Problem, backend: str | None = "hopper") -> None:
    upstream = problem.upstream()
    truth, eager = problem.truth(upstream), problem.truth(upstream, problem.query.dtype)
    of_inputs = {name: truth.grads[name] for name in INPUTS}
    found = differentiated(attention, problem, upstream, backend=backend)
    within_budget(found, replace(truth, grads=of_inputs), eager, 1.1)


def check(case: Case, dtype: torch.dtype = torch.bfloat16, backend: str | None = "hopper") -> None:
    agree(attn_dsl.compile(case.name, **case.constants), Problem.of(case, dtype, "cuda"), backend)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_variant_stays_within_the_error_budget(name: str, dim: int) -> None:
    check(larger(name, D=dim, DV=dim), backend=None if name in HEAVY else "hopper")


@pytest.mark.parametrize("dims", [(80, 80), (96, 96), (128, 64), (64, 128)], ids=str)
@pytest.mark.parametrize("name", ["causal", "alibi"])
def test_head_dimensions(name: str, dims: tuple[int, int]) -> None:
    check(larger(name, D=dims[0], DV=dims[1]))


@pytest.mark.parametrize(
    "lengths", [(1, 1), (1, 500, 499), (65, 127), (129, 1000, 871), (700, 90), (1152, 1152)], ids=str
)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", ["causal", "noop", "softcap"])
def test_lengths_and_offsets(name: str, dim: int, lengths: tuple[int, ...]) -> None:
    q_len, kv_len, *start = lengths
    check(larger(name, Q=q_len, KV=kv_len, q_offset=start[0] if start else 0, D=dim, DV=dim))


EDGES = [edge + off for edge in (64, 128, 192, 256, 512, 1024, 2048, 4096) for off in (-1, 0, 1)]
LENGTHS = sorted({1, 2, 3, 5, 8, 13, 21, 34, *EDGES, *random.Random(0).sample(range(65, 4096), 32)})


def dense(inputs: list[Tensor], upstream: Tensor, causal: bool, dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of query, key and value, every operation in `dtype`."""
    query, key, value = (x.detach().to(dtype).requires_grad_() for x in inputs)
    score = query @ key.mT / query.shape[3] ** 0.5
    if causal:
        score = score.masked_fill(torch.ones(score.shape[2:], dtype=torch.bool, device="cuda").triu(1), -torch.inf)
    out = score.softmax(-1) @ value
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), upstream.to(dtype))]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", ["causal", "noop"])
def test_lengths_from_1_to_4097(name: str, dim: int) -> None:
    """Short ones over many heads: the eager error of two rows is small by chance in one draw of five."""
    attention = attn_dsl.compile(name)
    for length in LENGTHS:
        heads = max(2, 256 // length)
        inputs = [torch.randn(1, heads, length, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        upstream, leaves = torch.randn_like(inputs[0]), [x.clone().requires_grad_() for x in inputs]
        bound = attention._binder.bind(*leaves, None, 0, {})
        out, _ = operators.attention(attention._executable, bound, Options("hopper"))
        found = [out, *torch.autograd.grad(out, leaves, upstream)]
        truth = dense(inputs, upstream, name == "causal", torch.float64)
        eager = dense(inputs, upstream, name == "causal", torch.bfloat16)
        for what, a, b, c in zip(("out", *INPUTS), found, truth, eager, strict=True):
            ours, theirs = ((x.double() - b).norm().item() for x in (a, c))
            assert ours <= 1.1 * theirs + 2e-3 * b.norm().item() + 1e-4, (what, length, ours, theirs)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", TEXTS)
def test_scores_and_masks_of_every_kind(name: str, dim: int) -> None:
    case = larger("causal", D=dim, DV=dim)
    attention = attn_dsl.compile(TEXTS[name])
    query, key, value = (x.cuda() for x in case.inputs(0, torch.bfloat16))
    tensors = {"bias": torch.randn(4, 333, device="cuda"), "sinks": torch.randn(4, device="cuda")}
    bindings = {t.name: tensors[t.name] for t in attention._executable.variant.tensors}
    agree(attention, Problem(attention._executable, query, key, value, bindings))


def test_groups_offsets_by_batch_and_half_precision() -> None:
    case = larger("causal", H=8, HK=1, Q=200, KV=700, D=128, DV=128)
    problem = Problem.of(case, torch.float16, "cuda")
    agree(attn_dsl.compile("causal"), replace(problem, q_offset=torch.tensor([500, 3], device="cuda")))


def test_large_logits_past_the_end_of_the_keys_poison_nothing() -> None:
    """Rows whose log-sum-exp is so low that a key of zeros would overflow."""
    case = larger("noop", D=128, DV=128)
    problem = Problem.of(case, torch.bfloat16, "cuda")
    problem = replace(problem, query=problem.query.abs() * 8, key=-problem.key.abs())
    agree(attn_dsl.compile("noop"), problem)


def test_gradients_with_room_between_their_rows() -> None:
    attention, case = attn_dsl.compile("causal"), larger("causal", D=128, DV=128)
    problem = Problem.of(case, torch.bfloat16, "cuda")
    whole, lse = problem.upstream()
    wide = torch.nn.functional.pad(whole.to(torch.bfloat16).transpose(1, 2), (0, 8)).contiguous()[..., :-8]
    odd = torch.nn.functional.pad(whole.to(torch.bfloat16), (1, 2))[..., 1:-2]
    one = whole.to(torch.bfloat16)[:, :, :1].expand_as(whole)
    for spread in (wide.transpose(1, 2), odd, one):
        found = differentiated(attention, problem, (spread, lse))
        truth = differentiated(attention, problem, (spread.contiguous(), lse))
        assert torch.equal(found.grads["key"], truth.grads["key"])
        assert torch.equal(found.grads["value"], truth.grads["value"])
        assert (found.grads["query"] - truth.grads["query"]).abs().max() < 1e-2


def all_gradients(attention: attn_dsl.Attention, problem: Problem, deterministic: bool, said: str | None) -> None:
    upstream, (leaves, bindings) = problem.upstream(), problem.leaves()
    truth, eager = problem.truth(upstream), problem.truth(upstream, torch.bfloat16)
    inputs = [leaves[x] for x in INPUTS]
    if said is not None:
        explained = attention.explain(*inputs, q_offset=problem.q_offset, **bindings)
        assert f"captured   {said}" in explained, explained
    bindings |= {"q_offset": problem.q_offset}
    out, lse = attention(*inputs, return_lse=True, deterministic=deterministic, **bindings)
    grads = upstream[0].to(out.dtype), torch.where(lse.isinf(), 0.0, upstream[1]).to(lse.dtype)
    found = torch.autograd.grad((out, lse), list(leaves.values()), grads)
    result = Result(out.detach(), lse.detach(), dict(zip(leaves, found, strict=True)))
    within_budget(result, truth, eager, 1.1)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", ["t5_bias", "alibi", "gpt_oss", "softcap"])
def test_gradients_of_what_is_captured_are_summed_on_the_way(name: str, dim: int) -> None:
    problem = Problem.of(larger(name, D=dim, DV=dim), torch.bfloat16, "cuda")
    all_gradients(attn_dsl.compile(name), problem, False, "hopper")


@pytest.mark.parametrize("name", ["t5_bias", "alibi", "gpt_oss", "softcap"])
def test_an_order_leaves_what_is_captured_to_a_pass_of_its_own(name: str) -> None:
    problem = Problem.of(larger(name, D=128, DV=128), torch.bfloat16, "cuda")
    all_gradients(attn_dsl.compile(name), problem, True, None)


LEARNED = {
    "near": "tensor x: float32[H, 41]\nscore = score + x[h, clamp(k - q, -20, 20) + 20]\nmask = q >= k",
    "capped": "tensor x: float32[H, 41]\nscore = 9 * tanh((score + x[h, clamp(k - q, -20, 20) + 20]) / 9)",
    "scaled": "tensor x: float32[41]\nscore = score * x[clamp(k - q, -20, 20) + 20]\nmask = q >= k",
    "keys": "tensor x: float32[H, KV]\nscore = score + x[h, k]\nmask = q >= k",
    "quarters": "tensor x: float32[B, N]\nscore = score * (1 + 0.1 * x[b, k // 4])\nmask = q >= k",
    "heads": "tensor x: float32[H]\nscore = score * x[h]\nmask = q >= k",
    "sinks": "tensor x: float32[H]\nscore = score + 0.02 * x[h] * min(q, 50)\nmask = q >= k\nsink = x[h]",
    "rows": "tensor x: float32[H, N]\nscore = score + x[h, q]\nmask = q >= k\nsink = 0.5",
    "both": "tensor x: float32[H]\ntensor y: float32[M, N]\nscore = x[h] * score + y[b, k]\nmask = q >= k",
    "twice": "tensor x: float32[H]\nscore = x[h] * score + x[h] * 0.1 * (k - q)\nmask = q >= k",
}


@pytest.mark.parametrize("lengths", [(333, 333), (70, 333, 263), (333, 128)], ids=str)
@pytest.mark.parametrize("name", LEARNED)
def test_sums_of_every_kind(name: str, lengths: tuple[int, ...]) -> None:
    q_len, kv_len, *start = lengths
    case = larger("causal", B=2, H=4, HK=2, Q=q_len, KV=kv_len, q_offset=start[0] if start else 0, D=128, DV=128)
    attention = attn_dsl.compile(f"attention learned\n{LEARNED[name]}\n")
    query, key, value = (x.cuda() for x in case.inputs(0, torch.bfloat16))
    table = (4, 41)
    shapes = {
        "near": table,
        "capped": table,
        "scaled": (41,),
        "keys": (4, kv_len),
        "quarters": (2, 100),
        "rows": (4, 400),
    }
    learned = torch.randn(shapes.get(name, (4,)), generator=torch.Generator().manual_seed(7)).cuda()
    bindings = {"x": learned}
    if name == "both":
        bindings["y"] = torch.zeros(2, 2**21, device="cuda")  # one copy
    problem = Problem(attention._executable, query, key, value, bindings, q_offset=case.sizes.q_offset)
    all_gradients(attention, problem, False, "hopper")


def test_what_does_not_fit_runs_on_portable_kernels_and_says_why() -> None:
    attention = attn_dsl.compile("causal")
    query, key, value = (torch.randn(2, 4, 130, 256, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    reason = "\nbackward   portable, since the head dimension is above 128"
    assert reason in attention.explain(query, key, value)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(attention(*leaves).sum(), leaves))


@pytest.mark.parametrize("name", ["causal", "noop", "sliding_window", "prefix_lm"])
def test_deterministic_gradients_are_the_same_bits_in_every_run(name: str) -> None:
    attention = attn_dsl.compile(name)
    query, key, value = larger(name, B=2, H=8, HK=4, Q=2000, KV=2000, D=128, DV=128).inputs(0, torch.bfloat16)
    leaves = [x.cuda().requires_grad_() for x in (query, key, value)]
    upstream = torch.randn(query.shape, device="cuda", dtype=torch.bfloat16)
    first = torch.autograd.grad(attention(*leaves, deterministic=True), leaves, upstream)
    usual = torch.autograd.grad(attention(*leaves), leaves, upstream)
    assert all((a - b).abs().max() < 2e-2 for a, b in zip(usual, first, strict=True))
    for _ in range(100):
        found = torch.autograd.grad(attention(*leaves, deterministic=True), leaves, upstream)
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


def test_keys_and_values_have_the_same_gradients_in_every_run() -> None:
    attention = attn_dsl.compile("causal")
    leaves = [torch.randn(2, 4, 1000, 128, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    upstream = torch.randn(2, 4, 1000, 128, device="cuda", dtype=torch.bfloat16)
    out = attention(*leaves)
    first = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    for _ in range(300):
        query, key, value = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
        assert torch.equal(key, first[1]) and torch.equal(value, first[2])
        assert (query - first[0]).abs().max() < 1e-2


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["alibi", "packed_causal"])
def test_sections_of_heads_give_what_one_launch_gives(
    name: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for long sequences; a section may end within a batch entry."""
    problem = Problem.of(larger(name, B=3, H=8, HK=4, D=128, DV=128), torch.bfloat16, "cuda")
    leaves = [getattr(problem, input).detach().requires_grad_() for input in INPUTS]
    upstream = torch.randn_like(leaves[0])

    def gradients() -> list[Tensor]:
        program = Program(problem.program.variant, problem.program._proof)  # one that knows no layouts
        call = program.binder.bind(*leaves, None, problem.q_offset, problem.all_bindings)
        out, _ = operators.attention(program, call, Options("hopper", deterministic=deterministic))
        return list(torch.autograd.grad(out, leaves, upstream))

    whole = gradients()
    monkeypatch.setattr(launch_backward, "_pairs_at_once", lambda *_: 5)
    query, key, value = gradients()
    assert torch.equal(key, whole[1]) and torch.equal(value, whole[2])
    assert torch.equal(query, whole[0]) if deterministic else (query - whole[0]).abs().max() < 1e-2


def test_a_step_can_be_captured_in_a_graph() -> None:
    attention = attn_dsl.compile("causal")
    leaves = [torch.randn(2, 4, 300, 128, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    upstream = torch.randn(2, 4, 300, 128, device="cuda", dtype=torch.bfloat16)
    torch.autograd.grad(attention(*leaves), leaves, upstream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(attention(*leaves), leaves, upstream)
    upstream.copy_(torch.randn_like(upstream))
    graph.replay()
    expected = torch.autograd.grad(attention(*leaves), leaves, upstream)
    assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])
