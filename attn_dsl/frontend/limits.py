"""Every limit of the front end, in one place. Each is a diagnostic (codes E060 to E069), never a traceback.

They are far above what a variant needs and low enough that no text, however hostile, costs more than a fraction of a
second and a few megabytes.
"""

from __future__ import annotations

FILE_BYTES = 64 * 1024
"""Size of one file, in bytes of UTF-8."""

NAME_LENGTH = 64
"""Characters of a name."""

PARAMETERS = 32
"""Parameters of a variant, or of a `def`."""

TENSORS = 32
"""Tensors of a variant, with those that come from imported variants."""

AXES = 8
"""Axes of a tensor."""

NESTING = 64
"""Open brackets at any place of the text."""

CHECK_DEPTH = 100
"""Expressions inside one another, counted through the calls of `def` and of imported variants."""

NODE_DEPTH = 200
"""Operations on the longest path from a root of the IR to a leaf; lets and calls are inlined."""

NODES = 10_000
"""Distinct nodes of a variant."""

EXPANSION = 20_000
"""Expressions visited while inlining calls."""

TREE_SIZE = 1_000_000
"""Nodes of one expression if nothing were shared."""

INTEGER = 2**63 - 1
"""Largest integer literal and largest magnitude of a constant integer expression."""

EXPONENT = 63
"""Largest constant exponent of an integer power."""

TRIPS = 1024
"""Terms of a reduction, times those of the reductions around it."""

IMPORT_DEPTH = 16
"""Length of a chain of imports."""

DIAGNOSTICS = 100
"""Errors that are reported; the rest is summarized in one."""

IMPORTED_FILES = 64
"""Distinct files that one variant imports, directly or not."""
