"""Which backend runs a call. There is no fallback: a call runs where its tensors are, or says why it cannot."""

from __future__ import annotations

import itertools
from typing import Protocol

import torch

from attn_dsl.backend.binding import Call
from attn_dsl.backend.execute import Options
from attn_dsl.errors import BindingError
from attn_dsl.passes.pipeline import Program


class Backend(Protocol):
    """What a backend offers; a module with these names is one. Programs have gone through the pass `schedule`."""

    @property
    def name(self) -> str: ...

    def explain(self, program: Program, call: Call) -> str:
        """Which tiles the call visits and why."""

    def source(self, program: Program, dtype: torch.dtype) -> str:
        """The emitted text."""


def select(device: torch.device) -> Backend:
    """The backend for tensors of a device. Raises BindingError where there is none."""
    if device.type == "cpu":
        from attn_dsl.backend.cpu import backend

        return backend
    if device.type == "cuda":
        from attn_dsl.backend import gpu

        return gpu
    raise BindingError(f"`query`: expected a tensor on a device with a backend (cpu, cuda), got one on {device}")


def options(
    device: torch.device, deterministic: bool | None = None, precise: bool = False, float32_precision: str = "ieee"
) -> Options:
    """What the operators are told to run for tensors of a device. Raises BindingError where there is no backend.

    `deterministic` is what `torch.use_deterministic_algorithms` says unless given.
    """
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    backend = _BACKENDS.get(device.type)
    if backend is None:
        raise BindingError(f"`query`: expected a tensor on a device with a backend (cpu, cuda), got one on {device}")
    if isinstance(precise, bool) and isinstance(deterministic, bool) and isinstance(float32_precision, str):
        found = _OPTIONS.get((backend, precise, deterministic, float32_precision))
        if found is not None:
            return found
    if float32_precision not in ("ieee", "tf32"):
        raise BindingError(f"`float32_precision`: expected ieee or tf32, got {float32_precision!r}")
    raise BindingError(f"`deterministic`, `precise`: expected bools, got {deterministic!r}, {precise!r}")


_BACKENDS = {"cpu": "cpu", "cuda": "gpu"}
_OPTIONS = {  # made here, so that a trace meets constants
    choice: Options(*choice)
    for choice in itertools.product(("cpu", "gpu"), (False, True), (False, True), ("ieee", "tf32"))
}
