"""Triton's compiler writes into this package's cache while it compiles this package's kernels, and only then.

Triton asks one class of the process for its cache. Inside `compiling(...)` that is a switch: the thread that compiles
for this package gets `KernelCache`, every other thread gets what Triton would have given it. Outside, nothing changes.

Triton's key of a kernel begins with a hash over Triton itself, half a gigabyte, which takes longer than everything else
in a process that finds its kernels. That hash is remembered for the files by their names, sizes and times.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.runtime import cache as triton_cache
from triton.runtime.cache import CacheManager, FileCacheManager

from attn_dsl.backend import cache

Inputs = Callable[[], Mapping[str, Any]]
"""What a kernel is compiled from, for `attn-dsl cache why`; asked only when something is stored."""

LAUNCHER = "__triton_launcher"
_here = threading.local()
_lock = threading.Lock()
_inside = 0
_before: list[Any] = []


@contextlib.contextmanager
def compiling(name: str, inputs: Inputs) -> Iterator[None]:
    """What this thread compiles in the block is cached under `name`, the variant's."""
    outer = getattr(_here, "job", None)
    _here.job = (name, inputs)
    _switch(+1)
    try:
        yield
    finally:
        _switch(-1)
        _here.job = outer


def _switch(step: int) -> None:
    """The first block of the process to begin puts the switch in; the last to end restores what was there."""
    global _inside
    with _lock:
        if _inside == 0:
            _before[:] = [vars(knobs.cache).get("manager_class")] if "manager_class" in vars(knobs.cache) else []
            knobs.cache.manager_class = _manager
            if _hash_of_triton is not None:
                triton_cache.triton_key = _remembered_key
        _inside += step
        if _inside == 0:
            del knobs.cache.manager_class
            if _before:
                knobs.cache.manager_class = _before[0]
            if _hash_of_triton is not None:
                triton_cache.triton_key = _hash_of_triton


# ---------------------------------------------------------------- the hash of Triton

_hash_of_triton: Callable[[], str] | None = getattr(triton_cache, "triton_key", None)
"""Triton's own; some releases have it elsewhere, and then go without a memory."""


@functools.cache
def _remembered_key() -> str:
    """What `triton_key` returns, from the disk where it was computed for the same files."""
    assert _hash_of_triton is not None
    key = cache.digest(triton.__version__, *_files_of_triton())
    entry = cache.find(cache.COMPILERS, "triton", key)
    if entry is not None:
        return entry.files["key"].read_text()
    found = _hash_of_triton()
    cache.put(cache.COMPILERS, "triton", key, {"key": found.encode()}, {"version": triton.__version__})
    return found


def _files_of_triton() -> Iterator[str]:
    """Path, size and times of each file that the compiler consists of."""
    root = Path(triton.__file__).parent
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(files):
            path = os.path.join(folder, name)
            about = os.stat(path)
            yield f"{path} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns} {about.st_ino}"


def _manager(key: str, override: bool = False, dump: bool = False) -> Any:
    """Triton's `manager_class(key, ...)`."""
    job = getattr(_here, "job", None)
    if job is not None and not (override or dump):
        return KernelCache(key, *job)
    return _theirs()(key, override=override, dump=dump)


def _theirs() -> Any:
    """The class that Triton would use without this module."""
    with _lock:
        found = _before[0] if _before else type(knobs.cache).__dict__["manager_class"].get()
    return found or FileCacheManager


class KernelCache(CacheManager):  # type: ignore[misc]
    """One key of Triton's: a compiled kernel, which is a group of files, or the launcher of one, a native module.

    A group is collected until `put_group`, which stores it whole. Modules that are no launcher are Triton's own.
    """

    def __init__(self, key: str, name: str, inputs: Inputs) -> None:
        self.key, self.name, self.inputs = key, name, inputs
        self.group: dict[str, bytes] | None = None
        self.found = False

    def get_group(self, filename: str) -> dict[str, str] | None:
        self.group = {}
        self.name = f"{self.name}.{filename.removesuffix('.json')}"
        entry = cache.find(cache.KERNELS, self.name, self.key)
        return None if entry is None else {file: str(path) for file, path in entry.files.items()}

    def put_group(self, filename: str, group: dict[str, str]) -> None:
        """Store what was put; `group` gets the paths, which Triton reads from it."""
        assert self.group is not None
        metadata = json.loads(self.group[filename])
        inputs = {**self.inputs(), "target": metadata.get("target"), "triton": metadata.get("triton_version")}
        entry = cache.put(cache.KERNELS, self.name, self.key, self.group, inputs)
        group.update({file: str(path) for file, path in entry.files.items()})

    def get_file(self, filename: str) -> str | None:
        if not filename.startswith(LAUNCHER):
            path: str | None = _theirs()(self.key).get_file(filename)
            return path
        entry = cache.find(cache.KERNELS, LAUNCHER, self.key)
        self.found = entry is not None
        return None if entry is None else str(entry.files[filename])

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        encoded = data if isinstance(data, bytes) else str(data).encode()
        if self.group is not None:
            self.group[filename] = encoded
            return filename  # no path yet: `put_group` gives it
        if not filename.startswith(LAUNCHER):
            return str(_theirs()(self.key).put(data, filename, binary=binary))
        # What was found and is written all the same did not load.
        inputs = {"file": filename}
        entry = cache.put(cache.KERNELS, LAUNCHER, self.key, {filename: encoded}, inputs, replace=self.found)
        return str(entry.files[filename])
