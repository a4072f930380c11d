"""Orders of positions: which ones a mask speaks of, and that a reordered variant means what the variant meant."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attn_dsl.frontend import load
from attn_dsl.ir.infix import infix
from attn_dsl.ir.nodes import Binary, BinaryOp, Compare, CompareOp, Const, K, Node, Q
from attn_dsl.ir.variant import Variant
from attn_dsl.passes import pipeline
from attn_dsl.passes.bake import bake
from attn_dsl.passes.order import Place, Residues, number, residues
from attn_dsl.passes.prove import prove
from attn_dsl.passes.schedule import Schedule, derive_schedule
from attn_dsl.passes.simplify import simplify
from tests.passes.random_masks import RandomMask, W
from tests.passes.tiles import Grid

BATCH, HEADS = 2, 3
SAMPLES = 10


def variant_of(mask: str, header: str = "attention t(window: int = 64, d: int = 4)") -> Variant:
    return pipeline.run(load(f"{header}\nmask = {mask}\n"), {}, stop_after="simplify").variant


@pytest.mark.parametrize(
    ("mask", "modulus"),
    [
        ("(q - k) % d == 0", "d"),
        ("(k - q) % 4 == 0 and q >= k", "4"),
        ("q % d == k % d and q - k < window", "d"),
        ("q >= k and (q - k + 8) % 4 == 0", "4"),
        ("0 == (q - k + d) % d", "d"),
        ("q % (2 * d) == k % (2 * d)", "2 * d"),
        ("q % 4 - k % 4 == 0", "4"),
    ],
)
def test_a_congruence_of_the_positions_is_found(mask: str, modulus: str) -> None:
    assert infix(next(residues(variant_of(mask))).modulus) in (modulus, "d * 2")


@pytest.mark.parametrize(
    "mask",
    [
        "q >= k",
        "(q - k) % d == 1",
        "(q + k) % d == 0",
        "(q - 2 * k) % d == 0",
        "q - k < window or (q - k) % d == 0",
        "not ((q - k) % d == 0)",
        "(q - k) // d == 0",
        "q % d == 0",
        "(q - k) % KV == 0",
    ],
)
def test_what_is_no_congruence_of_all_pairs_is_not(mask: str) -> None:
    assert not list(residues(variant_of(mask)))


def test_the_residue_is_divided_out_of_a_dilated_window() -> None:
    variant = pipeline.run(load("dilated_window"), {}, stop_after="simplify").variant
    (order,) = residues(variant)
    for place in Place:
        assert infix(order.reordered(place, ragged=False).mask) == "k <= q and q <= k + (window - 1) // dilation"


def test_names_of_the_variant_are_not_taken_twice() -> None:
    order = next(residues(variant_of("(q - k) % d == 0 and k < KV - call_KV", "attention t(d: int, call_KV: int)")))
    made = order.reordered(Place.BATCH, ragged=True)
    assert [p.name for p in made.parameters] == ["d", "call_KV", "call_KV_"]


def test_a_modulus_is_a_number_where_its_parameters_are() -> None:
    (order,) = residues(variant_of("q % (2 * d) == k % (2 * d)"))
    assert number(order.modulus, {"d": 3, "window": torch.zeros(())}) == 6
    assert number(order.modulus, {}) is None


def congruence(rng: random.Random, modulus: Node) -> Node:
    """A random spelling."""

    def rest(x: Node) -> Node:
        return Binary(BinaryOp.MOD, x, modulus)

    distance = Binary(BinaryOp.SUB, Q, K) if rng.random() < 0.5 else Binary(BinaryOp.SUB, K, Q)
    shifted = Binary(BinaryOp.ADD, distance, Binary(BinaryOp.MUL, modulus, Const(rng.randint(-2, 2))))
    sides = [(rest(Q), rest(K)), (rest(distance), Const(0)), (Const(0), rest(shifted))]
    return Compare(CompareOp.EQ, *rng.choice(sides))


@pytest.mark.parametrize("first", range(0, 60, SAMPLES))
def test_random_masks_keep_their_meaning_and_their_schedules_are_sound(first: int) -> None:
    for seed in range(first, first + SAMPLES):
        rng = random.Random(seed)
        modulus = rng.choice([W, Const(2), Const(3), Const(4)])
        drawn = RandomMask(rng).variant(rng.choice(["affine", "boolean", "general"]))
        variant = simplify(replace(drawn, mask=Binary(BinaryOp.AND, congruence(rng, modulus), drawn.mask)))
        parameters: dict[str, int | float | bool] = {
            "a": rng.randint(-9, 12),
            "w": rng.randint(2, 5),
            "flag": rng.random() < 0.5,
        }
        found = list(residues(bake(variant, {})))
        assert found or not variant.mask.depends, seed
        for order in found:
            check(order, rng, parameters)


def check(order: Residues, rng: random.Random, parameters: dict[str, int | float | bool]) -> None:
    """Each class of the mask, and tiles of it as its schedule has them, beside all pairs of the mask."""
    count = number(order.modulus, parameters)
    assert count is not None
    q_len, kv_len = rng.randint(count, 40), rng.randint(count, 40)
    start = rng.choice([0, 0, count, 3 * count])
    ragged = kv_len % count != 0
    whole = Grid(order.variant, q_len, kv_len, 8, 8, start, parameters, {}, {"B": BATCH, "H": HEADS, "HK": HEADS})
    dense = whole.dense()
    q, k = start + torch.arange(q_len)[:, None], torch.arange(kv_len)[None, :]
    assert not dense[(q - k) % count != 0].any()
    named = {order.size_name(name): size for name, size in (*whole.sizes.items(), ("Q", q_len), ("KV", kv_len))}
    rows, keys = -(-q_len // count), -(-kv_len // count)
    for place in rng.sample(list(Place), 1):
        made = order.reordered(place, ragged=ragged)
        proof = prove(made)
        schedules = [derive_schedule(made, proof, padded=padded) for padded in (False, True)]
        for residue in {0, rng.randrange(count)}:
            b, h = {Place.BATCH: (residue, 1), Place.HEAD: (1, residue * HEADS + 1), Place.PAIR: (4, residue)}[place]
            block = rng.choice([2, 3, 4, 8]), rng.choice([2, 3, 4, 8])
            tiles = Grid(
                made, rows, keys, *block, start // count, {**parameters, **named}, {}, {"B": 9, "H": 9, "HK": 9}, b, h
            )
            seen = tiles.dense()
            there = dense[residue::count, residue::count]
            assert torch.equal(seen[: there.shape[0], : there.shape[1]], there)
            assert not seen[:, there.shape[1] :].any(), "keys past the end are seen"
            assert_sound(tiles, tiles.claimed(proof), schedules)


def assert_sound(tiles: Grid, claimed: tuple[Tensor, Tensor], schedules: list[Schedule]) -> None:
    empty, full = tiles.exhaustive()
    assert not (claimed[0] & ~empty).any()
    assert not (claimed[1] & ~full).any()
    for schedule, padded in zip(schedules, (False, True), strict=True):
        for axis in ("kv", "q"):
            visits, masked = tiles.scheduled(schedule, axis, padded)  # type: ignore[arg-type]
            assert bool((visits <= 1).all())
            assert not ((visits == 0) & ~empty).any()
            assert not ((visits > 0) & ~masked & ~full).any()
