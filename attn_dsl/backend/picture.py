"""A small picture of the tiles of a call: characters for a terminal, rectangles for an SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from xml.sax.saxutils import escape

COLUMNS = 64
"""At most so many cells to a side; a cell of a larger call is several tiles."""
ROWS = 32
"""At most so many lines in a terminal, whose characters are about twice as high as wide."""


class Cell(NamedTuple):
    """How many of the tiles of a cell are what."""

    full: int
    partial: int
    empty: int

    @property
    def kind(self) -> str:
        """ "full" or "empty" where all tiles are, else "partial"."""
        if self.partial or (self.full and self.empty):
            return "partial"
        return "full" if self.full else "empty"


SYMBOLS = {"full": "█", "partial": "▒", "empty": "·"}
CODES = {"full": "34", "partial": "36", "empty": "2"}
COLORS = {"full": "#2b6cb0", "partial": "#90cdf4", "empty": "#edf2f7"}


@dataclass(frozen=True)
class Picture:
    """Cells from the first queries (top) and keys (left) on; `rows` by `columns` tiles in all."""

    cells: tuple[tuple[Cell, ...], ...]
    rows: int
    columns: int

    def text(self, *, color: bool = False) -> str:
        """Lines of characters and a legend; `color` adds the codes of a terminal."""
        lines = self.cells if len(self.cells) <= ROWS else tuple(_halved(self.cells))
        wide = 2 if len(lines[0]) * 2 <= COLUMNS else 1
        drawn = ["  " + "".join(_symbol(cell.kind, color) * wide for cell in line) for line in lines]
        legend = "   ".join(f"{_symbol(kind, color)} {kind}" for kind in SYMBOLS)
        return "\n".join([*drawn, f"  {legend}   ({self.rows} x {self.columns} tiles, queries downward)"])

    def svg(self, title: str, lines: Sequence[str] = ()) -> str:
        """A drawing of its own, with a title and lines of text below it."""
        size = max(4, 512 // max(len(self.cells), len(self.cells[0])))
        width, height = max(size * len(self.cells[0]), 320), size * len(self.cells)
        texts = [(title, 20, "bold"), *((line, height + 52 + 18 * i, "normal") for i, line in enumerate(lines))]
        out = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 32}" height="{height + 56 + 18 * len(lines)}"'
            ' font-family="sans-serif" font-size="13">',
            '<rect width="100%" height="100%" fill="#ffffff"/>',
        ]
        out += [f'<text x="16" y="{y}" font-weight="{weight}">{escape(text)}</text>' for text, y, weight in texts]
        out += [*self._rectangles(size), "</svg>"]
        return "\n".join(out) + "\n"

    def _rectangles(self, size: int) -> Iterator[str]:
        """One for each run of equal cells of a line."""
        for y, line in enumerate(self.cells):
            start = 0
            for x in range(1, len(line) + 1):
                if x == len(line) or line[x].kind != line[start].kind:
                    yield (
                        f'<rect x="{16 + start * size}" y="{32 + y * size}" width="{(x - start) * size}"'
                        f' height="{size}" fill="{COLORS[line[start].kind]}"/>'
                    )
                    start = x


def _symbol(kind: str, color: bool) -> str:
    return f"\x1b[{CODES[kind]}m{SYMBOLS[kind]}\x1b[0m" if color else SYMBOLS[kind]


def _halved(lines: Sequence[Sequence[Cell]]) -> Iterator[tuple[Cell, ...]]:
    """Two lines made one."""
    for i in range(0, len(lines), 2):
        pair = lines[i : i + 2]
        yield (
            tuple(pair[0])
            if len(pair) == 1
            else tuple(Cell(*map(sum, zip(x, y, strict=True))) for x, y in zip(*pair, strict=True))
        )
