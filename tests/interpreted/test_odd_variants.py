"""Random variants that nobody would write, on the CPU and by the portable kernels."""

from __future__ import annotations

import pytest
import torch
from odd_variants import agree, drawn


@pytest.mark.parametrize("seed", range(60))
def test_the_cpu_agrees_with_the_evaluator(seed: int) -> None:
    dtype = torch.float64 if seed % 3 else torch.float32
    problem, text = drawn(seed, dtype, (1, 2, 7, 33, 70))
    upstream = problem.upstream()
    found = problem.by("cpu", upstream)
    truth = problem.truth(upstream)
    rough = problem.truth(upstream, torch.float32) if dtype is torch.float32 else truth
    agree(found, truth, rough, 3e-5 if dtype is torch.float32 else 1e-6, text)


@pytest.mark.parametrize("seed", range(100, 115))
def test_the_portable_kernels_agree_with_the_evaluator(seed: int) -> None:
    dtype, tolerance = (torch.bfloat16, 0.04) if seed % 5 == 0 else (torch.float32, 3e-5)
    problem, text = drawn(seed, dtype, (1, 7, 18, 40))
    upstream = problem.upstream()
    found = problem.portable(upstream, deterministic=seed % 3 == 0)
    truth, rough = problem.truth(upstream), problem.truth(upstream, torch.float32)
    agree(found, truth, rough, tolerance, text)
