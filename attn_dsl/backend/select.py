"""Which backend runs a call. There is no fallback: a call runs where its tensors are, or says why it cannot."""

from __future__ import annotations

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
    raise BindingError(f"`query`: expected a tensor on a device with a backend (cpu), got one on {device}")


def options(device: torch.device) -> Options:
    """What the operators are told to run for tensors of a device. Raises BindingError where there is no backend."""
    found = _OPTIONS.get(device.type)
    if found is None:
        raise BindingError(f"`query`: expected a tensor on a device with a backend (cpu, cuda), got one on {device}")
    return found


_OPTIONS = {"cpu": Options("cpu"), "cuda": Options("portable")}
