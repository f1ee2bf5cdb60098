"""Groups rounded to given steps, compared and packed in one pass over them, compiled for the CPU.

The codes are those of :meth:`phi4edge.quant.grid.Grid.encode`, bit for bit. Nothing compiled is shared with the
searches: Numba keeps what it compiled by the file that a function stands in, and would not see another file change.
"""

from __future__ import annotations

__all__ = ["round_groups"]

import numpy as np
import numpy.typing as npt

from phi4edge.core.compiled import compiled

Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_ROUND = np.float32(1.5 * 2**23)  # added and taken away again, it leaves the nearest whole number, of ties the even one
_ZERO, _ONE = np.float32(0), np.float32(1)


def round_groups(
    x: Array, a: Array, b: Array, h: Array | None, codes: tuple[int, int, int], *, packed: bool
) -> tuple[Bytes, float]:
    """The nearest codes of groups ``x`` [n, group_size] that stand for a·q + b, and Σ h·E² of what is lost.

    ``a`` and ``b`` [n]; ``h`` [m, group_size] weighs group i by row i mod m, None all alike. ``codes``: the smallest,
    the largest, and that of a group whose step is zero. ``packed``: codes below 16, two to a byte, the first lowest;
    returns [n, group_size / 2] uint8 then, otherwise [n, group_size].
    """
    size = x.shape[1] // 2 if packed else x.shape[1]
    out = np.empty((len(x), size), np.uint8)
    low, high, idle = codes
    lost = np.zeros(x.shape[1], np.float64)  # by place in the group: one order, however wide vectors are
    _round(x, a, b, h, np.float32(low), np.float32(high), np.float32(idle), packed, out, lost)
    return out, float(lost.sum())


@compiled
def _round(x, a, b, h, low, high, idle, packed, out, lost):
    size = x.shape[1]
    found = np.empty(size + size % 2, np.uint8)
    pairs, squares = found.view(np.uint16), np.empty(size, np.float32)
    for group in range(x.shape[0]):
        step, least = a[group], b[group]
        safe = _ONE if step == _ZERO else step
        counts = 0 if h is None else group % h.shape[0]
        for i in range(size):
            code = min(max((x[group, i] - least) / safe, low), high) + _ROUND - _ROUND
            code = idle if step == _ZERO else code
            error = x[group, i] - (code * step + least)
            squares[i] = error * error if h is None else error * h[counts, i] * error
            found[i] = np.uint8(np.int32(code))
        for i in range(size):
            lost[i] += squares[i]
        if packed:
            for i in range(size // 2):
                out[group, i] = np.uint8(pairs[i] | (pairs[i] >> np.uint16(4)))
        else:
            out[group] = found[:size]
