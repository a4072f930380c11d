"""The CPU backend where numbers are not: poison under the mask, empty rows, and what autograd may ask."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import attn_dsl
from attn_dsl.backend.cpu.elementary import tanh, tanh_
from attn_dsl.backend.cpu.relative import antidiagonals, sum_antidiagonals
from attn_dsl.backend.cpu.workers import operations_on, spread
from attn_dsl.ir.evaluate import attention as dense


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inputs(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=make, dtype=dtype).requires_grad_() for _ in range(3)]


EVERYTHING = """attention everything(cap: float, gain: float = 1.5)
tensor table: float64[H, 9]
tensor row: float64[B, Q]
tensor column: float64[KV]
tensor pair: float64[Q, KV]
tensor sinks: float64[H]
sink = sinks[h] * gain
score = cap * tanh(score / cap) * sigmoid(row[b, q]) + table[h, clamp(k - q, -4, 4) + 4] + gain * column[k] + pair[q, k]
mask = k <= q + 2
"""


def test_gradcheck_in_double_precision() -> None:
    query, key, value = inputs(2, 2, 5, 3)
    make = torch.Generator().manual_seed(1)
    names = {"table": (2, 9), "row": (2, 5), "column": (5,), "pair": (5, 5), "sinks": (2,), "cap": (), "gain": ()}
    captured = [torch.rand(shape, generator=make, dtype=torch.float64) + 0.5 for shape in names.values()]
    attn = attn_dsl.compile(EVERYTHING)

    def run(query: Tensor, key: Tensor, value: Tensor, *captured: Tensor) -> tuple[Tensor, Tensor]:
        return attn(query, key, value, return_lse=True, **dict(zip(names, captured, strict=True)))

    assert gradcheck(run, (query, key, value, *(x.requires_grad_() for x in captured)))


def test_a_second_derivative_is_refused() -> None:
    query, key, value = inputs(1, 1, 4, 4)
    out = attn_dsl.compile("causal")(query, key, value)
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


PADDED = "attention padded_rows\ntensor length: int32[B]\nmask = k < length[b] and q < length[b]\n"


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_what_no_pair_sees_has_no_effect(where: str, poison: float) -> None:
    query, key, value = inputs(2, 2, 150, 8)
    length = torch.tensor([70, 150], dtype=torch.int32)
    named = {"query": query, "key": key, "value": value}
    with torch.no_grad():
        named[where][0, :, 70:] = poison
    attn = attn_dsl.compile(PADDED)
    out, lse = attn(query, key, value, return_lse=True, length=length)
    assert out.isfinite().all() and (out[0, :, 70:] == 0).all()
    assert (lse[0, :, 70:] == -math.inf).all() and lse[1].isfinite().all()
    expected, _ = dense(attn.variant, query, key, value, bindings={"length": length})
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(out)
    got = torch.autograd.grad((out * direction).sum(), (query, key, value))
    wanted = torch.autograd.grad((expected * direction).sum(), (query, key, value))
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs)


ROOT = """attention root
tensor bias: float64[KV]
score = score + sqrt(q - k) + log(bias[k])
mask = q >= k and k < 40
"""


def test_a_score_that_is_no_number_under_the_mask_has_no_effect() -> None:
    query, key, value = inputs(1, 2, 100, 4)
    bias = torch.full((100,), -1.0, dtype=torch.float64)
    bias[:40] = 2.0
    bias.requires_grad_()
    attn = attn_dsl.compile(ROOT)
    out = attn(query, key, value, bias=bias)
    expected, _ = dense(attn.variant, query, key, value, bindings={"bias": bias})
    torch.testing.assert_close(out, expected)
    leaves = (query, key, value, bias)
    for mine, theirs in zip(
        torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_an_index_out_of_range_under_the_mask_has_no_effect() -> None:
    query, key, value = inputs(1, 1, 70, 4)
    table = torch.randn(9, dtype=torch.float64).requires_grad_()
    attn = attn_dsl.compile(
        "attention near\ntensor table: float64[9]\nscore = score + table[q - k]\nmask = 0 <= q - k < 9\n"
    )
    out = attn(query, key, value, table=table, validate=True)
    expected, _ = dense(attn.variant, query, key, value, bindings={"table": table})
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), table)[0], torch.autograd.grad(expected.sum(), table)[0])


def test_rows_that_see_nothing_give_zero_and_no_gradient() -> None:
    query, key, value = inputs(1, 2, 70, 4)
    out, lse = attn_dsl.compile("attention none\nmask = q > 500\n")(query, key, value, return_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()
    out.sum().backward()
    assert all(x.grad is not None and (x.grad == 0).all() for x in (query, key, value))


def test_a_row_that_sees_only_the_sink_gives_zero_and_its_logit() -> None:
    query, key, value = inputs(1, 2, 6, 4)
    sinks = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)
    attn = attn_dsl.compile("attention s\ntensor sinks: float64[H]\nsink = sinks[h]\nmask = k + 3 <= q\n")
    out, lse = attn(query, key, value, return_lse=True, sinks=sinks)
    assert (out[:, :, :3] == 0).all()
    torch.testing.assert_close(lse[0, :, :3], sinks.detach()[:, None].expand(-1, 3))


@pytest.mark.parametrize("shift", [300.0, -300.0, 1e5])
def test_large_logits_neither_overflow_nor_vanish(shift: float) -> None:
    query, key, value = inputs(1, 1, 700, 4, dtype=torch.float32)
    attn = attn_dsl.compile("attention far(shift: float)\nscore = score + shift * (k // 300)\n")
    out = attn(query, key, value, shift=shift)
    expected, _ = dense(attn.variant, query, key, value, bindings={"shift": shift})
    rounding = 2**-24 * 4 * abs(shift)  # of a logit
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4 * rounding + 1e-5)


@pytest.mark.parametrize("cap", [-2.0, 0.5])
def test_a_factor_of_the_score_may_be_negative(cap: float) -> None:
    query, key, value = inputs(1, 2, 90, 4)
    attn = attn_dsl.compile("attention f(cap: float)\nscore = cap * exp(score / 2.0)\n")
    out = attn(query, key, value, cap=cap)
    torch.testing.assert_close(out, dense(attn.variant, query, key, value, bindings={"cap": cap})[0])


@pytest.mark.parametrize("score", ["0.5 * score", "score * gain", "score / gain", "-gain * score", "gain * KV"])
def test_a_score_that_is_only_a_multiple_has_gradients(score: str) -> None:
    query, key, value = inputs(1, 2, 90, 4)
    gain = torch.tensor(1.25, dtype=torch.float64, requires_grad=True)
    attn = attn_dsl.compile(f"attention f(gain: float)\nscore = {score}\nmask = q != k\n")
    leaves = (query, key, value, gain)
    out, expected = (
        attn(query, key, value, gain=gain),
        dense(attn.variant, query, key, value, bindings={"gain": gain})[0],
    )
    direction = torch.randn_like(out)
    got, wanted = (torch.autograd.grad((x * direction).sum(), leaves, allow_unused=True) for x in (out, expected))
    for mine, theirs, leaf in zip(got, wanted, leaves, strict=True):
        torch.testing.assert_close(*(torch.zeros_like(leaf) if x is None else x for x in (mine, theirs)))


@pytest.mark.parametrize("factor", [3.25, 1e4])
def test_a_row_that_sees_nothing_beside_others_under_a_large_factor(factor: float) -> None:
    query, key, value = inputs(1, 2, 40, 4, dtype=torch.float32)
    attn = attn_dsl.compile(
        "attention f(cap: float)\nscore = cap * tanh(score / cap)\nmask = k < 3 * q - 30\nsink = 1.0\n"
    )
    out, lse = attn(query, key, value, cap=factor, return_lse=True)
    expected = dense(attn.variant, query, key, value, bindings={"cap": factor})
    torch.testing.assert_close(out.double(), expected[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(lse.double(), expected[1], rtol=0, atol=1e-4)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (query, key, value)))


@pytest.mark.parametrize("score", ["exp(score)", "gain * exp(score)", "sigmoid(score)", "exp2(score) * exp(score)"])
def test_a_score_that_is_its_own_derivative(score: str) -> None:
    query, key, value = inputs(1, 2, 9, 4)
    gain = torch.tensor(1.25, dtype=torch.float64, requires_grad=True)
    attn = attn_dsl.compile(f"attention f(gain: float)\nscore = {score}\n")
    out, expected = (
        attn(query, key, value, gain=gain),
        dense(attn.variant, query, key, value, bindings={"gain": gain})[0],
    )
    leaves = (query, key, value, gain) if "gain" in score else (query, key, value)
    got, wanted = (torch.autograd.grad(x.square().sum(), leaves) for x in (out, expected))
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_captured_tensors_are_only_read() -> None:
    query, key, value = inputs(1, 1, 1, 4)
    bias = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    attn = attn_dsl.compile("attention f\ntensor bias: float64[1]\nscore = bias[0]\n")
    out, lse = attn(query, key, value, bias=bias, return_lse=True)
    (lse + out.sum(-1)).sum().backward()
    assert bias.item() == 1.5 and lse.item() == pytest.approx(1.5)
    assert bias.grad is not None and bias.grad.item() == pytest.approx(1.0)


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
        "exp2(cap * 1000.0) < 1.0 and q >= k + floor(log2(cap * -2.0))",
    ],
)
def test_the_schedule_has_an_answer_where_python_raises(mask: str) -> None:
    query, key, value = inputs(1, 2, 70, 4)
    attn = attn_dsl.compile(f"attention a(cap: float)\nmask = {mask}\n")
    expected = dense(attn.variant, query, key, value, bindings={"cap": -1.5})[0]
    torch.testing.assert_close(attn(query, key, value, cap=-1.5), expected)


def test_a_schedule_may_look_up_out_of_range_where_the_mask_is_false() -> None:
    query, key, value = inputs(1, 2, 70, 4)
    attn = attn_dsl.compile("attention a(n: int)\ntensor count: int32[5]\nmask = n < 5 and k < count[n]\n")
    assert (attn(query, key, value, n=11, count=torch.full((5,), 20, dtype=torch.int32)) == 0).all()


@pytest.mark.parametrize(
    "mask",
    [
        "table[h] * 3.0 > bound and q >= k",
        "k <= q + floor(table[h] * 10.0)",
        "k <= q + floor(bound / 0.1)",
        "q * bound < k",
    ],
)
def test_full_tiles_and_masked_tiles_agree_on_a_tie_of_float32(mask: str) -> None:
    query, key, value = inputs(1, 2, 150, 4, dtype=torch.float32)
    bindings = {"table": torch.tensor([0.1, 0.7]), "bound": 0.3}
    attn = attn_dsl.compile(f"attention a(bound: float)\ntensor table: float32[H]\nmask = {mask}\n")
    expected = dense(attn.variant, query, key, value, bindings=bindings)[0]
    torch.testing.assert_close(attn(query, key, value, **bindings).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("element", ["0, 0", "H // 100, 0", "h // 100, 0", "0, 1 if flag else 1"])
def test_a_sink_read_at_one_place_by_all_heads_has_a_gradient(element: str) -> None:
    query, key, value = inputs(2, 2, 20, 4)
    table = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)
    text = f"attention s(flag: bool)\ntensor table: float64[1, 2]\nsink = table[{element}]\nmask = q >= k\n"
    attn = attn_dsl.compile(text)
    bindings = {"table": table, "flag": True}
    out, expected = attn(query, key, value, **bindings), dense(attn.variant, query, key, value, bindings=bindings)[0]
    (mine,), (theirs,) = (torch.autograd.grad(x.square().sum(), table) for x in (out, expected))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("reach", [1e-6, 0.03, 0.1, 0.3, 0.5, 0.7, 2.0, 30.0])
def test_tanh_is_right_to_a_few_units_in_the_last_place(reach: float) -> None:
    x = torch.linspace(-reach, reach, 20_001)
    exact = torch.tanh(x.double())
    for found in (tanh(x), tanh_(x.clone())):
        error = (found.double() - exact).abs() / exact.abs().clamp(min=1e-30)
        assert error[x != 0].max() < 8 * 2**-24
        assert (found[x == 0] == 0).all()


@pytest.mark.parametrize("outlier", [0.16, -3.0, 100.0, float("inf"), float("nan")])
def test_tanh_of_one_large_number_among_small_ones(outlier: float) -> None:
    """What a sample does not see is seen all the same."""
    x = torch.full((20_001,), 0.1)
    x[7] = outlier
    torch.testing.assert_close(tanh_(x.clone()), torch.tanh(x.double()).float(), rtol=5e-7, atol=0.0, equal_nan=True)


def test_tanh_keeps_nan_and_saturates() -> None:
    x = torch.zeros(8192)
    x[5], x[6], x[7] = math.nan, math.inf, -math.inf
    found = tanh(x)
    assert found[5].isnan() and found[8] == 0
    torch.testing.assert_close(found[6:8], torch.tensor([1.0, -1.0]), rtol=2**-22, atol=0)


def test_antidiagonals_are_a_view_and_their_sum_its_transpose() -> None:
    vector = torch.arange(10.0).expand(2, 10).clone()
    tile = antidiagonals(vector, 4, 7)
    assert tile.data_ptr() == vector.data_ptr() and tile[1, 2, 3] == 5
    weight = torch.randn(2, 4, 7)
    torch.testing.assert_close((tile * weight).sum(), (vector * sum_antidiagonals(weight)).sum())


def test_a_worker_that_fails_is_heard_and_threads_are_given_back() -> None:
    torch.set_num_threads(2)

    def work(items: Iterator[int]) -> None:
        for item in items:
            if item == 5:
                raise ValueError("five")

    with pytest.raises(ValueError, match="five"), operations_on(1):
        spread(work, iter(range(100)), 2)
    assert torch.get_num_threads() == 2


def test_results_are_the_same_in_every_run() -> None:
    torch.set_num_threads(2)
    query, key, value = inputs(2, 4, 300, 16, dtype=torch.float32)
    table = torch.randn(4, 17, requires_grad=True)
    attn = attn_dsl.compile("t5_bias", reach=8)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attn(query, key, value, table=table).square().sum(), (query, key, value, table))

    for first, second in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, second)
