"""What the Hopper backward kernel is given, and which calls take it, decided without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hopper_support import GOOD, HOPPER, compiler, fresh, tensor
from portable_support import program_of
from torch import Tensor

from attn_dsl.backend import gpu
from attn_dsl.backend.execute import Program
from attn_dsl.backend.hopper import check
from attn_dsl.backend.hopper.backward import attention_backward
from attn_dsl.backend.hopper.backward_rows import count_turns, finish_queries, prepare_rows
from attn_dsl.backend.hopper.configs import SHARED_LIMIT
from attn_dsl.backend.hopper.configs_backward import candidates
from attn_dsl.backend.hopper.emit_backward import Emitted
from attn_dsl.backend.hopper.launch_backward import Kernels, backward, refusal
from attn_dsl.backend.portable.launch import Call

pytestmark = pytest.mark.usefixtures("own_cache")


def emitted(text: str) -> Emitted:
    return Kernels(program_of(text).kernels).emitted(False)[0]


def variant(score: str = "score", mask: str = "true", declared: str = "") -> str:
    return f"attention test(cap: float = 3.0)\n{declared}\nscore = {score}\nmask = {mask}\n"


def call(*shape: int, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Call:
    query = tensor(*shape, dtype=dtype)
    return Call(query, query, query, (), (), (), 0.1, **more)


# ---------------------------------------------------------------- emission


def test_a_bare_product_needs_no_score() -> None:
    for name in ("noop", "causal", "alibi"):
        assert "score" not in emitted(name).functions and not emitted(name).has_derivative


def test_a_score_and_its_derivative_share_what_they_have_in_common() -> None:
    text = emitted("softcap")
    assert text.has_derivative and not text.positional
    assert text.source.count("tanh_approx(") == 1 and "1.0 - t0 * t0" in text.source


def test_what_is_affine_in_the_positions_is_a_slope() -> None:
    assert "slope" in emitted("alibi").functions and not emitted("alibi").positional


def test_a_factor_may_be_negative() -> None:
    text = emitted(variant("-2.0 * score"))
    assert "-2.0" in text.source.partition("def factor")[2] or "-2.8" in text.source.partition("def factor")[2]
    assert "-2.0" in text.source.partition("def gain")[2] and not text.has_derivative


def test_look_ups_by_one_position_leave_the_pairs() -> None:
    text = emitted(variant(mask="kind[b, q] == kind[b, k]", declared="tensor kind: int32[B, N]"))
    assert {"keys", "columns", "mask"} <= text.functions
    assert "element(" not in text.source.partition("def mask")[2].partition("@triton.jit")[0]


def test_full_tiles_are_known_where_the_mask_allows_it() -> None:
    assert "full" in emitted("causal").functions and "full" in emitted("sliding_window").functions
    assert "full" not in emitted("document").functions and "mask" not in emitted("noop").functions


def test_pieces_are_cut_for_what_is_empty_alone() -> None:
    for name in ("causal", "sliding_window", "alibi"):
        assert len(Kernels(program_of(name).kernels).schedule.q.segments) == 1
    assert len(Kernels(program_of("prefix_lm").kernels).schedule.q.segments) == 2


def test_keys_decide_how_many_queries_see_them() -> None:
    assert Kernels(program_of("causal").kernels).uneven and not Kernels(program_of("noop").kernels).uneven


@pytest.mark.parametrize(
    ("score", "poisoned"),
    [
        ("score / (Q - q)", True),
        ("cap * tanh(score / cap)", False),
        ("score * sigmoid(score)", False),
        ("sqrt(abs(score))", True),
        ("score / (1.0 + abs(score))", True),
        ("2.0 * score / cap", False),
    ],
)
def test_scores_that_may_be_poisoned_where_there_is_no_pair(score: str, poisoned: bool) -> None:
    """A row of zeros stands for a query that is not there; what comes of it must be cut off, not multiplied by 0."""
    assert emitted(variant(score)).positional == poisoned


def test_ranges_with_large_bounds_are_computed_in_64_bits() -> None:
    assert emitted("natten1d").wide and not emitted("causal").wide


# ---------------------------------------------------------------- launches


def launches(of: Program, bound: Call, *, ordered: bool = False) -> list[tuple[Any, int, tuple[Any, ...]]]:
    found: list[tuple[Any, int, tuple[Any, ...]]] = []

    def run(kernel: Any, programs: int, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        found.append((kernel, programs, arguments))

    batch, heads, q_len, _ = bound.query.shape
    out, lse = tensor(*bound.query.shape), tensor(batch, heads, q_len, dtype=torch.float32)
    config = candidates(128, 128)[0]
    backward(of.hopper_backward, bound, out, lse, out, None, config, ordered=ordered, run=run)
    return found


def test_three_launches_and_a_fourth_for_an_order() -> None:
    of, bound = program_of("causal"), call(2, 4, 1000, 128)
    usual, ordered = launches(of, bound), launches(of, bound, ordered=True)
    assert [kernel for kernel, *_ in usual] == [prepare_rows, attention_backward, finish_queries]
    assert [kernel for kernel, *_ in ordered] == [prepare_rows, count_turns, attention_backward, finish_queries]
    assert [programs for _, programs, _ in usual] == [2 * 4 * 16, 2 * 4 * 8, 2 * 4 * 16 * 2]


def test_cheap_masks_of_wide_tiles_are_not_asked_about() -> None:
    """A branch around the mask costs more there than the mask, unless that takes many operations or reads tensors."""

    def asks(name: str, dim: int) -> list[bool]:
        of, bound = program_of(name), call(1, 4, 256, dim)
        return [config.ask for config in Kernels(of.kernels).candidates(bound)]

    assert asks("causal", 64) == [False, True, True, False, True, False] and asks("causal", 128)[0]
    assert all(asks(name, 64)[:2] == [True, False] for name in ("packed_causal", "natten1d"))
    assert not asks("sliding_window", 64)[0] and all(asks("noop", 64))


def test_a_group_of_heads_is_one_programs() -> None:
    query, key = tensor(2, 8, 256, 128), tensor(2, 2, 384, 128)
    bound = Call(query, key, key, (), (), (), 0.1)
    assert launches(program_of("noop"), bound)[1][1] == 2 * 2 * 3


def test_what_is_compiled_for_another_length_leaves_nothing_to_its_calls(says: Callable[..., None]) -> None:
    """The first call has both kernels compiled, that of ragged and that of whole keys."""
    says(GOOD, GOOD)
    query, keys = tensor(2, 4, 333, 128), tensor(2, 2, 333, 128)
    ragged = Call(query, keys, keys, (), (), (), 0.1, dims=(2, 4, 2, 333, 333, 128))
    few = tensor(2, 2, 128, 128)
    whole = replace(ragged, key=few, value=few, dims=(2, 4, 2, 333, 128, 128))
    used, unused = fresh("causal"), fresh("causal")
    used.hopper_backward.choice(ragged, compile=compiler()[1])

    def numbers(of: Program) -> list[tuple[Any, ...]]:
        found = launches(of, whole)
        return [(programs, *(x for x in arguments if isinstance(x, int | tuple))) for _, programs, arguments in found]

    assert numbers(used) == numbers(unused)
    assert used.hopper_backward.choice(whole).config is not None and numbers(used)[1][0] == 2 * 2


def test_sections_fill_the_machine_where_programs_are_uneven() -> None:
    bound = call(2, 16, 8192, 128)
    sections = {name: launches(program_of(name), bound)[1][2][-4] for name in ("causal", "noop")}
    assert sections == {"causal": 4, "noop": 1}


@pytest.mark.parametrize(
    "spread",
    [tensor(1, 4, 300, 136)[..., :128], tensor(1, 4, 300, 130)[..., :128], tensor(1, 4, 1, 128).expand(1, 4, 300, 128)],
    ids=["with room", "not aligned", "broadcast"],
)
def test_gradients_that_the_copy_engine_does_not_take_are_copied(spread: Tensor) -> None:
    from attn_dsl.backend.hopper.launch import loadable

    found = loadable(spread)
    assert all(stride % 8 == 0 and stride > 0 for stride in found.stride()[:3]) and found.stride(3) == 1
    assert (found is spread) == (spread.stride(2) == 136)


def test_every_configuration_fits_the_shared_memory() -> None:
    for dim, value_dim in ((64, 64), (64, 128), (128, 64), (128, 128)):
        assert candidates(dim, value_dim)
        assert all(config.shared_bytes(dim, value_dim) <= SHARED_LIMIT for config in candidates(dim, value_dim))
        assert all(config.queries == 64 for config in candidates(dim, value_dim) if max(dim, value_dim) == 128)
    assert candidates(256, 256) == () and candidates(64, 256) == ()


# ---------------------------------------------------------------- routes


def test_calls_that_fit_take_the_hopper_kernel(says: Callable[..., None]) -> None:
    says(GOOD)
    bound = call(2, 4, 300, 128)
    found = gpu.backward_route(fresh("causal"), bound, capability=HOPPER, compile=compiler()[1])
    assert found.backend == "hopper" and found.choice is not None and found.choice.config == candidates(128, 128)[0]
    assert gpu.describe_backward(fresh("causal"), bound, found, HOPPER).startswith(
        f"backward   hopper: {candidates(128, 128)[0]}; 0 bytes"
    )


REFUSED = {
    "element type is float32": (call(2, 4, 300, 128, dtype=torch.float32), frozenset()),
    "head dimension is above 128": (call(2, 4, 300, 192), frozenset()),
    "positions need 64 bits": (call(2, 4, 300, 128, q_offset=2**40), frozenset()),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_calls_that_do_not_fit_take_the_portable_kernels_and_say_why(reason: str) -> None:
    bound, wanted = REFUSED[reason]
    found = gpu.backward_route(fresh("causal"), bound, wanted, capability=HOPPER, compile=compiler()[1])
    assert found.backend == "portable" and reason in str(found.reason)
    assert gpu.describe_backward(fresh("causal"), bound, found, HOPPER).startswith(
        f"backward   portable, since {found.reason}: dK and dV"
    )


KEY_BIAS = variant("score + bias[h, k]", "q >= k", "tensor bias: float32[H, KV]")
ROW_FACTOR = variant("score * factor[h, q]", "q >= k", "tensor factor: float32[H, Q]")
TABLE = variant("score + table[h, clamp(k - q, -9, 9) + 9]", "q >= k", "tensor table: float32[H, 19]")
TABLES = "tensor table: float32[H, 19]"
DENSE = variant("score + dense[h, q, k]", "true", "tensor dense: float32[H, Q, KV]")
SHAPES = {"bias": (4, 300), "factor": (4, 300), "table": (4, 19), "dense": (4, 300, 300)}
KERNELS = ["prepare_rows", "attention_backward", "finish_queries"]
BESIDE = ["attention_delta", "attention_queries_backward"]


def backward_of(
    text: str, name: str, *, deterministic: bool = False
) -> tuple[gpu.BackwardRoute, list[str], frozenset[str], str]:
    """The route, the kernels that it launches, what they give beside dQ, dK and dV, and what `explain` says."""
    of, query = fresh(text), tensor(2, 4, 300, 128)
    captured = tensor(*SHAPES.get(name, (4,)), dtype=torch.float32)
    parameters = tuple({"window": 100, "cap": 3.0}[p.name] for p in of.variant.parameters)
    bound = Call(query, query, query, parameters, (captured,) * len(of.variant.tensors), (), 0.1, capability=HOPPER)
    found = gpu.backward_route(of, bound, frozenset({name}), deterministic, HOPPER, compiler()[1])
    launched: list[str] = []

    def run(kernel: Any, *rest: Any) -> None:
        launched.append(kernel.__name__)

    out, lse = tensor(2, 4, 300, 128), tensor(2, 4, 300, dtype=torch.float32)
    grads = gpu.run_backward(of, found, bound, out, lse, out, None, deterministic=deterministic, run=run)
    return found, launched, frozenset(grads.captured), gpu.describe_backward(of, bound, found, HOPPER)


@pytest.mark.parametrize(
    ("text", "name"),
    [("alibi", "slope"), ("gpt_oss", "sinks"), (KEY_BIAS, "bias"), (TABLE, "table"), ("softcap", "cap")],
)
def test_gradients_of_what_is_captured_are_summed_on_the_way(text: str, name: str, says: Callable[..., None]) -> None:
    says(GOOD)
    found, launched, captured, described = backward_of(text, name)
    assert found.fused == captured == {name} and launched == KERNELS
    assert f"captured   hopper: the gradient of `{name}` is summed on the way" in described


@pytest.mark.parametrize(("text", "name"), [(DENSE, "dense"), (ROW_FACTOR, "factor")])
def test_gradients_by_pair_take_a_pass_of_their_own(text: str, name: str, says: Callable[..., None]) -> None:
    says(GOOD)
    found, launched, captured, described = backward_of(text, name)
    assert not found.fused and captured == {name} and launched == KERNELS + BESIDE
    assert f"portable: a pass of its own for the gradient of `{name}`, since no sum comes first" in described


def test_an_order_sums_nothing_on_the_way(says: Callable[..., None]) -> None:
    says(GOOD, GOOD)
    found, launched, captured, described = backward_of("alibi", "slope", deterministic=True)
    assert not found.fused and captured == {"slope"} and launched.count("attention_queries_backward") == 2
    assert "a pass of its own for the gradient of `slope`, since its sums have no order" in described
    found, *_, described = backward_of(KEY_BIAS, "bias", deterministic=True)
    assert found.backend == "portable" and "the gradient of `bias` is a sum over queries" in described


def test_registers_that_do_not_suffice_for_sums_leave_them_to_a_pass_of_their_own(says: Callable[..., None]) -> None:
    says(*[check.Build(5000, (), ())] * 4, GOOD)
    found, launched, captured, described = backward_of("alibi", "slope")
    assert found.backend == "hopper" and not found.fused and launched == KERNELS + BESIDE and captured == {"slope"}
    assert "the gradient of `slope`, since registers do not suffice" in described


def test_a_score_that_is_not_linear_in_what_saturates_is_told_where_its_tile_begins() -> None:
    of = fresh(variant("cap * tanh((score + table[h, clamp(k - q, -9, 9) + 9]) / cap)", declared=TABLES))
    for source in (of.hopper.source(), of.hopper_backward.source()):
        plain = source.partition("def plain(")[2].partition("@triton.jit")[0]
        assert "q0, k0)" in plain and "k0 - q0" in plain and "k - q," not in plain


def test_small_and_large_gradients_have_as_many_copies() -> None:
    """Since one number says which of them a program adds to."""
    from attn_dsl.backend.hopper.launch_backward import COPIES, _copies

    found = [_copies(shapes, torch.device("cpu")) for shapes in ([(4,), (2**21,)], [(4,), ()], [(2**23,)], [])]
    assert [[x.shape[0] for x in each] for each in found] == [[2, 2], [COPIES] * 2, [1], []]


def test_sums_come_first_where_an_entry_has_several_pairs() -> None:
    def fusable(text: str, name: str) -> bool:
        return bool(Kernels(program_of(text).kernels).fusable(frozenset({name})))

    shared = ["table[h, max(k - q, -9) + Q]", "table[h, clamp(q - k, 0, 9)]", "table[h, k // 4]", "table[h, q // 4]"]
    own = ["table[h, k - q + Q]", "table[h, (k + q) // 4]", "score * table[h, q]", "table[h, 0] * table[h, k - q + Q]"]
    declared = "tensor table: float32[H, 600]"
    assert all(fusable(variant(f"score + {score}", "q >= k", declared), "table") for score in shared)
    assert not any(fusable(variant(f"score + {score}", "q >= k", declared), "table") for score in own)


def test_full_tiles_look_up_one_entry_of_a_table_that_saturates() -> None:
    text = emitted(TABLE)
    assert {"score", "plain", "shift", "full"} <= text.functions
    plain = text.source.partition("def plain")[2].partition("@triton.jit")[0]
    assert "element(" not in plain and "element(" in text.source.partition("def score")[2].partition("def plain")[0]
    assert "k0" in text.source.partition("def shift")[2].partition("@triton.jit")[0]


def test_the_table_of_an_order_does_not_outgrow_the_gradient() -> None:
    of, bound = fresh("noop"), call(1, 1, 2**17 + 1, 128)
    assert refusal(of.hopper_backward, bound, frozenset(), False) is None
    assert "more than 131072 keys" in str(refusal(of.hopper_backward, bound, frozenset(), True))


def test_other_devices_take_the_portable_kernels() -> None:
    found = gpu.backward_route(fresh("noop"), call(2, 4, 300, 128), capability=(8, 0))
    assert found.backend == "portable" and "not 9.0" in str(found.reason)


def test_a_bad_build_makes_way_for_the_next_configuration(says: Callable[..., None]) -> None:
    says(check.Build(5000, (), ()), GOOD)
    bound = call(2, 4, 300, 128)
    found = gpu.backward_route(fresh("causal"), bound, capability=HOPPER, compile=compiler()[1])
    first, second, *_ = candidates(128, 128)
    assert found.choice is not None and found.choice.config == second
    text = gpu.describe_backward(fresh("causal"), bound, found, HOPPER)
    assert f"hopper: {second}" in text and f"rejected   {first}: ptxas spilled 5000 bytes" in text


def test_no_kernel_is_compiled_twice_where_no_mask_can_be_left_out(says: Callable[..., None]) -> None:
    says(*[check.Build(5000, (), ())] * 9)
    unread = "attention unread\nmask = exp(0.01 * q) >= 0.5 * k\n"
    for text, tried in ((unread, 2 + 2), ("document", 4 + 4), ("noop", 4 + 2), ("causal", 4 + 4)):
        of, (made, compile) = fresh(text), compiler()
        captured = tuple(tensor(2, 300, dtype=torch.int32) for _ in of.variant.tensors)
        bound = replace(call(2, 4, 300, 128), tensors=captured)
        found = gpu.backward_route(of, bound, capability=HOPPER, compile=compile)
        assert found.backend == "portable" and len(made) == tried


def test_the_source_for_a_gpu_shows_what_the_backward_calls() -> None:
    import attn_dsl

    assert "# Hopper backward" in attn_dsl.compile("softcap").source("cuda", torch.bfloat16)


def test_the_first_call_compiles_for_all_lengths_and_an_order_has_kernels_of_its_own(says: Callable[..., None]) -> None:
    says(*[GOOD] * 9)
    of, (made, compile) = fresh("causal"), compiler()
    for length in (300, 301, 5000, 256):
        gpu.backward_route(of, call(2, 4, length, 128), capability=HOPPER, compile=compile)
        assert len(made) == 2, "for whole and for ragged keys"
    gpu.backward_route(of, call(2, 4, 300, 128), deterministic=True, capability=HOPPER, compile=compile)
    assert len(made) == 4


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("shape", [(2, 16, 131072, 128), (3, 5, 110_001, 128), (4, 8, 65536, 128)], ids=str)
def test_long_sequences_are_done_in_sections_whose_sums_take_the_same_memory(
    shape: tuple[int, ...], ordered: bool
) -> None:
    launched = launches(fresh("causal"), call(*shape), ordered=ordered)
    numbers, sums = launched[0][2][4:6]
    assert 4 * (numbers.numel() + sums.numel()) <= 66 * 2**20
    assert len({id(arguments[5]) for kernel, _, arguments in launched if kernel is prepare_rows}) == 1
    kernels = [prepare_rows, *[count_turns] * ordered, attention_backward, finish_queries]
    assert [kernel for kernel, *_ in launched] == kernels * (len(launched) // len(kernels))
    for kernel in kernels:
        own = [(programs, arguments) for called, programs, arguments in launched if called is kernel]
        parts = [(programs, arguments[-1]) for programs, arguments in own]
        if kernel is attention_backward:  # one on each multiprocessor
            assert all(programs == min(132, arguments[-2] * -(-shape[2] // 128)) for programs, arguments in own)
            parts = [arguments[-2:] for _, arguments in own]
        each = parts[0][0] // parts[1][1]
        ends = [first + programs // each for programs, first in parts]
        assert [first for _, first in parts] == [0, *ends[:-1]] and ends[-1] == shape[0] * shape[1]


def test_short_sequences_and_few_keys_take_one_launch() -> None:
    for shape, keys in (((2, 16, 8192, 128), 8192), ((8, 16, 16384, 64), 100), ((4, 32, 4096, 64), 4096)):
        query, key = tensor(*shape), tensor(*shape[:2], keys, shape[3])
        launched = launches(program_of("noop"), Call(query, key, key, (), (), (), 0.1))
        assert [kernel for kernel, *_ in launched] == [prepare_rows, attention_backward, finish_queries]
