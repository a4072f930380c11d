"""The portable kernels against the evaluator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import strategies
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from portable_support import Problem, assert_close, compiled, program_of
from torch import Tensor
from variant_cases import Case, Sizes, cases

FLOAT32 = 3e-5


def one_of_each() -> list[Case]:
    """The second case of each variant where there are two: other lengths and an offset."""
    chosen: dict[str, Case] = {}
    for case in cases():
        if case.name not in chosen or chosen[case.name].sizes.q_offset == 0:
            chosen[case.name] = replace(case, sizes=replace(case.sizes, B=min(case.sizes.B, 2)))
    return list(chosen.values())


@pytest.mark.parametrize("case", one_of_each(), ids=lambda case: case.id)
def test_every_shipped_variant_agrees_forward_and_backward(case: Case) -> None:
    problem = Problem.of(case)
    upstream = problem.upstream()
    assert_close(problem.portable(upstream), problem.truth(upstream), FLOAT32)


def small(name: str = "causal", **sizes: int) -> Case:
    return Case(name, {}, replace(Sizes(B=1, H=2, HK=1, Q=19, KV=35, D=16, DV=16, q_offset=16), **sizes))


def check(problem: Problem, tolerance: float = FLOAT32) -> None:
    upstream = problem.upstream()
    assert_close(problem.portable(upstream), problem.truth(upstream), tolerance)


@pytest.mark.parametrize("dims", [(16, 24), (80, 16), (96, 121), (192, 128), (33, 7)], ids=str)
def test_head_dimensions_of_any_size(dims: tuple[int, int]) -> None:
    check(Problem.of(small(D=dims[0], DV=dims[1])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_the_truth(dtype: torch.dtype) -> None:
    check(Problem.of(small("alibi"), dtype), 0.02)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 40), (40, 1), (33, 16)], ids=str)
def test_lengths_from_one(lengths: tuple[int, int]) -> None:
    check(Problem.of(small(Q=lengths[0], KV=lengths[1], q_offset=max(0, lengths[1] - lengths[0]))))


@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
@pytest.mark.parametrize("name", ["causal", "softcap"])
def test_scale_of_any_sign(name: str, scale: float) -> None:
    check(replace(Problem.of(small(name)), scale=scale))


def test_strides_of_any_kind() -> None:
    problem = Problem.of(small(D=16, DV=16))

    def transposed(x: Tensor) -> Tensor:
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    def spread(x: Tensor) -> Tensor:
        return torch.stack([x, x + 1], dim=-1).flatten(3)[..., ::2]

    check(replace(problem, query=transposed(problem.query)))
    check(replace(problem, key=spread(problem.key), value=transposed(problem.value)))
    check(replace(problem, query=problem.query.transpose(1, 2).contiguous().transpose(1, 2)))


def test_keys_and_values_broadcast_over_the_batch() -> None:
    problem = Problem.of(small(B=3))
    check(replace(problem, key=problem.key[:1], value=problem.value[:1]))


def test_query_offset_of_each_batch() -> None:
    check(replace(Problem.of(small(B=3)), q_offset=torch.tensor([0, 16, 5], dtype=torch.int32)))


def test_rows_that_see_nothing_give_zero_and_minus_infinity() -> None:
    problem = replace(Problem.of(small("sliding_window")), bindings={"window": 3}, q_offset=30)
    found = problem.portable(problem.upstream())
    empty = found.lse == -torch.inf
    assert empty.any() and (found.out[empty] == 0).all()
    check(problem)


def test_a_window_at_the_end_of_32_bits() -> None:
    for window in (2**31 - 1, 2**31, 2**40):
        check(replace(Problem.of(small("sliding_window")), bindings={"window": window}))


CAPTURES = {
    "bias[q, k]": ("float32[KV, KV]", "bias[q, k]"),
    "bias[h, q, k]": ("float16[H, KV, KV]", "bias[h, q, k]"),
    "bias[b, h, q, k]": ("bfloat16[B, H, KV, KV]", "bias[b, h, q, k]"),
    "bias[q]": ("float32[KV]", "score * bias[q]"),
    "bias[k]": ("float64[KV]", "bias[k]"),
    "bias[k, q]": ("float32[KV, KV]", "bias[k, q]"),
    "bias[q + k]": ("float32[2 * KV]", "bias[q + k]"),
    "bias[clamp(q - k)]": ("float32[9]", "bias[clamp(q - k, -4, 4) + 4]"),
    "bias[half(q)]": ("float32[KV]", "bias[q // 2] * score"),
    "gate[h]": ("float32[H]", "score * sigmoid(bias[h])"),
    "bias[0]": ("float32[1]", "bias[0] * (k / 8)"),
}


def capture(pattern: str) -> Problem:
    dtype, term = CAPTURES[pattern]
    text = f"attention capture\ntensor bias: {dtype}\nscore = score + {term}\nmask = q >= k\n"
    case = small(q_offset=0, Q=35)
    program = program_of(text)
    query, key, value = case.inputs()
    sizes = {"H": 2, "B": 1, "KV": 35, "2 * KV": 70}
    shape = [int(sizes.get(extent.strip(), 0) or extent) for extent in dtype[dtype.index("[") + 1 : -1].split(",")]
    kind = getattr(torch, dtype[: dtype.index("[")])
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(kind)
    return Problem(program, query, key, value, {"bias": bias})


@pytest.mark.parametrize("pattern", CAPTURES)
def test_gradients_reach_captures_of_any_pattern(pattern: str) -> None:
    check(capture(pattern), 5e-3 if "16" in CAPTURES[pattern][0] else FLOAT32)


@pytest.mark.parametrize("pattern", ["bias[clamp(q - k)]", "bias[q]", "bias[k]", "gate[h]"])
def test_deterministic_gradients_are_right_and_the_same_bits(pattern: str) -> None:
    problem = capture(pattern)
    upstream = problem.upstream()
    first, second = (problem.portable(upstream, deterministic=True) for _ in range(2))
    assert_close(first, problem.truth(upstream), FLOAT32)
    assert torch.equal(first.grads["bias"], second.grads["bias"])


SATURATING = {
    "both sides": "score = score + table[h, clamp(k - q, -3, 3) + 3]",
    "causal": "score = score + table[h, clamp(k - q, -3, 3) + 3]\nmask = q >= k",
    "in a product": "score = 2 * tanh(score * table[h, max(k - q, -5) - max(k - q - 1, -5) + 3] / 2)\nmask = q >= k",
    "beside keys": "score = score + table[h, clamp(q - k, 0, 6)] * row[k] + row[min(k, q)]",
    "one axis left": "score = score + row[min(q - k, 9) + k + 20]\nmask = 0 <= q - k",
}


@pytest.mark.parametrize("body", SATURATING)
def test_look_ups_that_saturate_are_one_number_on_full_tiles(body: str) -> None:
    text = f"attention saturating\ntensor table: float32[H, 7]\ntensor row: float32[160]\n{SATURATING[body]}\n"
    program = program_of(text)
    if body != "in a product":
        assert program.kernels.split[1]
    generator = torch.Generator().manual_seed(5)
    tensors = {"table": torch.randn(2, 7, generator=generator), "row": torch.randn(160, generator=generator)}
    problem = Problem(program, *small(Q=50, KV=80).inputs(), tensors, 28)
    upstream = problem.upstream()
    found = problem.portable(upstream, deterministic=body in ("causal", "one axis left"))
    assert_close(found, problem.truth(upstream), FLOAT32)


SINKS = """attention sinks(gain: float = 0.7)
tensor table: float32[H]
tensor bias: float32[KV]
score = score + bias[q] * table[h]
mask = 0 < q - k
sink = gain * table[h] - 1
"""


@pytest.mark.parametrize("deterministic", [False, True])
def test_sinks_hand_their_gradient_on_to_all_that_they_read(deterministic: bool) -> None:
    query, key, value = small().inputs()
    tensors = {"table": torch.tensor([0.3, -1.2]), "bias": torch.linspace(-2, 1, 35)}
    problem = Problem(program_of(SINKS), query, key, value, tensors)
    upstream = problem.upstream()
    assert_close(problem.portable(upstream, deterministic=deterministic), problem.truth(upstream), FLOAT32)


def test_captures_of_any_strides() -> None:
    problem = capture("bias[k, q]")
    check(replace(problem, bindings={"bias": problem.bindings["bias"].T.contiguous().T}))
    check(replace(problem, bindings={"bias": torch.randn(1, 35).expand(35, 35)}))


@pytest.mark.parametrize(
    "score",
    ["score / (q - k)", "log(q - k) + score", "score * (1.0 / (q - k)) ** 2", "score + sqrt(q - k - 1)"],
)
def test_values_under_the_mask_do_not_poison(score: str) -> None:
    program = program_of(f"attention poison\nscore = {score}\nmask = q - k > 0\n")
    check(Problem(program, *small().inputs(), {}, 16), 1e-4)


def test_padding_of_infinities_and_nan_does_not_poison() -> None:
    problem = Problem.of(small("padded", B=2, Q=40, KV=40, q_offset=0))
    length = torch.tensor([23, 40], dtype=torch.int32)
    key, value = problem.key.clone(), problem.value.clone()
    key[0, :, 23:], value[0, :, 23:] = torch.nan, torch.inf
    problem = replace(problem, key=key, value=value, bindings={"length": length})
    found, clean = problem.portable(problem.upstream()), Problem.of(small("padded", B=2, Q=40, KV=40, q_offset=0))
    for tensor in (found.out, *found.grads.values()):
        assert not tensor.isnan().any()
    clean = replace(clean, bindings={"length": length})
    assert torch.equal(found.out, clean.portable().out)


def test_a_key_that_is_not_a_number_does_not_reach_queries_that_do_not_see_it() -> None:
    problem = Problem.of(small(Q=40, KV=40, q_offset=0))
    key = problem.key.clone()
    key[:, :, 20] = torch.nan
    found, clean = replace(problem, key=key).portable(), problem.portable()
    assert torch.equal(found.out[:, :, :20], clean.out[:, :, :20]) and found.out[:, :, 20:].isnan().all()


@settings(
    max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(st.data())
def test_random_variants_agree(data: st.DataObject) -> None:
    variant = data.draw(strategies.variants())
    seed = data.draw(st.integers(0, 100))
    generator = torch.Generator().manual_seed(seed)
    sizes = strategies.SIZES

    def random(heads: int, rows: int) -> Tensor:
        return torch.randn(sizes["B"], heads, rows, sizes["D"], generator=generator)

    drawn = strategies.bindings(seed)
    bindings = {p.name: drawn[p.name] for p in variant.parameters}
    bindings |= {t.name: drawn[t.name].to(getattr(torch, t.dtype.value)) for t in variant.tensors}
    problem = Problem(
        compiled(variant), random(sizes["H"], sizes["Q"]), random(sizes["HK"], sizes["KV"]),
        random(sizes["HK"], sizes["KV"]), bindings,
    )  # fmt: skip
    truth = problem.truth(problem.upstream())
    if all(grad.isfinite().all() and grad.abs().max() < 1e4 for grad in truth.grads.values()):
        assert_close(problem.portable(problem.upstream()), truth, 1e-3)


@pytest.mark.parametrize(
    ("name", "wanted", "kernels"), [("t5_bias", "table", 2), ("alibi", "slope", 2), ("gpt_oss", "sinks", 1)]
)
def test_gradients_of_what_is_captured_can_be_had_alone(name: str, wanted: str, kernels: int) -> None:
    """By the kernels that add to them and no other: here all but that of dK and dV, for a sink the one of the rows."""
    from attn_dsl.backend.execute import Options, portable_call
    from attn_dsl.backend.portable import launch
    from attn_dsl.backend.portable.run import launch as run

    problem = Problem.of(next(case for case in one_of_each() if case.name == name))
    bindings = problem.all_bindings
    call = problem.program.binder.bind(problem.query, problem.key, problem.value, None, problem.q_offset, bindings)
    bound = portable_call(problem.program, call, Options("portable"))
    out, _, shifted = launch.forward(problem.program.kernels, bound)
    given = (problem.program.kernels, bound, out, shifted, torch.randn_like(out), None, frozenset({wanted}))
    launched: list[object] = []

    def counted(*arguments: object) -> None:
        launched.append(arguments[0])
        run(*arguments)  # type: ignore[arg-type]

    found = launch.captured_gradients(*given, run=counted)
    assert torch.allclose(found[wanted], launch.backward(*given).captured[wanted], rtol=1e-5, atol=1e-6)
    assert len(launched) == kernels
