"""Arguments of calls: their nodes, which parameter each belongs to, and what goes wrong in an inlined body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attn_dsl.errors import Diagnostic
from attn_dsl.frontend import hints, syntax
from attn_dsl.frontend.syntax import Argument
from attn_dsl.ir.nodes import Node

if TYPE_CHECKING:
    from attn_dsl.frontend.expressions import Expressions


def arguments(e: Expressions, tree: syntax.Call) -> list[Node] | None:
    return e.expressions([argument.value for argument in tree.arguments])


def bind(
    e: Expressions, tree: syntax.Call, what: str, order: Sequence[str], required: frozenset[str]
) -> dict[str, int] | None:
    """Which argument goes to which parameter; `score` is only ever given by name."""
    bound: dict[str, int] = {}
    sound = True
    seen_named = False
    for i, argument in enumerate(tree.arguments):
        name = _parameter_of(e, argument, i, what, order, seen_named)
        seen_named = seen_named or argument.name is not None
        if name is None:
            sound = False
        elif name in bound:
            e.error("E014", f"`{name}` of `{what}` is given twice", argument)
            sound = False
        else:
            bound[name] = i
    missing = [name for name in order if name in required and name not in bound]
    if missing and sound:
        names = ", ".join(f"`{name}`" for name in missing)
        e.error("E014", f"`{what}` needs {names}", tree, help=f"it is `{what}({', '.join(order)})`")
        sound = False
    return bound if sound else None


def _parameter_of(
    e: Expressions, argument: Argument, i: int, what: str, order: Sequence[str], seen_named: bool
) -> str | None:
    if argument.name is not None:
        name = argument.name.text
        if name in order or (name == "score" and what.endswith(".score")):
            return name
        help = hints.did_you_mean(name, order) or f"it is `{what}({', '.join(order)})`"
        e.error("E014", f"`{what}` has no parameter `{name}`", argument.name, "", help)
        return None
    if seen_named:
        e.error("E014", "an argument without a name follows one with a name", argument)
        return None
    if i >= len(order):
        if i == len(order):
            e.error("E014", f"too many arguments for `{what}`", argument, "", f"it is `{what}({', '.join(order)})`")
        return None
    return order[i]


def explain_inside(e: Expressions, problems: Sequence[Diagnostic], at: syntax.Tree, what: str) -> None:
    """Report at a call what went wrong in the body that it inlines."""
    if problems:
        first = problems[0]
        about = f"`{short(first.span.text)}` at {first.span}"
        e.error(first.code, f"in {what}: {first.message}", at, first.label and f"there: {first.label}", about)


def short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 48 else text[:47] + "…"
