"""The examples run, in small, and find what they promise."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_dsl

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), "--threads", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_what_is_served_from_pages_is_what_the_unbatched_model_says() -> None:
    """With so few pages that some request has to give its own up and start again."""
    said = run(
        "serve_lm.py", "--steps", "2", "--length", "64", "--width", "32", "--heads", "2", "--layers", "2", "--window",
        "24", "--requests", "6", "--prompt", "40", "--answer", "40", "--batch", "4", "--pages", "10",
    )  # fmt: skip
    assert "6 of 6 answers are the same; 0 pages are left behind" in said and re.search(r"[1-9]\d*\s+restarts", said)


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="transformers needs Python 3.11")
def test_a_llama_generates_what_it_does_on_sdpa() -> None:
    assert "3 of 3 are the same" in run("transformers_llama.py", "--batch", "3", "--tokens", "8", "--width", "64")


def dense(score: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    return torch.where(mask, score, -math.inf).softmax(-1) @ value


def swin(q: Tensor, k: Tensor, score: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """As the paper's code does it: the image is rolled and cut, and what were no neighbors before is masked."""
    y, x = torch.arange(8)[:, None], torch.arange(12)
    border_y, border_x = (y >= 4).int() + (y >= 6).int(), (x >= 8).int() + (x >= 10).int()
    cut = (y // 4 * 3 + x // 4) * 9 + border_y * 3 + border_x
    place = torch.roll(cut, (2, 2), (0, 1)).flatten()
    bias = table[:, (q // 12 - k // 12).clamp(-3, 3) + 3, (q % 12 - k % 12).clamp(-3, 3) + 3]
    return score + bias, place[:, None] == place


def forgetting(q: Tensor, k: Tensor, score: Tensor, log_gates: Tensor) -> tuple[Tensor, Tensor]:
    return score + log_gates[..., None] - log_gates[..., None, :], q >= k


def fire(q: Tensor, k: Tensor, score: Tensor, first: Tensor, shift: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    near = torch.log1p(0.1 * (q - k).double().clamp(min=0)) / torch.log1p(0.1 * q.double().clamp(min=64))
    hidden = torch.relu(near[..., None] * first + shift)
    return score + torch.einsum("qki,hi->hqk", hidden, second), q >= k


TEXTS: list[tuple[Callable[..., tuple[Tensor, Tensor]], dict[str, Any], dict[str, tuple[int, ...]]]] = [
    (swin, {"width": 12, "m": 4, "shift": 2}, {"table": (3, 7, 7)}),
    (forgetting, {}, {"log_gates": (2, 3, 96)}),
    (fire, {"hidden": 8}, {"first": (8,), "shift": (8,), "second": (3, 8)}),
]


@pytest.mark.parametrize(("definition", "numbers", "shapes"), TEXTS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_text_is_its_definition_with_gradients(
    definition: Callable[..., tuple[Tensor, Tensor]], numbers: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> None:
    make = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(shape, generator=make, dtype=torch.float32).double().requires_grad_()
        for shape in ((2, 3, 96, 8), (2, 3, 96, 8), (2, 3, 96, 8), *shapes.values())
    ]
    query, key, value, *captured = leaves
    attend = attn_dsl.compile(EXAMPLES / f"{definition.__name__}.attn", **numbers)
    tensors = {name: x.float() for name, x in zip(shapes, captured, strict=True)}
    q, k = torch.arange(96)[:, None], torch.arange(96)
    found = attend(query, key, value, **tensors)
    score, mask = definition(q, k, query @ key.mT / math.sqrt(8), *captured)
    expected = dense(score, mask, value)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(expected.shape, generator=make, dtype=torch.float64)
    grads = (torch.autograd.grad(out, leaves, upstream) for out in (found, expected))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
