"""The decode kernel against the evaluator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from portable_support import Problem, Result, assert_close, compiled, program_of
from torch import Tensor
from variant_cases import Case, Sizes, cases

from attn_dsl.backend import gpu
from attn_dsl.backend.execute import Options, portable_call
from attn_dsl.backend.portable import launch, launch_decode
from attn_dsl.backend.portable.launch_decode import Layout, fewest_splits
from attn_dsl.passes.lengths import with_lengths

FLOAT32 = 3e-5


def bound(problem: Problem) -> launch.Call:
    inputs = problem.query, problem.key, problem.value
    call = problem.program.binder.bind(*inputs, problem.scale, problem.q_offset, problem.all_bindings)
    return portable_call(problem.program, call, Options("decode"))


def layout(problem: Problem, splits: int, **changes: int) -> Layout:
    """Tiles of 16 keys, so that short lengths make several."""
    found = launch_decode.layout_of(problem.program.kernels, bound(problem), splits)
    return replace(found, **{"keys": 16, **changes})


def decoded(problem: Problem, splits: int = 1, **changes: int) -> Result:
    chosen = layout(problem, splits, **changes)
    out, lse, _ = launch_decode.forward(problem.program.kernels, bound(problem), layout=chosen)
    return Result(out, lse)


def check(problem: Problem, *splits: int, tolerance: float = FLOAT32) -> None:
    truth = problem.truth()
    for number in splits or (1, 3):
        assert_close(decoded(problem, number), truth, tolerance)


def short_calls() -> list[Case]:
    """Of each variant: some query tokens at the end of what the others look at."""
    chosen: dict[str, Case] = {}
    for case in cases():
        if case.name not in chosen:
            tokens = min(case.sizes.Q, 20 if case.name == "block_diffusion" else 5)
            sizes = replace(case.sizes, Q=tokens, q_offset=case.sizes.KV - tokens - 2)
            chosen[case.name] = replace(case, sizes=sizes)
    return list(chosen.values())


@pytest.mark.parametrize("case", short_calls(), ids=lambda case: case.name)
def test_every_shipped_variant_agrees(case: Case) -> None:
    check(Problem.of(case))


def cache(name: str = "causal", tokens: int = 1, length: int = 75, **sizes: int) -> Case:
    shape = Sizes(B=2, H=6, HK=2, Q=tokens, KV=length, D=16, DV=16, q_offset=length - tokens)
    return Case(name, {}, replace(shape, **sizes))


@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 33, 64])
def test_one_to_64_query_tokens(tokens: int) -> None:
    check(Problem.of(cache(tokens=tokens, B=1, H=3, HK=1)))


@pytest.mark.parametrize("heads", [(1, 1), (5, 1), (8, 8), (7, 1), (16, 1), (40, 2)], ids=str)
def test_groups_of_any_size(heads: tuple[int, int]) -> None:
    check(Problem.of(cache("alibi", tokens=3, B=1, H=heads[0], HK=heads[1])))


def test_rows_that_fill_several_tiles() -> None:
    problem = Problem.of(cache("alibi", tokens=30, B=1, H=3, HK=1))
    assert layout(problem, 2, rows=16).rows == 16
    for splits in (1, 2):
        found = decoded(problem, splits, rows=16, row_tiles=-(-90 // 16))
        assert_close(found, problem.truth(), FLOAT32)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 64, 100])
def test_caches_of_any_length(length: int) -> None:
    for name in ("noop", "causal"):
        check(Problem.of(cache(name, length=length)), 1, 2, 7)


@pytest.mark.parametrize("dims", [(16, 24), (80, 16), (96, 121), (192, 128), (256, 256), (33, 7)], ids=str)
def test_head_dimensions_of_any_size(dims: tuple[int, int]) -> None:
    check(Problem.of(cache(length=40, D=dims[0], DV=dims[1])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_the_truth(dtype: torch.dtype) -> None:
    check(Problem.of(cache("alibi"), dtype), tolerance=0.02)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
@pytest.mark.parametrize("name", ["causal", "softcap"])
def test_scale_of_any_sign(name: str, scale: float) -> None:
    check(replace(Problem.of(cache(name)), scale=scale))


def test_strides_of_any_kind() -> None:
    problem = Problem.of(cache(tokens=4))

    def tokens_first(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def spread(x: Tensor) -> Tensor:
        return torch.stack([x, x + 1], dim=-1).flatten(3)[..., ::2]

    check(replace(problem, query=tokens_first(problem.query), key=tokens_first(problem.key)))
    check(replace(problem, query=spread(problem.query), value=spread(problem.value)))
    check(replace(problem, key=problem.key[:1], value=problem.value[:1]))


@pytest.mark.parametrize("name", ["causal", "sliding_window", "alibi", "gpt_oss"])
def test_query_offsets_on_the_device(name: str) -> None:
    problem = Problem.of(cache(name, tokens=2))
    parameters = {"window": 20} if "window" in problem.all_bindings else {}
    bindings = {**problem.bindings, **parameters}
    for dtype in (torch.int32, torch.int64):
        check(replace(problem, bindings=bindings, q_offset=torch.tensor([3, 73], dtype=dtype)))


def test_rows_that_see_nothing_give_zero_and_minus_infinity() -> None:
    problem = replace(Problem.of(cache("sliding_window", tokens=9)), bindings={"window": 3}, q_offset=72)
    for splits in (1, 4):
        found = decoded(problem, splits)
        empty = found.lse == -torch.inf
        assert empty.any() and not empty.all() and (found.out[empty] == 0).all()
    check(problem, 1, 4)


def test_a_sink_counts_once_however_many_splits_there_are() -> None:
    problem = Problem.of(cache("gpt_oss", tokens=2))
    check(replace(problem, bindings={**problem.bindings, "window": 30}), 1, 2, 5)
    unseen = replace(problem, q_offset=400, bindings={**problem.bindings, "window": 30})
    sinks = problem.bindings["sinks"].view(1, -1, 1)
    for splits in (1, 3):
        found = decoded(unseen, splits)
        assert (found.out == 0).all()
        torch.testing.assert_close(found.lse, sinks.expand_as(found.lse))


@pytest.mark.parametrize("window", [1, 5, 16, 21, 74])
def test_windows_that_start_within_a_tile(window: int) -> None:
    check(replace(Problem.of(cache("sliding_window", tokens=3)), bindings={"window": window}), 1, 2, 6)


def test_a_window_reads_only_its_tiles() -> None:
    """What the window does not reach is poison, and the splits still share what it does."""
    problem = replace(Problem.of(cache("sliding_window", length=160)), bindings={"window": 40})
    truth = problem.truth()
    poisoned = replace(problem, key=problem.key.clone(), value=problem.value.clone())
    poisoned.key[:, :, :112] = poisoned.value[:, :, :112] = torch.nan  # 120 is the first that is seen, 112 its tile's
    for splits in (1, 2, 3):
        assert_close(decoded(poisoned, splits), truth, FLOAT32)


HEADS = """attention windows
tensor window: int32[H]
mask = q - window[h] < k <= q
"""


def test_heads_that_see_different_tiles_do_not_share_one() -> None:
    program = program_of(HEADS)
    query, key, value = cache(tokens=3).inputs()
    window = torch.tensor([1, 70, 20, 33, 5, 16], dtype=torch.int32)
    problem = Problem(program, query, key, value, {"window": window}, q_offset=72)
    assert layout(problem, 2).pack == 1
    check(problem, 1, 2)


KEYS = """attention chosen
tensor picked: int32[B, H, KV]
mask = picked[b, h, k] > 0 and q >= k
"""


def test_a_mask_of_heads_and_keys() -> None:
    case = cache(tokens=3)
    generator = torch.Generator().manual_seed(5)
    picked = torch.randint(0, 2, (2, 6, 75), generator=generator, dtype=torch.int32)
    check(Problem(program_of(KEYS), *case.inputs(), {"picked": picked}, q_offset=72))


ROWS = """attention rows
tensor bias: float32[H, KV]
tensor gate: float32[H]
score = score * gate[h] + bias[h, q] + 0.1 * gate[h] * (k - q)
mask = q >= k
"""


def test_factors_slopes_and_row_terms_of_each_head() -> None:
    case = cache(tokens=4)
    generator = torch.Generator().manual_seed(6)
    bias, gate = torch.randn(6, 75, generator=generator), torch.randn(6, generator=generator)
    check(Problem(program_of(ROWS), *case.inputs(), {"bias": bias, "gate": gate}, q_offset=71), 1, 4)


def test_what_the_backward_pass_wants_is_what_the_other_kernels_leave() -> None:
    case = cache(tokens=4)
    generator = torch.Generator().manual_seed(6)
    bias, gate = torch.randn(6, 75, generator=generator), torch.randn(6, generator=generator)
    problem = Problem(program_of(ROWS), *case.inputs(), {"bias": bias, "gate": gate}, q_offset=71)
    kernels, call = problem.program.kernels, bound(problem)
    for found, other in zip(
        launch_decode.forward(kernels, call, layout=layout(problem, 3)), launch.forward(kernels, call), strict=True
    ):
        torch.testing.assert_close(found, other)


def test_the_same_bits_in_every_run() -> None:
    problem = Problem.of(cache("alibi", tokens=3))
    first, second = (decoded(problem, 4) for _ in range(2))
    assert torch.equal(first.out, second.out) and torch.equal(first.lse, second.lse)


@pytest.mark.parametrize("name", ["noop", "causal", "alibi", "sliding_window", "gpt_oss"])
def test_lengths_of_each_batch_entry(name: str) -> None:
    """Keys past the length of an entry are neither seen nor read."""
    variant = program_of(name).variant
    case = cache(name, tokens=2, B=4)
    lengths = torch.tensor([0, 75, 33, 2], dtype=torch.int32)
    bindings = {**({"window": 20} if "window" in {p.name for p in variant.parameters} else {}), **case.tensors()}
    query, key, value = case.inputs()
    offsets = (lengths - 2).clamp(min=0)
    problem = Problem(
        compiled(with_lengths(variant)), query, key, value, {**bindings, "kv_len": lengths}, q_offset=offsets
    )
    truth = problem.truth()
    for i, length in enumerate(lengths.tolist()):
        key[i, :, length:] = value[i, :, length:] = torch.nan
    for splits in (1, 3):
        assert_close(decoded(problem, splits), truth, FLOAT32)


# ---------------------------------------------------------------- layouts and routes


def test_the_fewest_splits_that_fill_the_machine() -> None:
    assert fewest_splits(64, 264, 256) == 4
    assert fewest_splits(8, 264, 2048) == 33  # 29 would do for 85 percent, and 33 are still one wave
    assert fewest_splits(512, 264, 64) == 1 and fewest_splits(220, 264, 64) == 1
    assert fewest_splits(1, 264, 3) == 3  # no split without a tile
    for programs in range(1, 300):
        splits = fewest_splits(programs, 264, 1000)
        assert splits == 1 or programs * splits <= 264 * -(-programs * splits // 264)


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        (cache(tokens=1, H=32, HK=8), "decode"),
        (cache(tokens=16, H=32, HK=8, B=50), "decode"),
        (cache(tokens=17, H=32, HK=8, B=50), "portable"),
        (cache(tokens=64, H=3, HK=1, B=1, length=90), "decode"),
        (cache(tokens=65, H=1, HK=1, B=1, length=90), "portable"),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else value,
)
def test_shapes_decide_the_route_and_explain_says_why(case: Case, backend: str) -> None:
    problem = Problem.of(case)
    call = bound(problem)
    found = gpu.route(problem.program, call)
    assert found.backend == backend
    said = gpu.describe(problem.program, call, found, None)
    assert f"backend    {backend}, since" in said
    if backend == "decode":
        assert f"{case.sizes.Q} query token" in said and "split" in said and "rows x" in said


def test_the_route_runs_the_kernel_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    original = launch_decode.forward

    def spy(*arguments: object, **named: object) -> object:
        taken.append("decode")
        return original(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(launch_decode, "forward", spy)
    problem = Problem.of(cache(tokens=2))
    out, lse, _ = gpu.forward(problem.program, bound(problem), "gpu")
    assert taken == ["decode"]
    assert_close(Result(out, lse), problem.truth(), FLOAT32)
    gpu.forward(problem.program, bound(problem), "portable")
    assert taken == ["decode"]
