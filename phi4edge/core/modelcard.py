"""The place in an artifact's README.md where its drift stands once it was measured."""

from __future__ import annotations

__all__ = ["UNMEASURED", "with_drift"]

_BEGIN, _END = "<!-- drift: begin -->", "<!-- drift: end -->"
UNMEASURED = f"{_BEGIN}\nNot measured.\n{_END}"


def with_drift(card: str, tables: str) -> str | None:
    """``card`` with ``tables`` (Markdown) in that place; None where it has none."""
    before, begin, rest = card.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    return f"{before}{begin}\n{tables}\n{end}{after}" if begin and end else None
