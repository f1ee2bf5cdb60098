"""The licence that a checkpoint comes with: its text, and its short name where the checkpoint says it."""

from __future__ import annotations

__all__ = ["LICENCE_FILES", "licence_name", "licence_text"]

import re
from pathlib import Path

LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt")
_HEAD = 400  # characters in which a licence text names itself
_KNOWN = {"MIT License": "mit", "Apache License": "apache-2.0"}


def licence_text(folder: Path) -> str | None:
    """The licence file of checkpoint ``folder``, or None where it has none."""
    found = next((folder / name for name in LICENCE_FILES if (folder / name).is_file()), None)
    return found.read_text(encoding="utf-8", errors="replace") if found is not None else None


def licence_name(folder: Path) -> str | None:
    """The licence as a model card names it (``mit``): the card's word, or the text's title; None where neither says."""
    card = folder / "README.md"
    if card.is_file():
        front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        named = re.search(r"^license:\s*(\S+)\s*$", front[1], re.MULTILINE) if front else None
        if named:
            return named[1].strip("'\"")
    head = (licence_text(folder) or "")[:_HEAD]
    return next((short for title, short in _KNOWN.items() if title in head), None)
