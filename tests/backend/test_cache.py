"""The disk cache: whole entries, checked before use, shared by any number of processes, not needed for correctness."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from attn_dsl.backend import cache

KEY = cache.digest("a text", "another")
FILES = {"a.py": b"x = 1\n", "b.bin": bytes(range(256))}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTN_DSL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_said", set())
    monkeypatch.setattr(cache, "_temporaries", {})
    return cache.folder()


def store() -> cache.Entry:
    return cache.put(cache.SOURCES, "causal", KEY, FILES, {"text": "a text"})


def test_what_is_put_is_found(folder: Path) -> None:
    assert cache.find(cache.SOURCES, "causal", KEY) is None
    store()
    entry = cache.find(cache.SOURCES, "causal", KEY)
    assert entry is not None and entry.inputs == {"text": "a text"} and entry.size == 262
    assert {name: path.read_bytes() for name, path in entry.files.items()} == FILES
    assert entry.path.parent == folder / "sources" and entry.path.name.startswith("causal-")


def test_the_folder_is_chosen_by_environment_and_has_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import attn_dsl

    monkeypatch.delenv("ATTN_DSL_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.folder() == Path("/xdg/attn_dsl") / attn_dsl.__version__
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path.home() / ".cache" / "attn_dsl" / attn_dsl.__version__


def test_folder_and_files_are_private(folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o755)
    entry = store()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in entry.files.values())


def damage_contents(entry: cache.Entry) -> None:
    entry.files["b.bin"].write_bytes(b"something else")


def damage_half_written(entry: cache.Entry) -> None:
    (entry.path / cache.MANIFEST).write_text('{"key": "')


def damage_missing(entry: cache.Entry) -> None:
    entry.files["a.py"].unlink()


def damage_escape(entry: cache.Entry) -> None:
    manifest = json.loads((entry.path / cache.MANIFEST).read_text())
    manifest["files"] = {"../../../etc/passwd": "0"}
    (entry.path / cache.MANIFEST).write_text(json.dumps(manifest))


def damage_mode(entry: cache.Entry) -> None:
    entry.files["a.py"].chmod(0o666)


def damage_owner(entry: cache.Entry) -> None:
    if os.getuid() != 0:
        pytest.skip("only root gives files away")
    os.chown(entry.files["a.py"], 12345, 12345)


def damage_link(entry: cache.Entry) -> None:
    target = entry.path.parent / "elsewhere"
    entry.path.rename(target)
    entry.path.symlink_to(target)
    target.chmod(0o777)
    (target / "a.py").chmod(0o666)


DAMAGES = (damage_contents, damage_half_written, damage_missing, damage_escape, damage_mode, damage_owner, damage_link)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_said_once_and_made_anew(damage) -> None:  # type: ignore[no-untyped-def]
    damage(store())
    with pytest.warns(cache.CacheWarning, match="not sound"):
        assert cache.find(cache.SOURCES, "causal", KEY) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.find(cache.SOURCES, "causal", KEY) is None
        store()
        entry = cache.find(cache.SOURCES, "causal", KEY)
    assert entry is not None and entry.files["b.bin"].read_bytes() == FILES["b.bin"]


def test_an_entry_under_another_key_is_not_taken(folder: Path) -> None:
    entry = store()
    other = KEY[:16] + "f" * 48
    with pytest.warns(cache.CacheWarning, match="the key"):
        assert cache.find(cache.SOURCES, "causal", other) is None
    assert entry.path.is_dir()


def test_a_folder_that_cannot_be_used_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder can be made below a file")
    monkeypatch.setenv("ATTN_DSL_CACHE_DIR", str(blocked))
    with pytest.warns(cache.CacheWarning, match="temporary folder"):
        store()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entry = cache.find(cache.SOURCES, "causal", KEY)
    assert entry is not None and entry.files["a.py"].read_bytes() == FILES["a.py"]


def test_a_full_disk_costs_one_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if folder in path.parents:
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(cache.CacheWarning, match="No space left"):
        store()
    assert cache.find(cache.SOURCES, "causal", KEY) is not None
    assert not list((folder / "sources").iterdir()), "nothing half written stays"


WRITER = """
import sys, warnings
warnings.simplefilter("error")
from attn_dsl.backend import cache
for turn in range(20):
    key = cache.digest(str(turn))
    data = key.encode() * 5000
    found = cache.find("sources", "shared", key)
    if found is None:
        found = cache.put("sources", "shared", key, {"a.txt": data, "b.txt": data[::-1]}, {})
    assert found.files["a.txt"].read_bytes() == data and found.files["b.txt"].read_bytes() == data[::-1]
"""


def test_several_processes_write_the_same_entries(folder: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", WRITER], stderr=subprocess.PIPE) for _ in range(4)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    assert len(list(cache.entries())) == 20
    assert not [path for path in (folder / "sources").iterdir() if path.name.startswith(".")]


def test_several_threads_write_the_same_entry() -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                assert store().files["a.py"].read_bytes() == FILES["a.py"]
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_clear_removes_everything_of_this_version(folder: Path) -> None:
    store()
    (folder / "sources" / ".new-left-by-a-crash").mkdir()
    assert cache.clear() == 1
    assert not list(cache.entries()) and not list((folder / "sources").iterdir())
