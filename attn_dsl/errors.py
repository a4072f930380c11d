"""Source spans, diagnostics as data, and the exception tree.

Nothing here renders or prints: `frontend/render.py` turns a `Diagnostic` into text, the command line chooses where
it goes. Every error carries a stable code of the table in `frontend/codes.py`; `attn-dsl explain CODE` expands it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Source:
    """A piece of `.attn` text and the name that messages call it by."""

    name: str
    text: str = field(repr=False)


@dataclass(frozen=True, order=True)
class Span:
    """The half-open character range `[start, end)` of `source.text`."""

    source: Source = field(compare=False)
    start: int
    end: int

    @property
    def line(self) -> int:
        """1-based line of the first character."""
        return self.source.text.count("\n", 0, self.start) + 1

    @property
    def column(self) -> int:
        """1-based column of the first character."""
        return self.start - (self.source.text.rfind("\n", 0, self.start) + 1) + 1

    @property
    def text(self) -> str:
        return self.source.text[self.start : self.end]

    def __str__(self) -> str:
        return f"{self.source.name}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Diagnostic:
    """One finding about a program text.

    `label` stands beside the caret, `help` below the excerpt; both may be empty.
    """

    code: str
    message: str
    span: Span
    label: str = ""
    help: str = ""


class AttnError(Exception):
    """Base of every error that this package raises on purpose."""


class CompileError(AttnError):
    """The text of a variant is wrong. Carries every diagnostic of the text, in source order."""

    def __init__(self, diagnostics: Sequence[Diagnostic]) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__("\n".join(f"error[{d.code}]: {d.message} ({d.span})" for d in self.diagnostics))

    def __reduce__(self) -> tuple[type[CompileError], tuple[tuple[Diagnostic, ...]]]:
        return type(self), (self.diagnostics,)  # an exception is else made again from its message


class BindingError(AttnError, ValueError):
    """An argument of a call does not fit the variant; says which, what was expected and what came."""


class CacheFullError(AttnError):
    """The pages of a cache do not suffice for what was asked; says how many are needed, and how many free."""


class ProofError(AttnError):
    """A certificate does not check. Never the user's fault: a claim that fails its check must not be used."""
