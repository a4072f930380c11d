"""Reports: counts against brute force, what is refused, and the three forms."""

from __future__ import annotations

import json
import random
import resource
import time
from collections.abc import Iterator
from xml.etree import ElementTree

import pytest
import torch
from random_masks import RandomMask
from tiles import Grid

from attn_dsl.errors import BindingError
from attn_dsl.frontend import load
from attn_dsl.ir.nodes import TRUE
from attn_dsl.ir.variant import Variant
from attn_dsl.passes.prove import prove
from attn_dsl.report import Report, report

SEEDS = 120


def of(text: str) -> Variant:
    return load(f"attention made\n{text}\n")


def kinds(found: Report) -> tuple[int, int, int]:
    assert found.tiles is not None, found.notes
    return found.tiles.empty, found.tiles.partial, found.tiles.full


@pytest.mark.parametrize("first", range(0, SEEDS, 20))
def test_counts_of_random_calls_are_those_of_the_schedule_and_the_mask(first: int) -> None:
    for seed in range(first, first + 20):
        check(seed)


def check(seed: int) -> None:
    """Reproduce one failure with `python -c "from tests.test_report import check; check(SEED)"`."""
    rng = random.Random(seed)
    variant = RandomMask(rng).variant(("affine", "boolean", "general")[seed % 3])
    parameters: dict[str, int | float | bool] = {
        "a": rng.randint(-5, 15),
        "w": rng.randint(1, 9),
        "flag": seed % 2 == 0,
    }
    block = rng.choice((1, 2, 3, 7)), rng.choice((1, 2, 3, 7))
    q_len, kv_len, offset = rng.randint(1, 150), rng.randint(1, 150), rng.choice((0, 0, 5))
    found = report(variant, q_len, kv_len, block=block, q_offset=offset, parameters=parameters)
    assert found.tiles is not None and not found.notes
    grid = Grid(found.call.variant, q_len, kv_len, *block, offset, dict(parameters))
    visits, masked = grid.scheduled(found.schedule, "kv")
    expected = int((visits == 0).sum()), int(masked.sum()), int(((visits > 0) & ~masked).sum())
    assert kinds(found) == expected, seed
    assert found.kept == int(grid.dense().sum()), seed
    pairs = torch.outer(*(sizes(length, size) for length, size in zip((q_len, kv_len), block, strict=True)))
    assert found.tiles.computed == int((pairs * visits).sum()), seed
    assert found.tiles.masked == int((pairs * masked).sum()), seed
    cells = [cell for line in found.tiles.picture.cells for cell in line]
    assert tuple(sum(getattr(cell, kind) for cell in cells) for kind in ("empty", "partial", "full")) == expected


def sizes(length: int, block: int) -> torch.Tensor:
    return torch.tensor([min(block, length - at) for at in range(0, length, block)])


@pytest.mark.parametrize(
    "mask",
    [
        "0 <= q - k < 37 and (q - k) % 3 != 1",  # by distance
        "q >= k or k < 9",  # by row
        "q // 8 >= k // 5",  # by row, quotients
        "(q * k) % 7 < 3",  # by pair
        "q * q >= 3 * k and k < 90",  # by pair, some tiles proved
    ],
)
def test_kept_pairs_are_exact_however_they_are_counted(mask: str) -> None:
    variant = of(f"mask = {mask}")
    found = report(variant, 90, 101, block=(16, 8), q_offset=7)
    assert found.kept == int(Grid(variant, 90, 101, 16, 8, 7).dense().sum())


def test_time_and_memory_do_not_grow_with_the_matrix() -> None:
    length = 10**7
    report(load("causal"), 8, 8)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    found = report(load("causal"), length, length)
    assert time.perf_counter() - start < 60  # some seconds on a machine of its own
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
    rows = length // 128
    assert kinds(found) == (rows * (rows - 1) // 2, rows, rows * (rows - 1) // 2)
    assert found.kept == length * (length + 1) // 2


def test_ranges_of_one_tile_take_the_same_time_at_any_length() -> None:
    for length in (1_000, 10_000_000):
        grid = Grid(load("sliding_window"), length, length, 128, 128, parameters={"window": 300})
        schedule = report(grid.variant, 8, 8).schedule
        q0 = torch.tensor(length - 128)
        tile = {"q0": q0, "q1": q0 + 127, "block": torch.tensor(128)}
        visited = [(int(grid.value(s.begin, **tile)), int(grid.value(s.end, **tile))) for s in schedule.kv.segments]
        keys = range(length - 128 - 299, length)
        assert {j for begin, end in visited for j in range(begin, end)} == {k // 128 for k in keys}


# -- what a call knows ------------------------------------------------------------------------------------------------


def test_a_missing_parameter_is_named() -> None:
    with pytest.raises(BindingError, match="`width`, `height`"):
        report(load("natten2d"), 64, 64)


def test_a_divisor_below_one_is_refused() -> None:
    with pytest.raises(BindingError, match=r"`stride`.*at least 1, got 0"):
        report(load("sparse_strided"), 64, 64, parameters={"stride": 0})
    variant = load("attention made(w: int)\nmask = q // (2 * w - 9) == k\n")
    with pytest.raises(BindingError, match=r"`w \* 2 - 9`.* got -1"):
        report(variant, 64, 64, parameters={"w": 4})


@pytest.mark.parametrize(("name", "value"), [("q_len", 0), ("kv_len", -1), ("q_offset", -3), ("block", (0, 8))])
def test_sizes_below_their_least_are_refused(name: str, value: object) -> None:
    call = {"q_len": 8, "kv_len": 8, name: value}
    with pytest.raises(BindingError, match=name):
        report(load("causal"), **call)  # type: ignore[arg-type]


def test_an_unknown_tensor_is_refused() -> None:
    with pytest.raises(BindingError, match="docs"):
        report(load("document"), 8, 8, tensors={"docs": torch.zeros(1, 8)})


def test_const_parameters_are_baked_and_shown() -> None:
    found = report(load("bigbird"), 512, 512, parameters={"random": 2, "block": 32})
    assert found.json()["parameters"] == {"block": 32, "reach": 1, "globals": 2, "random": 2}


def test_a_mask_that_reads_a_tensor_is_counted_with_it_and_not_without() -> None:
    variant = load("document")
    without = report(variant, 64, 64, block=(16, 16))
    assert kinds(without) == (0, 16, 0)
    assert without.kept is None and without.json()["pairs"]["kept"] is None
    assert "tensor `doc`" in without.notes[0]
    doc = torch.arange(64)[None, :] // 10
    found = report(variant, 64, 64, block=(16, 16), tensors={"doc": doc})
    assert found.kept == 6 * 100 + 16


def test_a_schedule_of_a_batch_entry_needs_its_tensor() -> None:
    variant = load("padded")
    without = report(variant, 64, 64, block=(16, 16))
    assert without.tiles is None and "tensor `length`" in without.notes[0]
    assert without.json()["tiles"] == {"empty": None, "partial": None, "full": None}
    with pytest.raises(BindingError, match="length"):
        without.svg()
    assert "not counted" in without.text()
    length = torch.tensor([64, 33])
    for batch, expected in ((0, (0, 0, 16)), (1, (4, 4, 8))):
        found = report(variant, 64, 64, block=(16, 16), tensors={"length": length}, batch=batch)
        assert kinds(found) == expected and f"batch entry {batch}" in found.notes[0]


def test_sizes_are_needed_where_the_mask_looks_at_them() -> None:
    variant = of("mask = k < H * 4")
    assert "`H`" in report(variant, 64, 64).notes[0]
    assert report(variant, 64, 64, sizes={"H": 8}).kept == 64 * 32


def test_what_would_take_too_long_is_not_counted() -> None:
    found = report(of("mask = (q * k) % 7 < 3"), 10**6, 10**6)
    assert found.kept is None and "1,000,000,000,000 pairs" in found.notes[0]
    assert found.tiles is not None and found.tiles.computed == 10**12


# -- forms ------------------------------------------------------------------------------------------------------------


def test_json_has_the_documented_fields_and_survives_a_round_trip() -> None:
    data = report(load("sliding_window"), 1000, 2000, block=(64, 128), q_offset=1000, parameters={"window": 5}).json()
    assert json.loads(json.dumps(data)) == data
    assert {k: data[k] for k in ("variant", "q_len", "kv_len", "q_offset", "parameters", "block")} == {
        "variant": "sliding_window",
        "q_len": 1000,
        "kv_len": 2000,
        "q_offset": 1000,
        "parameters": {"window": 5},
        "block": [64, 128],
    }
    assert data["tiles"].keys() == {"empty", "partial", "full"}
    assert data["pairs"] == {"kept": 5000, "computed": data["pairs"]["computed"], "total": 2_000_000}
    for claim in data["claims"]:
        assert claim.keys() == {"kind", "clause", "condition", "rule", "exact", "span", "reasons"}
        assert claim["span"].keys() == {"file", "line", "column", "end_line", "end_column", "text"}
    empty = data["claims"][0]
    assert (empty["kind"], empty["exact"], empty["reasons"]) == ("empty", True, [])
    assert empty["span"]["text"] == "0 <= q - k < window"
    assert "q0 >= k1 + window" in empty["condition"]


def test_text_shows_the_clauses_the_ranges_the_counts_and_a_picture() -> None:
    text = report(load("sliding_window"), 512, 512, block=(64, 64), parameters={"window": 128}).text()
    for part in (
        "sliding_window(window=128): 512 queries, 512 keys, tiles of 64 x 64",
        "no pair iff   0 >= window or q0 >= k1 + window or k0 > q1  [interval intersection, corner]",
        "k in [q0 - window + 1, q1]",
        "q in [k0, k1 + window - 1]",
        "7 full",
        "  ▒▒··············\n  ██▒▒············\n  ▒▒██▒▒",
        "8 x 8 tiles",
    ):
        assert part in text
    assert "\x1b[" not in text
    assert "\x1b[" in report(load("causal"), 64, 64).text(color=True)


def test_text_of_what_is_unknown_says_why_and_what_would_help() -> None:
    text = report(load("document"), 64, 64).text()
    assert "UNKNOWN       it reads tensor `doc` at positions of the tile" in text
    assert "help" in text and "note: kept pairs are not counted" in text


def test_a_picture_of_many_tiles_has_at_most_64_columns_and_32_lines() -> None:
    found = report(load("causal"), 128 * 130, 128 * 200)
    assert found.tiles is not None
    lines = found.tiles.picture.text().splitlines()
    assert len(lines) <= 33 and {len(line) for line in lines[:-1]} == {2 + 64}
    assert sum(map(sum, (cell for line in found.tiles.picture.cells for cell in line))) == 130 * 200


def test_svg_is_well_formed_and_covers_every_cell() -> None:
    svg = report(load("prefix_lm"), 700, 900, parameters={"prefix": 130}).svg()
    assert svg.startswith("<svg")
    root = ElementTree.fromstring(svg)
    tag = "{http://www.w3.org/2000/svg}"
    rectangles = [r for r in root.iter(f"{tag}rect") if r.get("fill") != "#ffffff"]
    assert sum(int(r.get("width", 0)) * int(r.get("height", 0)) for r in rectangles) == 48 * 64 * 64
    assert any("kept" in (text.text or "") for text in root.iter(f"{tag}text"))


@pytest.fixture
def broken() -> Iterator[Report]:
    """A report of which a claim was tampered with."""
    found = report(load("causal"), 64, 64)
    proof = prove(found.call.variant)
    proof.claims[0].__dict__["condition"] = TRUE
    yield Report(found.call, proof, found.schedule, found.tiles, found.kept, ())


def test_verdicts_join_the_report(broken: Report) -> None:
    pytest.importorskip("islpy")
    pytest.importorskip("z3")
    good, bad = report(load("causal"), 64, 64).verified(), broken.verified()
    assert not good.is_refuted and bad.is_refuted
    assert "exact: isl proves it" in good.text()
    assert "z3 refutes it: " in bad.text() and "k=0" in bad.text()
    verdicts = bad.json()["verification"]
    assert json.loads(json.dumps(verdicts)) == verdicts
    assert {v["outcome"] for v in verdicts} == {"proved", "refuted"}
    assert all(v["counterexample"] for v in verdicts if v["outcome"] == "refuted")
    assert "verification" not in broken.json()


def test_tensors_that_the_mask_reads_decide_which_tiles_are_counted() -> None:
    doc = (torch.arange(1024) // 256).to(torch.int32)[None]
    found = report(load("packed_causal"), 1024, 1024, tensors={"doc": doc})
    assert found.tiles is not None
    assert (found.tiles.partial, found.tiles.full, found.tiles.empty) == (8, 4, 52)
    assert found.kept == 4 * 256 * 257 // 2


def test_an_order_is_shown_where_its_classes_cannot_be_counted() -> None:
    text = "attention heads(dilation: int = 4)\nmask = 0 <= q - k < 9 * H and (q - k) % dilation == 0\n"
    found = report(load(text), 40, 40)
    assert "4 residue classes of `dilation`" in found.orders[0] and "pairs computed" not in found.orders[0]
    assert "pairs computed" in report(load(text), 40, 40, sizes={"H": 1}).orders[0]
