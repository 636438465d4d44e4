"""Tables for the terminal and for Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import rich.table


@dataclass(frozen=True, slots=True)
class Table:
    """A title, column names and rows of text; the first column is left-aligned, the others right."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self) -> rich.table.Table:
        table = rich.table.Table(title=self.title, title_justify="left")
        for index, header in enumerate(self.headers):
            table.add_column(header, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*(cell.replace("**", "") for cell in row))
        return table

    def markdown(self) -> str:
        lines = [
            f"**{self.title}**",
            "",
            _line(self.headers),
            _line(["---", *["---:"] * (len(self.headers) - 1)]),
        ]
        return "\n".join([*lines, *map(_line, self.rows)])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def percentile(values: Iterable[float], percent: float) -> float:
    """Linear between the two nearest values."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def ms(seconds: float) -> str:
    """Milliseconds, with as many digits as mean something."""
    value = 1000 * seconds
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
