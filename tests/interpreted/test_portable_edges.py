"""The portable kernels where numbers are not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from portable_support import Problem, assert_close, program_of
from torch import Tensor

FLOAT32 = 3e-5


def problem(text: str, q_len: int = 19, kv_len: int = 35, batch: int = 2, **bindings: Any) -> Problem:
    make = torch.Generator().manual_seed(3)

    def random(heads: int, rows: int) -> Tensor:
        return torch.randn(batch, heads, rows, 4, generator=make)

    return Problem(program_of(text), random(2, q_len), random(1, kv_len), random(1, kv_len), bindings)


def check(problem: Problem, tolerance: float = FLOAT32, **options: Any) -> None:
    upstream = problem.upstream()
    assert_close(problem.portable(upstream, **options), problem.truth(upstream), tolerance)


@pytest.mark.parametrize("score", ["0.5 * score", "score * gain", "score / gain", "-gain * score", "gain * KV", "gain"])
def test_a_score_that_is_only_a_multiple_has_gradients(score: str) -> None:
    check(problem(f"attention f(gain: float)\nscore = {score}\nmask = q != k\n", gain=1.25))


@pytest.mark.parametrize("score", ["exp(score)", "gain * exp(score)", "sigmoid(score)", "exp2(score) * exp(score)"])
def test_a_score_that_is_its_own_derivative(score: str) -> None:
    check(problem(f"attention f(gain: float)\nscore = {score}\n", gain=0.75), 1e-4)


def test_a_score_that_is_one_element() -> None:
    check(problem("attention f\ntensor bias: float32[1]\nscore = bias[0]\n", bias=torch.tensor([1.5])))


@pytest.mark.parametrize("element", ["0, 0", "H // 100, 0", "h // 100, 0", "0, 1 if flag else 1"])
def test_a_sink_read_at_one_place_by_all_heads_has_a_gradient(element: str) -> None:
    text = f"attention s(flag: bool)\ntensor table: float32[1, 2]\nsink = table[{element}]\nmask = q >= k\n"
    check(problem(text, table=torch.tensor([[0.3, -1.0]]), flag=True))


def test_a_sink_of_minus_infinity_is_none() -> None:
    text = "attention s\ntensor sinks: float32[H]\nsink = sinks[h]\nmask = k + 3 <= q\n"
    found = problem(text, sinks=torch.tensor([0.5, -math.inf]))
    check(found)
    assert (found.portable().lse[:, 1, :3] == -math.inf).all()


@pytest.mark.parametrize(
    "mask",
    [
        "rsqrt(cap) <= 0.5",
        "log(cap) < k",
        "1.0 / (cap - cap) > 3.0",
        "exp(cap * -1000.0) > 0.0 and q >= k",
        "cap ** 0.5 < 2.0 or q >= k",
        "cap // (cap - cap) < 1.0 and q >= k",
        "cap % (cap - cap) < 1.0 or q >= k",
        "exp2(cap * 1000.0) < 1.0 and q >= k + floor(cap) + ceil(cap)",
        "q >= k + floor(cap * b)",
    ],
)
def test_a_mask_of_float_parameters_that_are_no_numbers(mask: str) -> None:
    check(problem(f"attention a(cap: float)\nmask = {mask}\n", cap=-1.5))


@pytest.mark.parametrize(
    "score", ["sqrt(cap) if cap > 0 else score", "score if q >= 0 else exp(cap * -1000.0) * score"]
)
def test_a_branch_that_is_not_taken_has_no_effect(score: str) -> None:
    text = f"attention a(cap: float)\nscore = {score}\nmask = q >= k\n"
    upstream = problem(text, cap=-1.5).upstream()
    found, truth = problem(text, cap=-1.5).portable(upstream), problem(text, cap=-1.5).truth(upstream)
    for name in ("query", "key", "value"):
        torch.testing.assert_close(found.grads[name].double(), truth.grads[name], rtol=1e-4, atol=1e-4)


def test_an_index_out_of_range_where_the_mask_is_false_has_no_effect() -> None:
    text = "attention near\ntensor table: float32[9]\nscore = score + table[q - k]\nmask = 0 <= q - k < 9\n"
    check(problem(text, table=torch.linspace(-1, 1, 9)))
    text = "attention a(n: int)\ntensor count: int32[5]\nmask = n < 5 and k < count[n]\n"
    check(problem(text, n=11, count=torch.full((5,), 20, dtype=torch.int32)))


@pytest.mark.parametrize(
    "mask", ["k * b < 5", "k * (h - b) < n", "k * n >= small[b]", "k * b < small[b]", "q * b < k * h"]
)
def test_a_factor_of_a_position_may_be_zero(mask: str) -> None:
    text = f"attention a(n: int)\ntensor small: int16[B]\nmask = {mask}\n"
    check(problem(text, n=0, small=torch.tensor([7, 20], dtype=torch.int16)))
    check(problem(text, n=2, small=torch.tensor([0, -3], dtype=torch.int16)))


def test_bounds_of_more_than_32_bits_beside_narrow_integers() -> None:
    text = "attention a(n: int)\ntensor small: int16[B]\nmask = max(b * k, n) - sign(HK) == abs(small[b])\n"
    check(problem(text, n=2, small=torch.tensor([-1, 6], dtype=torch.int16)))


@pytest.mark.parametrize("mask", ["table[h] * 3.0 > bound and q >= k", "k <= q + floor(table[h] * 10.0)"])
def test_full_tiles_and_masked_tiles_agree_on_a_tie_of_float32(mask: str) -> None:
    text = f"attention a(bound: float)\ntensor table: float32[H]\nmask = {mask}\n"
    tie = problem(text, 40, 70, table=torch.tensor([0.1, 0.7]), bound=0.3)
    assert_close(tie.portable(), tie.truth(dtype=torch.float32), FLOAT32)


@pytest.mark.parametrize("flag", [False, True])
def test_a_choice_between_scalars_and_look_ups(flag: bool) -> None:
    text = "attention a(c: float, flag: bool)\ntensor keep: bool[KV]\nmask = keep[0] or flag if keep[k] else c < 0.5\n"
    check(problem(text, c=0.25 if flag else 0.75, flag=flag, keep=torch.arange(35) % 3 > 0))


@pytest.mark.parametrize(
    "body", ["sqrt(score * score * t[0])", "log(abs(score)) * t[min(k - q, 0) + 18]", "log(abs(score)) * t[q]"]
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_past_the_end_do_not_poison_the_gradients_of_captured_tensors(body: str, deterministic: bool) -> None:
    text = f"attention p\ntensor t: float32[19]\nscore = {body}\n"
    check(problem(text, kv_len=64, t=torch.linspace(0.5, 2, 19)), 1e-4, deterministic=deterministic)
