"""Files read and written around the system's page cache, where it would only be in the way (O_DIRECT).

What passes through the cache is copied, and takes a page of memory for every page of file. For files that are larger
than the memory nothing is won by that, and on a virtual machine whose host takes free pages back it costs many times
what the disk does (benchmarks/scale/around_cache.py). A disk wants whole sectors at addresses to match, so buffers are
aligned, reads begin and end on sectors, and the end of a file that is no whole sector goes through the cache. Where
there is no such access (some network drives and file systems in memory, other systems than Linux), files are read and
written as usual: the bytes are the same.
"""

from __future__ import annotations

__all__ = ["DirectWriter", "aligned_buffer", "read_range"]

import errno
import fcntl
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from phi4edge.core.pagecache import let_go

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

_SECTOR = 1 << 12  # bytes, or a whole multiple of a disk's
_DIRECT = getattr(os, "O_DIRECT", 0)
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)
_CACHED = 1 << 24  # so much of a file's beginning is written through the cache: a small one stays there
_BUFFER = 1 << 22  # bytes sent at a time


def aligned_buffer(nbytes: int) -> Bytes:
    """Room for :func:`read_range` of at most ``nbytes``, wherever they lie in the file."""
    import numpy as np  # what only writes and hashes small files starts without it

    room = -(-nbytes // _SECTOR) * _SECTOR + _SECTOR
    memory: Bytes = np.empty(room + _SECTOR, dtype=np.uint8)
    start = -memory.ctypes.data % _SECTOR
    return memory[start : start + room]


def read_range(path: Path, offset: int, nbytes: int, *, around_cache: bool = False, into: Bytes | None = None) -> Bytes:
    """Bytes ``offset`` … ``offset + nbytes`` of a file, or fewer where it ends early.

    ``around_cache``: not through the page cache, where that can be. ``into`` is an :func:`aligned_buffer` for them, of
    which the result is a part.

    Raises:
        OSError: the file cannot be read.
    """
    buffer = aligned_buffer(nbytes) if into is None else into
    first = offset - offset % _SECTOR if around_cache else offset  # where the buffer begins
    part = buffer[offset - first :][:nbytes]
    assert len(part) == nbytes, "the buffer is too small"
    done = 0
    if around_cache and _DIRECT and nbytes:
        sectors = -(-(offset + nbytes - first) // _SECTOR) * _SECTOR
        done = min(max(_read_direct(path, buffer[:sectors], first) - (offset - first), 0), nbytes)
    if done < nbytes:
        with path.open("rb", buffering=0) as file:
            while done < nbytes and (count := os.preadv(file.fileno(), [part[done:].data], offset + done)):
                done += count
    return part[:done]


def _read_direct(path: Path, sectors: Bytes, offset: int) -> int:
    """Whole ``sectors`` of a file from one on; bytes that are there: fewer where it ends, none where it refuses."""
    done = 0
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | _DIRECT)
        try:
            while done < len(sectors):
                count = os.preadv(descriptor, [sectors[done:].data], offset + done)
                done += count
                if count == 0 or count % _SECTOR:  # the file's end
                    break
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
    return done


class DirectWriter:
    """Appends to an open file, around the page cache but for its beginning and its end.

    Data is copied into one of two buffers while the other is on its way to the disk. Nothing is complete before
    :meth:`finish`.
    """

    def __init__(self, descriptor: int, seen: Callable[[memoryview], object]) -> None:
        """``descriptor`` is open for writing, at its start; ``seen`` is called with all that is written, in order."""
        self._descriptor, self._seen = descriptor, seen
        self._buffers: list[Bytes] = []
        self._filled = self._written = 0
        self._direct = False
        self._refused = not _DIRECT
        self._threads = ThreadPoolExecutor(2, "write")
        self._pending: list[Future[None]] = []

    def write(self, data: memoryview) -> None:
        """Append ``data``, bytes.

        Raises:
            OSError: this or what was appended before could not be written.
        """
        source, taken = data.cast("B"), 0
        while taken < len(source):
            if not self._buffers:
                self._buffers = [aligned_buffer(_BUFFER)[:_BUFFER] for _ in range(2)]
            count = min(len(source) - taken, _BUFFER - self._filled)
            self._buffers[0][self._filled : self._filled + count] = source[taken : taken + count]
            self._filled, taken = self._filled + count, taken + count
            if self._filled == _BUFFER:
                self._send()

    def finish(self) -> None:
        """Write what is left; the descriptor stands at the end then, and is as it was. Nothing can be appended after.

        Raises:
            OSError: it could not be written.
        """
        try:
            self._wait()
            if self._filled:
                self._go_direct(False)
                rest = self._buffers[0][: self._filled]
                self._seen(rest.data)
                self._write(rest)
                self._filled = 0
        finally:
            self.close()

    def close(self) -> None:
        """Stop, whatever became of what was appended."""
        self._threads.shutdown(wait=True)
        self._go_direct(False)
        self._buffers = []

    def _send(self) -> None:
        self._wait()
        full, self._filled = self._buffers[0], 0
        self._buffers.reverse()
        if self._written >= _CACHED and not self._direct and not self._refused:
            self._go_direct(True)
        self._pending = [self._threads.submit(self._see, full), self._threads.submit(self._write, full)]

    def _see(self, data: Bytes) -> None:
        self._seen(data.data)

    def _wait(self) -> None:
        pending, self._pending = self._pending, []
        for one in pending:
            one.result()

    def _write(self, data: Bytes) -> None:
        done = 0
        while done < len(data):
            try:
                done += os.write(self._descriptor, data[done:].data)
            except OSError as error:
                if not self._direct or error.errno not in _REFUSED:
                    raise
                self._go_direct(False)
                self._refused = True
            else:
                if self._direct and done % _SECTOR:  # a full disk took a part: the rest will be refused by itself
                    self._go_direct(False)
        if not self._direct:
            let_go(self._descriptor, self._written, len(data))
        self._written += len(data)

    def _go_direct(self, direct: bool) -> None:
        if direct == self._direct:
            return
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | _DIRECT if direct else flags & ~_DIRECT)
        except OSError:
            self._refused = True
        else:
            self._direct = direct
