"""A checkpoint's files read once, from their start to their end: hashed, and their weights found to be finite.

What is read next is on its way while the last piece is looked at and hashed, so that this takes as long as the disk
or SHA-256 does, whichever is slower. Weights are looked at as they are stored: a value is NaN or Inf if and only if
all bits of its exponent are set.
"""

from __future__ import annotations

__all__ = ["digest_file"]

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from phi4edge.checkpoint._exponents import has_exponent
from phi4edge.checkpoint.index import TensorRef
from phi4edge.checkpoint.reader import check_values, stored_dtype
from phi4edge.core.ahead import ahead
from phi4edge.core.errors import InputError
from phi4edge.core.pagecache import Passing

_PIECE = 1 << 24  # bytes
_EXPONENTS: dict[torch.dtype, np.int16 | np.int32] = {
    torch.bfloat16: np.int16(0x7F80),
    torch.float16: np.int16(0x7C00),
    torch.float32: np.int32(0x7F800000),
}


def digest_file(path: Path, tensors: Iterable[TensorRef] = (), passing: Passing | None = None) -> str:
    """SHA-256 of ``path``; the values of ``tensors`` that lie in it are looked at on the way.

    ``passing`` says what of the file stays in memory.

    Raises:
        InputError: one of them is NaN or Inf, and where; or the file cannot be read, or ends early.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            ordered = sorted(tensors, key=lambda ref: ref.offset)
            with closing(ahead(_pieces(file, ordered, passing))) as pieces:
                for ref, first, piece in pieces:
                    hashing = threading.Thread(target=digest.update, args=(piece.data,))
                    hashing.start()
                    try:
                        if ref is not None:
                            _check(ref, first, piece)
                    finally:
                        hashing.join()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _pieces(
    file: BinaryIO, tensors: list[TensorRef], passing: Passing | None
) -> Iterator[tuple[TensorRef | None, int, NDArray[np.uint8]]]:
    """The whole file in order: (the tensor that a piece is of, index of its first value in it, bytes)."""
    position = 0
    for ref in tensors:
        for start in range(position, ref.offset, _PIECE):  # a header, or what is not looked at
            yield None, 0, _read(file, start, min(start + _PIECE, ref.offset), passing)
        width, position = stored_dtype(ref).itemsize, ref.offset + ref.nbytes
        for start in range(ref.offset, position, _PIECE):
            yield ref, (start - ref.offset) // width, _read(file, start, min(start + _PIECE, position), passing)
    size = os.fstat(file.fileno()).st_size
    for start in range(position, size, _PIECE):
        yield None, 0, _read(file, start, min(start + _PIECE, size), passing)


def _read(file: BinaryIO, start: int, stop: int, passing: Passing | None) -> NDArray[np.uint8]:
    buffer = np.empty(stop - start, dtype=np.uint8)
    done = 0
    while done < len(buffer):
        count = os.preadv(file.fileno(), [buffer.data[done:]], start + done)
        if count == 0:
            raise InputError(f"{file.name}: file ends {len(buffer) - done} bytes early")
        done += count
    if passing is not None:
        passing.read(file.fileno(), start, stop - start)
    return buffer


def _check(ref: TensorRef, first: int, piece: NDArray[np.uint8]) -> None:
    values = torch.from_numpy(piece).view(stored_dtype(ref))
    exponent = _EXPONENTS.get(values.dtype)
    if exponent is None:
        if values.is_floating_point():
            check_values(ref, values, first)
    elif has_exponent(piece.view(exponent.dtype), exponent):
        check_values(ref, values, first)
