"""What stands around the backward kernel over strips of a grid: rows spread to their places in boxes, and
sums of these, as the tensor cores leave them, gathered again."""

from __future__ import annotations

import pytest
import torch
from portable_support import program_of

from attn_dsl.backend import order
from attn_dsl.backend.execute import HOPPER, Options, portable_call
from attn_dsl.backend.hopper.backward_boxes import gather_queries, spread_rows
from attn_dsl.backend.portable.device import plain
from attn_dsl.backend.portable.host import number
from attn_dsl.passes.order_grid import strips

WIDTH, HEIGHT, COLUMNS, BATCH, HEADS = 37, 6, 32, 2, 2


@pytest.mark.parametrize(("dim", "rows", "lead", "words"), [(128, 64, 0, 1), (128, 64, 1, 2), (64, 128, 3, 1)])
def test_rows_reach_their_places_in_boxes_and_come_back(dim: int, rows: int, lead: int, words: int) -> None:
    program = program_of("natten2d")
    (given,) = strips(program.variant)
    by = given.exchanged()
    assert by is not None
    x = torch.empty(BATCH, HEADS, WIDTH * HEIGHT, dim, dtype=torch.bfloat16)
    bindings = {"width": WIDTH, "height": HEIGHT, "r": 2}
    call = program.binder.bind(x, x, x, None, 0, bindings)
    found = order.in_strips(by, program, call, Options(HOPPER), COLUMNS, lead)
    bound = portable_call(found.program, found.call, Options(HOPPER))
    box = found.program.hopper_backward.emitted(False)[1].query_box
    starts = by.starts(WIDTH, COLUMNS, bindings)
    assert starts is not None
    heads, q_len = bound.sizes[1], bound.sizes[3]
    tiles, own_tiles = -(-q_len // rows), -(-WIDTH * HEIGHT // rows)
    of_call = (tuple(map(number, bound.parameters)), tuple(map(plain, bound.sizes[:6])), (), 1)

    place = torch.arange(tiles * rows)
    y, x0 = place // COLUMNS - lead, torch.tensor(starts)[:, None]
    column = x0 + place % COLUMNS  # [strips, places]
    inside = (y >= 0) & (y < HEIGHT) & (column < WIDTH)
    position = torch.where(inside, y * WIDTH + column, 0)

    lines = torch.randn(BATCH * HEADS, 2, own_tiles * rows)
    numbers = torch.empty(BATCH * heads, 2, tiles * rows)
    done = torch.ones(BATCH * heads, tiles, words, dtype=torch.int32)
    spread_rows[(BATCH * heads * tiles * (rows // 64),)](
        lines, numbers, done, WIDTH, HEIGHT, own_tiles, HEADS, *of_call, BOX=box, COLUMNS=COLUMNS, ROWS=64,
        QUERIES=rows, WORDS=words
    )  # fmt: skip
    assert not done.any()
    expected = lines.view(BATCH, 1, HEADS, 2, -1).expand(-1, len(starts), -1, -1, -1)
    expected = expected.gather(4, position[None, :, None, None].expand(BATCH, -1, HEADS, 2, -1))
    outside = torch.tensor([torch.inf, 0.0])[:, None]
    expected = torch.where(inside[None, :, None, None], expected, outside)
    assert torch.equal(numbers.view(expected.shape), expected)

    parts = torch.randn(BATCH, len(starts), HEADS, tiles, rows, dim)
    halves = parts.view(-1, 2, 64, dim) if rows == 128 else parts.view(-1, 64, 2, dim // 2).transpose(1, 2)
    halves = halves.reshape(-1, 4, 2, 8, halves.shape[-1] // 8, 4, 2).permute(0, 4, 1, 3, 5, 2, 6).contiguous()
    done[:, ::2, 0] = 1  # nobody stored the others, where anything may stand
    stored = done[..., 0].view(BATCH, len(starts), HEADS, tiles, 1, 1) == 1
    halves = halves.view(BATCH * heads, tiles, -1).masked_fill(done[..., :1] == 0, torch.nan)
    dq = torch.empty(BATCH, HEADS, HEIGHT * WIDTH, dim)
    gather_queries[(BATCH * HEADS * -(-HEIGHT // 4) * -(-WIDTH // 16),)](
        halves.view(-1), done, dq, WIDTH, HEIGHT, HEADS, len(starts), *of_call, BOX=box, COLUMNS=COLUMNS, QUERIES=rows,
        D=dim, DIM=dim, ACROSS=16, DOWN=4, WORDS=words
    )  # fmt: skip
    whole = torch.zeros_like(dq)
    for strip in range(len(starts)):
        here = inside[strip]
        whole.index_add_(2, position[strip, here], (parts * stored)[:, strip].flatten(2, 3)[:, :, here])
    assert torch.allclose(dq, whole, atol=1e-6)
