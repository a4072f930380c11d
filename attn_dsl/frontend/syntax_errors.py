"""Words for a token that does not fit: what was expected there, and what to write instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lark import Token
from lark.exceptions import UnexpectedToken

from attn_dsl.errors import Diagnostic, Source, Span
from attn_dsl.frontend import hints

_SPELLED = {
    "EQUAL": "`=`", "LPAR": "`(`", "RPAR": "`)`", "LSQB": "`[`", "RSQB": "`]`", "COMMA": "`,`", "COLON": "`:`",
    "DOTDOT": "`..`", "ELSE": "`else`", "OVER": "`over`", "IN": "`in`", "NONDECREASING": "`nondecreasing`",
}  # fmt: skip
_DECLARING = frozenset({"ATTENTION", "IMPORT", "TENSOR", "LET", "DEF", "CONST", "NONDECREASING", "OVER"})
_KEYWORDS = _DECLARING | {"IN", "IF", "ELSE", "AND", "OR", "NOT", "TRUE", "FALSE"}
KEYWORDS = frozenset(word.lower() for word in _KEYWORDS)
"""Words that cannot name anything, since the grammar uses them."""


def explain_syntax_error(
    source: Source, tokens: Sequence[Token], error: UnexpectedToken, accepts: set[str]
) -> Diagnostic:
    """The diagnostic of the first token of a statement that does not fit."""
    token: Any = error.token
    at_end = token.type == "$END"
    place = next((i for i, other in enumerate(tokens) if other is token), len(tokens))
    end = tokens[-1].end_pos or 0
    span = Span(source, end, end) if at_end else Span(source, token.start_pos, token.end_pos)

    first = tokens[0]
    if place == 0 or (place == 1 and first.type == "NAME" and str(first) in hints.STATEMENTS):
        return _no_statement(Span(source, first.start_pos or 0, first.end_pos or 0), str(first))
    if place == 1 and first.type == "NAME":
        return _no_assignment(source, first, token, at_end)
    if token.type in _KEYWORDS and "NAME" in accepts and "INT" not in accepts:
        message = f"`{token}` is a reserved word"
        return Diagnostic("E008", message, span, "a name is expected here", "choose another name")
    expected = _expected(accepts)
    found = "the statement ends" if at_end else f"found `{token}`"
    return Diagnostic(
        "E001", f"expected {expected}, {found}", span, f"expected {expected}", _advice(tokens, place, accepts)
    )


def _no_statement(span: Span, word: str) -> Diagnostic:
    advice = hints.STATEMENTS.get(word, "")
    if not advice:
        advice = (
            "a statement begins with `attention`, `import`, `tensor`, `let`, `def`, `score =`, `mask =` or `sink =`"
        )
    return Diagnostic("E007", f"`{word}` does not begin a statement", span, "", advice)


def _no_assignment(source: Source, first: Token, token: Any, at_end: bool) -> Diagnostic:
    """`mask q >= k`, `mask == ...`, `window: int = 3`, `lett x = 3`: a first word without its `=`."""
    word = str(first)
    span = Span(source, first.start_pos or 0, first.end_pos or 0)
    if word in ("score", "mask", "sink"):
        where = Span(source, span.end, span.end) if at_end else Span(source, token.start_pos, token.end_pos)
        return Diagnostic("E001", f"expected `=` after `{word}`", where, "expected `=`", f"write `{word} = expression`")
    if not at_end and token.type == "COLON":
        advice = f"types are inferred: `let {word} = expression`; a captured tensor is `tensor {word}: dtype[extents]`"
        return Diagnostic("E007", f"`{word}` does not begin a statement", span, "", advice)
    near = hints.nearest(word, ["attention", "import", "tensor", "let", "def", "score", "mask", "sink"])
    if near:
        return Diagnostic("E007", f"`{word}` does not begin a statement", span, "", f"did you mean `{near}`?")
    return _no_statement(span, word)


def _expected(accepts: set[str]) -> str:
    if "INT" in accepts and "NAME" in accepts and "LPAR" in accepts:
        return "an expression"
    if accepts == {"NAME"} or accepts == {"NAME", "INT"} or accepts == {"NAME", "CONST", "RPAR"}:
        return "a name"
    spelled = [_SPELLED[kind] for kind in _SPELLED if kind in accepts and kind not in ("LPAR", "LSQB", "IN")]
    if "SIGN" in accepts:
        closing = [text for text in spelled if text in ("`)`", "`]`", "`,`", "`else`", "`..`", "`:`")]
        return " or ".join(["an operator", *closing])
    if not spelled:
        spelled = [_SPELLED[kind] for kind in ("LPAR", "LSQB", "IN") if kind in accepts]
    return " or ".join(spelled) if spelled else "the end of the statement"


def _advice(tokens: Sequence[Token], place: int, accepts: set[str]) -> str:
    kind = tokens[place].type if place < len(tokens) else "$END"
    before = tokens[place - 1]
    if kind == "$END":
        if before.type in ("AND", "OR", "SIGN", "MULTIPLY", "COMPARE", "POWER", "NOT", "EQUAL", "COMMA"):
            return "an expression goes on over line ends inside `( )`"
        if "ELSE" in accepts:
            return "write `x if condition else y`: both branches are needed"
        return ""
    text = str(tokens[place])
    if "DOTDOT" in accepts:
        return "a range is `low..high`, as in `sum(d in 0..3: expression)`"
    if "COLON" in accepts and kind == "COMMA":
        return "the terms follow a colon: `sum(d in 0..3: expression)`"
    if kind == "EQUAL" and "SIGN" in accepts:
        return "a comparison is written `==`"
    if kind == "COLON" and tokens[0].type == "DEF":
        return "a function is `def f(x, y) = expression`"
    if kind == "COLON" and tokens[0].type == "LET":
        return "types are inferred: `let name = expression`"
    if kind == "COLON":
        return "there are no slices; a reduction is `sum(d in 0..n: expression)`"
    if kind == "IN":
        return "a reduction is `sum(d in 0..n: expression)`; membership is spelled out: `x == a or x == b`"
    if kind == "NAME" and text in hints.ADVICE:
        return hints.ADVICE[text]
    if before.type == "NAME" and str(before) in hints.ADVICE:
        return hints.ADVICE[str(before)]
    if kind == "COMMA" and tokens[0].type in ("LET", "NAME"):
        return "an expression has one value; there are no tuples"
    if kind == "RSQB" and "RPAR" in accepts:
        return "the range is half open: `in [low, high)`"
    return ""
