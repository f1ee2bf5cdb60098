"""What a page consists of, before it is Markdown or HTML: text, tables and plots as values.

Nothing here is escaped; each renderer escapes what it prints.
"""

from __future__ import annotations

__all__ = [
    "ABSENT",
    "Block",
    "Cell",
    "Column",
    "Heading",
    "Items",
    "Page",
    "Paragraph",
    "Plots",
    "Section",
    "Table",
    "absent",
    "metric_cell",
]

from dataclasses import dataclass

from phi4edge.report.fields import Metric
from phi4edge.report.numbers import figure
from phi4edge.report.plots import Plot


@dataclass(frozen=True)
class Cell:
    """One cell: a value, its standard error, and a tag such as "baseline"."""

    text: str
    se: str = ""
    tag: str = ""
    muted: bool = False
    code: bool = False


@dataclass(frozen=True)
class Column:
    """A column's head; numbers are set flush right."""

    title: str
    unit: str = ""
    numeric: bool = True

    def __str__(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title


@dataclass(frozen=True)
class Table:
    """Rows under columns; the first cell of a row names it."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of short statements, each with the words that lead it in."""

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Plots:
    """Plots that stand beside each other where there is room."""

    plots: tuple[Plot, ...]


Block = Table | Paragraph | Heading | Items | Plots


@dataclass(frozen=True)
class Section:
    """A titled part of the page."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """The whole page."""

    title: str
    summary: str
    sections: tuple[Section, ...]


ABSENT = Cell("–", muted=True)


def absent(reason: str | None) -> Cell:
    """A figure that was not measured, and why."""
    return Cell(f"not measured ({reason})" if reason else "not measured", muted=True)


def metric_cell(metric: Metric, scale: float = 1.0) -> Cell:
    """A metric times ``scale``, with its standard error."""
    if metric.value is None:
        return absent(metric.reason)
    printed = figure(metric.value * scale, None if metric.se is None else metric.se * abs(scale))
    return Cell(printed.value, printed.se)
