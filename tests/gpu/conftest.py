"""Many workers share a machine: `pytest -m gpu -n 12`, since compiling takes most of the time, each with one thread."""

from __future__ import annotations

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture
def one_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first backward call of a kind compiles the kernel that it runs, not also that for keys of another length."""
    launch_backward = pytest.importorskip("attn_dsl.backend.hopper.launch_backward")
    monkeypatch.setattr(launch_backward, "_of_other_length", lambda call: call)
