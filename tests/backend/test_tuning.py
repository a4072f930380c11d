"""Tuning: every candidate once, the best one kept on disk, an interrupt that loses nothing. The clock is a fake."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

import attn_dsl
from attn_dsl.backend import cache, tuning
from attn_dsl.backend.execute import Program, program_for
from attn_dsl.backend.portable import launch
from attn_dsl.backend.portable.tiles import Tile, Tiles
from attn_dsl.backend.tuning import PASSES, Subject, Tuned, search
from attn_dsl.frontend import load
from attn_dsl.passes import pipeline

HOPPER = (9, 0)
BEST = {"forward": Tile(64, 32, 4, 2), "keys": Tile(32, 64, 8, 1), "queries": Tile(64, 64, 4, 2)}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_DSL_CACHE_DIR", str(tmp_path))
    tuning._choice.cache_clear()


@pytest.fixture(scope="module")
def program() -> Program:
    return program_for(pipeline.run(load("causal"), {}, stop_after="simplify").variant)


def call(head_dim: int = 64) -> launch.Call:
    x = torch.empty(1, 2, 128, head_dim, dtype=torch.bfloat16, device="meta")
    return launch.Call(x, x, x, (), (), (), 0.1)


def clock(run: Callable[[], object], tiles: Tiles) -> float:
    """Less, the nearer all tiles are to the best; some shapes do not fit the device."""
    shapes = [(getattr(tiles, name), BEST[name]) for name in PASSES]
    if tiles.forward.rows == 128 and tiles.forward.stages == 4:
        raise OutOfResources(300_000, 200_000, "shared memory")
    return 1.0 + sum(_distance(a, b) for a, b in shapes)


def _distance(a: Tile, b: Tile) -> float:
    shape = abs(math.log2(a.rows / b.rows)) + abs(math.log2(a.keys / b.keys))
    return shape + abs(a.warps - b.warps) + abs(a.stages - b.stages)


def test_candidates_have_room_for_accumulators_and_pipelines() -> None:
    """128 x 128 logits and as many sums take the registers of 8 warps; three tiles of keys and values fill the rest."""
    found = set(tuning.candidates("forward", torch.bfloat16, 128))
    assert Tile(128, 128, 8, 3) in found
    assert not {Tile(128, 128, 4, 3), Tile(128, 128, 8, 4)} & found


def test_the_best_tiles_of_each_kernel_are_found_and_remembered(program: Program) -> None:
    tuned = search(program, call(), HOPPER, timer=clock)
    assert {name: tuned.best(name) for name in PASSES} == BEST and tuned.finished
    assert math.inf in tuned.trials["forward"].values(), "what does not run is known not to"
    subject = Subject.of(program, call().query, call().value, HOPPER)
    assert tuning.recall(subject) == tuned
    assert tuning.chosen(program, call().query, call().value, HOPPER) == Tiles(**BEST)


def test_a_choice_is_for_one_architecture_dtype_head_dimension_and_variant(program: Program) -> None:
    search(program, call(), HOPPER, timer=clock)
    x = call().query
    assert tuning.chosen(program, x, x, (8, 0)) is None
    assert tuning.chosen(program, x.half(), x.half(), HOPPER) is None
    assert tuning.chosen(program, call(128).query, x, HOPPER) is None
    other = program_for(pipeline.run(load("noop"), {}, stop_after="simplify").variant)
    assert tuning.chosen(other, x, x, HOPPER) is None


def test_an_interrupt_keeps_what_was_found_and_the_next_search_goes_on_there(program: Program) -> None:
    times = 0

    def interrupted(run: Callable[[], object], tiles: Tiles) -> float:
        nonlocal times
        times += 1
        if times == 11:
            raise KeyboardInterrupt
        return clock(run, tiles)

    first = search(program, call(), HOPPER, timer=interrupted)
    assert not first.finished and sum(map(len, first.trials.values())) == 10
    subject = Subject.of(program, call().query, call().value, HOPPER)
    assert tuning.recall(subject) == first

    seen: list[tuple[str, Tile]] = []
    second = search(program, call(), HOPPER, timer=clock, on_trial=lambda name, tile, ms: seen.append((name, tile)))
    assert not {tile for name, tile in seen if name == "forward"} & set(first.trials["forward"])
    assert second.finished and second.best("forward") == BEST["forward"]


def test_a_damaged_choice_is_forgotten(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_said", set())
    search(program, call(), HOPPER, timer=clock, backward=False)
    (file,) = cache.folder().glob("tuning/causal.sm_90.bfloat16.64_64-*/tiles.json")
    file.write_text("{}")
    tuning._choice.cache_clear()
    with pytest.warns(cache.CacheWarning):
        assert tuning.chosen(program, call().query, call().value, HOPPER) is None


def test_what_is_known_goes_through_text(program: Program) -> None:
    tuned = Tuned()
    tuned.trials["keys"][Tile(64, 32, 8, 3)] = 1.25
    tuned.trials["keys"][Tile(64, 64, 8, 3)] = math.inf
    assert Tuned.from_json(tuned.to_json()) == tuned


def test_progress_shows_the_best_so_far(program: Program) -> None:
    progress, on_trial = tuning.show(call(), launch.tiles.choose(HOPPER, 2, 64, 64), backward=False, known=None)
    on_trial("forward", Tile(64, 64), 2.0)
    on_trial("forward", Tile(32, 64), 3.0)
    (task,) = progress.tasks
    assert task.description == "forward: best 2.000 ms at 64 x 64, 4 warps, 2 stages" and task.completed == 2


def test_only_tensors_on_a_gpu_have_tiles_to_search() -> None:
    x = torch.zeros(1, 2, 128, 64)
    with pytest.raises(attn_dsl.BindingError, match="`query`: expected a tensor on a GPU"):
        attn_dsl.compile("causal").tune(x, x, x)
