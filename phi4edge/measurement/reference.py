"""The reference store: full-precision logits of a text's scored positions, made once, used for every artifact.

    STORE/store.json      what it holds; written last, so that a store that is not finished is never taken for one
    STORE/tokens.bin      [chunks, context] int32
    STORE/00000.logits …  one file a chunk, see phi4edge.measurement.encoding
    STORE/key.json        what it is made of while it is made; another model or text is refused (exit 7)

The model is streamed block by block in float32. Chunks are written one by one under their final names only when they
are whole, so a process that goes on after an interruption computes the missing ones alone. Chunks whose hidden states
do not fit into RAM together are made group after group, each group reading the weights once.
"""

from __future__ import annotations

__all__ = ["ReferenceStore", "build_store", "cache_folder", "default_store", "fingerprint", "is_store", "open_store"]

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from phi4edge.checkpoint.index import CheckpointIndex
from phi4edge.checkpoint.reader import CheckpointReader
from phi4edge.core.atomic import write_bytes, write_json
from phi4edge.core.disk import full_disk, is_full, require_space
from phi4edge.core.errors import InputError, ResumeError, TargetError, UsageError
from phi4edge.core.events import SILENT, Progress
from phi4edge.core.hashing import sha256_bytes, sha256_file, sha256_json
from phi4edge.core.workdir import differences
from phi4edge.measurement.encoding import (
    StoredChunk,
    chunk_bytes,
    encode,
    encoding_name,
    is_encoding,
    read_chunk_file,
    top_of,
    write_chunk,
)
from phi4edge.measurement.texts import Chunks
from phi4edge.model.forward import stream_logits
from phi4edge.runtimes.torch_ref import sequences_in_ram

SCHEMA = "phi4edge/reference-store/1"
HEADER, KEY, TOKENS, LOCK = "store.json", "key.json", "tokens.bin", "lock"
CACHE = "PHI4EDGE_CACHE"
DTYPE = "float32"


def cache_folder() -> Path:
    """Where stores without a path of their own go: $PHI4EDGE_CACHE, or phi4edge in the user's cache folder."""
    given = os.environ.get(CACHE)
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phi4edge"


def is_store(path: Path) -> bool:
    """Whether ``path`` is a reference store, finished or not."""
    return (path / HEADER).is_file() or (path / KEY).is_file()


def first_scored(context: int) -> int:
    """The first position that is scored: the second half of a chunk."""
    return context // 2


@dataclass(frozen=True)
class ReferenceStore:
    """A finished store."""

    path: Path
    header: Mapping[str, Any]

    @property
    def vocab_size(self) -> int:
        """Logits a position."""
        return int(self.header["vocab_size"])

    @property
    def context(self) -> int:
        """Tokens a chunk."""
        return int(self.header["key"]["context"])

    @property
    def chunks(self) -> int:
        """Chunks stored."""
        return int(self.header["key"]["chunks"])

    @property
    def first(self) -> int:
        """The first scored position; the last one is context − 2, which predicts the last token."""
        return first_scored(self.context)

    @property
    def top(self) -> int | None:
        """How many of the most likely tokens are kept a position, None: all."""
        return top_of(self.header["encoding"])

    @property
    def positions(self) -> int:
        """Scored positions a chunk."""
        return self.context - 1 - self.first

    @cached_property
    def tokens(self) -> NDArray[np.int64]:
        """[chunks, context] the tokens that the logits are of.

        Raises:
            InputError: damaged.
        """
        return np.frombuffer(self._read(TOKENS), dtype="<i4").astype(np.int64).reshape(self.chunks, self.context)

    def chunk(self, number: int) -> StoredChunk:
        """The logits of one chunk, checked against their hash.

        Raises:
            InputError: damaged.
        """
        return read_chunk_file(self._read(_chunk_name(number)), self.positions, self.vocab_size, self.top)

    def _read(self, name: str) -> NDArray[np.uint8]:
        try:
            data = np.fromfile(self.path / name, dtype=np.uint8)
        except OSError as error:
            raise InputError(f"{self.path / name}: cannot be read ({error.strerror})", _DAMAGED) from error
        if sha256_bytes(data.data) != self.header["files"].get(name):
            raise InputError(f"{self.path / name}: differs from the SHA-256 in {HEADER}", _DAMAGED)
        return data


_DAMAGED = "the store is damaged: delete it, and it is computed again"


def _chunk_name(number: int) -> str:
    return f"{number:05d}.logits"


def open_store(path: Path) -> ReferenceStore:
    """Open a finished store.

    Raises:
        InputError: not a store, not finished, or of an encoding that this version does not know.
    """
    header = path / HEADER
    if not header.is_file():
        if (path / KEY).is_file():
            raise InputError(f"{path}: the store is not finished", "the command that began it goes on with it")
        raise InputError(f"{path}: not a reference store (no {HEADER})", "give a store, or a checkpoint folder")
    try:
        document = json.loads(header.read_text(encoding="utf-8"))
        schema, encoding, key = document["schema"], document["encoding"], document["key"]
        complete = {TOKENS, *(_chunk_name(i) for i in range(key["chunks"]))} <= set(document["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{header}: damaged ({error})", _DAMAGED) from error
    if schema != SCHEMA or not is_encoding(str(encoding)):
        raise InputError(
            f"{header}: {schema} in {encoding}; this version reads {SCHEMA} in {encoding_name(None)}",
            "compute the store again",
        )
    if not complete:
        raise InputError(f"{header}: names fewer files than its {key['chunks']} chunks", _DAMAGED)
    return ReferenceStore(path, document)


def fingerprint(index: CheckpointIndex) -> str:
    """The checkpoint's fingerprint; its files are hashed again only when size or times of one changed."""
    files = (*index.side_files, *index.shards)
    facts = {file.name: file.stat() for file in files}
    stamps = {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in facts.items()}
    note = cache_folder() / "fingerprints" / f"{sha256_bytes(str(index.folder.resolve()).encode())[:32]}.json"
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["stamps"] == stamps:
            return str(known["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no note, or one that cannot be read: it is made anew
    value = index.fingerprint()
    try:
        write_json(note, {"stamps": stamps, "fingerprint": value})
    except (OSError, TargetError):  # the latter: a full disk
        return value  # a cache that cannot be written costs time, nothing else
    return value


def store_key(checkpoint: CheckpointReader, text: Chunks, top: int | None = None) -> dict[str, Any]:
    """Everything that decides what a store holds."""
    count, context = text.tokens.shape
    return {
        "fingerprint": fingerprint(checkpoint.index),
        "text_sha256": text.sha256,
        "tokens_sha256": sha256_bytes(text.tokens.astype("<i4").tobytes()),
        "context": context,
        "chunks": count,
        "dtype": DTYPE,
        "encoding": encoding_name(top),
    }


def default_store(key: Mapping[str, Any]) -> Path:
    """Where the store of ``key`` lies when the user names no place."""
    return cache_folder() / "references" / sha256_json(dict(key))[:32]


def build_store(
    checkpoint: CheckpointReader,
    text: Chunks,
    path: Path | None = None,
    progress: Progress = SILENT,
    top: int | None = None,
) -> ReferenceStore:
    """The store of ``checkpoint`` on ``text`` in ``path`` (None: the cache); what is there already is not redone.

    ``top``: keep so many of the most likely tokens a position and the sum of the others, None: all.

    Raises:
        UsageError: ``top`` is not below the vocabulary.
        InputError: no room on the disk, damaged weights, or ``path`` holds something else.
        ResumeError: ``path`` holds the store of another model, text or setting.
    """
    if top is not None and not 0 < top < checkpoint.config.vocab_size:
        raise UsageError(
            f"--store-top {top} is not between 1 and {checkpoint.config.vocab_size - 1}",
            "leave it out to keep the whole vocabulary",
        )
    key = store_key(checkpoint, text, top)
    path = path or default_store(key)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file, not a folder", "choose another --store")
    if path.is_dir() and not is_store(path) and {p.name for p in path.iterdir()} - {LOCK}:
        raise InputError(f"{path}: is not empty and not a reference store", "choose another --store")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with _locked(path / LOCK, progress):
            if (path / HEADER).is_file():
                store = open_store(path)
                _check_key(path, store.header["key"], key)
                return store
            _begin(path, key)
            _compute(path, checkpoint, text, top, progress)
            return _finish(path, checkpoint, text, key)
    except OSError as error:
        if is_full(error):
            raise full_disk(path, error) from error
        raise InputError(
            f"{path}: the reference store cannot be written ({error.strerror})",
            f"name another place with --store or ${CACHE}; chunks that are whole are kept",
        ) from error


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """One process makes a store; another waits, and then finds it made."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.note(f"waiting for the process that makes {path.parent}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _check_key(path: Path, found: Any, key: dict[str, Any]) -> None:
    changed = differences(found, key)
    if changed:
        raise ResumeError(
            f"{path} is the store of something else: {'; '.join(changed[:3])}",
            "choose another --store, or leave --store out to use the cache",
        )


def _begin(path: Path, key: dict[str, Any]) -> None:
    marker = path / KEY
    if not marker.is_file():
        write_json(marker, key)
        return
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResumeError(f"{marker}: damaged ({error})", "delete the folder, or choose another --store") from error
    _check_key(path, found, key)


def _compute(path: Path, checkpoint: CheckpointReader, text: Chunks, top: int | None, progress: Progress) -> None:
    """Write every chunk that is not there yet."""
    count, context = text.tokens.shape
    first, vocab = first_scored(context), checkpoint.config.vocab_size
    size = chunk_bytes(context - 1 - first, vocab, top)
    missing = [i for i in range(count) if not _is_whole(path / _chunk_name(i), size)]
    hint = f"give fewer --chunks, free space, or name another place with --store or ${CACHE}"
    require_space(path, len(missing) * size, "the store", hint)
    progress.note(f"reference logits: {len(missing)} of {count} chunks to compute, into {path}")
    group = sequences_in_ram(checkpoint, context)
    for start in range(0, len(missing), group):
        numbers = missing[start : start + group]
        tokens = torch.from_numpy(text.tokens[numbers])
        for number, logits in zip(
            numbers, stream_logits(checkpoint, tokens, first=first, progress=progress), strict=True
        ):
            following = torch.from_numpy(text.tokens[number, first + 1 :])
            write_chunk(path / _chunk_name(number), encode(logits[:-1], following, top))


def _is_whole(path: Path, size: int) -> bool:
    """A chunk takes its name only when it is written and on disk, so its size tells."""
    return path.is_file() and path.stat().st_size == size


def _finish(path: Path, checkpoint: CheckpointReader, text: Chunks, key: dict[str, Any]) -> ReferenceStore:
    count, context = text.tokens.shape
    positions, vocab = context - 1 - first_scored(context), checkpoint.config.vocab_size
    tokens = text.tokens.astype("<i4").tobytes()
    write_bytes(path / TOKENS, tokens)
    files = {TOKENS: sha256_bytes(tokens)}
    noise, tail = np.empty((count, positions)), np.empty((count, positions))
    for number in range(count):
        name = _chunk_name(number)
        files[name] = sha256_file(path / name)
        data = np.fromfile(path / name, dtype=np.uint8)
        chunk = read_chunk_file(data, positions, vocab, top_of(key["encoding"]))
        noise[number], tail[number] = chunk.noise, chunk.tail_mass
    header = {
        "schema": SCHEMA,
        "key": key,
        "model": checkpoint.index.name,
        "dtype": DTYPE,
        "encoding": key["encoding"],
        "vocab_size": vocab,
        "config": checkpoint.config.raw,
        "noise_floor_kld": float(noise.mean()),
        "noise_max_kld": float(noise.max()),
        "tail_mass": float(tail.mean()),
        "tail_mass_max": float(tail.max()),
        "text": {"name": text.name, "sha256": text.sha256, "characters": text.characters},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "files": files,
    }
    write_json(path / HEADER, header)
    return open_store(path)
