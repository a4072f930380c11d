"""Carets stand below what they are about, whatever the text is made of."""

from __future__ import annotations

import re
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from attn_dsl.errors import Diagnostic, Source, Span
from attn_dsl.frontend.render import WIDTH, render


def one(text: str, start: int, end: int, **texts: str) -> str:
    return render([Diagnostic("E001", "message", Span(Source("x.attn", text), start, end), **texts)])


def columns(text: str) -> int:
    wide = (2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text if not invisible(c))
    return sum(wide)


def invisible(c: str) -> bool:
    return bool(unicodedata.combining(c)) or unicodedata.category(c) in ("Mn", "Me", "Cf")


def marked(rendered: str) -> str:
    """What stands above the carets."""
    above, below = rendered.split("\n")[3:5]
    caret = re.search(r"\^+", below)
    assert caret is not None
    out = ""
    at = 0
    for c in above:
        if caret.start() <= at < caret.end() and not invisible(c):
            out += c
        at += columns(c)
    return out


def test_style() -> None:
    text = "attention x\n" * 9 + "mask = oops\n"
    expected = """error[E001]: message
  --> x.attn:10:8
   |
10 | mask = oops
   |        ^^^^ label
   = help: help"""
    expected = expected.replace("\n  -->", "\n   -->").replace("\n   |", "\n    |").replace("\n10", "\n 10")
    expected = expected.replace("\n   =", "\n    =")
    start = text.index("oops")
    assert one(text, start, start + 4, label="label", help="help") == expected


def test_tabs_and_wide_and_combining_characters_keep_the_caret_in_place() -> None:
    for before in ("\t\t", "漢字", "e\u0301", "😀", "\u200b", "\x07"):
        text = f"{before}oops x"
        start = len(before)
        assert marked(one(text, start, start + 4)) == "oops"


def test_a_span_over_lines_is_marked_to_the_end_of_the_first() -> None:
    assert marked(one("mask = (q\n + k)", 7, 15)) == "(q"


def test_the_end_of_a_line_and_of_a_text_have_a_caret() -> None:
    assert one("mask =", 6, 6).endswith("|       ^")
    assert one("mask =\n", 6, 6).endswith("|       ^")


def test_long_lines_are_clipped_around_the_caret() -> None:
    text = "q + " * 5000 + "oops" + " + q" * 5000
    start = text.index("oops")
    rendered = one(text, start, start + 4, label="here")
    assert marked(rendered) == "oops"
    line = rendered.split("\n")[3]
    assert len(line) < WIDTH + 20
    assert line.count("…") == 2


def test_colors_only_when_asked() -> None:
    diagnostic = Diagnostic("E001", "message", Span(Source("x", "text"), 0, 4), "label", "help")
    assert "\x1b" not in render([diagnostic])
    assert re.sub(r"\x1b\[[0-9;]*m", "", render([diagnostic], color=True)) == render([diagnostic])


def test_a_text_cannot_steer_the_terminal() -> None:
    rendered = one("mask = \x1b[2J", 0, 4, label="\x1b[2J", help="a\x1bb\nc\td")
    assert "\x1b" not in rendered and rendered.endswith("help: a\ufffdb c d")


@given(st.text(max_size=300), st.integers(0, 300), st.integers(0, 300))
def test_every_span_of_every_text_renders(text: str, start: int, length: int) -> None:
    start = min(start, len(text))
    assert "^" in one(text + ".", start, min(start + length, len(text)))
