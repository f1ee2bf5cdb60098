"""Codes of GGML's 32-weight blocks put in their places in one pass, compiled for the CPU.

Tensors would take a dozen passes over pieces of sixteen bytes. Nothing compiled is shared with other modules: Numba
keeps what it compiled by the file that a function stands in, and would not see another file change.
"""

from __future__ import annotations

__all__ = ["put_nibbles"]

import numpy as np
import numpy.typing as npt

from phi4edge.core.compiled import compiled

Bytes = npt.NDArray[np.uint8]

_HALF, _LOW, _HIGH, _FOUR = 8, np.uint8(0x0F), np.uint8(0xF0), np.uint8(4)


def put_nibbles(nibbles: Bytes, first: Bytes) -> Bytes:
    """Blocks [n, fields + 16]: what each begins with, ``first`` [n, fields], and 32 codes.

    ``nibbles`` [n, 16]: two codes a byte, weight 2j in the low half of byte j and 2j + 1 in the high one. In a block
    byte j holds weights j and j + 16.
    """
    out = np.empty((len(nibbles), first.shape[1] + 2 * _HALF), np.uint8)
    _put(nibbles, first, out)
    return out


@compiled
def _put(nibbles, first, out):
    fields = first.shape[1]
    for block in range(nibbles.shape[0]):
        for i in range(fields):
            out[block, i] = first[block, i]
        for j in range(_HALF):
            here, there = nibbles[block, j], nibbles[block, j + _HALF]
            out[block, fields + 2 * j] = (here & _LOW) | (there << _FOUR)
            out[block, fields + 2 * j + 1] = (here >> _FOUR) | (there & _HIGH)
