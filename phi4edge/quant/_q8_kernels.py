"""Q8_0's rounding in one pass, compiled for the CPU.

Nothing compiled is shared with other modules: Numba keeps what it compiled by the file that a function stands in, and
would not see another file change.
"""

from __future__ import annotations

__all__ = ["round_q8_0"]

import numpy as np
import numpy.typing as npt

from phi4edge.core.compiled import compiled

_BLOCK = 32
_ROUND = np.float32(1.5 * 2**23)  # added and taken away again, it leaves the nearest whole number, of ties the even one
_ZERO, _HALF, _ONE, _TOP, _MOST = (np.float32(x) for x in (0, 0.5, 1, 127, np.finfo(np.float32).max))


def round_q8_0(x: npt.NDArray[np.float32], out: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """d [n] float32 of blocks ``x`` [n, 32], whose codes go to ``out`` [n, 34] from byte 2 on, int8."""
    d = np.empty(len(x), np.float32)
    _round(x, out, d)
    return d


@compiled
def _round(x, out, d):
    codes = np.empty(_BLOCK, np.int8)
    for block in range(x.shape[0]):
        most = _ZERO
        for i in range(_BLOCK):
            most = max(most, abs(x[block, i]))
        d[block] = most / _TOP
        inverse = _ONE / d[block]
        inverse = _ZERO if inverse > _MOST else inverse  # d is zero, or so small that float16 makes it zero
        for i in range(_BLOCK):
            scaled = x[block, i] * inverse
            code = scaled + _ROUND - _ROUND
            off = scaled - code
            # Of ties the even one was taken; it should be the one further from zero.
            code += _ONE if off == _HALF and scaled > _ZERO else _ZERO
            code -= _ONE if off == -_HALF and scaled < _ZERO else _ZERO
            codes[i] = np.int8(np.int32(code))
        for i in range(_BLOCK):
            out[block, 2 + i] = np.uint8(codes[i])
