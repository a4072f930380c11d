"""Which tiles are visited, and when the last is done, as counted without a kernel."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from hopper_support import tensor
from portable_support import program_of

from attn_dsl.backend import work
from attn_dsl.backend.hopper import check, launch, launch_backward
from attn_dsl.backend.hopper.launch import whole_sections
from attn_dsl.backend.portable.launch import Call
from attn_dsl.backend.tile_kinds import Axis
from attn_dsl.ir.evaluate import Environment, evaluate
from attn_dsl.passes.runs import is_confined
from attn_dsl.passes.schedule import derive_schedule
from attn_dsl.passes.summaries import derive_claims

LENGTH = 200


def environment(parameters: dict[str, int], **tensors: torch.Tensor) -> Environment:
    one = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    sizes = {"B": 1, "H": 1, "HK": 1, "Q": LENGTH, "KV": LENGTH, "D": 64}
    return Environment({"b": one, "h": one, "hk": one}, {"q_offset": torch.tensor(0)}, parameters, sizes, tensors)


def by_pairs(mask: torch.Tensor, rows: int, keys: int, *, transposed: bool) -> tuple[list[int], list[int]]:
    """(masked, full) tiles by looking at each pair; one that sticks out over the visited axis is masked."""
    own, other, length = (keys, rows, LENGTH) if transposed else (rows, keys, LENGTH)
    lines = mask.T if transposed else mask
    found = []
    for first in range(0, length, own):
        tiles = [lines[first : first + own, at : at + other] for at in range(0, length, other)]
        full = sum(bool(tile.all()) and tile.shape[1] == other for tile in tiles)
        found.append((sum(bool(tile.any()) for tile in tiles) - full, full))
    return [masked for masked, _ in found], [full for _, full in found]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("causal", {}), ("sliding_window", {"window": 40}), ("natten1d", {"r": 20}), ("prefix_lm", {"prefix": 70})],
)
@pytest.mark.parametrize("tile", [(32, 16), (16, 48)])
def test_ranges_say_what_each_pair_says(
    name: str, parameters: dict[str, int], tile: tuple[int, int], transposed: bool
) -> None:
    variant = program_of(name).variant
    parameters = {p.name: parameters.get(p.name, p.default) for p in variant.parameters}
    env, (rows, columns) = environment(parameters), (Axis(0, LENGTH, n) for n in tile)
    schedule = derive_schedule(variant, padded=True)
    found = work.in_ranges(schedule.q if transposed else schedule.kv, env, rows, columns, transposed=transposed)
    place = torch.arange(LENGTH)
    pairs = Environment({"q": place[:, None], "k": place}, {}, parameters, env.sizes)
    expected = by_pairs(evaluate(variant.mask, pairs), *tile, transposed=transposed)
    for counted, looked in zip((found.masked, found.full), expected, strict=True):
        assert counted[0, 0, :-1].tolist() == looked[:-1]
    assert found.total[0, 0, -1] == expected[0][-1] + expected[1][-1]  # its own axis counts as whole


@pytest.mark.parametrize("transposed", [False, True])
def test_claims_about_tensors_say_what_each_pair_says(transposed: bool) -> None:
    variant, doc = program_of("packed_causal").variant, torch.arange(LENGTH)[None] // 45
    env, rows, columns = environment({}, doc=doc), Axis(0, LENGTH, 32), Axis(0, LENGTH, 16)
    found = work.in_lists(derive_claims(variant), variant.mask, env, rows, columns, transposed=transposed)
    place = torch.arange(LENGTH)
    mask = (place[:, None] >= place) & (doc[0][:, None] == doc[0])
    masked, full = by_pairs(mask, 32, 16, transposed=transposed)
    assert found.total[0, 0].tolist() == [x + y for x, y in zip(masked, full, strict=True)]


def test_a_tile_that_visits_nothing_takes_the_time_of_a_masked_one() -> None:
    visits = work.Visits(torch.tensor([[[0, 2]]]), torch.tensor([[[0, 3]]]))
    assert work.Rate(10.0, 3.0, 2.0).times(visits).flatten().tolist() == [13.0, 22.0]


def test_tiles_are_taken_by_who_is_free_first() -> None:
    assert work.makespan([3.0, 1.0, 1.0, 4.0], 2) == 6.0 and work.longest_first([3.0, 1.0, 1.0, 4.0], 2) == 5.0
    times = [5.0, 4.0, 3.0, 3.0, 3.0]
    best = min(work.makespan(order, 2) for order in permutations(times))
    assert best == 9.0 and work.longest_first(times, 2) <= 4 / 3 * best


def test_sections_come_in_the_order_of_the_kernels() -> None:
    assert list(work.in_sections(3, 3, 2)) == [0, 3, 1, 4, 2, 5, 6, 7, 8]
    assert list(work.in_sections(3, 3, 2, last_first=True)) == [2, 5, 1, 4, 0, 3, 8, 7, 6]
    assert list(work.in_sections(3, 2, 1, 1)) == [0, 3, 1, 2, 4, 5]


@pytest.mark.parametrize(
    ("pairs", "most", "found"), [(32, 5, 4), (32, 9, 8), (32, 40, 32), (7, 3, 2), (1, 5, 1), (64, 1, 1)]
)
def test_the_last_section_lacks_few(pairs: int, most: int, found: int) -> None:
    assert whole_sections(pairs, most) == found


def test_the_last_section_of_a_causal_backward_pass_does_not_end_alone() -> None:
    """128 keys a program: 2 heads alone, of 32 in sections of 5, leave the longest programs to the end."""
    times = [float(tile) for _ in range(32) for tile in range(64, 0, -1)]

    def span(section: int) -> float:
        return work.makespan((times[place] for place in work.in_sections(64, 32, section)), 132)

    assert span(whole_sections(32, 5)) < 1.01 * sum(times) / 132 < 0.97 * span(5)


def test_masks_that_keep_pairs_of_one_run_alone_are_known() -> None:
    either = "attention either\ntensor t: int32[B, Q] nondecreasing over Q\nmask = t[b, q] == t[b, k] or q >= k\n"
    named = {"document": True, "packed_causal": True, "causal": False, "hash_buckets": False, either: False}
    assert {name: is_confined(program_of(name).variant) for name in named} == named


def test_narrow_masks_take_tiles_of_fewer_keys() -> None:
    """A band of up to 64 keys on either side touches three tiles of 128 keys, or four of 64."""

    def finer(name: str, *numbers: object, dim: int = 128) -> tuple[int, int] | None:
        query = tensor(1, 2, 4096, dim)
        bound = Call(query, query, query, numbers, (), (), 0.1)
        of = program_of(name)
        found = of.hopper.finer(bound)
        keys = found[1] if found else of.hopper.candidates(replace(bound, parameters=wide))[0].keys
        assert of.hopper.candidates(bound)[0].keys == keys
        return found

    wide: tuple[object, ...] = (1000,)
    assert [finer("natten1d", radius) for radius in (6, 64)] == [(128, 64)] * 2
    assert [finer("natten1d", radius) for radius in (65, 128, 500)] == [None] * 3
    assert [finer("sliding_window", window) for window in (1, 64, 128, 130, 1024)] == [None] * 5
    assert finer("natten1d", torch.tensor(6)) is None and finer("natten1d", 6, dim=64) is None
    wide = ()
    assert finer("causal") is None and finer("noop") is None


def test_a_choice_among_tiles_is_the_least_of_the_model() -> None:
    """Brute force over all tiles, where what is in the middle stands for all."""
    rates = {(64, 64): work.Rate(10, 30, 20), (64, 32): work.Rate(10, 17, 11), (32, 32): work.Rate(8, 9, 6)}
    variant = program_of("natten1d").variant
    ranges = derive_schedule(variant, padded=True).kv
    for radius in (5, 20, 40, 100):
        env = environment({"r": radius})
        env = replace(env, sizes={**env.sizes, "Q": work.NOMINAL, "KV": work.NOMINAL})
        total = {}
        for (rows, keys), rate in rates.items():
            axes = Axis(0, work.NOMINAL, rows), Axis(0, work.NOMINAL, keys)
            total[rows, keys] = float(rate.times(work.in_ranges(ranges, env, *axes)).sum())
        best = min(total, key=lambda tile: total[tile])
        if abs(total[best] / total[64, 64] - work.GAIN) > 0.02:
            expected = best if total[best] < work.GAIN * total[64, 64] else None
            assert work.better_tile(rates, ranges, {"r": radius}) == expected
    assert work.better_tile(rates, ranges, {}) is None


def test_what_narrow_masks_and_ordered_lists_take_is_sound() -> None:
    """Compiled ahead of time: hardly a spill, no product serialized."""
    query = tensor(1, 2, 4096, 128)
    band = Call(query, query, query, (64,), (), (), 0.1)
    choice = program_of("natten1d").hopper.choice(band, launch.compile_ahead)
    assert choice.config is not None and choice.config.keys == 64 and not choice.rejected
    documents = Call(query, query, query, (), (tensor(1, 4096, dtype=torch.int32),), (), 0.1)
    kernels = program_of("packed_causal").hopper_backward
    everywhere = next(config for config in kernels.candidates(documents) if not config.ask)
    build = check.inspect(launch_backward.build(kernels, documents, everywhere, ordered=True).asm["ptx"])
    assert build.defect_beyond(launch_backward.ORDERED_SPILLS) is None


def test_heads_run_side_by_side_where_their_keys_fit_the_cache() -> None:
    """4 MiB a head at 8192 keys; of documents, a quarter or less is in use at a time."""

    def section(name: str, length: int, heads: int = 16, kv_heads: int = 16) -> int:
        query, key = tensor(2, heads, length, 128), tensor(2, kv_heads, length, 128)
        tensors = (tensor(2, length, dtype=torch.int32),) if name == "packed_causal" else ()
        return program_of(name).hopper.section(Call(query, key, key, (), tensors, (), 0.1))

    assert [section("causal", length) for length in (2048, 8192, 16384, 131072)] == [32, 8, 4, 1]
    assert [section("packed_causal", length) for length in (8192, 32768, 131072)] == [32, 8, 2]
    assert section("noop", 8192) == 1 and section("causal", 8192, 32, 8) == 32
