"""SHA-256 of a checkpoint's files from what somebody else reads of them, so that nearly all is read once.

Whoever uses weights up says beforehand which pieces he will read, in which order, and shows each while he has it. A
file is hashed from its start to its end: a piece that is shown when the file is hashed up to it is taken as it is. All
else is read here: what nobody wants, and what was shown too early, as blocks 6 to 9 are where a file has 10 to 13
before them. Who shows a piece waits only for what lies right before it, which is a matter of a few reads.

Values that are read here are found to be finite on the way; those that are shown, whoever shows them looks at.
"""

from __future__ import annotations

__all__ = ["FedDigest", "Segment", "StoppedError"]

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phi4edge.checkpoint.digest import PIECE, check_piece, read_piece
from phi4edge.checkpoint.index import TensorRef
from phi4edge.checkpoint.reader import stored_dtype
from phi4edge.core.direct_io import aligned_buffer

Segment = tuple[Path, int, int]  # of a file, bytes from … to

_NEAR = 3 << 29  # bytes before a piece that are hashed while its reader waits: an embedding, or a few blocks


class StoppedError(Exception):
    """Files are not hashed to their ends, as nobody waits for that any more."""


class _State(Enum):
    LATER = auto()  # will be read some time
    COMING = auto()  # is being read
    SHOWN = auto()
    PAST = auto()  # its reader has used it up


@dataclass
class _Part:
    """A piece that somebody reads."""

    file: _File
    start: int
    stop: int
    state: _State = _State.LATER
    data: memoryview | None = None


@dataclass
class _File:
    path: Path
    size: int
    weights: list[TensorRef]  # in the file's order
    parts: list[_Part] = field(default_factory=list)  # the same
    shown: list[_Part] = field(default_factory=list)
    at: int = 0  # hashed up to here
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)


_Read = tuple[int, int]  # bytes from … to that are to be read here


class FedDigest:
    """Hashes ``files`` in a thread of its own (:meth:`run`), while others read them."""

    def __init__(
        self,
        files: Sequence[Path],
        weights: Iterable[TensorRef],
        wanted: Iterable[Segment],
        *,
        around_cache: bool,
    ) -> None:
        """``weights`` are looked at for what is not finite; ``wanted`` are the pieces that will be shown."""
        refs = sorted(weights, key=lambda ref: ref.offset)
        self._files = [_File(path, path.stat().st_size, [ref for ref in refs if ref.path == path]) for path in files]
        by_path = {file.path: file for file in self._files}
        self._parts: dict[tuple[Path, int], _Part] = {}
        for path, start, stop in wanted:
            file = by_path[path]
            self._parts[path, start] = part = _Part(file, start, stop)
            file.parts.append(part)
        for file in self._files:
            file.parts.sort(key=lambda part: part.start)
        self._around_cache, self._stopped = around_cache, False
        self._taken: _Part | None = None
        self._lock = threading.Lock()
        self._offered, self._advanced = threading.Condition(self._lock), threading.Condition(self._lock)

    # --- who reads -------------------------------------------------------------------------------------------

    def coming(self, path: Path, start: int) -> None:
        """The piece that begins there is being read, and will be shown."""
        with self._lock:
            self._set(self._parts[path, start], _State.COMING)

    def show(self, path: Path, start: int, data: memoryview) -> None:
        """The piece that begins there has been read: ``data``, which stays as it is until :meth:`release` returns."""
        with self._lock:
            self._set(self._parts[path, start], _State.SHOWN, data)

    def release(self, path: Path, start: int) -> None:
        """The piece is used up; waits while it is being hashed, or soon will be."""
        part = self._parts[path, start]
        with self._lock:  # until it is past: it must not be taken in between
            self._advanced.wait_for(lambda: not self._awaited(part))
            self._set(part, _State.PAST)

    def _awaited(self, part: _Part) -> bool:
        if part is self._taken:
            return True
        return not self._stopped and part.state is _State.SHOWN and _is_near(part)

    def _set(self, part: _Part, state: _State, data: memoryview | None = None) -> None:
        if part.state is _State.SHOWN:
            part.file.shown.remove(part)
        if state is _State.SHOWN:
            part.file.shown.append(part)
        part.state, part.data = state, data
        if state is not _State.COMING:
            self._offered.notify()

    # --- who hashes ------------------------------------------------------------------------------------------

    def run(self) -> Mapping[Path, str]:
        """Hash all files to their ends; hex digests.

        Raises:
            InputError: a file cannot be read, or ends early; or a value read here is NaN or Inf.
            StoppedError: :meth:`stop` was called.
        """
        room = aligned_buffer(PIECE)
        try:
            while True:
                with self._lock:
                    while (found := self._next()) is None and not self._stopped and not self._ended():
                        self._offered.wait()
                    if self._stopped:
                        raise StoppedError
                    if found is None:
                        return {file.path: file.digest.hexdigest() for file in self._files}
                    file, job = found
                    self._taken = job if isinstance(job, _Part) else None
                if isinstance(job, _Part):
                    assert job.data is not None
                    file.digest.update(job.data)
                    stop = job.stop
                else:
                    start, stop = job
                    file.digest.update(self._read(file, start, stop, room).data)
                with self._lock:
                    file.at, self._taken = stop, None
                    self._advanced.notify_all()
        finally:
            with self._lock:
                self._taken = None
            self.stop()  # nobody waits for a thread that is no more

    def stop(self) -> None:
        """Hash no further."""
        with self._lock:
            self._stopped = True
            self._offered.notify_all()
            self._advanced.notify_all()

    def _ended(self) -> bool:
        return all(file.at == file.size for file in self._files)

    def _next(self) -> tuple[_File, _Part | _Read] | None:
        """What can be hashed now: a piece that is shown, or bytes to be read, first those before one that waits."""
        found: tuple[_File, _Part | _Read] | None = None
        for file in self._files:
            job = self._next_of(file)
            if isinstance(job, _Part):
                return file, job
            if job is not None and (found is None or any(map(_is_near, file.shown))):
                found = file, job
        return found

    def _next_of(self, file: _File) -> _Part | _Read | None:
        if file.at == file.size:
            return None
        index = bisect_right(file.parts, file.at, key=lambda part: part.start)
        part = file.parts[index - 1] if index and file.at < file.parts[index - 1].stop else None
        if part is not None and part.start == file.at:
            if part.state is _State.SHOWN:
                return part
            if part.state is _State.COMING:
                return None
            if part.state is _State.LATER and not any(map(_is_near, file.shown)):
                return None
        stop = part.stop if part is not None else file.parts[index].start if index < len(file.parts) else file.size
        return file.at, min(stop, file.at + PIECE, self._boundary(file))

    def _boundary(self, file: _File) -> int:
        """Where the next tensor begins or this one ends: a read is of one tensor, or of none."""
        index = bisect_right(file.weights, file.at, key=lambda ref: ref.offset)
        if index and file.at < file.weights[index - 1].offset + file.weights[index - 1].nbytes:
            return file.weights[index - 1].offset + file.weights[index - 1].nbytes
        return file.weights[index].offset if index < len(file.weights) else file.size

    def _read(self, file: _File, start: int, stop: int, room: NDArray[np.uint8]) -> NDArray[np.uint8]:
        data = read_piece(file.path, start, stop, self._around_cache, room)
        index = bisect_right(file.weights, start, key=lambda ref: ref.offset)
        if index and start < file.weights[index - 1].offset + file.weights[index - 1].nbytes:
            ref = file.weights[index - 1]
            check_piece(ref, (start - ref.offset) // stored_dtype(ref).itemsize, data)
        return data


def _is_near(part: _Part) -> bool:
    return 0 <= part.start - part.file.at <= _NEAR
