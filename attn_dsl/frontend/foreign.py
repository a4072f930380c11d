"""Functions of torch, numpy and flex_attention, answered with what they are here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attn_dsl.frontend import hints, syntax
from attn_dsl.frontend.functions import FUNCTION_NAMES

if TYPE_CHECKING:
    from attn_dsl.frontend.expressions import Expressions


def foreign_function(e: Expressions, tree: syntax.Call, shown: syntax.Tree, name: str) -> bool:
    """Answer a function of torch, numpy or flex_attention."""
    text = e.file.span(shown).text[:60]
    given = [e.file.span(x.value).text for x in tree.arguments]
    if name == "where" and len(given) == 3 and sum(map(len, given)) < 80:
        help = f"write `{given[1]} if {given[0]} else {given[2]}`"
    elif name == "where":
        help = "write `x if condition else y`"
    elif name in FUNCTION_NAMES:
        help = f"write `{name}(...)`"
    elif name in hints.FUNCTIONS:
        other = hints.FUNCTIONS[name]
        help = f"write `{other}(...)`" if other in FUNCTION_NAMES else f"write `{other}`"
    elif name in ("round", "trunc"):
        help = "write `floor(x + 0.5)`"
    elif name in ("full", "tensor", "zeros", "ones", "arange"):
        help = "a captured tensor is declared: `tensor name: dtype[extents]`"
    else:
        return False
    e.error("E015", f"unknown function `{text}`", shown, "", help)
    return True
