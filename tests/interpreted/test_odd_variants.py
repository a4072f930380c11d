"""Random variants that nobody would write, on the CPU and by the portable kernels."""

from __future__ import annotations

import pytest
import torch
from odd_variants import OddText, odd_call
from portable_support import Problem, Result, differentiated, program_of

from attn_dsl.backend import operators
from attn_dsl.backend.execute import Options
from attn_dsl.errors import BindingError, CompileError

STORED = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""What a gradient loses that is stored so."""


def agree(found: Result, truth: Result, rough: Result, tolerance: float, text: str) -> None:
    """Each output and gradient within `tolerance`, and within what `rough`, plain float32 arithmetic, loses thirtyfold.

    Gradients that are not finite in truth are not looked at.
    """
    named = {"out": (found.out, truth.out, rough.out), "lse": (found.lse, truth.lse, rough.lse)}
    named |= {f"grad of {n}": (grad, truth.grads[n], rough.grads[n]) for n, grad in found.grads.items()}
    for name, (mine, exact, plain) in named.items():
        infinite = exact.isinf()
        if name.startswith("grad") and not exact.isfinite().all():
            continue
        assert torch.equal(mine.isinf(), infinite), f"{name}: infinities differ\n{text}"
        error, loss = (torch.where(infinite, 0.0, x.double() - exact.double()).abs().max() for x in (mine, plain))
        largest = torch.where(infinite, 0.0, exact).abs().max().clamp(min=1.0)
        allowed = max(tolerance, STORED.get(mine.dtype, 0.0)) * largest + 30 * loss
        assert error <= allowed, f"{name}: error {error:.3g} of {largest:.3g}\n{text}"


def drawn(seed: int, dtype: torch.dtype, lengths: tuple[int, ...]) -> tuple[Problem, str]:
    """A problem and its text; skips what the compiler refuses, and what has no number for an answer."""
    text = OddText(seed).text
    try:
        program = program_of(text)
        call = odd_call(program.variant, seed, dtype, lengths)
        names = {p.name for p in program.variant.parameters} | {t.name for t in program.variant.tensors}
        bindings = {name: value for name, value in call.bindings.items() if name in names}
        problem = Problem(program, call.query, call.key, call.value, bindings, call.q_offset)
        program.binder.bind(call.query, call.key, call.value, None, call.q_offset, problem.all_bindings)
    except (CompileError, BindingError) as refusal:
        pytest.skip(str(refusal).splitlines()[0])
    lse = problem.truth().lse
    if lse.isnan().any() or (lse == torch.inf).any() or lse[lse.isfinite()].abs().gt(1e3).any():
        pytest.skip("the answer is no number")
    return problem, text


@pytest.mark.parametrize("seed", range(60))
def test_the_cpu_agrees_with_the_evaluator(seed: int) -> None:
    dtype = torch.float64 if seed % 3 else torch.float32
    problem, text = drawn(seed, dtype, (1, 2, 7, 33, 70))
    leaves, bindings = problem.leaves()
    call = problem.program.binder.bind(
        leaves["query"], leaves["key"], leaves["value"], None, problem.q_offset, bindings
    )  # fmt: skip
    upstream = problem.upstream()
    out, lse = operators.attention(problem.program, call, Options("cpu"))
    found = differentiated(out, lse, leaves, upstream)
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
