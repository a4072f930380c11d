"""Triton's interpreter, made quicker for tests.

It replaces the functions of `triton.language` for each launch, and again for each call of a device function within it,
which takes most of its time. Once for each launch does.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_replace = interpreter._patch_lang
_EVERYTHING = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
"""Stands for a function that knows both modules, as the language's own functions know `core`."""
_launched = False


class _Launch:
    """What a launch restores at its end."""

    def __init__(self) -> None:
        self.scope = _replace(_EVERYTHING)

    def restore(self) -> None:
        global _launched
        _launched = False
        self.scope.restore()


def _replace_once(function: Any) -> _Launch | None:
    """For a launch, which comes first, what it restores; nothing for what it calls."""
    global _launched
    if _launched:
        return None
    launch = _Launch()
    _launched = True
    return launch


def replace_once_for_each_launch() -> None:
    interpreter._patch_lang = _replace_once
