"""The page as Markdown: the same text and tables; plots are named, and stand in the HTML page."""

from __future__ import annotations

__all__ = ["render_blocks", "render_markdown"]

import re
from collections.abc import Iterable

from phi4edge.report.page import Block, Cell, Heading, Items, Page, Paragraph, Plots, Section, Table

_CODE = re.compile(r"[\w./:+-]+")
_SPECIAL = re.compile(r"([\\`*\[\]|])")


def escape(text: str) -> str:
    """Text that Markdown shows as it is: on one line, no mark-up, no HTML."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def render_markdown(page: Page) -> str:
    """The document."""
    parts = [f"# {escape(page.title)}", escape(page.summary), *(_section(section) for section in page.sections)]
    return "\n\n".join(parts) + "\n"


def render_blocks(blocks: Iterable[Block]) -> str:
    """Some blocks alone."""
    return "\n\n".join(_block(block) for block in blocks)


def _section(section: Section) -> str:
    return "\n\n".join([f"## {escape(section.title)}", *(_block(block) for block in section.blocks)])


def _block(block: Block) -> str:
    match block:
        case Paragraph(text):
            return escape(text)
        case Heading(text):
            return f"### {escape(text)}"
        case Items(items):
            return "\n".join(f"- **{escape(lead)}** {escape(text)}" for lead, text in items)
        case Plots(plots):
            return "\n".join(f"*Plot in report.html: {escape(plot.title)}. {escape(plot.caption)}*" for plot in plots)
        case Table():
            return _table(block)


def _table(table: Table) -> str:
    lines = [f"{escape(table.caption)}\n"] if table.caption else []
    lines.append("| " + " | ".join(escape(str(column)) for column in table.columns) + " |")
    lines.append("|" + "|".join("--:" if column.numeric else ":--" for column in table.columns) + "|")
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in table.rows]
    if table.notes:
        lines.append("\n" + "  \n".join(escape(note) for note in table.notes))
    return "\n".join(lines)


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    if cell.code and _CODE.fullmatch(cell.text):
        text = f"`{cell.text}`"
    text += f" ± {escape(cell.se)}" if cell.se else ""
    return text + (f" *({escape(cell.tag)})*" if cell.tag else "")
