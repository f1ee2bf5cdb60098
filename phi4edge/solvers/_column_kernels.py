"""Walks over the columns of a panel, compiled for the CPU: GPTQ's, and that of a sweep over finished codes.

A column's choice changes what every later one of the panel starts from. Rows know nothing of each other, so some of
them lie side by side, a lane each, in the nearest cache while all columns of the panel are gone through; with tensors
every column takes a dozen passes over memory, and as many calls. What a column gets from earlier ones is added in
their order, no sum is reordered and no multiplication fused with an addition.
"""

from __future__ import annotations

__all__ = ["move_panel", "round_panel"]

import numpy as np
import numpy.typing as npt

from phi4edge.core.compiled import compiled

Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

_LANES = 256  # rows side by side: with 32 columns, what the nearest cache holds
_ROUND = np.float32(1.5 * 2**23)  # added and taken away again, it leaves the nearest whole number, of ties the even one


def round_panel(
    work: Array,
    original: Array,
    triangle: Array,
    steps: tuple[Array, Array, Array],
    places: Indices,
    groups: Indices,
    d: Array,
    damp: float,
    codes: tuple[int, int],
    errors: Array,
    out: Bytes,
) -> float:
    """Round the columns of a panel one after the other; Σ d·(w̃ − q)² − damp·e² over its weights.

    ``work``, ``original`` [columns, rows]: w̃ before this panel's own errors, and w. ``triangle`` [columns, columns]:
    what an error adds to later columns, above the diagonal. ``steps``: a, b and the divisor [groups, rows], of which
    column i has row ``groups[i]``. ``codes``: the smallest and the largest. Column i's go to row ``places[i]`` of
    ``out`` [n, rows], its errors to ``errors`` [columns, rows].
    """
    low, high = map(np.float32, codes)
    lost = _round(work, original, triangle, *steps, places, groups, d, np.float32(damp), low, high, errors, out)
    return float(lost)


def move_panel(
    pull: Array, step: Array, per_step: Array, hessian: Array, inverse: Array, codes: tuple[int, int], q: Bytes
) -> tuple[Array, int]:
    """Move the codes ``q`` [columns, rows] of a panel in place, each to where its own loss is least, one after another.

    ``pull`` [columns, rows] is E H before. ``step`` and ``per_step`` [rows]: a code's step and one over it;
    ``hessian`` [columns, columns]; ``inverse`` [columns]: one over its diagonal. Returns how the errors changed,
    [columns, rows], and how many codes moved.
    """
    change = np.empty_like(pull)
    low, high = map(np.float32, codes)
    moved = _move(pull, step, per_step, hessian, inverse, low, high, q, change)
    return change, int(moved)


@compiled
def _hand_on(to, e, triangle, column, count):
    """Add what the errors ``e`` of the columns before ``column`` mean for it to ``to``, in their order."""
    j = 0
    while j + 4 <= column:
        m0, m1, m2, m3 = triangle[j, column], triangle[j + 1, column], triangle[j + 2, column], triangle[j + 3, column]
        for r in range(count):
            to[r] = to[r] + m0 * e[j, r] + m1 * e[j + 1, r] + m2 * e[j + 2, r] + m3 * e[j + 3, r]
        j += 4
    while j < column:
        m0 = triangle[j, column]
        for r in range(count):
            to[r] = to[r] + m0 * e[j, r]
        j += 1


@compiled
def _round(work, original, triangle, a, b, divisor, places, groups, d, damp, low, high, errors, out):
    columns, rows = work.shape
    e = np.empty((columns, _LANES), np.float32)
    w = np.empty(_LANES, np.float32)
    away = np.empty(_LANES, np.float32)
    lost = 0.0
    for start in range(0, rows, _LANES):
        count = min(_LANES, rows - start)
        for r in range(count):
            away[r] = np.float32(0)
        for i in range(columns):
            group, place = groups[i], places[i]
            for r in range(count):
                w[r] = work[i, start + r]
            _hand_on(w, e, triangle, i, count)
            d_i = d[i]
            for r in range(count):
                step, least = a[group, start + r], b[group, start + r]
                code = min(max((w[r] - least) / divisor[group, start + r], low), high) + _ROUND - _ROUND
                value = code * step + least
                error = original[i, start + r] - value
                off = w[r] - value
                away[r] += d_i * off * off - damp * error * error
                e[i, r] = error
                errors[i, start + r] = error
                out[place, start + r] = np.uint8(np.int32(code))
        for r in range(count):
            lost += np.float64(away[r])
    return lost


@compiled
def _move(pull, step, per_step, hessian, inverse, low, high, q, change):
    columns, rows = pull.shape
    e = np.empty((columns, _LANES), np.float32)
    g = np.empty(_LANES, np.float32)
    moved = 0
    for start in range(0, rows, _LANES):
        count = min(_LANES, rows - start)
        for i in range(columns):
            for r in range(count):
                g[r] = pull[i, start + r]
            _hand_on(g, e, hessian, i, count)
            for r in range(count):
                old = np.float32(q[i, start + r])
                code = (g[r] * per_step[start + r] * inverse[i]) + _ROUND - _ROUND + old
                code = min(max(code, low), high)
                e[i, r] = (old - code) * step[start + r]
                moved += 1 if code != old else 0
                q[i, start + r] = np.uint8(np.int32(code))
                change[i, start + r] = e[i, r]
    return moved
