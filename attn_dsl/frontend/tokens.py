"""Text to tokens, tokens to statements.

Never fails: what is no token of the language is reported and, where one can tell what was meant (`&` for `and`),
replaced, so that the statement around it is still parsed and checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from lark import Lark, Token
from lark.lark import PostLex

from attn_dsl.errors import Diagnostic, Source, Span
from attn_dsl.frontend import hints, limits

Report = Callable[[Diagnostic], None]

_UNUSED_BY_RULES = ("FOREIGN", "STRING", "MALFORMED", "UNKNOWN", "SEMICOLON", "NEWLINE", "COMMENT")
_CLOSING = {"LPAR": "RPAR", "LSQB": "RSQB"}
_OPENS_STATEMENT = frozenset({"ATTENTION", "IMPORT", "TENSOR", "LET", "DEF"})


class _KeepAll(PostLex):  # type: ignore[misc]
    """Keeps the terminals that no rule mentions."""

    always_accept = _UNUSED_BY_RULES

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        return stream


@lru_cache(maxsize=1)
def grammar() -> Lark:
    """The parser of one statement, built on first use."""
    from attn_dsl.frontend.parser import Builder

    text = Path(__file__).with_name("grammar.lark").read_text()
    return Lark(
        text,
        start="statement",
        parser="lalr",
        lexer="basic",
        postlex=_KeepAll(),
        transformer=Builder(),
        maybe_placeholders=False,
    )


@dataclass
class Statement:
    """The tokens of one statement; `sound` is False where its brackets or characters rule out parsing it."""

    tokens: list[Token] = field(default_factory=list)
    sound: bool = True


@dataclass(frozen=True)
class Tokens:
    statements: tuple[Statement, ...]
    comments: tuple[Token, ...]


def scan(text: str) -> list[Token]:
    """Every token of the text, with comments and line ends."""
    # `Lark.lex` would build its lexer again at every call; a parse has the one that was built with the grammar.
    parse = grammar().parse_interactive(text)
    return list(parse.lexer_thread.lex(parse.parser_state))


def split(source: Source, report: Report) -> Tokens:
    """The statements of a text. Reports foreign characters, malformed numbers and unbalanced brackets."""
    return _Splitter(source, report).run()


class _Splitter:
    def __init__(self, source: Source, report: Report) -> None:
        self.source = source
        self.report = report
        self.statements: list[Statement] = []
        self.comments: list[Token] = []
        self.current = Statement()
        self.open: list[tuple[Token, str]] = []  # bracket, terminal that closes it

    def run(self) -> Tokens:
        tokens = scan(self.source.text)
        for i, token in enumerate(tokens):
            if self.open and self._begins_statement(tokens, i):
                self.finish()
            self.take(token)
        self.finish()
        return Tokens(tuple(self.statements), tuple(self.comments))

    def take(self, token: Token) -> None:
        match token.type:
            case "COMMENT":
                self.comments.append(token)
            case "NEWLINE" | "SEMICOLON" if not self.open or token.type == "SEMICOLON":
                self.finish()
            case "NEWLINE":
                pass
            case "FOREIGN" | "STRING" | "MALFORMED" | "UNKNOWN":
                self.foreign(token)
            case "INT" | "FLOAT":
                self.current.tokens.append(self.number(token))
            case "LPAR" | "LSQB":
                self.open_bracket(token)
            case "RPAR" | "RSQB":
                self.close_bracket(token)
            case _:
                if token.type == "NAME" and len(token) > limits.NAME_LENGTH:
                    self.error("E060", f"a name of {len(token)} characters", token, f"at most {limits.NAME_LENGTH}")
                    token = token.update(value=token.value[: limits.NAME_LENGTH])
                self.current.tokens.append(token)

    def _begins_statement(self, tokens: list[Token], i: int) -> bool:
        """Whether, inside an open bracket, a line begins as only a statement does: the bracket was forgotten."""
        token = tokens[i]
        if i == 0 or tokens[i - 1].type != "NEWLINE":
            return False
        if token.type in _OPENS_STATEMENT:
            return True
        if token.start_pos != tokens[i - 1].end_pos or str(token) not in ("score", "mask", "sink"):
            return False
        return i + 1 < len(tokens) and tokens[i + 1].type == "EQUAL"

    def finish(self) -> None:
        """End the statement. A bracket that is still open is an error at that bracket."""
        if self.open:
            token, closing = self.open[-1]
            mark = ")" if closing == "RPAR" else "]"
            self.error("E003", f"`{token}` is never closed", token, f"no `{mark}` matches it")
            self.current.sound = False
            self.open.clear()
        if self.current.tokens:
            self.statements.append(self.current)
        self.current = Statement()

    def open_bracket(self, token: Token) -> None:
        self.open.append((token, _CLOSING[token.type]))
        tokens = self.current.tokens
        tokens.append(token)
        if len(self.open) == limits.NESTING + 1:
            self.error("E061", "brackets are nested too deeply", token, f"at most {limits.NESTING} may be open")
            self.current.sound = False

    def close_bracket(self, token: Token) -> None:
        tokens = self.current.tokens
        tokens.append(token)
        if not self.open:
            if self.current.sound:
                self.error("E003", f"`{token}` closes nothing", token, "no bracket is open here")
            self.current.sound = False
            return
        opened, closing = self.open.pop()
        if token.type == closing or (opened.type == "LSQB" and self._after_in(opened)):
            return
        if self.current.sound:
            mark = ")" if closing == "RPAR" else "]"
            self.error("E003", f"`{token}` does not close `{opened}`", token, f"expected `{mark}`")
        self.current.sound = False

    def _after_in(self, bracket: Token) -> bool:
        """Whether a `[` begins a half-open range `in [low, high)`."""
        tokens = self.current.tokens
        place = next(i for i, token in enumerate(tokens) if token is bracket)
        return place > 0 and tokens[place - 1].type == "IN"

    def number(self, token: Token) -> Token:
        digits = token.value.replace("_", "")
        if token.type == "FLOAT":
            if math.isfinite(float(digits)):
                return token
            self.error("E063", "the number is too large for a float", token, "at most about 1.8e308")
            return token.update(value="1.0")
        if len(digits) <= 19 and int(digits) <= limits.INTEGER:
            return token
        self.error("E063", "the integer is too large", token, "at most 2**63 - 1")
        return token.update(value="1")

    def foreign(self, token: Token) -> None:
        """Report what is no token of this language, and put in its place what was meant."""
        text = token.value
        if token.type == "FOREIGN":
            kind, advice = hints.OPERATORS[text]
            self.error("E004", f"`{text}` is not an operator here", token, advice)
        elif token.type == "STRING":
            kind = "INT"
            help = hints.ADVICE["inf"] if "inf" in text else "names stand bare; comments begin with `#`"
            self.error("E002", "there are no strings", token, help=help)
        elif token.type == "MALFORMED":
            kind = "INT"
            self.error("E005", f"`{_clip(text)}` is no number", token, help=_number_help(text))
        else:
            kind, advice = hints.CHARACTERS.get(text, ("", ""))
            self.error("E002", f"{_describe(text)} has no meaning here", token, advice)
        if kind:
            self.current.tokens.append(token.update(type=kind, value="1" if kind == "INT" else text))
        else:
            self.current.sound = False

    def error(self, code: str, message: str, token: Token, label: str = "", help: str = "") -> None:
        self.report(Diagnostic(code, message, token_span(self.source, token), label, help))


def token_span(source: Source, token: Any) -> Span:
    return Span(source, token.start_pos, token.end_pos)


def _clip(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"


def _describe(text: str) -> str:
    if len(text) == 1 and not text.isprintable():
        return f"the character U+{ord(text):04X}"
    return f"`{_clip(''.join(c if c.isprintable() else '?' for c in text))}`"


def _number_help(text: str) -> str:
    if text[:2].lower() in ("0x", "0b", "0o") and len(text) < 40:
        try:
            return f"numbers are decimal: write {int(text, 0)}"
        except ValueError:
            return "numbers are decimal"
    if "_" in text and not any(c.isalpha() for c in text):
        return "`_` stands between two digits"
    return "a product needs its `*`, and a name cannot begin with a digit"
