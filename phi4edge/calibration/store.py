"""Activations of all calibration samples: in RAM where they fit, in a file where the budget asks for it.

The file is read and written by position, a few samples at a time, so what is resident is what is in use.
"""

from __future__ import annotations

__all__ = ["ActivationStore"]

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from phi4edge.core.atomic import atomic_file
from phi4edge.core.errors import InputError


class ActivationStore:
    """An array [samples, length, width], float32 unless ``dtype`` says otherwise."""

    def __init__(
        self, samples: int, length: int, width: int, path: Path | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.shape, self._dtype = (samples, length, width), dtype
        self._row = length * width * dtype.itemsize  # bytes of a sample
        self._memory = torch.empty(samples, length, width, dtype=dtype) if path is None else None
        self._file: int | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            path.unlink()  # scratch: the space is given back however the process ends
            os.posix_fallocate(self._file, 0, max(samples * self._row, 1))

    @classmethod
    def of(cls, values: Tensor) -> ActivationStore:
        """A store over ``values`` [samples, length, width] in RAM, without a copy."""
        store = cls(0, values.shape[1], values.shape[2], dtype=values.dtype)
        store.shape = (values.shape[0], values.shape[1], values.shape[2])
        store._memory = values
        return store

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes."""
        return self.shape[0] * self._row

    def read(self, start: int, stop: int) -> Tensor:
        """Samples ``start:stop``; treat as read-only."""
        if self._memory is not None:
            return self._memory[start:stop]
        assert self._file is not None
        # torch's own memory is aligned as the array in RAM is; matrix products may round by alignment.
        out = torch.empty(stop - start, *self.shape[1:], dtype=self._dtype)
        _transfer(os.preadv, self._file, _bytes_of(out), start * self._row)
        return out

    def write(self, start: int, values: Tensor) -> None:
        """Put ``values`` [count, length, width] at sample ``start``."""
        if self._memory is not None:
            self._memory[start : start + values.shape[0]] = values
            return
        assert self._file is not None
        _transfer(os.pwritev, self._file, _bytes_of(values.detach().to("cpu", self._dtype)), start * self._row)

    def save(self, path: Path) -> str:
        """Write the array to ``path`` atomically, raw little-endian; its sha256."""
        digest = hashlib.sha256()
        with atomic_file(path) as file:
            for i in range(self.shape[0]):
                data = _bytes_of(self.read(i, i + 1))
                digest.update(data)
                file.write(data)
        return digest.hexdigest()

    def load(self, path: Path, sha256: str) -> bool:
        """Fill the array from ``path``; False where the file is missing or not the one that was saved."""
        if not path.is_file() or path.stat().st_size != self.nbytes:
            return False
        digest = hashlib.sha256()
        with path.open("rb") as file:
            for i in range(self.shape[0]):
                data = bytearray(file.read(self._row))
                digest.update(data)
                self.write(i, torch.frombuffer(data, dtype=self._dtype).reshape(1, *self.shape[1:]))
        return digest.hexdigest() == sha256

    def close(self) -> None:
        """Give back RAM or disk."""
        self._memory = None
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _bytes_of(values: Tensor) -> memoryview:
    """The memory of ``values``, or of a contiguous copy."""
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _transfer(call: object, descriptor: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        count = call(descriptor, [view[done:]], offset + done)  # type: ignore[operator]
        if count == 0:
            raise InputError("scratch file of activations ended early")
        done += count
