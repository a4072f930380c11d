"""The Hopper kernels, and those around them, on tensors of the CPU: launches go to the interpreter of Gluon."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gluon_interpreter import Machine
from triton.runtime.jit import JITFunction

MULTIPROCESSORS = 3
"""So few that programs take several tiles, and take them from each other."""


def take_over(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    """Let calls that ask for the backend `hopper` or `portable` run on a machine, with first configurations.

    What the backward kernels hand on to each other is NaN, or -1, before it is written.
    """
    from attn_dsl.backend import gpu
    from attn_dsl.backend.hopper import check, launch, launch_backward
    from attn_dsl.backend.portable import launch as portable

    def run(kernel: JITFunction[Any], *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
        if warmup:
            return SimpleNamespace(hash="", asm={"ptx": ""})
        return machine.run(kernel, grid[0], arguments, options)

    def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, float("nan") if dtype.is_floating_point else -1, dtype=dtype, device=device)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(launch_backward, "empty", poisoned)
    monkeypatch.setattr(gpu, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(check, "inspected", lambda name, kernel: check.Build(0, (), ()))
    monkeypatch.setattr(portable, "capability_of", lambda device: (9, 0))
    for module in (launch, launch_backward):
        monkeypatch.setattr(module, "multiprocessors", lambda device: MULTIPROCESSORS)
        monkeypatch.setattr(module, "compile_here", lambda *given: None)
