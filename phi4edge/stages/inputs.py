"""What a run depends on, hashed: the part of ``run.json`` that must not change between two processes."""

from __future__ import annotations

__all__ = [
    "FILES_AT_ONCE",
    "LOCATION",
    "check_tokenizer",
    "check_unchanged",
    "hash_checkpoint",
    "hashed_weights",
    "known_hashes",
    "note_location",
    "open_inputs",
    "remembered_hashes",
    "stamps_of",
]

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from phi4edge import __version__
from phi4edge.checkpoint.digest import digest_file
from phi4edge.checkpoint.index import CheckpointIndex, TensorRef
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


def check_unchanged(index: CheckpointIndex, stamps: dict[str, list[int]]) -> None:
    """Hold the checkpoint's files to be those that had ``stamps``.

    Raises:
        InputError: one is not.
    """
    changed = [name for name, found in stamps_of(index).items() if found != stamps.get(name)]
    if changed:
        raise InputError(
            f"{index.folder}: {', '.join(changed)} changed while the checkpoint was read",
            "leave its files alone, and try again",
        )


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


def hash_checkpoint(index: CheckpointIndex, run: Path) -> dict[str, str]:
    """SHA-256 of every file of the checkpoint, whose weights are found to be finite on the way.

    Files are read again only where size or time differ from ``run``'s record.

    Raises:
        InputError: a file cannot be read, or changes meanwhile; or a weight is NaN or Inf.
    """
    known = known_hashes(index, run)
    if known is not None:
        return known
    weights, paths = hashed_weights(index), (*index.side_files, *index.shards)
    around_cache = outgrows_memory(index.nbytes)

    def digest(path: Path) -> str:
        return digest_file(path, (ref for ref in weights if ref.path == path), around_cache=around_cache)

    def digests() -> dict[Path, str]:
        # One core comes to a gigabyte or two a second with SHA-256, which a disk may well exceed.
        with ThreadPoolExecutor(FILES_AT_ONCE, "hash") as threads:
            return dict(zip(paths, threads.map(digest, paths), strict=True))

    return remembered_hashes(index, digests)


def hashed_weights(index: CheckpointIndex) -> list[TensorRef]:
    """What is to be finite: packed linears are not weights."""
    shapes = index.config.tensor_shapes()
    return [ref for name, ref in index.tensors.items() if name in shapes]


def remembered_hashes(index: CheckpointIndex, digests: Callable[[], Mapping[Path, str]]) -> dict[str, str]:
    """What ``digests`` gives for all files of the checkpoint, by their names; this process asks for it once.

    Raises:
        InputError: a file changed meanwhile; what ``digests`` raises.
    """
    stamps = stamps_of(index)
    found = {path.name: digest for path, digest in digests().items()}
    check_unchanged(index, stamps)
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
