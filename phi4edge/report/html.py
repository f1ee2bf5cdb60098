"""The page as one HTML file that needs nothing else: style and plots inside, no script, no address.

Everything that comes from a document passes through ``html.escape``.
"""

from __future__ import annotations

__all__ = ["render_html"]

import re
from html import escape
from importlib import resources

from phi4edge import __version__
from phi4edge.report.page import Block, Cell, Column, Heading, Items, Page, Paragraph, Plots, Section, Table
from phi4edge.report.plots import Plot

_SHORT = 13  # characters of a head that is not broken
_LONG = 28  # characters from which a cell of words asks for room
_HASH = re.compile(r"[0-9a-f]{32,}")


def _prose(text: str) -> str:
    """Escaped text whose figures keep together with their error and unit."""
    text = escape(text).replace(" ± ", "&nbsp;±&nbsp;").replace("÷ ", "÷&nbsp;")
    return re.sub(r"(?<=\d) (?=(?:%|nat|MiB|tok/s|s|tokens|times|threads)\b|%)", "&nbsp;", text)


def render_html(page: Page) -> str:
    """The document."""
    style = resources.files("phi4edge.report").joinpath("page.css").read_text(encoding="utf-8")
    sections = "\n".join(_section(i, section) for i, section in enumerate(page.sections, 1))
    links = " ".join(f'<a href="#s{i}">{escape(s.title)}</a>' for i, s in enumerate(page.sections, 1))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(page.title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header>
<h1>{escape(page.title)}</h1>
<p class="summary">{_prose(page.summary)}</p>
<nav aria-label="Sections">{links}</nav>
</header>
{sections}
<footer>Made by phi4edge {escape(__version__)} from the files listed above.
The same figures are in report.json.</footer>
</main>
</body>
</html>
"""


def _section(number: int, section: Section) -> str:
    blocks = "\n".join(_block(block, f"s{number}b{i}") for i, block in enumerate(section.blocks))
    return f'<section id="s{number}">\n<h2>{escape(section.title)}</h2>\n{blocks}\n</section>'


def _block(block: Block, prefix: str) -> str:
    match block:
        case Paragraph(text):
            return f"<p>{_prose(text)}</p>"
        case Heading(text):
            return f"<h3>{escape(text)}</h3>"
        case Items(items):
            return "<dl>\n" + "\n".join(f"<dt>{_prose(a)}</dt><dd>{_prose(b)}</dd>" for a, b in items) + "\n</dl>"
        case Plots(plots):
            drawn = "\n".join(_plot(plot, f"{prefix}p{i}") for i, plot in enumerate(plots))
            return f'<div class="plots">\n{drawn}\n</div>'
        case Table():
            return _table(block)


def _plot(plot: Plot, prefix: str) -> str:
    caption = f"<figcaption>{_prose(plot.caption)}</figcaption>" if plot.caption else ""
    return f"<figure>\n<h4>{escape(plot.title)}</h4>\n{plot.draw(prefix)}\n{caption}\n</figure>"


def _table(table: Table) -> str:
    head = "".join(_head(column) for column in table.columns)
    rows = "\n".join(
        "<tr>" + "".join(_cell(i, c, k) for i, (c, k) in enumerate(zip(row, table.columns, strict=True))) + "</tr>"
        for row in table.rows
    )
    caption = f"<figcaption>{_prose(table.caption)}</figcaption>\n" if table.caption else ""
    notes = "".join(f"<li>{_prose(note)}</li>" for note in table.notes)
    label = escape(table.caption or "Table")
    kind = "" if any(column.numeric for column in table.columns) else ' class="words"'
    return (
        f'<figure class="table">\n{caption}'
        f'<div class="scroll" tabindex="0" role="group" aria-label="{label}">\n<table{kind}>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>\n"
        + (f'<ul class="notes">{notes}</ul>\n' if notes else "")
        + "</figure>"
    )


def _head(column: Column) -> str:
    unit = f' <span class="unit">({escape(column.unit)})</span>' if column.unit else ""
    kind = f' class="number{" roomy" if len(column.title) > _SHORT else ""}"' if column.numeric else ""
    title = escape(column.title)
    title = title.replace(" ", "&nbsp;") if len(column.title) <= _SHORT else title.replace("÷ ", "÷&nbsp;")
    return f'<th scope="col"{kind}>{title}{unit}</th>'


def _cell(index: int, cell: Cell, column: Column) -> str:
    text = escape(cell.text)
    if cell.code:
        text = f"<code>{text}</code>"
    if cell.muted:
        text = f'<span class="muted">{text}</span>'
    if cell.se:
        text += f' <span class="se">±&nbsp;{escape(cell.se)}</span>'
    if cell.tag:
        text += f' <span class="tag">{escape(cell.tag)}</span>'
    classes = ["number"] if column.numeric else []
    if column.numeric and len(cell.text) > 16:
        classes.append("words")
    if not column.numeric and index and len(cell.text) > _LONG:
        classes.append("wide")
    if _HASH.fullmatch(cell.text):
        classes = ["hash"]
    kind = f' class="{" ".join(classes)}"' if classes else ""
    return f'<th scope="row"{kind}>{text}</th>' if index == 0 else f"<td{kind}>{text}</td>"
