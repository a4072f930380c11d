"""Emitted text to functions: each text is a file of the cache folder, so that tracebacks and Triton find its lines."""

from __future__ import annotations

import sys
import threading
from types import ModuleType

from attn_dsl.backend import cache

PREFIX = "attn_dsl_emitted_"
_lock = threading.Lock()


def load(source: str, stem: str) -> ModuleType:
    """The module of a source text, imported once a process. `stem`, the variant's name, names the file."""
    digest = cache.digest(source)
    name = f"{PREFIX}{digest[:16]}_{stem}"
    with _lock:
        if name not in sys.modules:
            file = f"{stem}.py"
            entry = cache.find(cache.SOURCES, stem, digest)
            if entry is None:
                entry = cache.put(cache.SOURCES, stem, digest, {file: source.encode()}, {"text": digest})
            module = ModuleType(name, f"Emitted for the attention variant {stem}.")
            module.__file__ = str(entry.files[file])
            sys.modules[name] = module  # Triton looks functions up by the name of their module
            try:
                exec(compile(source, module.__file__, "exec"), vars(module))
            except BaseException:
                del sys.modules[name]
                raise
        return sys.modules[name]
