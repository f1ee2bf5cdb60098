"""What a run depends on, hashed: the part of ``run.json`` that must not change between two processes."""

from __future__ import annotations

__all__ = ["FILES_AT_ONCE", "LOCATION", "check_tokenizer", "hash_checkpoint", "note_location", "open_inputs"]

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from phi4edge import __version__
from phi4edge.checkpoint.digest import digest_file
from phi4edge.checkpoint.index import CheckpointIndex
from phi4edge.core.atomic import write_json
from phi4edge.core.pagecache import Passing
from phi4edge.core.recipe import CorpusRecipe
from phi4edge.model.tokenizer import Tokenizer, load_tokenizer

LOCATION = "location.json"  # where the checkpoint lay, and stamps that say whether its hashes still hold
_READ: dict[str, dict[str, str]] = {}  # hashes of what this process has read, by folder and stamps
FILES_AT_ONCE = 2  # files that are hashed
CODE = 9  # raised when the same recipe would give other codes


def open_inputs(corpus: CorpusRecipe | None, corpus_sha256: str | None, hashes: dict[str, str]) -> dict[str, Any]:
    """The inputs that every kind of run has in common."""
    return {
        "code": f"{__version__}/{CODE}",
        "checkpoint": hashes,
        "corpus_sha256": corpus_sha256 if corpus is not None else None,
    }


def _stamps(paths: Iterable[Path]) -> dict[str, list[int]]:
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def hash_checkpoint(index: CheckpointIndex, run: Path) -> dict[str, str]:
    """SHA-256 of every file of the checkpoint, whose weights are found to be finite on the way.

    Files are read again only where size or time differ from ``run``'s record.

    The record is written when the run directory exists; it is a note of where things lay, not an input.
    """
    paths = (*index.side_files, *index.shards)
    stamps = _stamps(paths)
    note = run / LOCATION
    known: dict[str, Any] = {}
    if note.is_file():
        try:
            known = json.loads(note.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            known = {}
    if known.get("folder") == str(index.folder.resolve()) and known.get("stamps") == stamps:
        return dict(known["sha256"])
    seen = json.dumps([str(index.folder.resolve()), stamps])
    if seen not in _READ:
        known_tensors = index.config.tensor_shapes()
        weights = [ref for name, ref in index.tensors.items() if name in known_tensors]  # packed linears are not
        passing = Passing(index.nbytes)

        def digest(path: Path) -> str:
            return digest_file(path, (ref for ref in weights if ref.path == path), passing)

        # One core comes to a gigabyte or two a second with SHA-256, which a disk may well exceed.
        with ThreadPoolExecutor(FILES_AT_ONCE, "hash") as threads:
            _READ[seen] = dict(zip((path.name for path in paths), threads.map(digest, paths), strict=True))
    return dict(_READ[seen])


def note_location(index: CheckpointIndex, run: Path, hashes: dict[str, str]) -> None:
    """Record where the checkpoint lies, for ``export`` and for the next process."""
    stamps = _stamps((*index.side_files, *index.shards))
    write_json(run / LOCATION, {"folder": str(index.folder.resolve()), "stamps": stamps, "sha256": hashes})


def check_tokenizer(index: CheckpointIndex) -> Tokenizer:
    """The checkpoint's tokenizer, after its vocabulary was held against the embedding.

    Raises:
        InputError: no tokenizer, or more ids than embeddings.
    """
    tokenizer = load_tokenizer(index.folder)
    tokenizer.check_vocabulary(index.config)
    return tokenizer
