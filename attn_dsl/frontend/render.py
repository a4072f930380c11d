"""Diagnostics as text, for people.

    error[E012]: `doc` has 2 axes but is indexed with 1
      --> packed_causal.attn:4:19
       |
     4 | mask = q >= k and doc[q] == doc[b, k]
       |                   ^^^^^^ expected doc[b, q]
       = help: `doc` is declared int32[B, KV] on line 3

Carets stand below their text whatever its width: tabs become spaces, wide characters count two columns, combining and
invisible ones none. A long line is clipped around the caret.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from attn_dsl.errors import Diagnostic

TAB = 4
WIDTH = 110
"""Columns of the source line that are shown."""

_RED, _BLUE, _BOLD, _OFF = "\x1b[1;31m", "\x1b[1;34m", "\x1b[1m", "\x1b[0m"


def render(diagnostics: Sequence[Diagnostic], color: bool = False) -> str:
    """All diagnostics, separated by blank lines, and a count where there is more than one."""
    blocks = [_render(diagnostic, color) for diagnostic in diagnostics]
    if len(blocks) > 1:
        blocks.append(_paint(f"{len(blocks)} errors", _BOLD, color))
    return "\n\n".join(blocks)


def _render(diagnostic: Diagnostic, color: bool) -> str:
    span = diagnostic.span
    title = _paint(f"error[{diagnostic.code}]", _RED, color) + _paint(f": {_clean(diagnostic.message)}", _BOLD, color)
    if not span.source.text:
        lines = [title, f"{_paint('  -->', _BLUE, color)} {_clean(span.source.name)}"]
        return "\n".join(lines + _notes(diagnostic, " ", color))
    number = str(span.line)
    gutter = " " * len(number)
    bar = _paint("|", _BLUE, color)
    text, column, width = _excerpt(diagnostic)
    label = f" {_clean(diagnostic.label)}" if diagnostic.label else ""
    lines = [
        title,
        f"{gutter} {_paint('-->', _BLUE, color)} {_clean(str(span))}",
        f" {gutter} {bar}",
        f" {_paint(number, _BLUE, color)} {bar} {text}".rstrip(),
        f" {gutter} {bar} {' ' * column}{_paint('^' * width + label, _RED, color)}",
    ]
    return "\n".join(lines + _notes(diagnostic, gutter, color))


def _notes(diagnostic: Diagnostic, gutter: str, color: bool) -> list[str]:
    if not diagnostic.help:
        return []
    return [f" {gutter} {_paint('=', _BLUE, color)} {_paint('help', _BOLD, color)}: {_clean(diagnostic.help)}"]


def _excerpt(diagnostic: Diagnostic) -> tuple[str, int, int]:
    """The line of the span as shown, the column of its caret and the caret's width."""
    span = diagnostic.span
    source = span.source.text
    begin = source.rfind("\n", 0, span.start) + 1
    end = source.find("\n", span.start)
    line = source[begin : end if end >= 0 else len(source)].rstrip("\r")
    start = min(span.start - begin, len(line))
    stop = max(start, min(span.end - begin, len(line)))
    # Only what can be shown is measured: a line may be as long as the file.
    first = max(0, start - WIDTH)
    cells = [_cell(c) for c in line[first : start + WIDTH]]
    column = _width(cells[: start - first])
    caret = max(1, _width(cells[start - first : stop - first]))
    return _clip(cells, column, caret, clipped=(first > 0, start + WIDTH < len(line)))


def _clip(cells: list[str], column: int, caret: int, clipped: tuple[bool, bool]) -> tuple[str, int, int]:
    """At most `WIDTH` columns around the caret, with `…` where something is left out."""
    text = "".join(cells)
    if _columns(text) <= WIDTH and not any(clipped):
        return text, column, caret
    skip = max(0, min(column - WIDTH // 3, _columns(text) - WIDTH)) if column + caret > WIDTH - 10 or clipped[0] else 0
    shown: list[str] = []
    at = 0
    for cell in cells:
        wide = _columns(cell)
        if at >= skip and at + wide - skip <= WIDTH:
            shown.append(cell)
        elif at < skip < at + wide:
            shown.append(" " * (at + wide - skip))
        at += wide
    left = "…" if skip or clipped[0] else ""
    right = "…" if at - skip > WIDTH or clipped[1] else ""
    place = column - skip
    return left + "".join(shown) + right, place + len(left), max(1, min(caret, WIDTH - place))


def _cell(character: str) -> str:
    """A character as shown; none of them moves the cursor."""
    if character == "\t":
        return " " * TAB
    return character if character.isprintable() else "\ufffd"


def _columns(text: str) -> int:
    if text.isascii():
        return len(text)
    return sum(_char_width(c) for c in text)


def _width(cells: Sequence[str]) -> int:
    return sum(_columns(cell) for cell in cells)


def _char_width(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _clean(text: str) -> str:
    """Text from a file must not steer the terminal."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else "\ufffd" for c in text)


def _paint(text: str, style: str, color: bool) -> str:
    return f"{style}{text}{_OFF}" if color else text
