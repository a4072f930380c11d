"""Where variants are found: the shipped library, and files beside the one that imports.

An import is a bare identifier, so it names no path; symbolic links that lead out of the directory are refused, and so
is whatever is no regular file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from attn_dsl.errors import Diagnostic, Source, Span
from attn_dsl.frontend import hints, limits
from attn_dsl.frontend.scope import Module

SHIPPED = Path(__file__).resolve().parent.parent / "variants"


@lru_cache(maxsize=1)
def shipped() -> tuple[str, ...]:
    """The names of the shipped variants, sorted."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.attn")))


def shipped_path(name: str) -> Path | None:
    """The file of a shipped variant."""
    return SHIPPED / f"{name}.attn" if name in shipped() else None


class Unreadable(Exception):
    """A file that cannot be taken as text; says why."""


def read(path: Path) -> Source:
    """The text of a file; raises `Unreadable` where it is missing, no regular file, too large or not UTF-8."""
    try:
        if not path.is_file():
            raise Unreadable("it is not a file" if path.exists() else "there is no such file")
        with path.open("rb") as file:
            data = file.read(limits.FILE_BYTES + 1)
    except OSError as error:
        raise Unreadable(error.strerror or "it cannot be opened") from None
    except ValueError:
        raise Unreadable("it is not a file name") from None
    if len(data) > limits.FILE_BYTES:
        raise Unreadable(f"it is larger than {limits.FILE_BYTES // 1024} KiB")
    try:
        return Source(str(path), data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Unreadable(f"it is not UTF-8 (byte {error.start})") from None


@dataclass(frozen=True)
class Imports:
    """Finds imports for one file. `chain` is the way from the file that is compiled to this one."""

    check: Callable[[Path, Source, Imports, Callable[[Diagnostic], None]], Module | None]
    directory: Path | None = None
    chain: tuple[tuple[str, Path | None], ...] = ()
    found: dict[Path, Module | None] = field(default_factory=dict)

    def inside(self, module: Module) -> Imports:
        """The same for the imports of an imported variant."""
        link = (module.path.stem, module.path)
        return replace(self, directory=module.path.parent, chain=(*self.chain, link))

    def find(self, name: str, span: Span, report: Callable[[Diagnostic], None]) -> Module | None:
        """The variant of this name; None where it is missing or wrong, which is reported (once)."""
        path = self._locate(name, span, report)
        if path is None:
            return None
        problem = self._problem(name, path)
        if problem is not None:
            report(Diagnostic(problem[0], problem[1], span, "", problem[2]))
            return None
        if path not in self.found:
            self.found[path] = self._load(name, path, span, report)
        return self.found[path]

    def _problem(self, name: str, path: Path) -> tuple[str, str, str] | None:
        steps = [link for _, link in self.chain]
        if path in steps:
            names = [step for step, _ in self.chain[steps.index(path) :]]
            return "E051", f"`{name}` imports itself", " -> ".join([*names, name])
        if len(self.chain) > limits.IMPORT_DEPTH:
            names = [step for step, _ in self.chain]
            return "E065", f"imports are more than {limits.IMPORT_DEPTH} deep", " -> ".join([*names, name])
        if path not in self.found and len(self.found) >= limits.IMPORTED_FILES:
            return "E065", f"more than {limits.IMPORTED_FILES} files are imported", ""
        return None

    def _load(self, name: str, path: Path, span: Span, report: Callable[[Diagnostic], None]) -> Module | None:
        try:
            source = read(path)
        except Unreadable as error:
            report(Diagnostic("E050", f"`{name}` cannot be imported: {error}", span))
            return None
        inner = replace(self, directory=path.parent, chain=(*self.chain, (path.stem, path)))
        return self.check(path, source, inner, report)

    def _locate(self, name: str, span: Span, report: Callable[[Diagnostic], None]) -> Path | None:
        """Beside the importing file, else in the library."""
        if self.directory is not None:
            directory = self.directory.resolve()
            beside = (directory / f"{name}.attn").resolve()
            if beside.exists():
                if beside.parent == directory:
                    return beside
                report(
                    Diagnostic("E050", f"`{name}` leads out of its directory", span, "", "imports stay beside the file")
                )
                return None
        path = shipped_path(name)
        if path is None:
            known = [*shipped(), *self._beside()]
            where = "neither beside this file nor in the library" if self.directory else "not in the library"
            report(Diagnostic("E050", f"no variant `{name}`", span, where, hints.did_you_mean(name, known)))
        return path

    def _beside(self) -> list[str]:
        return [] if self.directory is None else [path.stem for path in sorted(self.directory.glob("*.attn"))[:1000]]
