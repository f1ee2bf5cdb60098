"""A checkpoint's files read once, from their start to their end: hashed, and their weights found to be finite.

What is read next is on its way while the last piece is looked at and hashed, so that this takes as long as the disk
or SHA-256 does, whichever is slower. Weights are looked at as they are stored: a value is NaN or Inf if and only if
all bits of its exponent are set.
"""

from __future__ import annotations

__all__ = ["PIECE", "check_piece", "digest_file", "read_piece"]

import hashlib
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from phi4edge.checkpoint._exponents import has_exponent
from phi4edge.checkpoint.index import TensorRef
from phi4edge.checkpoint.reader import check_values, stored_dtype
from phi4edge.core.ahead import IN_RAM, ahead
from phi4edge.core.direct_io import aligned_buffer, read_range
from phi4edge.core.errors import InputError

PIECE = 1 << 22  # bytes read at a time
_EXPONENTS: dict[torch.dtype, np.int16 | np.int32] = {
    torch.bfloat16: np.int16(0x7F80),
    torch.float16: np.int16(0x7C00),
    torch.float32: np.int32(0x7F800000),
}


def digest_file(path: Path, tensors: Iterable[TensorRef] = (), *, around_cache: bool = False) -> str:
    """SHA-256 of ``path``; the values of ``tensors`` that lie in it are looked at on the way.

    ``around_cache``: nothing of the file need stay in memory for the next who reads it.

    Raises:
        InputError: one of them is NaN or Inf, and where; or the file cannot be read, or ends early.
    """
    digest, ordered = hashlib.sha256(), sorted(tensors, key=lambda ref: ref.offset)
    with closing(ahead(_pieces(path, ordered, around_cache))) as pieces:
        for ref, first, piece in pieces:
            hashing = threading.Thread(target=digest.update, args=(piece.data,))
            hashing.start()
            try:
                if ref is not None:
                    check_piece(ref, first, piece)
            finally:
                hashing.join()
    return digest.hexdigest()


def _pieces(
    path: Path, tensors: list[TensorRef], around_cache: bool
) -> Iterator[tuple[TensorRef | None, int, NDArray[np.uint8]]]:
    """The whole file in order: (the tensor that a piece is of, index of its first value in it, bytes).

    A piece lies where the third one before it lay, which is done with when the second one behind that is asked for.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    buffers = cycle([aligned_buffer(min(PIECE, size)) for _ in range(IN_RAM)])
    position = 0
    for ref in [*tensors, None]:
        end = size if ref is None else ref.offset
        for start in range(position, end, PIECE):  # a header, or what is not looked at
            yield None, 0, read_piece(path, start, min(start + PIECE, end), around_cache, next(buffers))
        if ref is None:
            return
        width, position = stored_dtype(ref).itemsize, ref.offset + ref.nbytes
        for start in range(ref.offset, position, PIECE):
            data = read_piece(path, start, min(start + PIECE, position), around_cache, next(buffers))
            yield ref, (start - ref.offset) // width, data


def read_piece(path: Path, start: int, stop: int, around_cache: bool, buffer: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bytes ``start`` … ``stop`` of a file, in ``buffer``.

    Raises:
        InputError: the file cannot be read, or ends early.
    """
    try:
        data = read_range(path, start, stop - start, around_cache=around_cache, into=buffer)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) < stop - start:
        raise InputError(f"{path}: file ends {stop - start - len(data)} bytes early")
    return data


def check_piece(ref: TensorRef, first: int, piece: NDArray[np.uint8]) -> None:
    """Hold bytes of the tensor that ``ref`` points at, from its ``first`` value on, to be finite.

    Raises:
        InputError: a value is NaN or Inf.
    """
    values = torch.from_numpy(piece).view(stored_dtype(ref))
    exponent = _EXPONENTS.get(values.dtype)
    if exponent is None:
        if values.is_floating_point():
            check_values(ref, values, first)
    elif has_exponent(piece.view(exponent.dtype), exponent):
        check_values(ref, values, first)
