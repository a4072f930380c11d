"""The Hopper kernels in the interpreter of Gluon: results, races, deadlocks and bounds, on a machine without a GPU.

Each test runs in an order of warps and copies of its own; `-k` and another SEED try others.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import replace
from typing import Any

import hopper_on_cpu
import pytest
import torch
from gluon_interpreter import Machine
from gpu_support import larger, within_budget
from hopper_on_cpu import take_over
from odd_variants import agree as close
from odd_variants import drawn
from portable_support import Problem, Result, assert_close, compiled, program_of
from torch import Tensor
from variant_cases import SHIPPED, Case

from attn_dsl.backend import gpu, operators
from attn_dsl.backend.execute import HOPPER, PORTABLE, Options, Program, portable_call
from attn_dsl.backend.hopper import configs_backward, launch, launch_backward
from attn_dsl.backend.hopper.configs import FROZEN, SHARED_LIMIT, TABLE, Config
from attn_dsl.errors import BindingError
from attn_dsl.passes.lengths import with_lengths, with_packing, with_pages

INPUTS = ("query", "key", "value")
SMALL: dict[str, int] = {"B": 1, "H": 2, "HK": 1, "Q": 200, "KV": 200}


@pytest.fixture(autouse=True)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine(zlib.crc32(request.node.name.encode()) + int(os.environ.get("SEED", "0")))
    take_over(monkeypatch, found)
    return found


def fresh(program: Program) -> Program:
    """For which no kernel was chosen yet."""
    return Program(program.variant, program._proof)


def called(
    problem: Problem, upstream: tuple[Tensor, Tensor] | None = None, backend: str = HOPPER, **options: Any
) -> Result:
    """By the Hopper kernels, with gradients of everything that can have one if there is `upstream`."""
    if upstream is not None:
        return problem.by(backend, upstream, **options)
    inputs = (getattr(problem, name) for name in INPUTS)
    call = problem.program.binder.bind(*inputs, problem.scale, problem.q_offset, problem.all_bindings)
    return Result(*operators.attention(problem.program, call, Options(backend, **options)))


def agree(problem: Problem, *, gradients: bool = True, logits: float = 8.0, **options: Any) -> None:
    upstream = problem.upstream() if gradients else None
    truth, eager = problem.truth(upstream), problem.truth(upstream, problem.query.dtype)
    within_budget(called(problem, upstream, **options), truth, eager, 1.1, logits)


def problem_of(name: str, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> Problem:
    return Problem.of(larger(name, **SMALL | sizes), dtype)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_variant_stays_within_the_error_budget(name: str, dim: int) -> None:
    agree(problem_of(name, D=dim, DV=dim))


@pytest.mark.parametrize("name", ["causal", "alibi", "softcap", "document"])
def test_everything_at_a_size_of_many_tiles(name: str) -> None:
    agree(problem_of(name, B=2, H=4, HK=2, Q=600, KV=600))


@pytest.mark.parametrize(
    "dims", [(80, 80), (96, 96), (128, 64), (64, 128), (192, 128), (192, 192), (256, 256)], ids=str
)
@pytest.mark.parametrize("name", ["causal", "alibi"])
def test_head_dimensions(name: str, dims: tuple[int, int]) -> None:
    agree(problem_of(name, D=dims[0], DV=dims[1]), gradients=max(dims) <= 128)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 300, 299), (65, 127), (129, 500, 371), (300, 90), (384, 384)], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", ["causal", "noop", "softcap"])
def test_lengths_and_offsets(name: str, dim: int, lengths: tuple[int, ...]) -> None:
    q_len, kv_len, *start = lengths
    agree(problem_of(name, Q=q_len, KV=kv_len, q_offset=start[0] if start else 0, D=dim, DV=dim))


SEEN_BY_SOME = "attention seen_by_some\nmask = 0 <= q - k < 100\n"


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("programs", [1, 3, 100])
@pytest.mark.parametrize("dim", [64, 128])
def test_tiles_of_keys_that_no_query_sees_stand_among_others(
    dim: int, programs: int, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before them and behind them, for one program after the other, and alone."""
    for module in (launch, launch_backward):
        monkeypatch.setattr(module, "multiprocessors", lambda device: programs)
    problem = problem_of("causal", B=2, H=4, HK=2, Q=100, KV=700, q_offset=300, D=dim, DV=dim)
    problem = replace(problem, program=program_of(SEEN_BY_SOME))
    upstream = problem.upstream()
    found = called(problem, upstream, deterministic=deterministic)
    within_budget(found, problem.truth(upstream), problem.truth(upstream, problem.query.dtype), 1.1)
    for name in ("key", "value"):
        assert not found.grads[name][:, :, :200].any() and not found.grads[name][:, :, 400:].any()
        assert found.grads[name][:, :, 201:400].any(-1).all()


@pytest.mark.parametrize("dim", TABLE)
@pytest.mark.parametrize("name", ["causal", "alibi", "noop"])
def test_every_forward_configuration(name: str, dim: int) -> None:
    problem = problem_of(name, D=dim, DV=dim, Q=400, KV=400)
    call = problem.program.binder.bind(*(getattr(problem, x) for x in INPUTS), None, 0, problem.all_bindings)
    call = portable_call(problem.program, call, Options(HOPPER))
    truth, eager = problem.truth(None), problem.truth(None, torch.bfloat16)
    configs: list[Config] = [*TABLE[dim], FROZEN[dim]]
    configs += [replace(config, ahead=False, hold=config.frozen) for config in configs]
    configs = [config for config in configs if config.shared_bytes(dim, dim) <= SHARED_LIMIT]
    for config in dict.fromkeys(configs):
        out, lse, _ = launch.forward(problem.program.hopper, call, config=config)
        within_budget(Result(out, lse), truth, eager, 1.1)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", ["causal", "t5_bias", "document"])
def test_every_backward_configuration(
    name: str, dim: int, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, asks = problem_of(name, D=dim, DV=dim), name == "t5_bias"  # in any case: full tiles have another score
    for config in (config for config in configs_backward.candidates(dim, dim) if config.ask or not asks):
        monkeypatch.setattr(launch_backward, "candidates", lambda *_, config=config: (config,))
        agree(replace(problem, program=fresh(problem.program)), deterministic=deterministic)


def test_groups_offsets_by_batch_and_half_precision() -> None:
    problem = problem_of("causal", torch.float16, B=2, H=8, HK=1, Q=200, KV=400, D=128, DV=128)
    agree(replace(problem, q_offset=torch.tensor([200, 3])))


@pytest.mark.parametrize("seed", [*range(200, 212), *range(215, 230)])  # the others compare Booleans with numbers
def test_variants_that_nobody_would_write(seed: int) -> None:
    problem, text = drawn(seed, torch.bfloat16, (1, 33, 70, 150), (16, 64, 80))
    upstream = problem.upstream()
    found = called(problem, upstream, deterministic=seed % 3 == 0)
    truth, rough = problem.truth(upstream), problem.truth(upstream, torch.float32)
    close(found, truth, rough, 0.04, text)


def test_logits_that_leave_the_first_tiles_far_behind(machine: Machine) -> None:
    """Query tiles whose maximum may not stay come again: for one warpgroup, for all, for none."""
    problem = problem_of("causal", H=3, HK=3, Q=600, KV=600, D=128, DV=128)
    query, key = problem.query, problem.key
    leap = torch.where(torch.arange(600).view(-1, 1) < 200, 1.0, 60.0)
    one = key.clone()
    one[:, 1, 5] = 50 * query[:, 1, 500]  # seen by all, in a full tile; the rest of the heads stays as it is
    for keys in (key * torch.arange(600).view(-1, 1) / 64, key * leap, one):
        hard = replace(problem, key=keys.to(query.dtype))
        truth, eager = hard.truth(None), hard.truth(None, query.dtype)
        found, again = called(hard), called(hard)
        assert torch.equal(found.out, again.out) and torch.equal(found.lse, again.lse)
        error, allowed = ((x.out.double() - truth.out).norm() for x in (found, eager))
        assert error <= 1.1 * allowed + 1e-3 * truth.out.norm(), f"{error:.3g}, eager {allowed:.3g}"


@pytest.mark.parametrize("name", ["causal", "noop", "sliding_window", "prefix_lm"])
def test_deterministic_gradients_are_the_same_bits_in_every_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of numbers that nearly cancel, so that another order of the additions shows; of two there is but one sum."""
    problem = problem_of(name, H=2, HK=1, Q=500, KV=500, D=64, DV=64)
    key, value = problem.key.clone(), problem.value.clone()
    key[:, :, :128] *= 2**12
    key[:, :, 128:256], value[:, :, 128:256] = -key[:, :, :128], value[:, :, :128]
    problem = replace(problem, query=problem.query * 2.0**-24, key=key, value=value)
    monkeypatch.setattr(hopper_on_cpu, "MULTIPROCESSORS", 8)  # all at the same time
    upstream = problem.upstream()
    first, usual = called(problem, upstream, deterministic=True), called(problem, upstream)
    varies = False
    for seed in range(4):
        take_over(monkeypatch, Machine(seed, resident=1 + seed))
        found = called(problem, upstream, deterministic=True)
        assert all(torch.equal(found.grads[x], first.grads[x]) for x in INPUTS)
        varies |= not torch.equal(called(problem, upstream).grads["query"], usual.grads["query"])
    assert varies or name == "sliding_window"


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["alibi", "packed_causal"])
def test_sections_of_heads_give_what_one_launch_gives(
    name: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for long sequences; a section may end within a batch entry."""
    problem = problem_of(name, B=3, H=4, HK=2, D=64, DV=64)
    upstream = problem.upstream()
    whole = called(replace(problem, program=fresh(problem.program)), upstream, deterministic=deterministic)
    monkeypatch.setattr(launch_backward, "_pairs_at_once", lambda *_: 4)
    found = called(replace(problem, program=fresh(problem.program)), upstream, deterministic=deterministic)
    assert torch.equal(found.grads["key"], whole.grads["key"])
    assert torch.equal(found.grads["value"], whole.grads["value"])
    assert (found.grads["query"] - whole.grads["query"]).abs().max() < (1e-30 if deterministic else 1e-2)


READS = "attention reads\ntensor x: float32[H, KV]\ntensor y: float32[H, Q]\nscore = max(score, x[h, k]) + y[h, q]\n"


@pytest.mark.parametrize("name", [*SHIPPED, READS], ids=lambda name: name.split("\n")[0])
def test_portable_kernels_stay_within_their_tensors(name: str) -> None:
    """Triton's interpreter reads what stands beside a tensor, and says nothing."""
    if name is READS:
        problem = problem_of("causal", Q=70, KV=150)
        x, y = torch.randn(2, 150), torch.randn(2, 70)
        problem = replace(problem, program=program_of(READS), bindings={"x": x, "y": y})
    else:
        problem = problem_of(name, Q=150, KV=150)
    agree(problem, backend=PORTABLE)


LISTED: dict[str, dict[str, Any]] = {
    "bigbird": {"block": 64, "reach": 1, "globals": 1, "random": 2},
    "tree": {}, "shared_prefix": {"prefix": 150}, "hash_buckets": {}, "document": {},
}  # fmt: skip


@pytest.mark.parametrize("name", LISTED)
def test_lists_of_tiles(name: str) -> None:
    sizes = replace(larger(name, **SMALL).sizes, B=2, Q=600, KV=600)
    const = frozenset({"random"} & LISTED[name].keys())
    agree(Problem.of(Case(name, LISTED[name], sizes, const), torch.bfloat16))


def ends(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("name", "bindings"), [
    ("noop", {}), ("causal", {}), ("sliding_window", {"window": 90}), ("gpt_oss", {"window": 50}), ("alibi", {}),
], ids=["noop", "causal", "sliding_window", "gpt_oss", "alibi"])  # fmt: skip
def test_packed_sequences(name: str, bindings: dict[str, Any], dim: int) -> None:
    """The next sequence begins within a tile; some are empty. The backward pass is that of the portable kernels."""
    queries, keys = (130, 1, 64, 0, 70), (130, 5, 300, 9, 70)
    generator = torch.Generator().manual_seed(3)
    shapes = (sum(queries), 2, dim), (sum(keys), 1, dim), (sum(keys), 1, dim)
    inputs = [torch.randn(shape, generator=generator).bfloat16().transpose(0, 1)[None] for shape in shapes]
    captured = larger(name, **SMALL).tensors()
    packing = {"query_ends": ends(*queries), "key_ends": ends(*keys), "longest_query": 130, "longest_key": 300}
    problem = Problem(compiled(with_packing(program_of(name).variant)), *inputs, {**captured, **bindings, **packing})
    found, upstream = called(problem, problem.upstream()), problem.upstream()
    expected = on_cpu(problem, upstream)
    assert_close(found, expected, 2e-2)


@pytest.mark.parametrize(("name", "dim"), [("causal", 128), ("noop", 64), ("alibi", 64), ("causal", 256)])
def test_nothing_of_a_packed_sequence_reaches_another(name: str, dim: int) -> None:
    """Not even by way of which of the right results comes out: bits stay the same when others are NaN."""
    bounds = ends(300, 1, 129, 64, 0, 200)
    total = int(bounds[-1])
    generator = torch.Generator().manual_seed(4)
    inputs = [torch.randn(1, heads, total, dim, generator=generator).bfloat16() for heads in (2, 1, 1)]
    packing = {"query_ends": bounds, "key_ends": bounds, "longest_query": 300, "longest_key": 300}
    packed = compiled(with_packing(program_of(name).variant))
    captured = larger(name, **SMALL).tensors()
    usual = called(Problem(packed, *inputs, {**captured, **packing}))
    others = torch.zeros(total, dtype=torch.bool)
    others[300:301] = others[430:494] = True
    for x in inputs:
        x[:, :, others] = torch.nan
    found = called(Problem(packed, *inputs, {**captured, **packing}))
    assert torch.equal(found.out[:, :, ~others], usual.out[:, :, ~others])
    assert torch.equal(found.lse[:, :, ~others], usual.lse[:, :, ~others])


def on_cpu(problem: Problem, upstream: tuple[Tensor, Tensor]) -> Result:
    """In float32, by the backend for CPUs."""
    return replace(problem, **{name: getattr(problem, name).float() for name in INPUTS}).by("cpu", upstream)


@pytest.mark.parametrize(("name", "page", "dim"), [
    ("causal", 16, 128), ("sliding_window", 64, 64), ("alibi", 32, 128), ("gpt_oss", 256, 128), ("noop", 128, 64),
])  # fmt: skip
def test_pages_have_the_bits_of_one_piece_and_nothing_past_the_end_is_read(name: str, page: int, dim: int) -> None:
    """What belongs to no sequence is nan, and table entries past the end name any page."""
    lengths, room, heads = (190, 64, 333), 512, 2
    count, generator = len(lengths) * room // page, torch.Generator().manual_seed(5)
    table = torch.randperm(count, generator=generator).view(len(lengths), -1).int()
    query = torch.randn(len(lengths), 2 * heads, 150, dim, generator=generator).bfloat16()
    pieces, pools = [], []
    for _ in range(2):
        piece = torch.randn(len(lengths), heads, room, dim, generator=generator).bfloat16()
        pool = torch.full((count, heads, page, dim), torch.nan, dtype=piece.dtype)
        for entry, pages, length in zip(piece, table.long(), lengths, strict=True):
            entry[:, length:] = torch.nan
            held = -(-length // page)
            pool[pages[:held]] = entry[:, : held * page].unflatten(1, (-1, page)).transpose(0, 1)
        pieces.append(piece)
        pools.append(pool)
    ended = torch.tensor(lengths, dtype=torch.int32)
    captured = larger(name, **SMALL | {"H": 2 * heads, "HK": heads}).tensors()
    bindings = {**captured, "kv_len": ended, **({"window": 90} if name in ("sliding_window", "gpt_oss") else {})}
    variant, offset = with_lengths(program_of(name).variant), (ended.long() - 150).clamp(min=0)
    whole = called(Problem(compiled(variant), query, *pieces, bindings, offset))
    found = called(Problem(compiled(with_pages(variant)), query, *pools, {**bindings, "page_table": table}, offset))
    assert not found.out.isnan().any()
    assert torch.equal(found.out, whole.out) and torch.equal(found.lse, whole.lse)


def test_what_the_kernels_refuse_is_not_computed() -> None:
    problem = problem_of("causal", torch.float32)
    with pytest.raises(BindingError, match="float32"):
        called(problem)


def test_a_variant_without_a_gpu_is_not_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert gpu.unavailable(gpu._capability(torch.device("cpu"))) is not None
    assert program_of("causal") is not None
