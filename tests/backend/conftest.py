"""Fixtures that several tests of kernels share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_DSL_CACHE_DIR", str(tmp_path))


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what the assembler says of the kernels that `hopper_support.compiler` makes, in order, the last
    of all that follow."""
    from attn_dsl.backend.hopper import check

    def set_builds(*builds: check.Build) -> None:
        monkeypatch.setattr(check, "inspect", lambda ptx: builds[min(int(ptx), len(builds) - 1)])

    return set_builds
