"""Values on their way to bfloat16 units, rounded in one pass as they are put where they belong, compiled for the CPU.

Rounded to nearest, of ties to the even one, as torch rounds; finite values and infinities come out with its bits.
Torch takes a pass over memory for each step, and wakes its threads for every one of them, which for what one sample
makes takes longer than the pass. Nothing compiled is shared with other modules: Numba keeps what it compiled by the
file that a function stands in, and would not see another file change.
"""

from __future__ import annotations

__all__ = ["put_in_pairs", "put_values"]

import numpy as np
import numpy.typing as npt

from phi4edge.core.compiled import compiled

Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.uint16]  # bits of bfloat16 values
Pairs = npt.NDArray[np.uint32]  # bits of two

_HALF, _ODD, _UPPER, _HIGH = np.uint32(0x7FFF), np.uint32(1), np.uint32(16), np.uint32(0xFFFF0000)


def put_in_pairs(rows: Array, out: Pairs) -> None:
    """``rows`` [tokens, width] into ``out`` [pairs, width], two tokens a pair, the first in the low half.

    Behind the last of an odd number stands zero.
    """
    _pair(rows.view(np.uint32), out)


def put_values(codes: Bytes, a: Array, b: Array, out: Halves) -> None:
    """Into ``out`` what ``codes`` [rows, in_features] stand for, a·q + b of their groups [rows, groups]."""
    _decode(codes, a, b, out)


@compiled
def _pair(bits, out):
    tokens, width = bits.shape
    for pair in range(out.shape[0]):
        first, second = 2 * pair, 2 * pair + 1
        if second < tokens:
            for i in range(width):
                low, high = bits[first, i], bits[second, i]
                low = (low + _HALF + ((low >> _UPPER) & _ODD)) >> _UPPER
                high = (high + _HALF + ((high >> _UPPER) & _ODD)) & _HIGH
                out[pair, i] = low | high
        else:
            for i in range(width):
                low = bits[first, i]
                out[pair, i] = (low + _HALF + ((low >> _UPPER) & _ODD)) >> _UPPER


@compiled
def _decode(codes, a, b, out):
    rows, groups = a.shape
    size = codes.shape[1] // groups
    values = np.empty(size, np.float32)
    bits = values.view(np.uint32)
    for row in range(rows):
        for group in range(groups):
            step, least, start = a[row, group], b[row, group], group * size
            for i in range(size):
                values[i] = np.float32(codes[row, start + i]) * step + least
            for i in range(size):
                here = bits[i]
                out[row, start + i] = np.uint16((here + _HALF + ((here >> _UPPER) & _ODD)) >> _UPPER)
