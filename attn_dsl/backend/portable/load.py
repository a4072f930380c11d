"""Emitted text to functions: each text is a file of the cache folder, so that tracebacks and Triton find its lines."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
import threading
from pathlib import Path
from types import ModuleType

_lock = threading.Lock()


def folder() -> Path:
    """`$ATTN_DSL_CACHE_DIR`, else `attn_dsl` in the XDG cache folder; private to the user."""
    chosen = os.environ.get("ATTN_DSL_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attn_dsl"


def load(source: str, stem: str) -> ModuleType:
    """The module of a source text, imported once a process. A folder that cannot be written is replaced by a private
    temporary one: the text is small, and what matters is that it has a file."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    name = f"attn_dsl_emitted_{stem}_{digest}"
    with _lock:
        if name not in sys.modules:
            path = _write(source, f"{stem}_{digest}.py")
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[name]
                raise
        return sys.modules[name]


def _write(source: str, name: str) -> Path:
    for base in (folder() / "source", Path(tempfile.gettempdir()) / f"attn_dsl_{os.getuid()}"):
        try:
            base.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = base / name
            if _read(path) != source:  # written anew where it is missing or damaged
                with tempfile.NamedTemporaryFile("w", dir=base, suffix=".tmp", delete=False) as file:
                    file.write(source)
                os.replace(file.name, path)
            return path
        except OSError:
            continue
    raise OSError("no folder can be written for emitted source; set ATTN_DSL_CACHE_DIR")


def _read(path: Path) -> str | None:
    try:
        return path.read_text() if path.stat().st_uid == os.getuid() else None
    except (OSError, UnicodeDecodeError):
        return None
