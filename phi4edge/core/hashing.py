"""SHA-256 of files and of JSON documents, the only hash that phi4edge writes down."""

from __future__ import annotations

__all__ = ["HashedFile", "sha256_bytes", "sha256_file", "sha256_json"]

import hashlib
import json
import threading
from pathlib import Path
from typing import Any, BinaryIO

from phi4edge.core.pagecache import let_go

_LARGE = 1 << 20  # bytes


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

    Large pieces are hashed in a thread while they are written, and are on their way to the disk from then on, where the
    system can be told so: it would keep them back, and the fsync at the end would wait for all of them.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self._position = file, hashlib.sha256(), file.tell()
        assert self._position == 0, "the beginning would be missing from the hash"

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``."""
        nbytes = data.nbytes if isinstance(data, memoryview) else len(data)
        if nbytes < _LARGE:
            self._hash.update(data)
            self._file.write(data)
        else:
            hashing = threading.Thread(target=self._hash.update, args=(data,))
            hashing.start()
            try:
                self._file.write(data)
            finally:
                hashing.join()
            let_go(self._file.fileno(), self._position, nbytes)
        self._position += nbytes

    @property
    def position(self) -> int:
        """Bytes written."""
        return self._position

    @property
    def sha256(self) -> str:
        """Hex digest of all that was written."""
        return self._hash.hexdigest()
