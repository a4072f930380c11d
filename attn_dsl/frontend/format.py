"""The formatter: one layout for every text.

It works on tokens, so comments and line ends stay where they are, and no token changes but a float's spelling (`.5`
becomes `0.5`); the result parses to the same tree. Formatting twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lark import Token

from attn_dsl.errors import Source
from attn_dsl.frontend.parser import parse
from attn_dsl.frontend.tokens import scan

INDENT = 4
_OPENING = ("LPAR", "LSQB")
_CLOSING = ("RPAR", "RSQB")
_OPERAND_ENDS = ("NAME", "INT", "FLOAT", "TRUE", "FALSE", *_CLOSING)
_NEVER_AFTER_SPACE = ("COMMA", "COLON", "SEMICOLON", "DOTDOT", "DOT", *_CLOSING)
_NEVER_BEFORE_SPACE = ("DOTDOT", "DOT", *_OPENING)


def format_text(text: str, name: str = "<text>") -> str:
    """The text in the layout of the language; raises `CompileError` where it does not parse."""
    parse(Source(name, text))
    writer = _Writer()
    lines = [writer.line(tokens) for tokens in _lines(text)]
    _align_results(lines)
    return _join(lines)


@dataclass
class _Line:
    """A line as laid out; `result` is `score`, `mask` or `sink` where it begins by setting one."""

    indent: int
    code: str
    comment: str
    result: str = ""

    def __str__(self) -> str:
        return " " * self.indent + "  ".join(part for part in (self.code, self.comment) if part)


class _Writer:
    """Lays out line by line, knowing which brackets are open and whether they are those of the header."""

    def __init__(self) -> None:
        self.depth = 0
        self.header = False

    def line(self, tokens: Sequence[Token]) -> _Line:
        code = list(_without_idle_semicolons([token for token in tokens if token.type != "COMMENT"]))
        comment = next((_comment(token) for token in tokens if token.type == "COMMENT"), "")
        closing = next((i for i, token in enumerate(code) if token.type not in _CLOSING), len(code))
        indent = INDENT * max(0, self.depth - closing)
        word = str(code[0]) if self.depth == 0 and len(code) > 1 and code[1].type == "EQUAL" else ""
        return _Line(indent, "".join(self._spaced(code)), comment, word)

    def _spaced(self, tokens: Sequence[Token]) -> Iterator[str]:
        before: Token | None = None
        tight = True  # whether nothing separates the next token from the one before
        for token in tokens:
            if self.depth == 0 and (before is None or before.type == "SEMICOLON"):
                self.header = token.type == "ATTENTION"
            named = token.type == "EQUAL" and self.depth > 0 and not self.header
            if not (tight or named) and _is_spaced(before, token):
                yield " "
            sign = token.type == "SIGN" and (before is None or before.type not in _OPERAND_ENDS)
            tight = sign or named or token.type in _NEVER_BEFORE_SPACE
            self.depth += (token.type in _OPENING) - (token.type in _CLOSING)
            yield _number(str(token)) if token.type == "FLOAT" else str(token)
            before = token


def _is_spaced(before: Token | None, token: Token) -> bool:
    if token.type in _OPENING and before is not None:
        return before.type not in ("NAME", *_CLOSING)  # a call, an index
    return token.type not in _NEVER_AFTER_SPACE


def _lines(text: str) -> list[list[Token]]:
    lines: list[list[Token]] = [[]]
    for token in scan(text):
        if token.type == "NEWLINE":
            lines.append([])
        else:
            lines[-1].append(token)
    return lines


def _without_idle_semicolons(tokens: Sequence[Token]) -> Iterator[Token]:
    """Semicolons that separate two statements of the line."""
    for i, token in enumerate(tokens):
        separates = i > 0 and i + 1 < len(tokens) and tokens[i + 1].type != "SEMICOLON"
        if token.type != "SEMICOLON" or (separates and any(t.type != "SEMICOLON" for t in tokens[:i])):
            yield token


def _comment(token: Token) -> str:
    text = str(token).rstrip()
    return f"# {text[1:]}" if len(text) > 1 and text[1] not in " #!" else text


def _number(text: str) -> str:
    """A float with digits on both sides of its point."""
    mantissa, mark, exponent = text.lower().partition("e")
    whole, point, fraction = mantissa.partition(".")
    return (whole or "0") + (f".{fraction or '0'}" if point else "") + mark + exponent


def _align_results(lines: Sequence[_Line]) -> None:
    """`score =`, `mask  =` and `sink  =` on neighboring lines stand below one another."""
    groups: list[list[_Line]] = [[]]
    for line in lines:
        if line.result:
            groups[-1].append(line)
        elif groups[-1]:
            groups.append([])
    for group in groups:
        width = max((len(line.result) for line in group), default=0)
        for line in group:
            line.code = f"{line.result:{width}}{line.code[len(line.result) :]}"


def _join(lines: Sequence[_Line]) -> str:
    """At most one empty line in a row, none at the ends, one line end at the end."""
    kept: list[str] = []
    for text in (str(line).rstrip() for line in lines):
        if text or (kept and kept[-1]):
            kept.append(text)
    return "\n".join(kept).rstrip("\n") + "\n" if kept else ""
