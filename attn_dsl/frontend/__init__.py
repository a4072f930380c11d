"""Text to typed IR: `parse` gives the syntax tree, `load` the checked variant."""

from attn_dsl.frontend.library import shipped
from attn_dsl.frontend.loader import load, locate
from attn_dsl.frontend.parser import parse

__all__ = ["load", "locate", "parse", "shipped"]
