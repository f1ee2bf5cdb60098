"""What a run depends on, hashed: the part of ``run.json`` that must not change between two processes."""

from __future__ import annotations

__all__ = [
    "FILES_AT_ONCE",
    "LOCATION",
    "check_tokenizer",
    "hash_checkpoint",
    "known_hashes",
    "note_location",
    "open_inputs",
    "stamps_of",
]

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from phi4edge import __version__
from phi4edge.checkpoint.digest import Gate, digest_file
from phi4edge.checkpoint.index import CheckpointIndex
from phi4edge.core.atomic import write_json
from phi4edge.core.errors import InputError
from phi4edge.core.pagecache import outgrows_memory
from phi4edge.core.recipe import CorpusRecipe
from phi4edge.model.tokenizer import Tokenizer, load_tokenizer

LOCATION = "location.json"  # where the checkpoint lay, and stamps that say whether its hashes still hold
_READ: dict[str, dict[str, str]] = {}  # hashes of what this process has read, by folder and stamps
FILES_AT_ONCE = 2  # files that are hashed
CODE = 10  # raised when the same recipe would give other codes


def open_inputs(corpus: CorpusRecipe | None, corpus_sha256: str | None, hashes: dict[str, str]) -> dict[str, Any]:
    """The inputs that every kind of run has in common."""
    return {
        "code": f"{__version__}/{CODE}",
        "checkpoint": hashes,
        "corpus_sha256": corpus_sha256 if corpus is not None else None,
    }


def stamps_of(index: CheckpointIndex) -> dict[str, list[int]]:
    """Size and time of change (ns) of every file of the checkpoint: where both are the same, so is the file."""
    found = ((path.name, path.stat()) for path in (*index.side_files, *index.shards))
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found}


def known_hashes(index: CheckpointIndex, run: Path) -> dict[str, str] | None:
    """What :func:`hash_checkpoint` gives, where nothing need be read for it."""
    stamps, note = stamps_of(index), run / LOCATION
    known: dict[str, Any] = {}
    if note.is_file():
        try:
            known = json.loads(note.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            known = {}
    if known.get("folder") == str(index.folder.resolve()) and known.get("stamps") == stamps:
        return dict(known["sha256"])
    read = _READ.get(_seen(index, stamps))
    return None if read is None else dict(read)


def _seen(index: CheckpointIndex, stamps: dict[str, list[int]]) -> str:
    return json.dumps([str(index.folder.resolve()), stamps])


def hash_checkpoint(index: CheckpointIndex, run: Path, gate: Gate | None = None) -> dict[str, str]:
    """SHA-256 of every file of the checkpoint, whose weights are found to be finite on the way.

    Files are read again only where size or time differ from ``run``'s record. ``gate`` holds the reading back, whose
    whole is all that is read.

    Raises:
        InputError: a file cannot be read, or changes meanwhile; or a weight is NaN or Inf.
        StoppedError: the gate was stopped.
    """
    known = known_hashes(index, run)
    if known is not None:
        return known
    stamps, shapes = stamps_of(index), index.config.tensor_shapes()
    weights = [ref for name, ref in index.tensors.items() if name in shapes]  # packed linears are not
    around_cache, paths = outgrows_memory(index.nbytes), (*index.side_files, *index.shards)
    whole = sum(size for size, _ in stamps.values())

    def digest(path: Path) -> str:
        tensors = (ref for ref in weights if ref.path == path)
        if gate is None:
            return digest_file(path, tensors, around_cache=around_cache)
        return digest_file(path, tensors, around_cache=around_cache, passes=lambda n: gate.passes(n / whole))

    # One core comes to a gigabyte or two a second with SHA-256, which a disk may well exceed. Beside other work one
    # file at a time keeps up with it.
    with ThreadPoolExecutor(FILES_AT_ONCE if gate is None else 1, "hash") as threads:
        found = dict(zip((path.name for path in paths), threads.map(digest, paths), strict=True))
    if stamps_of(index) != stamps:
        raise InputError(f"{index.folder}: files were changed while they were read", "leave them alone, and try again")
    _READ[_seen(index, stamps)] = found
    return dict(found)


def note_location(index: CheckpointIndex, run: Path, hashes: dict[str, str]) -> None:
    """Record where the checkpoint lies, for ``export`` and for the next process."""
    stamps = stamps_of(index)
    write_json(run / LOCATION, {"folder": str(index.folder.resolve()), "stamps": stamps, "sha256": hashes})


def check_tokenizer(index: CheckpointIndex) -> Tokenizer:
    """The checkpoint's tokenizer, after its vocabulary was held against the embedding.

    Raises:
        InputError: no tokenizer, or more ids than embeddings.
    """
    tokenizer = load_tokenizer(index.folder)
    tokenizer.check_vocabulary(index.config)
    return tokenizer
