"""The disk cache for people: what is in it, and what made a key, so that a recompile can be explained."""

from __future__ import annotations

import time
from collections.abc import Sequence

from attn_dsl.backend.cache import Entry, folder


def listing(entries: Sequence[Entry]) -> str:
    """One line for each entry: kind, name, size, age; then the sum."""
    width = max((len(entry.path.name) for entry in entries), default=0)
    lines = [
        f"{e.kind:8} {e.path.name:{width}} {e.size / 1024:9.1f} KiB  {_age(time.time() - e.created)}" for e in entries
    ]
    total = sum(entry.size for entry in entries) / 2**20
    return "\n".join([*lines, f"{len(entries)} entries, {total:.1f} MiB in {folder()}"]) + "\n"


def why(entries: Sequence[Entry], key: str) -> str | None:
    """What made the key of the entry that `key` names, and how its nearest relative differs; None if there is none."""
    found = [entry for entry in entries if entry.path.name.startswith(key) or entry.key.lower().startswith(key.lower())]
    if not found:
        return None
    return "\n".join(_explained(entry, entries) for entry in found)


def _explained(entry: Entry, entries: Sequence[Entry]) -> str:
    width = max((len(name) for name in entry.inputs), default=0)
    lines = [f"{entry.path.name}, made from"]
    lines += [f"  {name:{width}}  {value}" for name, value in entry.inputs.items()]
    stem = entry.path.name.rpartition("-")[0]
    others = [
        e for e in entries if e.path != entry.path and e.kind == entry.kind and e.path.name.rpartition("-")[0] == stem
    ]
    if others:
        nearest = min(others, key=lambda other: len(_differences(other, entry)))
        lines.append(f"differs from {nearest.path.name} in")
        lines += [f"  {line}" for line in _differences(nearest, entry)] or ["  nothing that is written down"]
    return "\n".join(lines) + "\n"


def _differences(old: Entry, new: Entry) -> list[str]:
    names = dict.fromkeys((*old.inputs, *new.inputs))
    pairs = ((name, old.inputs.get(name), new.inputs.get(name)) for name in names)
    return [f"{name}: {before} there, {after} here" for name, before, after in pairs if before != after]


def _age(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return "now"
