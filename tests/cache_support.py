"""What of a file is in the system's memory; Linux says so (mincore)."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path


def in_memory(path: Path, offset: int = 0, nbytes: int | None = None) -> int:
    """Bytes of a part of ``path`` that are in the system's memory; whole pages."""
    nbytes = path.stat().st_size - offset if nbytes is None else nbytes
    page = mmap.PAGESIZE
    assert offset % page == 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as m:
        pages = ctypes.create_string_buffer(-(-len(m) // page))
        start = ctypes.addressof(ctypes.c_char.from_buffer(m))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(m)), pages) == 0
    return page * sum(flag & 1 for flag in pages.raw[offset // page : -(-(offset + nbytes) // page)])
