"""Documents from files of the user: a piece of text of at most a few thousand characters, or a chat."""

from __future__ import annotations

__all__ = ["Document", "file_documents", "pieces"]

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4edge.core.errors import InputError

PIECE_CHARACTERS = 4000
_PAIRS = (("question", "answer"), ("prompt", "completion"), ("instruction", "output"), ("input", "output"))


@dataclass(frozen=True)
class Document:
    """One text, or one chat (``messages`` is then the list that a chat template takes)."""

    text: str
    messages: tuple[dict[str, str], ...] = ()
    domain: str = ""  # where a file names one record by record


def pieces(text: str) -> Iterator[Document]:
    """Cut ``text`` at line ends into pieces of about PIECE_CHARACTERS."""
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= PIECE_CHARACTERS:
            yield Document("".join(piece))
            piece, size = [], 0
    if "".join(piece).strip():
        yield Document("".join(piece))


def file_documents(path: Path) -> Iterator[Document]:
    """Documents of a text file (cut into pieces) or of a JSONL file (one a record), in the file's order.

    Raises:
        InputError: no such file, not UTF-8, or a record without text (the line is named).
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file", "give a text file, a .jsonl file or the name of a corpus")
    try:
        if path.suffix not in (".jsonl", ".ndjson"):
            yield from pieces(path.read_text(encoding="utf-8"))
            return
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _record(line, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}", "convert the file to UTF-8") from error


def _record(line: str, where: str) -> Document:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON ({error.msg})") from error
    if isinstance(record, dict):
        domain = record.get("domain", "")
        if not isinstance(domain, str):
            raise InputError(f"{where}: domain is {domain!r}", "a domain is a word in quotes")
        if isinstance(record.get("text"), str):
            return Document(record["text"], domain=domain)
        messages = record.get("messages")
        if isinstance(messages, list) and messages and all(isinstance(m, dict) and "content" in m for m in messages):
            turns = ({"role": str(m.get("role", "user")), "content": str(m["content"])} for m in messages)
            return Document("", tuple(turns), domain)
        for ask, reply in _PAIRS:
            if isinstance(record.get(ask), str) and isinstance(record.get(reply), str):
                pair = ({"role": "user", "content": record[ask]}, {"role": "assistant", "content": record[reply]})
                return Document(f"{record[ask]}\n{record[reply]}\n", pair, domain)
    pairs = ", ".join(f"{a}/{b}" for a, b in _PAIRS)
    raise InputError(f"{where}: record has no text", f"a record needs text, messages, or a pair {pairs}")
