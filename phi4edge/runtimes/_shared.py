"""Memory that this process and a worker of ours both see: logits cross over by being written once.

A pipe copies them twice through the kernel, a few kB at a time, and into memory that is new to the reader each time; on
a small model that was a twentieth of a measurement. There are two places, so that one can be read while the worker is
at work on the other.
"""

from __future__ import annotations

__all__ = ["SharedRows", "copy_rows"]

import mmap
import os
import tempfile

import numpy as np
from numpy.typing import NDArray

_PLACES = 2


class SharedRows:
    """The owner's side; a child gets ``descriptor`` by inheritance."""

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("phi4edge-logits")
        else:  # macOS: a file without a name, which stays in the page cache
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        self._memory: mmap.mmap | None = None
        self._size = self._turn = 0  # bytes of a place, places given so far

    def place(self, nbytes: int) -> tuple[int, int]:
        """Where the next ``nbytes`` shall be written: offset, and bytes of the whole; other than those given last."""
        if nbytes > self._size:
            self._size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
            os.ftruncate(self.descriptor, _PLACES * self._size)
            self._memory = mmap.mmap(self.descriptor, _PLACES * self._size)
        self._turn += 1
        return self._turn % _PLACES * self._size, _PLACES * self._size

    def rows(self, offset: int, shape: tuple[int, int]) -> NDArray[np.float32]:
        """What lies at ``offset``, float32; overwritten when the place is given again."""
        assert self._memory is not None
        return np.frombuffer(self._memory, "<f4", shape[0] * shape[1], offset).reshape(shape)

    def close(self) -> None:
        """Let go of it; arrays that are still held stay as they are."""
        os.close(self.descriptor)


def copy_rows(memory: mmap.mmap, offset: int, rows: NDArray[np.float32]) -> int:
    """The worker's side: write ``rows`` at ``offset``; the offset behind them."""
    np.copyto(np.frombuffer(memory, "<f4", rows.size, offset).reshape(rows.shape), rows)
    return offset + rows.nbytes
