"""The portable kernels on a GPU, against the evaluator: `pytest -m gpu tests/gpu/test_portable_gpu.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpu_support import larger, within_budget
from portable_support import Problem, program_of
from standalone_support import run_alone
from torch import Tensor
from variant_cases import SHIPPED, cases

from attn_dsl.backend.portable import backward as backward_kernels
from attn_dsl.backend.portable import forward as forward_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

HALF = ("alibi", "causal", "gpt_oss", "softcap", "t5_bias")
"""Variants that are also tried in float16: what the others do differently does not depend on the 16 bits."""


def check(problem: Problem) -> None:
    upstream = problem.upstream()
    factor = 10.0 if problem.query.dtype is torch.float32 else 1.1
    eager = problem.truth(upstream, problem.query.dtype)
    within_budget(problem.portable(upstream), problem.truth(upstream), eager, factor)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_variant_stays_within_the_error_budget(name: str) -> None:
    for dtype in (torch.bfloat16, torch.float16) if name in HALF else (torch.bfloat16,):
        check(Problem.of(larger(name), dtype, "cuda"))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_variant_agrees_in_float32(name: str) -> None:
    """At lengths and head dimensions that are no multiple of anything; all calls of a variant share their kernels."""
    for case in cases():
        if case.name == name:
            print(case.id)
            check(Problem.of(case, torch.float32, "cuda"))


@pytest.mark.parametrize(
    ("dtype", "dims"),
    [
        *((torch.bfloat16, d) for d in ((16, 16), (80, 80), (96, 64), (121, 121), (128, 256), (192, 128), (256, 256))),
        *((torch.float16, d) for d in ((96, 64), (192, 128))),
        *((torch.float32, d) for d in ((64, 64), (80, 80), (121, 121), (256, 256))),
    ],
    ids=str,
)
def test_head_dimensions(dtype: torch.dtype, dims: tuple[int, int]) -> None:
    check(Problem.of(larger("causal", D=dims[0], DV=dims[1]), dtype, "cuda"))


@pytest.mark.parametrize("name", ["causal", "alibi"])
def test_lengths(name: str) -> None:
    for length in (1, 2, 63, 64, 65, 127, 128, 129, 1000):
        print(length)
        sizes = {"KV": length} if name == "causal" else {"KV": 300, "q_offset": 300 - min(length, 300)}
        check(Problem.of(larger(name, Q=length, **sizes), torch.bfloat16, "cuda"))


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second column": lambda x: torch.stack([x, x], -1).flatten(3)[..., ::2],
    "expanded heads": lambda x: x[:, :1].expand_as(x),
    "offset": lambda x: torch.cat([x.flatten().new_zeros(3), x.flatten()])[3:].view(x.shape),
}


@pytest.mark.parametrize("kind", STRIDES)
def test_strides(kind: str) -> None:
    problem = Problem.of(larger("causal"), torch.bfloat16, "cuda")
    change = STRIDES[kind]
    check(replace(problem, query=change(problem.query), key=change(problem.key), value=change(problem.value)))


def test_more_than_65535_programs() -> None:
    query, key, value = (torch.randn(70_000, 1, 3, 16, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    check(Problem(program_of("causal"), query, key, value, {}))


def test_a_file_that_stands_alone_stays_within_the_error_budget(tmp_path: Path) -> None:
    problems = {name: Problem.of(larger(name), torch.bfloat16, "cuda") for name in ("alibi", "t5_bias", "gpt_oss")}
    for name, found in run_alone(problems, "backward", tmp_path, interpret=False).items():
        truth, eager = (problems[name].truth(problems[name].upstream(), x) for x in (torch.float64, torch.bfloat16))
        named = found.grads.keys()
        truth, eager = (replace(x, grads={key: x.grads[key] for key in named}) for x in (truth, eager))
        within_budget(found, truth, eager, 1.1)


def test_deterministic_gradients_are_the_same_bits() -> None:
    problem = Problem.of(larger("t5_bias"), torch.bfloat16, "cuda")
    upstream = problem.upstream()
    first, second = (problem.portable(upstream, deterministic=True) for _ in range(2))
    for name, grad in first.grads.items():
        assert torch.equal(grad, second.grads[name]), name
    truth, eager = problem.truth(upstream), problem.truth(upstream, torch.bfloat16)
    within_budget(first, truth, eager, 1.1)


def compiled_kernels() -> int:
    kernels = (
        forward_kernels.attention_forward,
        backward_kernels.attention_delta,
        backward_kernels.attention_keys_backward,
        backward_kernels.attention_queries_backward,
    )
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


def test_lengths_windows_and_scales_do_not_recompile() -> None:
    def run(length: int, window: int) -> None:
        case = larger("sliding_window", Q=length, KV=length)
        problem = Problem.of(replace(case, parameters={"window": window}), torch.bfloat16, "cuda")
        replace(problem, scale=1 / window).portable(problem.upstream())

    run(200, 50)
    before = compiled_kernels()
    for i in range(40):
        run(1 + 37 * i, 1 + 16 * (i % 5))
    run(300, 2**31 - 1)
    assert compiled_kernels() - before <= 4  # 64-bit positions, for a window near the end of 32 bits


@pytest.mark.parametrize("name", ["causal", "sliding_window"])
def test_long_sequences_take_no_extra_memory(name: str) -> None:
    length = 131_072
    case = larger(name, B=1, H=2, HK=2, Q=length, KV=length)
    problem = Problem.of(replace(case, parameters={"window": 1024} if name == "sliding_window" else {}), torch.bfloat16)
    query, key, value = (x.cuda().requires_grad_() for x in (problem.query, problem.key, problem.value))
    small = replace(problem, query=query, key=key, value=value)
    leaves = 3 * query.numel() * query.element_size()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    upstream = (torch.randn(1, 2, length, 64, device="cuda"), torch.zeros(1, 2, length, device="cuda"))
    given = sum(x.numel() * x.element_size() for x in upstream)
    small.portable(upstream)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - given - 3 * leaves  # leaves, outputs and gradients
    assert extra < 100 * 2**20, f"{extra / 2**20:.0f} MiB"
    assert math.isfinite(extra)
