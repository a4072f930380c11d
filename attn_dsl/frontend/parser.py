"""Tokens to syntax tree, statement by statement: one syntax error each, and the next one is read all the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

from lark import Token, Transformer
from lark.exceptions import UnexpectedToken

from attn_dsl.errors import CompileError, Diagnostic, Source
from attn_dsl.frontend import syntax
from attn_dsl.frontend.syntax import Expression, Name
from attn_dsl.frontend.syntax_errors import explain_syntax_error
from attn_dsl.frontend.tokens import Report, Statement, grammar, split


def parse(source: Source) -> syntax.File:
    """The syntax tree of a text; raises `CompileError` with every syntax error."""
    diagnostics: list[Diagnostic] = []
    file = parse_recovering(source, diagnostics.append)
    if diagnostics:
        raise CompileError(sorted(diagnostics, key=lambda d: d.span))
    return file


def parse_recovering(source: Source, report: Report) -> syntax.File:
    """The syntax tree of a text; a statement that does not parse is reported and becomes `Broken`."""
    tokens = split(source, report)
    statements = tuple(_statement(source, statement, report) for statement in tokens.statements)
    return syntax.File(source, statements, _doc(source))


def _statement(source: Source, statement: Statement, report: Report) -> syntax.Statement:
    if not statement.sound:
        return _broken(statement.tokens)
    parser = grammar().parse_interactive(start="statement")
    try:
        for token in statement.tokens:
            parser.feed_token(token)
        return cast(syntax.Statement, parser.feed_eof(statement.tokens[-1]))
    except UnexpectedToken as error:
        report(explain_syntax_error(source, statement.tokens, error, parser.accepts()))
        return _broken(statement.tokens)


def _broken(tokens: Sequence[Token]) -> syntax.Broken:
    """What can be saved of a statement that does not parse: the names that it declares."""
    names: list[str] = []
    keyword = tokens[0].type if tokens else ""
    if keyword in ("LET", "DEF", "TENSOR"):
        names = [str(token) for token in tokens[1:2] if token.type == "NAME"]
    elif keyword == "IMPORT":
        names = [str(token) for token in tokens[1:] if token.type == "NAME"]
    elif keyword == "ATTENTION":
        pairs = pairwise(tokens[1:])
        names = [str(token) for token, after in pairs if token.type == "NAME" and after.type in ("COLON", "EQUAL")]
    elif len(tokens) > 1 and tokens[0].type == "NAME":
        keyword, names = "NAME", [str(tokens[0])]
    start = tokens[0].start_pos if tokens else 0
    return syntax.Broken(start or 0, (tokens[-1].end_pos if tokens else 0) or 0, keyword, tuple(names))


def _doc(source: Source) -> str:
    """The comment lines at the top of the text."""
    lines: list[str] = []
    for line in source.text.split("\n"):
        if not line.lstrip().startswith("#"):
            break
        lines.append(line.strip().lstrip("#").strip())
    return "\n".join(lines).strip()


def _start(child: Any) -> int:
    return cast(int, child.start_pos if isinstance(child, Token) else child.start)


def _end(child: Any) -> int:
    return cast(int, child.end_pos if isinstance(child, Token) else child.end)


def _trees(children: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(child for child in children if not isinstance(child, Token))


def _name(token: Token) -> Name:
    return Name(cast(int, token.start_pos), cast(int, token.end_pos), str(token))


class Builder(Transformer[Token, Any]):  # type: ignore[misc]
    """Callbacks of the grammar's rules, called while parsing; every terminal is a child, so ends are exact."""

    def header(self, c: list[Any]) -> syntax.Header:
        return syntax.Header(_start(c[0]), _end(c[-1]), _name(c[1]), _trees(c))

    def parameter(self, c: list[Any]) -> syntax.ParameterDeclaration:
        const = c[0].type == "CONST"
        name, kind = c[const], c[const + 2]
        default = None if isinstance(c[-1], Token) else c[-1]
        return syntax.ParameterDeclaration(_start(c[0]), _end(c[-1]), _name(name), _name(kind), default, const)

    def import_(self, c: list[Any]) -> syntax.Import:
        names = tuple(_name(token) for token in c if token.type == "NAME")
        return syntax.Import(_start(c[0]), _end(c[-1]), names)

    def tensor(self, c: list[Any]) -> syntax.TensorDeclaration:
        promises = (syntax.NondecreasingPromise, syntax.RangePromise)
        trees = _trees(c)
        return syntax.TensorDeclaration(
            _start(c[0]),
            _end(c[-1]),
            _name(c[1]),
            _name(c[3]),
            tuple(tree for tree in trees if not isinstance(tree, promises)),
            tuple(tree for tree in trees if isinstance(tree, promises)),
        )

    def nondecreasing(self, c: list[Any]) -> syntax.NondecreasingPromise:
        axis = _name(c[2]) if c[2].type == "NAME" else self.integer([c[2]])
        return syntax.NondecreasingPromise(_start(c[0]), _end(c[2]), axis)

    def in_range(self, c: list[Any]) -> syntax.RangePromise:
        return syntax.RangePromise(_start(c[0]), _end(c[-1]), c[2], c[4])

    def let(self, c: list[Any]) -> syntax.Let:
        return syntax.Let(_start(c[0]), _end(c[-1]), _name(c[1]), c[3])

    def def_(self, c: list[Any]) -> syntax.Def:
        names = tuple(_name(token) for token in c[2:-1] if token.type == "NAME")
        return syntax.Def(_start(c[0]), _end(c[-1]), _name(c[1]), names, c[-1])

    def assignment(self, c: list[Any]) -> syntax.Assignment:
        return syntax.Assignment(_start(c[0]), _end(c[-1]), _name(c[0]), c[2])

    def conditional(self, c: list[Any]) -> Expression:
        return syntax.Conditional(_start(c[0]), _end(c[-1]), c[0], c[2], c[4])

    def chain(self, c: list[Any]) -> Expression:
        return syntax.Chain(_start(c[0]), _end(c[-1]), tuple(c[::2]), tuple(str(token) for token in c[1::2]))

    def comparison(self, c: list[Any]) -> Expression:
        return syntax.Comparison(_start(c[0]), _end(c[-1]), tuple(c[::2]), tuple(str(token) for token in c[1::2]))

    def unary(self, c: list[Any]) -> Expression:
        return syntax.Unary(_start(c[0]), _end(c[-1]), str(c[0]), c[1])

    def call(self, c: list[Any]) -> Expression:
        return syntax.Call(_start(c[0]), _end(c[-1]), c[0], _trees(c[1:]))

    def argument(self, c: list[Any]) -> syntax.Argument:
        return syntax.Argument(_start(c[0]), _end(c[-1]), _name(c[0]) if len(c) == 3 else None, c[-1])

    def reduction(self, c: list[Any]) -> Expression:
        return syntax.Reduction(_start(c[0]), _end(c[-1]), c[0], _name(c[2]), c[4], c[6], c[8])

    def subscript(self, c: list[Any]) -> Expression:
        return syntax.Subscript(_start(c[0]), _end(c[-1]), c[0], _trees(c[1:]))

    def member(self, c: list[Any]) -> Expression:
        return syntax.Member(_start(c[0]), _end(c[-1]), c[0], _name(c[2]))

    def name(self, c: list[Any]) -> Expression:
        return _name(c[0])

    def integer(self, c: list[Any]) -> syntax.Literal:
        return syntax.Literal(_start(c[0]), _end(c[0]), int(c[0].replace("_", "")))

    def float_(self, c: list[Any]) -> Expression:
        return syntax.Literal(_start(c[0]), _end(c[0]), float(c[0].replace("_", "")))

    def true(self, c: list[Any]) -> Expression:
        return syntax.Literal(_start(c[0]), _end(c[0]), True)

    def false(self, c: list[Any]) -> Expression:
        return syntax.Literal(_start(c[0]), _end(c[0]), False)

    def parenthesized(self, c: list[Any]) -> Expression:
        return cast(Expression, c[1])
