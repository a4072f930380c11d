"""Claims against brute force: never unsound, and exact where they say so."""

from __future__ import annotations

import random

import pytest
import torch

from attn_dsl.errors import BindingError
from attn_dsl.frontend import load
from attn_dsl.passes.monotone import direction
from attn_dsl.passes.prove import prove
from attn_dsl.passes.schedule import derive_schedule
from tests.passes.random_masks import RandomMask
from tests.passes.tiles import Grid

MASKS = 1000
CHUNK = 25


def draw(seed: int) -> Grid:
    rng = random.Random(seed)
    kind = ("affine", "boolean", "general", "general")[seed % 4]
    variant = RandomMask(rng).variant(kind)
    return Grid(
        variant,
        q_len=rng.randint(1, 20),
        kv_len=rng.randint(1, 20),
        block_m=rng.choice((1, 2, 3, 4, 7, 8)),
        block_n=rng.choice((1, 2, 3, 4, 7, 8)),
        q_offset=rng.choice((0, 0, 3, 11)),
        parameters={"a": rng.randint(-5, 15), "w": rng.randint(1, 9), "flag": rng.random() < 0.5},
    )


@pytest.mark.parametrize("first", range(0, MASKS, CHUNK))
def test_random_masks_are_classified_soundly(first: int) -> None:
    for seed in range(first, first + CHUNK):
        check(seed)


def check(seed: int) -> None:
    """Reproduce one failure with `python -c "from tests.passes.test_prove import check; check(SEED)"`."""
    check_grid(draw(seed), f"seed {seed}", affine=seed % 4 == 0)


def check_grid(grid: Grid, name: str, *, affine: bool = False) -> None:
    proof = prove(grid.variant)
    empty, full = grid.exhaustive()
    proved_empty, proved_full = grid.claimed(proof)
    assert not (proved_empty & ~empty).any(), f"{name}: a tile proved EMPTY is not"
    assert not (proved_full & ~full).any(), f"{name}: a tile proved FULL is not"
    if all(side.claim.exact for side in proof.visit):
        assert (proved_empty == empty).all(), f"{name}: EMPTY is called exact and is not"
    if all(side.claim.exact for side in proof.masked):
        assert (proved_full == full).all(), f"{name}: FULL is called exact and is not"
    if affine:
        assert proof.exact, f"{name}: a conjunction of affine comparisons is not exact"
    for padded in (False, True):
        schedule = derive_schedule(grid.variant, proof, padded=padded)
        for axis in ("kv", "q"):
            visits, masked = grid.scheduled(schedule, axis, padded)
            where = f"{name}, {axis} ranges, padded={padded}"
            assert (visits <= 1).all(), f"{where}: a tile is visited twice"
            assert not ((visits == 0) & ~empty).any(), f"{where}: a tile with a kept pair is not visited"
            assert not ((visits == 1) & ~masked & ~full).any(), f"{where}: a tile without mask is not full"
            if proof.exact and not padded:
                assert ((visits == 0) == empty).all(), f"{where}: an empty tile is visited"
                assert (masked == ~(empty | full)).all(), f"{where}: a full tile is masked"


@pytest.mark.parametrize(
    "mask",
    [
        "k * b < 5",
        "k * b > 5",
        "q * h + 3 >= k and k * b <= 4",
        "k * (n // 4) <= 6 or q * b > n",
        "q * b >= k * h - 2",
        "k * b * 3 < q * h + n",
        "clamp(q, Q, k) == D * k",
        "(D - 1) * max(q, n) >= k",
        "max(k, n) * h <= q",
    ],
)
@pytest.mark.parametrize("n", [0, 3, 9])
def test_a_factor_of_a_position_may_be_zero(mask: str, n: int) -> None:
    variant = load(f"attention zero(n: int)\nmask = {mask}\n")
    check_grid(Grid(variant, 9, 13, 4, 2, parameters={"n": n}), mask)


@pytest.mark.parametrize(
    "mask",
    [
        "q >= k and (q - k) % every[h] == 0",
        "q // every[h] == k // every[h]",
        "q == 0 or k % q == 0",
        "k // (q + 1) < n",
        "h > 0 and (q - k) % h == 0 or q == k",
        "q // (n - w) == k // (n - w)",
        "(q - k) % (KV // 5) == 0 and q >= k",
        "q // (n - 9000 + 9000) >= k // n",
    ],
)
def test_divisors_are_anything_that_is_positive_where_it_counts(mask: str) -> None:
    variant = load(f"attention divided(n: int, w: int)\ntensor every: int32[H]\nmask = {mask}\n")
    for every in (1, 4):
        tensors = {"every": torch.tensor([every], dtype=torch.int32)}
        check_grid(Grid(variant, 9, 13, 4, 2, parameters={"n": 7, "w": 3}, tensors=tensors), mask)


def test_a_divisor_that_no_numbers_make_positive_is_refused() -> None:
    with pytest.raises(BindingError, match=r"must be positive; no numbers were found.*: `0 - n \* n`"):
        prove(load("attention never(n: int)\nmask = q // (0 - n * n) == k // (0 - n * n)\n"))


@pytest.mark.parametrize(
    "mask",
    [
        "k != ceil(cap)",
        "q - k <= floor(cap * 2.0) and q >= k",
        "any(d in 0..3: k + d == floor(cap * d))",
        "k // 2 <= floor(cap) + q",
        "floor(cap * q) >= k",
        "(k if cap > 1.0 else q) <= floor(cap)",
    ],
)
def test_a_float_rounded_to_an_integer_is_a_number_like_others(mask: str) -> None:
    variant = load(f"attention rounded(cap: float)\nmask = {mask}\n")
    for cap in (-1.5, 0.0, 2.5):
        check_grid(Grid(variant, 9, 13, 4, 2, parameters={"cap": cap}), mask)


LONG = {
    "shifted windows of an image": "(q // w + n - 2) // n == (k // w + n - 2) // n"
    " and (q % w + n - 2) // n == (k % w + n - 2) // n",
    "a window in the frames of the past": "k // n == q // n or (k // n < q // n and"
    " abs(q % n // w - k % n // w) <= 1 and abs(q % w - k % w) <= 1)",
    "a part of a segment for each head": "q // n == k // n and q % w == 1 and k % w == 1",
}


@pytest.mark.parametrize("name", LONG)
def test_what_a_comparison_says_alone_is_not_lost_in_a_long_clause(name: str) -> None:
    variant = load(f"attention long(n: int, w: int)\nmask = {LONG[name]}\n")
    parameters = {"n": 4, "w": 11} if "image" in name else {"n": 24, "w": 6}
    grid = Grid(variant, 150, 150, 16, 16, parameters=parameters)
    check_grid(grid, name)
    proof = prove(variant)
    empty, _ = grid.exhaustive()
    assert (grid.claimed(proof)[0] == empty).all()
    for axis in ("kv", "q"):
        visits, _ = grid.scheduled(derive_schedule(variant, proof), axis)
        assert ((visits == 0) == empty).all(), axis


@pytest.mark.parametrize("width", [1, 13, 200])
def test_an_element_that_is_promised_to_be_positive_divides_like_a_parameter(width: int) -> None:
    rows = "abs(q // width[b] - k // width[b]) <= 1"
    images = load(f"attention images\ntensor width: int32[B] in [1, KV)\nmask = {rows}\n")
    grid = Grid(images, 150, 150, 16, 16, tensors={"width": torch.tensor([width], dtype=torch.int32)})
    check_grid(grid, rows)
    assert prove(images).exact and (grid.claimed(prove(images))[0] == grid.exhaustive()[0]).all()


@pytest.mark.parametrize(
    "step",
    ["abs(x{0} - {0})", "abs(x{0} * 2 - k)", "x{0} + 1 if q > k + {0} else x{0} - k"],
)
def test_a_mask_of_too_many_cases_is_unknown_not_endless(step: str) -> None:
    lets = "".join(f"let x{i + 1} = {step.format(i)}\n" for i in range(16))
    proof = prove(load(f"attention nested\nlet x0 = q - k\n{lets}mask = x16 > 3\n"))
    assert not proof.exact


def test_nested_comparisons_of_conditions_end() -> None:
    lets = "".join(f"let x{i + 1} = x{i} == (q > k + {i})\n" for i in range(40))
    proof = prove(load(f"attention nested\nlet x0 = q > k\n{lets}mask = x40\n"))
    assert any("too many cases" in reason for claim in proof.claims for reason in claim.reasons) or not proof.exact


@pytest.mark.parametrize("step", ["max({0}, {0} - 1)", "max({0} % 3, {0} % 3 - 1)"])
def test_what_is_shared_is_asked_once(step: str) -> None:
    lets = "".join(f"let x{i + 1} = {step.format(f'x{i}')}\n" for i in range(16))
    variant = load(f"attention doubled\nlet x0 = q\n{lets}mask = x16 >= k\n")
    asked = direction.cache_info().misses
    prove(variant)
    assert direction.cache_info().misses - asked < 500
