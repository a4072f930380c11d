"""Calls on tensors without data, a compiler and an assembler that are made up: for what is decided without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from portable_support import program_of
from torch import Tensor

from attn_dsl.backend.execute import Program
from attn_dsl.backend.hopper import check

HOPPER = (9, 0)
GOOD = check.Build(0, (), ())


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def fresh(text: str) -> Program:
    """A program for which nothing was decided yet."""
    known = program_of(text)
    return Program(known.variant, known._proof)


def compiler() -> tuple[list[int], Callable[..., Any]]:
    """Makes kernels that the fixture `says` knows by their number; the list grows with each."""
    made: list[int] = []

    def compile(kernel: Any, arguments: tuple[Any, ...], chosen: Mapping[str, Any]) -> Any:
        made.append(len(made))
        return SimpleNamespace(hash=f"kernel {len(made)}", asm={"ptx": str(len(made) - 1)})

    return made, compile
