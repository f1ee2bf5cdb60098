"""The scale searches of :mod:`phi4edge.quant.search` compiled for the CPU: a candidate is one pass over the weights.

Each computes, operation by operation and in the same order, what its counterpart there computes with tensors, so both
give the same bits, on every machine: no sum is reordered and no multiplication fused with an addition. Groups lie side
by side, a lane each, so that a loop over them fills vectors of whatever width. Numba compiles them at their first use
and keeps what it made, beside the module or in its own cache. Where all values count the same, ``h`` is None, and what
it would multiply is compiled without.
"""

from __future__ import annotations

__all__ = ["minimum_steps", "nearest_symmetric", "symmetric_steps", "zero_point_steps"]

import numpy as np
import numpy.typing as npt

from phi4edge.core.compiled import compiled

Array = npt.NDArray[np.float32]

_VALUES = 1 << 12  # of groups side by side, twice as many where nothing lies beside them: they stay in a near cache
_VECTOR, _FEWEST_VECTORS = 16, 5  # lanes; an odd number of such vectors, or a group's values would share a cache's sets
_ROUND = np.float32(1.5 * 2**23)  # added and taken away again, it leaves the nearest whole number, of ties the even one
_ROUND_SMALL = np.float32(1.5 / 2)  # the same for multiples of 2⁻²⁴, as float16 has them below 2⁻¹⁴
_ZERO, _ONE, _TWO, _HALF = np.float32(0), np.float32(1), np.float32(2), np.float32(0.5)
_LEAST = np.float32(1e-38)
_SPARE = np.float32(2.0**-10)  # far more than products are rounded by
_NORMAL16, _BEYOND16 = np.float32(2.0**-14), np.float32(65520)  # least normal float16; from here on it is infinite
_INFINITE = np.float32(np.inf)
_SIZE, _EXPONENT = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)  # all but the sign; from here on it is not finite


def symmetric_steps(x: Array, h: Array | None, factors: Array, low: float, high: float, refinements: int) -> Array:
    """Steps [n] of groups ``x`` [n, group_size] for codes ``low`` … ``high``, by ``_symmetric`` there.

    ``factors`` are the candidates' spans over the extreme. Group i counts as row i mod m of ``h`` [m, group_size] says,
    or all alike.
    """
    out = np.empty(len(x), np.float32)
    pairs = np.append(factors, factors[-1:]) if len(factors) % 2 else factors
    _symmetric(*_padded(x, h), pairs, np.float32(low), np.float32(high), refinements, out)
    return out


def nearest_symmetric(
    stored: npt.NDArray[np.uint16] | npt.NDArray[np.uint32],
    factors: Array,
    codes: tuple[int, int, int],
    refinements: int,
    *,
    packed: bool,
) -> tuple[npt.NDArray[np.uint8], Array, float] | None:
    """Codes, steps [n] as float16 has them, and Σ E² of groups ``stored`` [n, group_size] that all count alike.

    ``stored`` are the bits of bfloat16 or float32, a whole number of quads in each group; None where a value is not
    finite. The steps are :func:`symmetric_steps`'s, and the codes those of a rounding to them, two to a byte where they
    are to be ``packed``: :func:`phi4edge.quant._rounding_kernels.round_groups` says how, and what ``codes`` are. All is
    done in one call, as threads that come back to Python for every few hundred rows wait for each other there.
    """
    pairs = np.append(factors, factors[-1:]) if len(factors) % 2 else factors
    out = np.empty((len(stored), stored.shape[1] // 2 if packed else stored.shape[1]), np.uint8)
    scales, lost = np.empty(len(stored), np.float32), np.zeros(stored.shape[1], np.float64)
    shift = np.uint32(0 if stored.dtype == np.uint32 else 16)
    first, last, middle = (np.float32(code) for code in codes)
    if not _nearest(stored, shift, pairs, (first, last, middle), refinements, packed, out, scales, lost):
        return None
    return out, scales, float(lost.sum())


def zero_point_steps(x: Array, h: Array | None, factors: Array, shifts: Array, top: float, refinements: int) -> Array:
    """Steps and zero points [2, n] of groups ``x`` for codes 0 … ``top``, by ``_with_zero_point`` there."""
    out = np.empty((2, len(x)), np.float32)
    _zero_point(*_padded(x, h), factors, shifts, np.float32(top), refinements, out)
    return out


def minimum_steps(x: Array, h: Array | None, factors: Array, top: float, nested: bool, refinements: int) -> Array:
    """Steps and minima [2, n] of groups ``x`` for codes 0 … ``top``, by ``_with_minimum`` there."""
    out = np.empty((2, len(x)), np.float32)
    _minimum(*_padded(x, h), factors, np.float32(top), nested, refinements, out)
    return out


def _padded(x: Array, h: Array | None) -> tuple[Array, Array | None]:
    """Groups of a whole number of quads: filled up with their first value, which counts nothing there."""
    more = -x.shape[1] % 4
    if more == 0:
        return x, h
    if h is None:
        h = np.ones((1, x.shape[1]), np.float32)
    first = np.broadcast_to(x[:, :1], (len(x), more))
    return np.concatenate((x, first), 1), np.concatenate((h, np.zeros((len(h), more), np.float32)), 1)


@compiled
def _lanes(size, h):
    vectors = (2 * _VALUES if h is None else _VALUES) // (size * _VECTOR)
    return max(_FEWEST_VECTORS, (vectors - 1) | 1) * _VECTOR


@compiled
def _lane(lanes):
    return np.empty(lanes, np.float32)


@compiled
def _groups(size, lanes):
    """Room for groups, their weights, and both multiplied; an array that is unpacked would lose its known layout."""
    groups = np.empty((3, size, lanes), np.float32)
    return groups[0], groups[1], groups[2]


@compiled
def _load(x, h, start, at, weight, weighted):
    """Groups from ``start`` on, a lane each; where there are no more, the last again."""
    for lane in range(at.shape[1]):
        group = min(start + lane, x.shape[0] - 1)
        for i in range(at.shape[0]):
            at[i, lane] = x[group, i]
        if h is not None:
            counts = group % h.shape[0]
            for i in range(at.shape[0]):
                weight[i, lane] = h[counts, i]
                weighted[i, lane] = h[counts, i] * x[group, i]


@compiled
def _times(h, i, k, q0, q1, q2, q3):
    """Four values of a group, each times what it counts."""
    if h is None:
        return q0, q1, q2, q3
    return h[i, k] * q0, h[i + 1, k] * q1, h[i + 2, k] * q2, h[i + 3, k] * q3


@compiled
def _ratio(numerator, denominator):
    return numerator / max(denominator, _LEAST) if denominator > _ZERO else _ZERO


@compiled
def _rounded(value, low, high):
    return min(max(value, low), high) + _ROUND - _ROUND


@compiled
def _fit_about(x, hx, h, inverse, point, low, high, along, square):
    """Σ h·x·q and Σ h·q² of a candidate's codes, which count from ``point`` (None: zero), by lanes."""
    along[:], square[:] = _ZERO, _ZERO
    for i in range(0, x.shape[0], 4):
        for k in range(x.shape[1]):
            p, z = inverse[k], None if point is None else point[k]
            q0, q1 = _about(x[i, k] * p, z, low, high), _about(x[i + 1, k] * p, z, low, high)
            q2, q3 = _about(x[i + 2, k] * p, z, low, high), _about(x[i + 3, k] * p, z, low, high)
            along[k] += (hx[i, k] * q0 + hx[i + 1, k] * q1) + (hx[i + 2, k] * q2 + hx[i + 3, k] * q3)
            h0, h1, h2, h3 = _times(h, i, k, q0, q1, q2, q3)
            square[k] += (h0 * q0 + h1 * q1) + (h2 * q2 + h3 * q3)


@compiled
def _about(value, point, low, high):
    return _rounded(value, low, high) if point is None else _rounded(value + point, low, high) - point


# --- symmetric --------------------------------------------------------------------------------------------------


@compiled
def _within(value, low, high):
    """The same, where a bound that is None is never exceeded."""
    if low is not None:
        value = max(value, low)
    if high is not None:
        value = min(value, high)
    return value + _ROUND - _ROUND


@compiled
def _fit(x, hx, h, one, other, low, high, low_other, high_other, along, square, along_other, square_other):
    """Σ h·x·q and Σ h·q² of the codes that two candidates give, by lanes."""
    along[:], square[:], along_other[:], square_other[:] = _ZERO, _ZERO, _ZERO, _ZERO
    for i in range(0, x.shape[0], 4):
        for k in range(x.shape[1]):
            p, q = one[k], other[k]
            p0, q0 = _within(x[i, k] * p, low, high), _within(x[i, k] * q, low_other, high_other)
            p1, q1 = _within(x[i + 1, k] * p, low, high), _within(x[i + 1, k] * q, low_other, high_other)
            p2, q2 = _within(x[i + 2, k] * p, low, high), _within(x[i + 2, k] * q, low_other, high_other)
            p3, q3 = _within(x[i + 3, k] * p, low, high), _within(x[i + 3, k] * q, low_other, high_other)
            t0, t1, t2, t3 = hx[i, k], hx[i + 1, k], hx[i + 2, k], hx[i + 3, k]
            along[k] += (t0 * p0 + t1 * p1) + (t2 * p2 + t3 * p3)
            along_other[k] += (t0 * q0 + t1 * q1) + (t2 * q2 + t3 * q3)
            t0, t1, t2, t3 = _times(h, i, k, p0, p1, p2, p3)
            square[k] += (t0 * p0 + t1 * p1) + (t2 * p2 + t3 * p3)
            t0, t1, t2, t3 = _times(h, i, k, q0, q1, q2, q3)
            square_other[k] += (t0 * q0 + t1 * q1) + (t2 * q2 + t3 * q3)


@compiled
def _fit_pair(x, hx, h, one, other, furthest, low, high, along, square, along_other, square_other):
    """The same, bounds left out that no value goes beyond; ``furthest`` from zero are the candidates' extremes."""
    reached, reached_other = furthest[0] + _SPARE, furthest[1] + _SPARE
    if max(reached, reached_other) < high + _HALF:
        _fit(x, hx, h, one, other, None, None, None, None, along, square, along_other, square_other)
    elif reached < _HALF - low and reached_other < high + _HALF:
        _fit(x, hx, h, one, other, None, high, None, None, along, square, along_other, square_other)
    elif reached_other < _HALF - low:
        _fit(x, hx, h, one, other, low, high, None, high, along, square, along_other, square_other)
    else:
        _fit(x, hx, h, one, other, low, high, low, high, along, square, along_other, square_other)


@compiled
def _better(along, square, best, scale):
    for k in range(best.shape[0]):
        score = _ratio(along[k] * along[k], square[k])
        if score > best[k]:
            best[k], scale[k] = score, _ratio(along[k], square[k])


@compiled
def _search(x, hx, h, factors, low, high, refinements, room, scale):
    """The steps of groups that are lanes; ``room`` [8, lanes] is overwritten."""
    along, square, along_other, square_other = room[0], room[1], room[2], room[3]
    inverse, one, other, best = room[4], room[5], room[6], room[7]
    inverse[:] = x[0]
    for i in range(1, x.shape[0]):
        for k in range(x.shape[1]):
            inverse[k] = x[i, k] if abs(x[i, k]) > abs(inverse[k]) else inverse[k]
    for k in range(x.shape[1]):
        inverse[k] = _ONE / (_ONE if inverse[k] == _ZERO else inverse[k])
    best[:], scale[:] = -_ONE, _ZERO
    for c in range(0, factors.shape[0], 2):
        for k in range(x.shape[1]):
            one[k], other[k] = factors[c] * inverse[k], factors[c + 1] * inverse[k]
        far = (abs(factors[c]), abs(factors[c + 1]))
        _fit_pair(x, hx, h, one, other, far, low, high, along, square, along_other, square_other)
        _better(along, square, best, scale)
        _better(along_other, square_other, best, scale)
    for _ in range(refinements):
        for k in range(x.shape[1]):
            one[k] = _ratio(_ONE, abs(scale[k])) * np.sign(scale[k])
        _fit_about(x, hx, h, one, None, low, high, along, square)
        _better(along, square, best, scale)


@compiled
def _symmetric(x, h, factors, low, high, refinements, out):
    size = x.shape[1]
    lanes = _lanes(size, h)
    at, weight, weighted = _groups(size, lanes)
    counts = None if h is None else weight
    products = at if h is None else weighted
    room, scale = np.empty((8, lanes), np.float32), _lane(lanes)
    for start in range(0, x.shape[0], lanes):
        _load(x, h, start, at, weight, weighted)
        _search(at, products, counts, factors, low, high, refinements, room, scale)
        for k in range(min(lanes, x.shape[0] - start)):
            out[start + k] = scale[k]


@compiled
def _widen(stored, shift, bits):
    """Bits of ``stored`` [count, size] as float32, the last group again behind them; whether all are finite."""
    there, flat, largest = stored.reshape(-1), bits.reshape(-1), np.uint32(0)
    for i in range(there.shape[0]):
        flat[i] = np.uint32(there[i]) << shift
    for i in range(there.shape[0]):
        largest = max(largest, flat[i] & _SIZE)
    for lane in range(stored.shape[0], bits.shape[0]):
        bits[lane] = bits[stored.shape[0] - 1]
    return largest < _EXPONENT


@compiled
def _encode(row, step, first, last, middle, found, squares):
    """Codes of a group, and the squares of what they lose."""
    least, safe = step * -middle, _ONE if step == _ZERO else step
    for i in range(row.shape[0]):
        code = min(max((row[i] - least) / safe, first), last) + _ROUND - _ROUND
        code = middle if step == _ZERO else code
        error = row[i] - (code * step + least)
        squares[i] = error * error
        found[i] = np.uint8(np.int32(code))


@compiled
def _nearest(stored, shift, factors, codes, refinements, packed, out, scales, lost):
    first, last, middle = codes
    size, lanes = stored.shape[1], _lanes(stored.shape[1], None)
    at, room, scale = np.empty((size, lanes), np.float32), np.empty((8, lanes), np.float32), _lane(lanes)
    bits, found, squares = np.empty((lanes, size), np.uint32), np.empty(size, np.uint8), np.empty(size, np.float32)
    rows, pairs, finite = bits.view(np.float32), found.view(np.uint16), True
    for start in range(0, stored.shape[0], lanes):
        count = min(lanes, stored.shape[0] - start)
        finite &= _widen(stored[start : start + count], shift, bits)
        for lane in range(0, lanes, _VECTOR):
            for i in range(size):
                for k in range(_VECTOR):
                    at[i, lane + k] = rows[lane + k, i]
        _search(at, at, None, factors, first - middle, last - middle, refinements, room, scale)
        _to_float16(scale, scale.view(np.int32))
        for lane in range(count):
            scales[start + lane] = scale[lane]
            _encode(rows[lane], scale[lane], first, last, middle, found, squares)
            for i in range(size):
                lost[i] += squares[i]
            if packed:
                for i in range(size // 2):
                    out[start + lane, i] = np.uint8(pairs[i] | (pairs[i] >> np.uint16(4)))
            else:
                out[start + lane] = found
    return finite


# --- zero points ------------------------------------------------------------------------------------------------


@compiled
def _better_point(along, square, point, best, scale, zero):
    for k in range(best.shape[0]):
        score = _ratio(along[k] * along[k], square[k])
        if score > best[k]:
            best[k], scale[k], zero[k] = score, _ratio(along[k], square[k]), point[k]


@compiled
def _zero_point(x, h, factors, shifts, top, refinements, out):
    size = x.shape[1]
    lanes = _lanes(size, h)
    at, weight, weighted = _groups(size, lanes)
    counts = None if h is None else weight
    products = at if h is None else weighted
    along, square, inverse, point, middle, span, best, scale, zero = (
        _lane(lanes),
        _lane(lanes),
        _lane(lanes),
        _lane(lanes),
        _lane(lanes),
        _lane(lanes),
        _lane(lanes),
        _lane(lanes),
        _lane(lanes),
    )
    for start in range(0, x.shape[0], lanes):
        _load(x, h, start, at, weight, weighted)
        middle[:], span[:] = _ZERO, _ZERO  # for now the least and the largest
        for i in range(size):
            for k in range(lanes):
                middle[k], span[k] = min(middle[k], at[i, k]), max(span[k], at[i, k])
        for k in range(lanes):
            span[k] -= middle[k]
            step = span[k] / top
            middle[k] = _rounded(-middle[k] / (_ONE if step == _ZERO else step), _ZERO, top)
        best[:], scale[:], zero[:] = -_ONE, _ZERO, _ZERO
        for factor in factors:
            for k in range(lanes):
                step = span[k] * factor
                inverse[k] = _ONE / (_ONE if step == _ZERO else step)
            for shift in shifts:
                for k in range(lanes):
                    point[k] = min(max(middle[k] + shift, _ZERO), top)
                _fit_about(at, products, counts, inverse, point, _ZERO, top, along, square)
                _better_point(along, square, point, best, scale, zero)
        for _ in range(refinements):
            for k in range(lanes):
                inverse[k] = _ONE / (_ONE if scale[k] == _ZERO else scale[k])
            point[:] = zero
            _fit_about(at, products, counts, inverse, point, _ZERO, top, along, square)
            _better_point(along, square, point, best, scale, zero)
        for k in range(min(lanes, x.shape[0] - start)):
            out[0, start + k], out[1, start + k] = scale[k], zero[k]


# --- minima -----------------------------------------------------------------------------------------------------


@compiled
def _fit_minimum(x, hx, h, inverse, offset, top, sum_q, sum_qq, sum_qx):
    sum_q[:], sum_qq[:], sum_qx[:] = _ZERO, _ZERO, _ZERO
    for i in range(0, x.shape[0], 4):
        for k in range(x.shape[1]):
            q0 = _rounded((x[i, k] - offset[k]) * inverse[k], _ZERO, top)
            q1 = _rounded((x[i + 1, k] - offset[k]) * inverse[k], _ZERO, top)
            q2 = _rounded((x[i + 2, k] - offset[k]) * inverse[k], _ZERO, top)
            q3 = _rounded((x[i + 3, k] - offset[k]) * inverse[k], _ZERO, top)
            h0, h1, h2, h3 = _times(h, i, k, q0, q1, q2, q3)
            sum_q[k] += (h0 + h1) + (h2 + h3)
            sum_qq[k] += (h0 * q0 + h1 * q1) + (h2 * q2 + h3 * q3)
            sum_qx[k] += (hx[i, k] * q0 + hx[i + 1, k] * q1) + (hx[i + 2, k] * q2 + hx[i + 3, k] * q3)


@compiled
def _to_float16(values, bits):
    """``values`` to the nearest float16, of ties the even one; ``bits`` is the same memory as int32."""
    for k in range(values.shape[0]):
        value = values[k]
        size = abs(value)
        if size < _NORMAL16:
            values[k] = (value + _ROUND_SMALL) - _ROUND_SMALL
        elif size >= _BEYOND16:
            values[k] = value * _INFINITE
        else:
            bits[k] = (bits[k] + np.int32(0xFFF) + ((bits[k] >> np.int32(13)) & np.int32(1))) & np.int32(-0x2000)


@compiled
def _solve_minimum(total, sum_x, sum_q, sum_qq, sum_qx, nested, a, b):
    """The step and minimum that lose least on the codes of which these are the sums."""
    for k in range(a.shape[0]):
        determinant = total[k] * sum_qq[k] - sum_q[k] * sum_q[k]
        a[k] = _ratio(total[k] * sum_qx[k] - sum_x[k] * sum_q[k], determinant)
    if not nested:
        _to_float16(a, a.view(np.int32))
    for k in range(a.shape[0]):
        above = nested and sum_x[k] > a[k] * sum_q[k]  # b would be positive, and is stored as −dmin·m
        if above:
            a[k] = _ratio(sum_qx[k], sum_qq[k])
        b[k] = _ZERO if above else (sum_x[k] - a[k] * sum_q[k]) / total[k]
    if not nested:
        _to_float16(b, b.view(np.int32))


@compiled
def _better_minimum(total, sum_x, sum_xx, sum_q, sum_qq, sum_qx, a, b, best, scale, minimum):
    for k in range(best.shape[0]):
        cross = a[k] * b[k] * sum_q[k] - a[k] * sum_qx[k] - b[k] * sum_x[k]
        error = sum_xx[k] + a[k] * a[k] * sum_qq[k] + b[k] * b[k] * total[k] + _TWO * cross
        if error < best[k]:
            best[k], scale[k], minimum[k] = error, a[k], b[k]


@compiled
def _minimum(x, h, factors, top, nested, refinements, out):
    size = x.shape[1]
    lanes = _lanes(size, h)
    at, weight, weighted = _groups(size, lanes)
    counts = None if h is None else weight
    products = at if h is None else weighted
    total, sum_x, sum_xx, sum_q, sum_qq, sum_qx, low, high = (
        _lane(lanes),
        _lane(lanes),
        _lane(lanes),
        _lane(lanes),
        _lane(lanes),
        _lane(lanes),
        _lane(lanes),
        _lane(lanes),
    )
    inverse, offset, a, b, best, scale, minimum = (
        _lane(lanes),
        _lane(lanes),
        _lane(lanes),
        _lane(lanes),
        _lane(lanes),
        _lane(lanes),
        _lane(lanes),
    )
    for start in range(0, x.shape[0], lanes):
        _load(x, h, start, at, weight, weighted)
        total[:], sum_x[:], sum_xx[:] = _ZERO, _ZERO, _ZERO
        for i in range(0, size, 4):
            for k in range(lanes):
                w0, w1, w2, w3 = products[i, k], products[i + 1, k], products[i + 2, k], products[i + 3, k]
                h0, h1, h2, h3 = _times(counts, i, k, _ONE, _ONE, _ONE, _ONE)
                total[k] += (h0 + h1) + (h2 + h3)
                sum_x[k] += (w0 + w1) + (w2 + w3)
                sum_xx[k] += (w0 * at[i, k] + w1 * at[i + 1, k]) + (w2 * at[i + 2, k] + w3 * at[i + 3, k])
        low[:], high[:] = at[0], at[0]
        for i in range(1, size):
            for k in range(lanes):
                low[k], high[k] = min(low[k], at[i, k]), max(high[k], at[i, k])
        for k in range(lanes):
            if nested:
                low[k] = min(low[k], _ZERO)
            best[k], scale[k], minimum[k] = _INFINITE, _ZERO, low[k]
        for factor in factors:
            for tilt in (-_HALF, _ZERO, _HALF):  # which end a narrower span clips
                for k in range(lanes):
                    span = high[k] - low[k]
                    step = _ONE if span * factor == _ZERO else span * factor
                    inverse[k] = _ONE / step
                    offset[k] = ((low[k] + high[k]) * _HALF - step * top * _HALF) + tilt * (span - step * top)
                _fit_minimum(at, products, counts, inverse, offset, top, sum_q, sum_qq, sum_qx)
                _solve_minimum(total, sum_x, sum_q, sum_qq, sum_qx, nested, a, b)
                _better_minimum(total, sum_x, sum_xx, sum_q, sum_qq, sum_qx, a, b, best, scale, minimum)
        for _ in range(refinements):
            for k in range(lanes):
                inverse[k] = _ONE / (_ONE if scale[k] == _ZERO else scale[k])
            offset[:] = minimum
            _fit_minimum(at, products, counts, inverse, offset, top, sum_q, sum_qq, sum_qx)
            _solve_minimum(total, sum_x, sum_q, sum_qq, sum_qx, nested, a, b)
            _better_minimum(total, sum_x, sum_xx, sum_q, sum_qq, sum_qx, a, b, best, scale, minimum)
        for k in range(min(lanes, x.shape[0] - start)):
            out[0, start + k], out[1, start + k] = scale[k], minimum[k]
