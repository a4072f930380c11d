"""Text to typed IR: `parse` gives the syntax tree, `load` the checked variant.

tokens, parser (grammar.lark), syntax, syntax_errors     text to tree, and what does not fit
checker, declarations, expressions, calls, functions, builder     tree to IR
arguments, imported, scope, tensors, limits     what these ask
loader, library       where texts come from
render, codes, hints, foreign     errors, in words
format                the one layout
"""

from attn_dsl.frontend.library import shipped
from attn_dsl.frontend.loader import load, locate
from attn_dsl.frontend.parser import parse

__all__ = ["load", "locate", "parse", "shipped"]
