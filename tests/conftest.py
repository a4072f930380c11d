"""Options of the test suite."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# On CI the same examples every time: what fails there fails here. Elsewhere every run looks at new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
OF_INTERPRETER = Path(__file__).parent / "interpreted"

if INTERPRETING:
    from interpreter_support import replace_once_for_each_launch

    replace_once_for_each_launch()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """A process has Triton's interpreter or its compiler: one takes the tests in `interpreted`, the other the rest."""
    inside = OF_INTERPRETER in (collection_path, *collection_path.parents)
    return ((inside or collection_path.is_file()) and inside != INTERPRETING) or None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite expected output instead of comparing with it"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests on a GPU are handed out by what they compile."""
    if config.option.markexpr != "gpu":
        return None
    from gpu_scopes import ByKernels

    return ByKernels(config, log)
