"""Finds result documents: in files that are named, and in folders that are searched for ``*.json``.

A file that is not a result of ours is left out with a note; one that is ours and damaged is an error, because a
comparison that silently lost a row would mislead.
"""

from __future__ import annotations

__all__ = ["Found", "Source", "find_documents"]

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phi4edge.core.errors import InputError
from phi4edge.core.hashing import sha256_bytes
from phi4edge.report.documents import Document, Quantization
from phi4edge.report.fields import Field, parse_json
from phi4edge.report.parse import SCHEMAS, parse_document

_OURS = re.compile(r"phi4edge/([a-z0-9-]+)/(\d+)")
_PERFORMANCE = "performance.json"


@dataclass(frozen=True)
class Source:
    """A file that the report was made of; ``name`` is relative to the argument that led to it."""

    name: str
    schema: str
    sha256: str


@dataclass(frozen=True)
class Found:
    """What the arguments came to."""

    documents: tuple[Document, ...]
    sources: tuple[Source, ...]
    ignored: tuple[str, ...]  # JSON files that are no results
    notes: tuple[str, ...]


def find_documents(paths: Iterable[Path]) -> Found:
    """Every result in ``paths``, in the order given, the files of a folder by name; each content once.

    Raises:
        InputError: a path does not exist, a document is damaged, or there is no result at all.
    """
    given = list(paths)
    documents: list[Document] = []
    sources: dict[str, Source] = {}
    ignored: list[str] = []
    notes: list[str] = []
    runs: dict[str, str] = {}
    seen: set[Path] = set()
    for path, name in _files(given):
        if path.resolve() in seen:
            continue
        seen.add(path.resolve())
        raw = _read(path)
        document = _own_document(raw, path, named=path in given)
        if document is None:
            ignored.append(name)
            continue
        schema = document["schema"]
        if schema == "phi4edge/report/1":
            continue  # made from results, as this one
        digest = sha256_bytes(raw)
        if digest in sources:
            notes.append(f"{name} has the same content as {sources[digest].name}; it counts once")
            continue
        if schema not in SCHEMAS:
            ignored.append(name)
            continue
        performance, beside = _performance(path, name) if schema == "phi4edge/quantize/1" else (None, None)
        new = _labelled(parse_document(document, str(path), _run_name(path), performance), name)
        run = next((d for d in new if isinstance(d, Quantization)), None)
        if run is not None and run.key is not None and runs.setdefault(run.key, name) != name:
            notes.append(f"{name} describes the same run as {runs[run.key]}; it counts once")
            continue
        documents += new
        sources[digest] = Source(name, schema, digest)
        if beside is not None:
            sources[beside.sha256] = beside
    if not documents:
        looked = ", ".join(map(str, given)) or "nothing"
        raise InputError(
            f"no results found in {looked}"
            + (f" ({len(ignored)} JSON files there are not results)" if ignored else ""),
            "give JSON documents of `phi4edge drift`, `bench` or `quantize`, or folders that hold them",
        )
    return Found(tuple(documents), tuple(sources.values()), tuple(ignored), tuple(notes))


def _files(paths: list[Path]) -> Iterable[tuple[Path, str]]:
    """Files to look at, with the names that the report uses: free of where this machine keeps them."""
    for path in paths:
        if path.is_dir():
            for file in sorted(p for p in path.rglob("*.json") if p.is_file()):
                if file.name != _PERFORMANCE:
                    yield file, f"{path.resolve().name}/{file.relative_to(path).as_posix()}"
        elif path.exists():
            yield path, path.name
        else:
            raise InputError(f"{path}: no such file or folder")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _own_document(raw: bytes, path: Path, *, named: bool) -> dict[str, Any] | None:
    """The document when it is ours, of whatever command; None for other JSON."""
    if b"phi4edge/" not in raw and not named:
        return None  # before parsing: a folder may hold tokenizers of many megabytes
    try:
        document = parse_json(raw.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    match = _OURS.fullmatch(schema) if isinstance(schema, str) else None
    if match is None:
        return None
    known = f"phi4edge/{match[1]}/1"
    if known in SCHEMAS and match[2] != "1":
        raise InputError(
            f"{path}: schema: is {schema!r}, this version reads {known!r}", "use the phi4edge that made the document"
        )
    assert isinstance(document, dict)
    return document


def _performance(path: Path, name: str) -> tuple[dict[str, Any] | None, Source | None]:
    """What a run cost, which a run directory keeps apart from its manifest (the one is the same each time)."""
    file = path.with_name(_PERFORMANCE)
    if path.name != "manifest.json" or not file.is_file():
        return None, None
    raw = _read(file)
    performance = Field(parse_json(raw.decode("utf-8", "replace"), str(file)), str(file)).object()
    return performance, Source(str(Path(name).with_name(_PERFORMANCE)), "cost of the run", sha256_bytes(raw))


def _run_name(path: Path) -> str:
    return path.resolve().parent.name if path.name == "manifest.json" else path.stem


def _labelled(documents: list[Document], name: str) -> list[Document]:
    """The documents under the names that the report shows; until here their full path served the messages."""
    return [replace(document, file=name) for document in documents]
