"""`load`: from a path, a name or a text to a checked `Variant`."""

from __future__ import annotations

import re
from pathlib import Path

from attn_dsl.errors import BindingError, CompileError, Diagnostic, Source, Span
from attn_dsl.frontend import hints, limits
from attn_dsl.frontend.checker import check_module, check_source
from attn_dsl.frontend.library import Imports, Unreadable, read, shipped, shipped_path
from attn_dsl.ir.variant import Variant

_TEXT = re.compile(r"\s*attention(\s|;|$)|.*\n", re.DOTALL)


def load(source: str | Path | Source) -> Variant:
    """The variant of a path ending in `.attn`, of the name of a shipped variant, or of a text.

    Raises `CompileError` with every error of the text, or with the one reason why there is no text.
    """
    found = source if isinstance(source, Source) else locate(source)
    diagnostics: list[Diagnostic] = []
    variant: Variant | None = None
    size = len(found.text.encode("utf-8", "surrogatepass"))
    if size > limits.FILE_BYTES:
        label = f"{size} bytes; at most {limits.FILE_BYTES}"
        diagnostics.append(Diagnostic("E060", "the text is too long", Span(found, 0, 0), label))
    else:
        directory, path = _place(found)
        imports = Imports(check_module, directory, ((path.stem if path else found.name, path),))
        variant = check_source(found, imports, diagnostics.append)
    if diagnostics or variant is None:
        raise CompileError(_in_order(found, diagnostics))
    return variant


def locate(source: str | Path) -> Source:
    """The text that `load` would compile; raises `CompileError` where there is none, BindingError for what is no
    path, name or text."""
    if not isinstance(source, str | Path):
        raise BindingError(f"`source`: expected a path, a name or a text, got {type(source).__name__}")
    if isinstance(source, Path) or (source.endswith(".attn") and not _TEXT.match(source)):
        return _read(Path(source), str(source))
    if not source.strip() or _TEXT.match(source) or any(mark in source for mark in "=;#"):
        return Source("<text>", source)
    path = shipped_path(source)
    if path is None:
        help = hints.did_you_mean(source, shipped()) or "a path ends in `.attn`; a text begins with `attention`"
        raise CompileError([Diagnostic("E000", f"no shipped variant `{source[:80]}`", _nowhere(source), "", help)])
    return _read(path, source)


def _read(path: Path, name: str) -> Source:
    try:
        return read(path)
    except Unreadable as error:
        beside = shipped()
        if path.parent.is_dir():
            beside = (*beside, *(other.stem for other in sorted(path.parent.glob("*.attn"))[:1000]))
        help = hints.did_you_mean(path.stem, beside)
        raise CompileError([Diagnostic("E000", f"cannot read `{name}`: {error}", _nowhere(name), "", help)]) from None


def _nowhere(name: str) -> Span:
    return Span(Source(name, ""), 0, 0)


def _place(source: Source) -> tuple[Path | None, Path | None]:
    """The directory whose variants a text may import, and its own path."""
    if not source.name.endswith(".attn"):
        return None, None
    path = Path(source.name)
    return (path.resolve().parent, path.resolve()) if path.is_file() else (None, None)


def _in_order(source: Source, diagnostics: list[Diagnostic]) -> list[Diagnostic]:
    """In order of place, those of the text itself first, none twice, and not more than one can read."""
    unique = list(dict.fromkeys(diagnostics))
    names = list(dict.fromkeys([source.name, *(d.span.source.name for d in unique)]))
    unique.sort(key=lambda d: (names.index(d.span.source.name), d.span.start, d.span.end))
    if len(unique) <= limits.DIAGNOSTICS:
        return unique
    kept = unique[: limits.DIAGNOSTICS]
    rest = f"{len(unique) - len(kept)} more errors are not shown"
    return [*kept, Diagnostic("E067", rest, kept[-1].span, "", "repair these first")]
