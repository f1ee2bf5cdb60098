"""What the system keeps of files in memory that nobody else wants: asked for ahead, and let go where it would not fit.

A checkpoint that is larger than this memory is read from its start to its end, and then again. By itself the system
keeps what was read last, which is the last to be asked for again; and where its memory is full, every page that is
read or written has to take another's place, which took as long as writing the whole artifact did. So what was read is
let go, but for the beginning, which the second reading finds there. Nothing here holds or changes any data, and where
the system cannot be told, nothing happens.
"""

from __future__ import annotations

__all__ = ["Passing", "let_go", "outgrows_memory", "will_need"]

import os
import threading
from contextlib import suppress

from phi4edge.core.memory import available_bytes

_FITS, _KEPT = 0.8, 0.4  # shares of the memory that is available: so much stays, of a file so much that does not


def outgrows_memory(nbytes: int) -> bool:
    """Whether so many bytes of files would not stay in memory until they are read again."""
    available = available_bytes()
    return available is not None and nbytes > _FITS * available


class Passing:
    """Files of ``nbytes`` in all that are read once now, and from their beginning again later."""

    def __init__(self, nbytes: int) -> None:
        available = available_bytes() or 0
        self._room = int(_KEPT * available) if outgrows_memory(nbytes) else nbytes
        self._lock = threading.Lock()

    def read(self, descriptor: int, offset: int, nbytes: int) -> None:
        """So many bytes of an open file were read, in whichever thread."""
        with self._lock:
            self._room -= nbytes
            stays = self._room >= 0
        if not stays:
            let_go(descriptor, offset, nbytes)


def will_need(descriptor: int, offset: int, nbytes: int) -> None:
    """Have a part of an open file read into memory meanwhile."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)


def let_go(descriptor: int, offset: int, nbytes: int) -> None:
    """Nobody here asks for this part of an open file again. What of it was written is on its way to the disk then."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)
