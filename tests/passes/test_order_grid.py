"""Strips of a grid: what a strip sees lies within it, and a variant over places in strips means what it meant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attn_dsl.frontend import load
from attn_dsl.ir.evaluate import Environment, evaluate
from attn_dsl.ir.variant import Variant
from attn_dsl.passes import pipeline
from attn_dsl.passes.order_grid import QUERY_COLUMNS, Strips, strips
from attn_dsl.passes.prove import prove
from attn_dsl.passes.schedule import Schedule, derive_schedule
from tests.passes.tiles import Grid

HEADS, KV_HEADS = 4, 2
PLAIN = """attention plain(width: int, r: int, bottom: int = 3)
tensor bias: float32[H, KV]
score = score + bias[h, k] * (q // width - k % width)
mask = abs(q % width - k % width) < r and q // width - k // width >= 0 and q // width < k // width + bottom
"""
ONE_SIDED = """attention one_sided(width: int, r: int)
mask = k % width <= q % width and q % width - k % width <= r and (q + k) % 3 != 0 and q >= k
"""
CASES = [
    ("natten2d", {"width": 19, "height": 11, "r": 2}, 32),
    ("natten2d", {"width": 33, "height": 9, "r": 4}, 32),
    ("natten2d", {"width": 40, "height": 17, "r": 8}, 32),
    ("natten2d", {"width": 50, "height": 13, "r": 6}, 64),
    ("natten3d", {"width": 18, "height": 3, "depth": 4, "r": 1}, 32),
    (PLAIN, {"width": 37, "r": 5, "bottom": 3}, 32),
    (PLAIN, {"width": 9, "r": 3, "bottom": 2}, 32),
    (ONE_SIDED, {"width": 35, "r": 7}, 32),
]


def variant_of(text: str) -> Variant:
    return pipeline.run(load(text), {}, stop_after="simplify").variant


def test_masks_that_speak_of_no_columns_have_no_strips() -> None:
    for name in ("causal", "dilated_window", "sparse_fixed", "sparse_strided", "natten1d"):
        assert not list(strips(variant_of(name))), name


def test_strips_begin_where_the_first_column_is_that_they_see() -> None:
    (order,) = strips(variant_of("natten2d"))
    assert order.starts(90, 32, {"width": 90, "height": 90, "r": 6}) == [0, 10, 26, 42, 58, 74]
    assert order.starts(81, 32, {"width": 81, "height": 90, "r": 6}) == [0, 10, 26, 42, 58, 68]
    assert order.starts(90, 32, {"width": 90, "height": 90, "r": 9}) is None
    assert order.starts(90, 64, {"width": 90, "height": 90, "r": 9}) is not None
    assert order.starts(90, 64, {"width": 90}) is None


@pytest.mark.parametrize(("text", "parameters", "columns"), CASES)
@pytest.mark.parametrize("lead", [0, 2])
def test_every_pair_is_seen_once_and_where_boxes_are_read(
    text: str, parameters: dict[str, int], columns: int, lead: int
) -> None:
    order = next(iter(strips(variant_of(text))))
    width = parameters["width"]
    rows = parameters.get("height", 8) * parameters.get("depth", 1)
    length = rows * width
    starts = order.starts(width, columns, parameters)
    assert starts is not None
    sizes = {"B": 1, "H": HEADS, "HK": KV_HEADS, "Q": length, "KV": length}
    tensors = {"bias": torch.randn(HEADS, length, dtype=torch.float64).float()} if text == PLAIN else {}
    whole = Grid(order.variant, length, length, 8, 8, 0, {**parameters}, tensors, sizes, 0, 3)
    dense = whole.dense()
    made = order.reordered(columns, ragged=False)
    known = {**parameters, **{order.name(name): size for name, size in sizes.items()}, order.name("lead"): lead}
    given = {parameter.name: known[parameter.name] for parameter in made.parameters}
    proof = prove(made)
    schedules = [derive_schedule(made, proof, padded=padded) for padded in (False, True)]
    found = torch.zeros_like(dense, dtype=torch.int64)
    for strip in range(len(starts)):
        tiles = Grid(
            made, rows * QUERY_COLUMNS, (rows + lead) * columns, 16, 2 * columns, 0, given, tensors,
            {"B": 1, "H": 9, "HK": 9}, 0, strip * HEADS + 3,
        )  # fmt: skip
        q, k = torch.arange(tiles.q_len), torch.arange(tiles.kv_len)
        seen = tiles.dense()
        qy, qx = q // QUERY_COLUMNS, strip * QUERY_COLUMNS + q % QUERY_COLUMNS
        ky, kx = k // columns - lead, starts[strip] + k % columns
        here = qx < width
        seen[~here] = False
        assert not seen[:, (kx >= width) | (ky < 0)].any()
        at_q, at_k = seen.nonzero(as_tuple=True)
        found[(qy * width + qx)[at_q], (ky * width + kx)[at_k]] += 1
        check_boxes(order, columns, given, strip, q, k, (qy, qx), (ky, kx))
        check_schedule(tiles, schedules)
        if text == PLAIN:
            after = value(made, tiles, q[at_q], k[at_k])
            before = value(order.variant, whole, (qy * width + qx)[at_q], (ky * width + kx)[at_k])
            assert torch.equal(after, before)
    assert torch.equal(found, dense.to(torch.int64))


@pytest.mark.parametrize(("text", "parameters", "columns"), CASES)
@pytest.mark.parametrize("lead", [0, 1])
def test_strips_of_keys_see_every_pair_once(text: str, parameters: dict[str, int], columns: int, lead: int) -> None:
    given = next(iter(strips(variant_of(text))))
    order = given.exchanged()
    assert order is not None
    width = parameters["width"]
    rows = parameters.get("height", 8) * parameters.get("depth", 1)
    columns = next(n for n in (32, 64) if order.starts(width, n, parameters) is not None)
    starts = order.starts(width, columns, parameters)
    assert starts is not None
    length = rows * width
    sizes = {"B": 1, "H": HEADS, "HK": KV_HEADS, "Q": length, "KV": length}
    tensors = {"bias": torch.randn(HEADS, length)} if text == PLAIN else {}
    dense = Grid(given.variant, length, length, 8, 8, 0, {**parameters}, tensors, sizes, 0, 3).dense()
    made = order.reordered(columns, ragged=False)
    known = {**parameters, **order.named_sizes(sizes, lead)}
    bound = {parameter.name: known[parameter.name] for parameter in made.parameters}
    proof = prove(made)
    schedules = [derive_schedule(made, proof, padded=padded) for padded in (False, True)]
    found, boxes = torch.zeros_like(dense, dtype=torch.int64), order.boxes(columns)
    for strip in range(len(starts)):
        head = strip * HEADS + 3
        tiles = Grid(
            made, (rows + lead) * columns, rows * QUERY_COLUMNS, 2 * columns, 16, 0, bound, tensors,
            {"B": 1, "H": 9, "HK": 9}, 0, head,
        )  # fmt: skip
        q, k = torch.arange(tiles.q_len), torch.arange(tiles.kv_len)
        seen = tiles.dense()
        qy, qx = q // columns - lead, starts[strip] + q % columns
        ky, kx = k // QUERY_COLUMNS, strip * QUERY_COLUMNS + k % QUERY_COLUMNS
        assert not seen[(qx >= width) | (qy < 0)].any() and not seen[:, kx >= width].any()
        at_q, at_k = seen.nonzero(as_tuple=True)
        found[(qy * width + qx)[at_q], (ky * width + kx)[at_k]] += 1
        check_schedule(tiles, schedules)
        env = Environment(indices={"b": torch.tensor(0), "h": torch.tensor(head), "q": q[::columns]}, parameters=bound)
        at = [evaluate(node, env).expand(rows + lead) for node in boxes.query]
        assert (at[0] == 3).all() and torch.equal(at[1], qy[::columns]) and torch.equal(at[2], qx[::columns])
        env = Environment(
            indices={"b": torch.tensor(0), "h": torch.tensor(strip * KV_HEADS + 1), "k": k[::QUERY_COLUMNS]},
            parameters=bound,
        )
        at = [evaluate(node, env).expand(rows) for node in boxes.key]
        first = ky[::QUERY_COLUMNS], kx[::QUERY_COLUMNS]
        assert (at[0] == 1).all() and torch.equal(at[1], first[0]) and torch.equal(at[2], first[1])
    assert torch.equal(found, dense.to(torch.int64))


def value(variant: Variant, tiles: Grid, q: Tensor, k: Tensor) -> Tensor:
    """The score of pairs."""
    head = torch.tensor(tiles.head)
    env = Environment(
        indices={"b": torch.tensor(0), "h": head, "hk": head, "q": q, "k": k}, parameters=tiles.parameters,
        sizes=tiles.sizes, tensors=tiles.tensors, score=torch.zeros(()),
    )  # fmt: skip
    return evaluate(
        variant.score, env, torch.broadcast_to(torch.tensor(True), torch.broadcast_shapes(q.shape, k.shape))
    )


def check_boxes(
    order: Strips,
    columns: int,
    parameters: dict[str, int],
    strip: int,
    q: Tensor,
    k: Tensor,
    query: tuple[Tensor, Tensor],
    key: tuple[Tensor, Tensor],
) -> None:
    """A tile's box begins at the head, row and column of its first place."""
    boxes = order.boxes(columns)
    for box, places, width, heads, (y, x) in (
        (boxes.query, q, QUERY_COLUMNS, HEADS, query),
        (boxes.key, k, columns, KV_HEADS, key),
    ):
        first = places[::width]
        head = heads - 1
        env = Environment(
            indices={"b": torch.tensor(0), "h": torch.tensor(strip * heads + head), "q": first, "k": first},
            parameters=parameters,
        )
        at = [evaluate(node, env).expand(first.shape) for node in box]
        assert (at[0] == head).all() and torch.equal(at[1], y[::width]) and torch.equal(at[2], x[::width])


def check_schedule(tiles: Grid, schedules: list[Schedule]) -> None:
    empty, full = tiles.exhaustive()
    for schedule, padded in zip(schedules, (False, True), strict=True):
        for axis in ("kv", "q"):
            visits, masked = tiles.scheduled(schedule, axis, padded)
            assert not ((visits == 0) & ~empty).any() and bool((visits <= 1).all())
            assert not ((visits > 0) & ~masked & ~full).any()
