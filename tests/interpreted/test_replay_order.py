"""Calls in another order that were made before: the same results and gradients, for new tensors too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from portable_support import program_of
from torch import Tensor

from attn_dsl.backend import operators, order, replay
from attn_dsl.backend.execute import Options
from attn_dsl.backend.replay_order import Differentiable, Forward

PORTABLE = Options("portable")
SEGMENTS = """attention segments(window: int = 30)
tensor segment: int32[B, KV]
tensor bias: float32[H, KV]
score = score + bias[h, k] - 0.01 * (q - k)
mask = segment[b, q] == segment[b, k] and q - k < window
"""
SHIFTED = """attention shifted()
tensor segment: int32[B, H, KV]
tensor bias: float32[H, KV]
score = score + bias[h, q]
mask = segment[b, h, q] == segment[b, h, k] and q >= k
"""
DILATED = """attention far(window: int = 20, d: int = 3)
tensor bias: float32[H, KV]
score = score + bias[h, k]
mask = abs(q - k) < window and q % d == k % d
"""


@pytest.fixture(autouse=True)
def _always_reordered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of the short calls of tests no order would pay."""
    monkeypatch.setattr(order, "GAIN", 100.0)
    monkeypatch.setattr(order, "SHORT", 1)
    for text in (SEGMENTS, SHIFTED, DILATED):
        program_of(text).choices.clear()
    yield


def tensors(seed: int, text: str, rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = (4, 2) if text is SEGMENTS else (2, 2)
    made = {name: torch.randn(2, heads[i > 0], rows, 16, generator=generator) for i, name in enumerate(("q", "k", "v"))}
    if text is not DILATED:
        shape = (2, rows) if text is SEGMENTS else (2, heads[0], rows)
        made["segment"] = torch.randint(0, 4, shape, generator=generator, dtype=torch.int32)
    made["bias"] = torch.randn(heads[0], rows, generator=generator)
    for name in ("q", "k", "v", "bias"):
        made[name].requires_grad_()
    return made


def gradients(out: Tensor, lse: Tensor, made: dict[str, Tensor], with_lse: bool) -> list[Tensor]:
    wanted = [x for x in made.values() if x.requires_grad]
    generator = torch.Generator().manual_seed(9)
    upstream = [torch.randn(x.shape, generator=generator) for x in (out, lse)]
    results = (out, lse) if with_lse else (out,)
    return [out, lse, *torch.autograd.grad(results, wanted, upstream[: len(results)])]


@pytest.mark.parametrize(
    ("text", "rows", "with_lse"),
    [(SEGMENTS, 45, False), (SHIFTED, 40, True), (DILATED, 48, False), (DILATED, 50, True)],
    ids=["groups", "rows", "whole", "ragged"],
)
def test_repeated_calls_have_the_results_and_gradients_of_the_first(text: str, rows: int, with_lse: bool) -> None:
    program = program_of(text)
    names = program.tensor_names

    def bound(made: dict[str, Tensor]) -> Any:
        return program.binder.bind(made["q"], made["k"], made["v"], None, 0, {name: made[name] for name in names})

    first = bound(tensors(0, text, rows))
    forward = replay._forward(program, first, PORTABLE)
    assert isinstance(forward, Forward)
    repeated = replay.Differentiable.of(program, first, PORTABLE, forward)
    assert isinstance(repeated, Differentiable)
    for seed in (0, 1):
        made = tensors(seed, text, rows)
        given = made["q"], made["k"], made["v"], [made[name] for name in names], 0
        wanted = gradients(*operators.attention(program, bound(made), PORTABLE), made, with_lse)
        found = gradients(*repeated.run(*given), made, with_lse)
        plain = forward.run(*given)
        for x, y in zip((*found, *plain), (*wanted, *wanted[:2]), strict=True):
            assert torch.allclose(x, y, atol=2e-5), (x - y).abs().max()


def saved(call: Any) -> list[tuple[torch.Size, torch.dtype]]:
    found: list[tuple[torch.Size, torch.dtype]] = []

    def pack(x: Tensor) -> Tensor:
        found.append((x.shape, x.dtype))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return found


@pytest.mark.parametrize(("text", "rows"), [(SEGMENTS, 45), (SHIFTED, 40), (DILATED, 50)])
def test_as_much_is_saved_as_by_the_first_call(text: str, rows: int) -> None:
    program, made = program_of(text), tensors(0, text, rows)
    names = program.tensor_names
    call = program.binder.bind(made["q"], made["k"], made["v"], None, 0, {name: made[name] for name in names})
    repeated = replay.Differentiable.of(program, call, PORTABLE, replay._forward(program, call, PORTABLE))
    assert repeated is not None
    again = saved(lambda: repeated.run(made["q"], made["k"], made["v"], [made[name] for name in names], 0))
    assert again == saved(lambda: operators.attention(program, call, PORTABLE))


def test_a_sort_that_changed_since_is_an_error_of_the_backward_pass() -> None:
    program, made = program_of(SHIFTED), tensors(0, SHIFTED, 40)
    names = program.tensor_names
    call = program.binder.bind(made["q"], made["k"], made["v"], None, 0, {name: made[name] for name in names})
    repeated = replay.Differentiable.of(program, call, PORTABLE, replay._forward(program, call, PORTABLE))
    assert repeated is not None
    out, _ = repeated.run(made["q"], made["k"], made["v"], [made[name] for name in names], 0)
    made["segment"][0, 0, 0] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), made["q"])


@pytest.mark.parametrize("text", [SHIFTED, DILATED])
def test_a_second_derivative_is_refused_not_lost(text: str) -> None:
    program, made = program_of(text), tensors(0, text, 40)
    names = program.tensor_names
    call = program.binder.bind(made["q"], made["k"], made["v"], None, 0, {name: made[name] for name in names})
    repeated = replay.Differentiable.of(program, call, PORTABLE, replay._forward(program, call, PORTABLE))
    assert repeated is not None
    out, _ = repeated.run(made["q"], made["k"], made["v"], [made[name] for name in names], 0)
    plain = torch.autograd.grad(out.sum(), made["q"], retain_graph=True)[0]
    (recorded,) = torch.autograd.grad(out.sum(), made["q"], create_graph=True)
    assert torch.equal(recorded, plain)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(recorded.sum(), made["q"])
