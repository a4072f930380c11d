"""Kernels that run without a GPU, in Triton's interpreter."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("the tests in `interpreted` run in Triton's interpreter: TRITON_INTERPRET=1 pytest")
