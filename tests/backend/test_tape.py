"""A tape passes what the recorded function would have its kernels passed, tensors by their addresses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_start import Compiled, no_gpu  # noqa: F401
from torch import Tensor

from attn_dsl.backend.portable.run import Options
from attn_dsl.backend.portable.start import Ready
from attn_dsl.backend.portable.tape import Launches, recorded

ROWS = Options()
BLOCKS = Options()


def described(base: Tensor, known: dict[int, Any]) -> Any:
    return SimpleNamespace(base=base, shape=[4, 8], strides=[8, 1], padding="zero", known=known)


KNOWN: tuple[dict[int, Any], dict[int, Any]] = ({}, {})


def function(run: Any, query: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two kernels that hand on scratch memory, of which the second reads a part."""
    out, numbers, again = torch.empty_like(query), torch.empty(2, 3, 8), torch.empty(40, dtype=torch.int32)
    rows = described(query, KNOWN[0])
    run(None, 5, (rows, out, numbers, None, 7, ((table, (4,), (1,)), (9, 1.5))), ROWS)
    blocks = rows, described(numbers.select(0, 1), KNOWN[1])
    run(None, 6, (*blocks, again, out, (1, 2), query), BLOCKS)
    return out, query, out


def on_meta(run: Any, query: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    with torch.device(query.device):
        return function(run, query, table)


def found(rows: Compiled, blocks: Compiled) -> dict[Options, Ready]:
    return {ROWS: Ready(rows, ("constant",)), BLOCKS: Ready(blocks, ())}


def kernels() -> tuple[Compiled, Compiled]:
    return Compiled(1), Compiled(2)


def test_only_addresses_change() -> None:
    rows, blocks = kernels()
    tape = recorded(on_meta, (torch.ones(4, 8), torch.ones(4)), found(rows, blocks))
    assert tape is not None and len(tape.made) == 1
    query, table = torch.ones(4, 8), torch.ones(4)
    out, same, twice = tape((query, table), 2)
    assert same is query and twice is out and out.shape == query.shape and out.data_ptr() != query.data_ptr()
    first, second = rows.got[-1], blocks.got[-1]
    assert first[:4] == (5, 1, 1, 13) and second[:4] == (6, 1, 1, 13)
    numbers, at = first[19], (query.data_ptr(), out.data_ptr(), table.data_ptr())
    assert first[13][1] == at[0] and first[14:18] == (4, 8, 8, 1)
    assert first[18:] == (at[1], numbers, None, 7, ((at[2], (4,), (1,)), (9, 1.5)), "constant")
    (map_0, map_1), again = (second[13], second[18]), second[23]
    assert map_0[1] == at[0] and map_1[1] == numbers + 3 * 8 * 4, "the second half of the numbers"
    assert second[14:18] == second[19:23] == (4, 8, 8, 1) and second[24:] == (at[1], (1, 2), at[0])
    assert again >= numbers + 2 * 3 * 8 * 4 and again % 4 == 0 and tape.scratch >= again - numbers + 160


def on_meta_and_more(run: Any, query: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    torch.zeros(3, device=query.device)
    return on_meta(run, query, table)


def test_what_a_function_does_beside_launches_keeps_it_from_being_recorded() -> None:
    given = (torch.ones(4, 8), torch.ones(4))
    for more in (lambda x: x.zero_(), lambda x: x + 1, lambda x: torch.zeros(3, device=x.device)):

        def busy(run: Any, query: Tensor, table: Tensor, more: Any = more) -> Any:
            more(query)
            return on_meta(run, query, table)

        assert recorded(busy, given, found(*kernels())) is None
    assert recorded(on_meta, given, {}) is None, "a kernel that was not launched"
    foreign = Compiled(2)
    foreign.run.launch = lambda *_: None
    assert recorded(on_meta, given, found(Compiled(1), foreign)) is None, "a launcher that is not known"


def test_a_function_is_called_until_its_kernels_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 2, raising=False)
    for wanted in (True, False):
        rows, blocks = kernels()
        launches = Launches(on_meta if wanted else on_meta_and_more)
        launches.runner.index, launches.runner.found = 2, found(rows, blocks)
        given = (torch.ones(4, 8), torch.ones(4))
        for _ in range(3):
            launches(given)
            assert len(rows.got) == len(blocks.got)
        assert len(rows.got) == 3 and (launches.tapes[()] is not None) == wanted
        assert isinstance(rows.got[-1][18], int) == wanted


def test_tensors_of_other_shapes_have_a_tape_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 2, raising=False)
    rows, blocks = kernels()
    launches = Launches(on_meta)
    launches.runner.index, launches.runner.found = 2, found(rows, blocks)
    for length in (4, 6, 4, 6):
        table = torch.ones(length)
        launches((torch.ones(4, 8),), (table,))
    assert len(launches.tapes) == 2 and None not in launches.tapes.values()
    assert rows.got[-1][22][0][0] == table.data_ptr()
