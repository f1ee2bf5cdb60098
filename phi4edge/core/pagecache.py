"""What the system keeps of files in memory that nobody else wants: asked for ahead, and let go where it would not fit.

A checkpoint that fits stays there until it is read again. One that is larger is read twice from the disk whatever one
does, and where the memory is full, every page that is read takes another's place: so such a file is hashed around the
cache (:mod:`phi4edge.core.direct_io`), and a weight that was read through it is let go when it has been used. Nothing
here holds or changes any data, and where the system cannot be told, nothing happens.
"""

from __future__ import annotations

__all__ = ["let_go", "outgrows_memory", "will_need"]

import os
from contextlib import suppress

from phi4edge.core.memory import available_bytes

_FITS = 0.8  # of the memory that is available: so much of a file stays there until it is read again


def outgrows_memory(nbytes: int) -> bool:
    """Whether so many bytes of files would not stay in memory until they are read again."""
    available = available_bytes()
    return available is not None and nbytes > _FITS * available


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
