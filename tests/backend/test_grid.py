"""Strips of a grid: the program of a call over them, and the Hopper kernel that reads them in boxes, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from portable_support import program_of
from torch import Tensor

from attn_dsl.backend import order
from attn_dsl.backend.execute import HOPPER, Options, Program, portable_call
from attn_dsl.backend.hopper import check, launch, launch_backward, launch_boxes
from attn_dsl.backend.hopper.configs_backward import candidates
from attn_dsl.backend.layouts import Grid
from attn_dsl.ir import evaluate
from attn_dsl.passes.order_grid import QUERY_COLUMNS, strips

BIASED = """attention biased(width: int, r: int)
tensor bias: float32[H, KV]
score = score + bias[h, k] - 0.01 * (q - k)
mask = abs(q // width - k // width) <= r and abs(q % width - k % width) <= r
"""


def in_strips(program: Program, query: Tensor, key: Tensor, value: Tensor, **bindings: object) -> order.Ordered:
    (found,) = strips(program.variant)
    call = program.binder.bind(query, key, value, None, 0, bindings)
    return order.in_strips(found, program, call, Options(HOPPER), 32)


def boxed(x: Tensor, rows: int, width: int, starts: list[int], columns: int) -> Tensor:
    """What a kernel that reads boxes sees of a tensor, [B, strip * H, rows * columns, D]; 0 outside of the grid."""
    grid = torch.nn.functional.pad(x.unflatten(2, (rows, width)), (0, 0, 0, 2 * columns))
    found = [grid[:, :, :, start : start + columns] for start in starts]
    return torch.stack(found, 1).flatten(3, 4).flatten(1, 2)


@pytest.mark.parametrize(
    ("name", "bindings"),
    [("natten2d", {"width": 35, "height": 6, "r": 2}), (BIASED, {"width": 18, "r": 3})],
    ids=["natten2d", "biased"],
)
def test_strips_give_what_the_grid_gives(name: str, bindings: dict[str, int]) -> None:
    program, width, rows = program_of(name), bindings["width"], 6
    query = torch.randn(2, 4, rows * width, 8, dtype=torch.float64)
    key, value = (torch.randn(2, 2, rows * width, 8, dtype=torch.float64) for _ in range(2))
    tensors = {} if name == "natten2d" else {"bias": torch.randn(4, rows * width)}
    found = in_strips(program, query, key, value, **bindings, **tensors)
    (by,) = strips(program.variant)
    first = by.starts(width, 32, bindings)
    assert first is not None
    inputs = [boxed(query, rows, width, [QUERY_COLUMNS * i for i in range(len(first))], QUERY_COLUMNS)]
    inputs += [boxed(x, rows, width, first, 32) for x in (key, value)]
    assert [x.shape[1] for x in inputs] == [found.call.sizes["H"], found.call.sizes["HK"], found.call.sizes["HK"]]
    assert inputs[0].shape[2] == found.call.sizes["Q"] and inputs[1].shape[2] == found.call.sizes["KV"]
    out, lse = evaluate.attention(
        found.program.variant, *inputs, bindings={**found.call.parameters, **tensors}, dtype=torch.float64
    )
    truth = evaluate.attention(program.variant, query, key, value, bindings={**bindings, **tensors})
    assert isinstance(found.layout, Grid)
    assert torch.allclose(found.layout.join(lse, rows * width), truth[1], equal_nan=True)
    columns = [found.layout.join(column, rows * width) for column in out.unbind(-1)]
    assert torch.allclose(torch.stack(columns, -1), truth[0])


@pytest.mark.parametrize("width", [9, 32, 35])
def test_lines_of_strips_join_again(width: int) -> None:
    grid, x = Grid(width, QUERY_COLUMNS), torch.randn(2, 3, 5 * width)
    line = grid.split_line(x, 7.0)
    assert line.shape == (2, 3 * -(-width // QUERY_COLUMNS), 5 * QUERY_COLUMNS)
    assert torch.equal(grid.join(line, 5 * width), x)
    assert torch.equal(line[:, :3, :QUERY_COLUMNS][..., :9], x[..., :9])
    assert (line == 7.0).sum() == line.numel() - x.numel()


@pytest.mark.parametrize("dim", [64, 128])
def test_the_hopper_kernel_reads_and_writes_boxes_alone(dim: int) -> None:
    program = program_of("natten2d")
    x = torch.empty(2, 4, 8100, dim, dtype=torch.bfloat16, device="meta")
    found = in_strips(program, x, x, x, width=90, height=90)
    bound = replace(portable_call(found.program, found.call, found.options), capability=(9, 0))
    assert bound.grid == (90, QUERY_COLUMNS, 32)
    assert launch.refusal(found.program.kernels, bound) is None
    choice = found.program.hopper.choice(bound, launch.compile_ahead)
    assert choice.build is not None and choice.build.spilled <= check.SPILLS and not choice.build.notes
    _, lse, _ = launch.forward(found.program.hopper, bound, lambda *_: None, choice.config)
    assert lse.shape == (2, 6 * 4, 90 * QUERY_COLUMNS)
    ptx = launch.build(found.program.hopper, bound).asm["ptx"]
    assert "cp.async.bulk.tensor.5d.shared" in ptx and "cp.async.bulk.tensor.5d.global" in ptx
    assert "cp.async.bulk.tensor.4d" not in ptx


@pytest.mark.parametrize("dim", [64, 128])
def test_the_hopper_backward_kernel_reads_and_writes_boxes_alone(dim: int) -> None:
    program = program_of("natten2d")
    x = torch.empty(2, 4, 8100, dim, dtype=torch.bfloat16, device="meta")
    (given,) = strips(program.variant)
    by = given.exchanged()
    assert by is not None
    call = program.binder.bind(x, x, x, None, 0, {"width": 90, "height": 90})
    found = order.in_strips(by, program, call, Options(HOPPER), 32)
    bound = replace(portable_call(found.program, found.call, found.options), capability=(9, 0))
    assert bound.grid == (90, 32, QUERY_COLUMNS)
    kernels = found.program.hopper_backward
    assert launch_backward.refusal(kernels, bound, frozenset()) is None
    assert launch_backward.refusal(kernels, bound, frozenset({"r"})) is not None
    choice = kernels.choice(bound, compile=launch.compile_ahead)
    assert choice.config is not None and choice.build is not None and not choice.build.notes
    ptx = launch_backward.build(kernels, bound).asm["ptx"]
    assert "cp.async.bulk.tensor.5d.shared" in ptx and "cp.async.bulk.tensor.5d.global" in ptx
    assert "cp.async.bulk.tensor.4d" not in ptx


def test_batch_entries_come_one_after_the_other_where_sums_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("natten2d")
    x = torch.empty(3, 2, 8100, 64, dtype=torch.bfloat16, device="meta")
    (given,) = strips(program.variant)
    by = given.exchanged()
    assert by is not None
    call = program.binder.bind(x, x, x, None, 0, {"width": 90, "height": 90})
    found = order.in_strips(by, program, call, Options(HOPPER), 32)
    bound = replace(portable_call(found.program, found.call, found.options), capability=(9, 0))
    kernels, lse = found.program.hopper_backward, torch.empty(3, 2, 8100, device="meta")

    def programs() -> list[tuple[str, int]]:
        seen: list[tuple[str, int]] = []
        launch_backward.backward(
            kernels, bound, x, lse, x, None, candidates(64, 64)[0], run=lambda k, n, *_: seen.append((k.__name__, n))
        )  # fmt: skip
        return [one for one in seen if one[0] != "list_tiles"]

    monkeypatch.setattr(launch_boxes, "multiprocessors", lambda _: 1 << 20)  # one for each tile
    whole = programs()
    monkeypatch.setattr(launch_boxes, "SUMS", 1)
    assert programs() == [(name, count // 3) for name, count in whole] * 3


def test_tiles_of_keys_hold_whole_rows_of_a_box() -> None:
    program = program_of("natten2d")
    for dim, columns, fits in ((128, 128, True), (256, 64, True), (256, 128, False)):
        x = torch.empty(2, 4, 8100, dim, dtype=torch.bfloat16, device="meta")
        (grid,) = strips(program.variant)
        call = program.binder.bind(x, x, x, None, 0, {"width": 90, "height": 90})
        found = order.in_strips(grid, program, call, Options(HOPPER), columns)
        bound = replace(portable_call(found.program, found.call, found.options), capability=(9, 0))
        assert (launch.refusal(found.program.kernels, bound) is None) is fits
        assert all(config.keys >= columns for config in launch._candidates(bound))


def test_what_is_built_ahead_has_the_programs_of_other_orders() -> None:
    # One for each pass; whole classes alike, ragged ones in three places.
    names = {"causal": 0, "hash_buckets": 2, "dilated_window": 4}
    for name, count in names.items():
        program = program_of(name)
        made = list(order.programs(program))
        assert len(made) == len({found.text for found in made} - {program.text}) == count
