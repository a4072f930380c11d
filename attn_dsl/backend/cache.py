"""Folders of files that survive the process: emitted sources, compiled kernels, tuning choices, words of the assembler,
hashes of compilers.

    <root>/<kind>/<name>-<digest>/     one entry: its files and `manifest.json`

An entry appears by one rename, complete or not at all, so that any number of processes may write the same one. Before
it is used, it must belong to this user and every file must have the hash that the manifest names; what does not is said
once and made anew. A folder that cannot be written is replaced, for this process, by a private temporary one: that
costs speed, not correctness.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import shutil
import stat
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attn_dsl

MANIFEST = "manifest.json"
SOURCES, KERNELS, TUNING, VERDICTS, COMPILERS = "sources", "kernels", "tuning", "verdicts", "compilers"
_lock = threading.Lock()
_said: set[str] = set()


class CacheWarning(UserWarning):
    """The disk cache is slower than it should be: not writable, damaged, or not this user's."""


@dataclass(frozen=True)
class Entry:
    """A verified entry. `inputs` are what made its key, for people; `files` have absolute paths."""

    kind: str
    path: Path
    key: str
    inputs: Mapping[str, Any]
    files: Mapping[str, Path]
    created: float

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for path in self.files.values())


def folder() -> Path:
    """Where entries are kept: `$ATTN_DSL_CACHE_DIR`, else `attn_dsl` in the XDG cache folder; below it the version."""
    chosen = os.environ.get("ATTN_DSL_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser() / attn_dsl.__version__
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "attn_dsl" / attn_dsl.__version__


def digest(*parts: str) -> str:
    """The key of an entry made from texts, as hexadecimal digits."""
    total = hashlib.sha256()
    for part in parts:
        total.update(f"{len(part)}:{part}".encode())
    return total.hexdigest()


def find(kind: str, name: str, key: str) -> Entry | None:
    """The entry, if it is there and sound. A damaged or foreign one is reported once and counts as absent."""
    for root in _readable():
        path = root / kind / _label(name, key)
        if path.is_dir():
            entry = _checked(kind, path, key)
            if entry is not None:
                return entry
    return None


def put(
    kind: str,
    name: str,
    key: str,
    files: Mapping[str, bytes],
    inputs: Mapping[str, Any],
    *,
    replace: bool = False,
) -> Entry:
    """Store an entry whole and return it; a sound one that is there already stays, unless `replace`.

    Raises OSError only where not even a temporary folder can be written.
    """
    error: OSError | None = None
    for root in _writable():
        try:
            return _commit(root, kind, name, key, files, inputs, replace=replace)
        except OSError as failed:
            error = failed
            if root != _temporary(os.getpid()):
                _say(str(root), f"{root} cannot be written ({failed.strerror}); a temporary folder is used instead")
    raise OSError(f"no folder can be written for the cache; set ATTN_DSL_CACHE_DIR ({error})")


def entries() -> Iterator[Entry]:
    """All sound entries of the folder on disk, by kind and name."""
    root = folder()
    for path in sorted(root.glob("*/*")):
        if path.is_dir() and not path.name.startswith("."):
            entry = _checked(path.parent.name, path, None)
            if entry is not None:
                yield entry


def clear() -> int:
    """Remove every entry of this version from the disk; returns how many there were."""
    root = folder()
    removed = 0
    for kind in (SOURCES, KERNELS, TUNING, VERDICTS, COMPILERS):
        for path in (root / kind).glob("*"):
            removed += not path.name.startswith(".")
            shutil.rmtree(path, ignore_errors=True)
    return removed


# ---------------------------------------------------------------- reading


def _checked(kind: str, path: Path, key: str | None) -> Entry | None:
    """The entry of a folder if owner, key and hashes are right."""
    try:
        _own(path)
        manifest = json.loads(_bytes(path / MANIFEST))
        hashes: dict[str, str] = manifest["files"]
        files = {}
        for name, expected in hashes.items():
            if os.path.basename(name) != name:
                raise ValueError(f"the file name {name!r}")
            if hashlib.sha256(_bytes(path / name)).hexdigest() != expected:
                raise ValueError(f"the contents of {name}")
            files[name] = path / name
        if key is not None and manifest["key"] != key:
            raise ValueError("the key")
        return Entry(kind, path, manifest["key"], manifest["inputs"], files, float(manifest["created"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if path.is_dir():  # gone meanwhile is no damage
            _say(str(path), f"the cache entry {path} is not sound ({error}); it is made anew")
        return None


def _own(path: Path) -> None:
    """Refuse what another user could have written."""
    found = path.lstat()
    if found.st_uid != _user():
        raise ValueError(f"{path.name} belongs to user {found.st_uid}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f"others may write {path.name}")


def _bytes(path: Path) -> bytes:
    _own(path)
    return path.read_bytes()


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


# ---------------------------------------------------------------- writing


def _commit(
    root: Path,
    kind: str,
    name: str,
    key: str,
    files: Mapping[str, bytes],
    inputs: Mapping[str, Any],
    *,
    replace: bool,
) -> Entry:
    (root / kind).mkdir(mode=0o700, exist_ok=True)
    manifest = {
        "key": key,
        "created": time.time(),
        "versions": versions(),
        "inputs": dict(inputs),
        "files": {file: hashlib.sha256(data).hexdigest() for file, data in files.items()},
    }
    stage = Path(tempfile.mkdtemp(prefix=".new-", dir=root / kind))
    try:
        for file, data in {**files, MANIFEST: json.dumps(manifest, indent=1, default=str).encode()}.items():
            path = stage / file
            path.write_bytes(data)
            path.chmod(0o600)
        final = root / kind / _label(name, key)
        for _ in range(3):
            try:
                os.rename(stage, final)
                break
            except OSError:  # another process was first, or what stands there is damaged
                if not final.is_dir():
                    raise
                entry = None if replace else _checked(kind, final, key)
                if entry is not None:
                    return entry
                _discard(final)
        entry = _checked(kind, final, key)
        if entry is None:
            raise OSError(f"{final} does not keep what is written to it")
        return entry
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _discard(path: Path) -> None:
    """Take an entry away by one rename, so that nobody sees it half removed."""
    aside = Path(tempfile.mkdtemp(prefix=".old-", dir=path.parent))
    try:
        os.rename(path, aside / path.name)
    except FileNotFoundError:  # another process was faster
        pass
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"attn-dsl": attn_dsl.__version__, "python": platform.python_version()}
    for package in ("torch", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


# ---------------------------------------------------------------- folders


def _label(name: str, key: str) -> str:
    """A readable folder name: what the entry is for, and enough of its key to be its own."""
    clean = "".join(c if c.isalnum() or c in "._" else "_" for c in name)[:100]
    return f"{clean}-{key[:16].lower()}"


def _readable() -> Iterator[Path]:
    """The folder on disk, and the temporary one if this process had to make it."""
    root = _prepared(folder())
    if root is not None:
        yield root
    if _temporaries.get(os.getpid()) is not None:
        yield _temporary(os.getpid())


def _writable() -> Iterator[Path]:
    root = _prepared(folder())
    if root is not None:
        yield root
    yield _temporary(os.getpid())


@functools.cache
def _prepared(root: Path) -> Path | None:
    """The folder, made and private; None, said once, where it cannot be used."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = root.stat()
        if found.st_uid != _user():
            raise PermissionError(0, f"it belongs to user {found.st_uid}")
        if stat.S_IMODE(found.st_mode) != 0o700:
            root.chmod(0o700)
        return root
    except OSError as error:
        _say(str(root), f"{root} cannot be used ({error.strerror}); kernels are kept in a temporary folder instead")
        return None


_temporaries: dict[int, Path] = {}


def _temporary(process: int) -> Path:
    """A private folder that ends with the process."""
    with _lock:
        if process not in _temporaries:
            try:
                path = Path(tempfile.mkdtemp(prefix="attn_dsl-"))
            except OSError:
                path = Path(tempfile.mkdtemp(prefix="attn_dsl-", dir="/dev/shm"))
            _temporaries[process] = path
            atexit.register(_remove, path, process)
        return _temporaries[process]


def _remove(path: Path, process: int) -> None:
    """At the end of the process that made it, not of one forked from that."""
    if os.getpid() == process:
        shutil.rmtree(path, ignore_errors=True)


def _say(about: str, message: str) -> None:
    """Warn once a process about each thing."""
    with _lock:
        if about in _said:
            return
        _said.add(about)
    warnings.warn(message, CacheWarning, stacklevel=3)
