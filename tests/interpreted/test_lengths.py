"""Packed sequences in the portable kernels, both passes, beside the CPU's loop over them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from portable_support import Problem, assert_close, compiled, program_of
from torch import Tensor

from attn_dsl.passes.lengths import with_packing

BIAS = "attention biased\ntensor w: float32[B, Q]\nscore = score * w[b, q] + 0.1 * b\nmask = q >= k\nsink = 0.5\n"
CASES: dict[str, dict[str, Any]] = {
    "noop": {},
    "sliding_window": {"window": 20},
    "gpt_oss": {"window": 9, "sinks": torch.tensor([0.5, -0.1])},
    BIAS: {"w": torch.linspace(0.5, 1.5, 5 * 40).view(5, 40)},
}


def ends(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize(("name", "keys"), [
    ("noop", (9, 33, 0, 2, 7)), ("sliding_window", (5, 1, 40, 0, 17)), ("gpt_oss", (5, 1, 40, 0, 17)),
    (BIAS, (7, 33, 0, 2, 20)),
])  # fmt: skip
def test_packed_sequences_equal_the_loop_forward_and_backward(name: str, keys: tuple[int, ...]) -> None:
    queries, generator = (5, 1, 40, 0, 17), torch.Generator().manual_seed(3)
    shapes = (sum(queries), 2, 16), (sum(keys), 1, 16), (sum(keys), 1, 24)
    inputs = [torch.randn(shape, generator=generator).transpose(0, 1)[None] for shape in shapes]
    packing = {"query_ends": ends(*queries), "key_ends": ends(*keys), "longest_query": 40, "longest_key": 40}
    problem = Problem(compiled(with_packing(program_of(name).variant)), *inputs, {**CASES[name], **packing})
    upstream = problem.upstream()
    expected, found = (problem.by(backend, upstream) for backend in ("cpu", "portable"))
    assert found.out.transpose(1, 2).is_contiguous() and found.lse.transpose(1, 2).is_contiguous()
    assert_close(found, expected, 3e-5)
