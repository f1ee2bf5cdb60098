"""SHA-256 of files and of JSON documents, the only hash that phi4edge writes down."""

from __future__ import annotations

__all__ = ["HashedFile", "sha256_bytes", "sha256_file", "sha256_json"]

import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from phi4edge.core.direct_io import DirectWriter


def sha256_bytes(data: bytes | memoryview) -> str:
    """Hex digest of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file's contents, read in bounded pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(document: Any) -> str:
    """Hex digest of a JSON document in canonical form (sorted keys, no white space)."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return sha256_bytes(text.encode())


class HashedFile:
    """A file that is written from its start to its end, and hashed on the way: nothing need be read again.

    A context manager: at its end all is written, or, after an error, what was on its way is waited for. Large files go
    to the disk around the page cache (:mod:`phi4edge.core.direct_io`), one piece while the next is put together.
    """

    def __init__(self, file: BinaryIO) -> None:
        """``file`` is open for writing and empty; nothing else writes to it meanwhile."""
        assert file.tell() == 0, "the beginning would be missing from the hash"
        self._hash, self._position, self._ended = hashlib.sha256(), 0, False
        self._writer = DirectWriter(file.fileno(), self._hash.update)

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: object, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self._writer.finish()
            self._ended = True
        else:
            self._writer.close()

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``, which may change afterwards.

        Raises:
            OSError: this or what was appended before could not be written.
        """
        piece = memoryview(data).cast("B")
        self._writer.write(piece)
        self._position += len(piece)

    @property
    def position(self) -> int:
        """Bytes appended."""
        return self._position

    @property
    def sha256(self) -> str:
        """Hex digest of all that was written; known at the end."""
        assert self._ended, "not all is written yet"
        return self._hash.hexdigest()
