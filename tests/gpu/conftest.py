"""Many workers share a machine: `pytest -m gpu -n 12`, since compiling takes most of the time, each with one thread."""

from __future__ import annotations

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
