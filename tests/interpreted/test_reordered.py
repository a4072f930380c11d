"""Calls in residue classes: results as in the order given, without copies where strides can say it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from portable_support import Problem, assert_close, program_of
from torch import Tensor

from attn_dsl.backend import execute, order, schedules, sorting
from attn_dsl.backend.binding import Call
from attn_dsl.backend.execute import Options, Program
from attn_dsl.backend.layouts import Classes, Permutation
from attn_dsl.backend.portable import listing
from attn_dsl.errors import BindingError
from attn_dsl.passes.order import Place

PORTABLE = Options("portable")
BIASED = """attention biased(window: int = 20, d: int = 3, last: int = 3)
tensor slope: float32[H]
tensor bias: float32[B, H, KV]
score = score - slope[h] * (q - k) + bias[b, h, k]
mask = abs(q - k) < window and q % d == k % d and k < KV - last
"""


@pytest.fixture(autouse=True)
def _always_reordered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of the short calls of tests no order would pay."""
    monkeypatch.setattr(order, "GAIN", 100.0)
    program_of("dilated_window").choices.clear()
    yield
    program_of("dilated_window").choices.clear()


def tensor(batch: int, heads: int, rows: int, dim: int = 16, *, rows_first: bool = False) -> Tensor:
    return torch.randn(batch, rows, heads, dim).transpose(1, 2) if rows_first else torch.randn(batch, heads, rows, dim)


def bound(program: Program, problem: Problem) -> Call:
    return program.binder.bind(problem.query, problem.key, problem.value, None, problem.q_offset, problem.bindings)


@pytest.mark.parametrize(
    ("shape", "rows_first", "place"),
    [
        ((2, 2, 2, 48, 48, 0), False, Place.PAIR),
        ((2, 2, 2, 50, 50, 0), False, Place.PAIR),
        ((2, 4, 2, 48, 48, 0), True, Place.HEAD),
        ((2, 4, 2, 41, 77, 36), False, Place.HEAD),
        ((1, 2, 1, 48, 48, 0), False, Place.BATCH),
        ((1, 2, 1, 40, 76, 36), True, Place.BATCH),
    ],
    ids=str,
)
def test_a_dilated_window_agrees_forward_and_backward(shape: tuple[int, ...], rows_first: bool, place: Place) -> None:
    batch, heads, kv_heads, q_len, kv_len, start = shape
    program = program_of("dilated_window")
    key, value = (tensor(batch, kv_heads, kv_len, rows_first=rows_first) for _ in range(2))
    query = tensor(batch, heads, q_len, rows_first=rows_first)
    problem = Problem(program, query, key, value, {"window": 17, "dilation": 3}, start)
    found = order.ordered(program, bound(program, problem), PORTABLE)
    assert found is not None and isinstance(found.layout, Classes) and found.layout.place is place
    upstream = problem.upstream()
    assert_close(problem.portable(upstream), problem.truth(upstream), 3e-5)


@pytest.mark.parametrize(("batch", "rows"), [(2, 48), (1, 50)])
def test_scores_and_gradients_of_what_is_captured_see_true_positions(batch: int, rows: int) -> None:
    program = program_of(BIASED)
    inputs = (tensor(batch, 2, rows) for _ in range(3))
    problem = Problem(program, *inputs, {"slope": torch.rand(2), "bias": torch.randn(batch, 2, rows)})
    assert order.ordered(program, bound(program, problem), PORTABLE) is not None
    upstream = problem.upstream()
    assert_close(problem.portable(upstream), problem.truth(upstream), 3e-5)


SEGMENTS = """attention segments(window: int = 30)
tensor segment: int32[B, KV]
tensor bias: float32[H, KV]
score = score + bias[h, k] - 0.01 * (q - k)
mask = segment[b, q] == segment[b, k] and q - k < window
"""


@pytest.mark.parametrize(("name", "heads", "kv_heads"), [("hash_buckets", 2, 2), (SEGMENTS, 4, 2)])
def test_positions_sorted_by_data_agree_forward_and_backward(
    name: str, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "SHORT", 1)
    program, rows = program_of(name), 45
    program.choices.clear()
    query, key, value = tensor(2, heads, rows), tensor(2, kv_heads, rows), tensor(2, kv_heads, rows)
    elements = torch.randint(0, 4, (2, heads, rows), dtype=torch.int32)
    bindings = (
        {"bucket": elements}
        if name == "hash_buckets"
        else {"segment": elements[:, 0], "bias": torch.randn(heads, rows)}
    )
    problem = Problem(program, query, key, value, bindings)
    found = order.ordered(program, bound(program, problem), PORTABLE)
    assert found is not None and isinstance(found.layout, Permutation)
    upstream = problem.upstream()
    truth = problem.truth(upstream)
    assert_close(problem.portable(upstream), truth, 3e-5)
    call = bound(program, problem)
    out, lse, _ = execute.forward(program, call, Options("cpu"))
    assert torch.allclose(out.double(), truth.out, atol=1e-5)
    assert torch.allclose(lse.double(), truth.lse, atol=1e-5)


def test_a_sort_is_made_once_for_a_tensor_that_does_not_change() -> None:
    program = program_of("hash_buckets")
    (by_bucket,) = program.orders
    names = by_bucket.end_names["first"]
    bucket = torch.randint(0, 4, (1, 1, 600), dtype=torch.int32)
    first = sorting.sort(by_bucket, bucket, names)
    assert sorting.sort(by_bucket, bucket, names) is first
    bucket[0, 0, 0] = 7
    again = sorting.sort(by_bucket, bucket, names)
    assert again is not first and again.order[0, 0, -1] == 0
    assert sorting.sort(by_bucket, bucket.clone(), names) is not again


@pytest.mark.parametrize("place", list(Place))
@pytest.mark.parametrize("rows", [12, 13])
def test_what_is_split_joins_again(place: Place, rows: int) -> None:
    batch = 1 if place is Place.BATCH else 2
    classes = Classes(3, place, batch)
    for rows_first in (False, True):
        x = tensor(batch, 4, rows, rows_first=rows_first)
        split = classes.split(x)
        assert torch.equal(classes.join(split, rows), x)
        assert classes.is_view(x) == (split.untyped_storage().data_ptr() == x.untyped_storage().data_ptr())
        line = classes.split_line(x[..., 0], -1.0)
        assert line.is_contiguous() and torch.equal(classes.join(line, rows), x[..., 0])
        assert torch.equal(line[:, :, : rows // 3], split[:, :, : rows // 3, 0])


def test_no_tensor_is_copied_where_strides_can_say_it() -> None:
    program = program_of("dilated_window")
    for rows_first in (False, True):
        x = tensor(2, 4, 48, rows_first=rows_first)
        call = program.binder.bind(x, x, x, None, 0, {"dilation": 4})
        found = order.ordered(program, call, PORTABLE)
        assert found is not None and found.laid_out("portable") == "nothing copied"
        assert found.call.query.data_ptr() == x.data_ptr()
        assert found.forward()[0].shape == x.shape


def test_the_order_stays_as_it_is_where_another_would_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    program = program_of("dilated_window")
    x = torch.empty(1, 1, 2048, 16)
    for bindings, pays in (({}, True), ({"dilation": 1}, False), ({"dilation": 1024, "window": 2048}, False)):
        call = program.binder.bind(x, x, x, None, 0, bindings)
        assert (order.ordered(program, call, PORTABLE) is not None) is pays, bindings
        found = order.choice(program, call, PORTABLE)
        assert found is not None and ("pairs visited instead of" in found.why) is pays
    uneven = program.binder.bind(x, x, x, None, 3, {})
    assert order.ordered(program, uneven, PORTABLE) is None  # classes of queries and keys begin apart
    assert (
        execute.reordered(program_of("causal"), program_of("causal").binder.bind(x, x, x, None, 0, {}), PORTABLE)
        is None
    )


def test_calls_with_the_same_tensors_sort_and_list_once_and_a_schedule_holds_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(order, "SHORT", 1)
    program = Program(program_of("hash_buckets").variant)
    made: list[str] = []
    for owner, name in ((sorting, "made"), (listing.Lists, "make")):
        whole = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, whole=whole, name=name: made.append(name) or whole(*given))
    query, key, value = (tensor(1, 2, 150) for _ in range(3))
    bucket = torch.randint(0, 4, (1, 2, 150), dtype=torch.int32)

    def call() -> Call:
        return program.binder.bind(query, key, value, None, 0, {"bucket": bucket})

    held = schedules.make(program, call(), PORTABLE, backward=False)
    assert made == ["made", "make"]
    assert "positions sorted by `bucket`, first places of runs" in held.text() and "tiles of" in held.text()
    for given in (query, torch.randn_like(query)):
        execute.forward(program, replace(call(), query=given), PORTABLE)
    assert made == ["made", "make"], "tensors that do not change cost nothing"
    held.check(program, call())
    bucket[0, 0, 0] += 1
    execute.forward(program, call(), PORTABLE)
    assert made == ["made", "make"] * 2
    with pytest.raises(BindingError, match="for what `bucket` held before"):
        held.check(program, call())
