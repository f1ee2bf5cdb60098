"""Scale search: the grid parameters of each group that lose least, weighted by importance.

For a group of weights x with importance h (diag H, or ones) and codes q on a grid a·q + b, minimise
Σ h (x − a·q − b)². Candidate steps shrink and stretch the one that spans the group's range; for each, the codes
follow by rounding, and then a (and b) by weighted least squares, in closed form. The best candidate is
refined twice more. With an absmax step the extreme weight of a group rules all others; the search is worth
as much as error compensation does at 4 bits.

Symmetric 4-bit grids have one level more below zero than above, so both signs of the step are tried.

Groups of a super-block are first searched each on its own, a and b any real numbers (b at most 0), and stored as
nearly as the grid can. Then whole numbers near those found are tried for each group, with the codes that follow, and
the shared float16 numbers by least squares, in turns. It is the minimum's steps that cost most: with 6 bits for all
minima of a super-block they are as wide as a third of q5_k's own, so which of them suits a group's weights best
must be tried on the weights.
"""

from __future__ import annotations

__all__ = ["minimum_steps", "nearest", "search", "search_again", "symmetric_steps", "zero_point_steps"]

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phi4edge.quant import _search_kernels as kernels
from phi4edge.quant.grid import Grid, NestedGrid, Params, half, reciprocal
from phi4edge.quant.scheme import Scheme

_CHUNK = 1 << 20  # weights searched at a time, where no compiled search does it
_REFINEMENTS = 2
# Values of a group that count alike, and how many of the spans are tried: on a symmetric grid, and on others.
_ALIKE: tuple[tuple[int, int, int], ...] = ((32, 8, 10), (64, 11, 13), (128, 13, 13))
# In a super-block, how far from the whole numbers found others are tried, (scales, minima), turn by turn.
_REACHES = {"symmetric": ((8, 0), (0, 0)), "with minimum": ((2, 2), (0, 0))}
_REACH_AGAIN = {"symmetric": (8, 0), "with minimum": (4, 2)}  # where weights have changed since


def _ratios(scheme: Scheme, size: int, *, alike: bool) -> list[float]:
    """Candidate spans of the codes over the absmax span of ``size`` values: above 1 the extremes are clipped.

    Where all values count alike, nothing is gained by clipping one of a few by much: of hundreds of thousands of drawn
    groups one or none came out otherwise for the spans that are left out (benchmarks/kernels/spans.py).
    """
    if scheme.bits >= 8:
        return [0.98, 1.0, 1.02, 1.05]
    if not scheme.symmetric and (scheme.bits == 5 or scheme.nested):
        return [0.9 + 0.025 * i for i in range(13)]
    counts = next((counts for most, *counts in _ALIKE if size <= most), (17, 17)) if alike else (17, 17)
    count = counts[0 if scheme.symmetric else 1]
    return [0.85 + 0.05 * i for i in range(count)]


def search(grid: Grid, values: Tensor, importance: Tensor | None = None) -> Params:
    """Parameters of every group of ``values``.

    ``values`` [rows, groups, group_size] float32; ``importance`` [groups, group_size], [rows, groups, group_size]
    or None for equal weights; whole super-blocks where the scheme has them. Returns what the grid stores.

    Raises:
        InputError: a scale exceeds float16.
    """
    rows, _, size = values.shape
    weight = None if importance is None else _importance(importance).reshape(-1, size)
    params = _search(grid, values.reshape(-1, size), weight)
    return {field: params[field].reshape(rows, -1) for field in grid.fields}


def search_again(grid: NestedGrid, params: Params, group: int, values: Tensor, importance: Tensor) -> Params:
    """``params`` of one super-block a row, with the whole numbers of one ``group`` fit to what has become of it.

    ``values`` [rows, group_size] float32, ``importance`` [group_size]. The float16 numbers that groups share stay.
    """
    x = values[:, None, :]
    part = slice(group, group + 1)
    before = {field: p if field in grid.tunable else p[:, part] for field, p in params.items()}
    reach = _REACH_AGAIN["symmetric" if grid.scheme.symmetric else "with minimum"]
    after, _ = _near(grid, before, x, _importance(importance[None, :]).expand_as(x), *reach)
    return {
        field: p if field in grid.tunable else torch.cat((p[:, :group], after[field], p[:, group + 1 :]), dim=1)
        for field, p in params.items()
    }


def _importance(importance: Tensor) -> Tensor:
    # A channel that calibration never excited still counts a little: its weights must stay near.
    floor = importance.mean(-1, keepdim=True) * 1e-4 + torch.finfo(torch.float32).tiny
    return torch.maximum(importance, floor)


def _search(grid: Grid, x: Tensor, h: Tensor | None) -> Params:
    """Of groups ``x`` [n, group_size]; group i counts as row i mod m of ``h`` [m, group_size] says, None: all alike."""
    if isinstance(grid, NestedGrid):
        return _nested(grid, x, h)
    if grid.scheme.symmetric:
        return {"scales": half(_symmetric(grid, x, h))}
    if grid.scheme.grid == "affine":
        scale, zero = _with_zero_point(grid, x, h)
        return {"scales": half(scale), "zeros": zero.to(torch.uint8)}
    scale, minimum = _with_minimum(grid, x, h)
    return {"scales": half(scale), "mins": half(minimum)}


# Each of the three searches below has a compiled twin, which computes the same bits.


def _symmetric(grid: Grid, x: Tensor, h: Tensor | None) -> Tensor:
    """Steps of the groups [n]."""
    low, high = float(grid.low - grid.middle), float(grid.high - grid.middle)
    factors = _symmetric_factors(grid, x.shape[1], alike=h is None).to(x.device)
    if x.device.type == "cpu":
        return _compiled(kernels.symmetric_steps, x, h, factors.numpy(), low, high, _REFINEMENTS)
    return torch.cat([symmetric_steps(*part, factors, low, high) for part in _parts(x, h)])


def _symmetric_factors(grid: Grid, size: int, *, alike: bool) -> Tensor:
    """Where candidates put the extreme of a group of ``size`` values."""
    low, high = float(grid.low - grid.middle), float(grid.high - grid.middle)
    ends = (low,) if low == -high else (low, high)
    return torch.tensor([end * ratio for ratio in _ratios(grid.scheme, size, alike=alike) for end in ends])


def nearest(grid: Grid, stored: Tensor) -> tuple[Tensor, Params, float] | None:
    """:func:`search`, then :func:`phi4edge.quant.rounding.round_to`, of weights that all count alike, in one pass.

    ``stored`` [rows, groups, group_size], bfloat16 or float32. Returns codes as a run stores them, what the grid
    stores, and the squared error. None where that is not done in one pass, or a value is not finite.

    Raises:
        InputError: a scale exceeds float16.
    """
    rows, _, size = stored.shape
    whole = isinstance(grid, NestedGrid) or not grid.scheme.symmetric or size % 4
    if whole or stored.device.type != "cpu" or stored.dtype not in (torch.bfloat16, torch.float32):
        return None
    factors = _symmetric_factors(grid, size, alike=True).numpy()
    bits = stored.contiguous().view(torch.uint16 if stored.dtype == torch.bfloat16 else torch.uint32)
    codes = (grid.low, grid.high, grid.middle)
    found = kernels.nearest_symmetric(
        bits.reshape(-1, size).numpy(), factors, codes, _REFINEMENTS, packed=grid.scheme.bits == 4
    )
    if found is None:
        return None
    scales = half(torch.from_numpy(found[1])).reshape(rows, -1)
    return torch.from_numpy(found[0]).reshape(rows, -1), {"scales": scales}, found[2]


def symmetric_steps(x: Tensor, h: Tensor, factors: Tensor, low: float, high: float) -> Tensor:
    """Steps [n] of groups that are columns, ``x`` and ``h`` [group_size, n]; ``factors`` are spans over the extreme."""
    extreme = _extreme(x)
    inverse = _nonzero(extreme).reciprocal()
    hx = h * x
    best, scale = torch.full_like(extreme, -1.0), torch.zeros_like(extreme)

    def consider(inverse: Tensor) -> None:
        nonlocal best, scale
        q = (x * inverse).clamp_(low, high).round_()
        along, square = _sum(hx * q), _sum((h * q).mul_(q))
        score = _ratio(along * along, square)  # what the group's error falls by at the best step
        better = score > best
        best = torch.where(better, score, best)
        scale = torch.where(better, _ratio(along, square), scale)

    for factor in factors:
        consider(factor * inverse)
    for _ in range(_REFINEMENTS):
        consider(_ratio(torch.ones_like(scale), scale.abs()) * scale.sign())
    return scale


def _extreme(x: Tensor) -> Tensor:
    """The value of each column of ``x`` that is furthest from zero, with its sign; the first of equals."""
    size = x.abs()
    turn = torch.arange(len(x), 0, -1, device=x.device, dtype=torch.float32)[:, None]
    first = len(x) - ((size == size.amax(0)) * turn).amax(0, keepdim=True).long()
    return x.gather(0, first).squeeze(0)


def _with_zero_point(grid: Grid, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
    """Steps and zero points of the groups, [n] each."""
    top = float(grid.high)
    ratios = _ratios(grid.scheme, x.shape[1], alike=h is None)
    factors = torch.tensor([1 / (top * ratio) for ratio in ratios], device=x.device)
    shifts = torch.tensor((-1.0, 0.0, 1.0) if grid.scheme.bits < 8 else (0.0,), device=x.device)
    if x.device.type == "cpu":
        found = _compiled(kernels.zero_point_steps, x, h, factors.numpy(), shifts.numpy(), top, _REFINEMENTS)
    else:
        found = torch.cat([zero_point_steps(*part, factors, shifts, top) for part in _parts(x, h)], dim=1)
    return found[0], found[1]


def zero_point_steps(x: Tensor, h: Tensor, factors: Tensor, shifts: Tensor, top: float) -> Tensor:
    """Steps and zero points [2, n] of groups that are columns; candidates are ``factors`` of a group's span."""
    low, high = x.amin(0).clamp_max(0), x.amax(0).clamp_min(0)
    hx, span = h * x, high - low
    middle = (-low / _nonzero(span / top)).clamp_(0, top).round_()
    best, scale, zero = torch.full_like(low, -1.0), torch.zeros_like(low), torch.zeros_like(low)

    def consider(inverse: Tensor, point: Tensor) -> None:
        nonlocal best, scale, zero
        q = (x * inverse).add_(point).clamp_(0, top).round_().sub_(point)
        along, square = _sum(hx * q), _sum((h * q).mul_(q))
        score = _ratio(along * along, square)
        better = score > best
        best = torch.where(better, score, best)
        scale = torch.where(better, _ratio(along, square), scale)
        zero = torch.where(better, point, zero)

    for factor in factors:
        for shift in shifts:
            consider(_nonzero(span * factor).reciprocal(), (middle + shift).clamp_(0, top))
    for _ in range(_REFINEMENTS):
        consider(_nonzero(scale).reciprocal(), zero)
    return torch.stack((scale, zero))


def _with_minimum(grid: Grid, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
    """Steps and minima of the groups, [n] each."""
    top, nested = float(grid.high), grid.scheme.nested
    ratios = _ratios(grid.scheme, x.shape[1], alike=h is None)
    factors = torch.tensor([1 / (top * ratio) for ratio in ratios], device=x.device)
    if x.device.type == "cpu":
        found = _compiled(kernels.minimum_steps, x, h, factors.numpy(), top, nested, _REFINEMENTS)
    else:
        found = torch.cat([minimum_steps(*part, factors, top, nested) for part in _parts(x, h)], dim=1)
    return found[0], found[1]


def minimum_steps(x: Tensor, h: Tensor, factors: Tensor, top: float, nested: bool) -> Tensor:
    """Steps and minima [2, n] of groups that are columns; candidates are ``factors`` of a group's span."""
    low, high = x.amin(0), x.amax(0)
    if nested:
        low = low.clamp_max(0)
    hx, span = h * x, high - low
    total, sum_x, sum_xx = _sum(h), _sum(hx), _sum(hx * x)
    best, scale, minimum = torch.full_like(low, torch.inf), torch.zeros_like(low), low.clone()

    def consider(inverse: Tensor, offset: Tensor) -> None:
        nonlocal best, scale, minimum
        q = (x - offset).mul_(inverse).clamp_(0, top).round_()
        hq = h * q
        sum_q, sum_qq, sum_qx = _sum(hq), _sum(hq * q), _sum(hx * q)
        determinant = total * sum_qq - sum_q * sum_q
        a = _ratio(total * sum_qx - sum_x * sum_q, determinant)
        if nested:
            above = sum_x > a * sum_q  # b would be positive, and is stored as −dmin·m
            a = torch.where(above, _ratio(sum_qx, sum_qq), a)
            b = torch.where(above, torch.zeros_like(a), (sum_x - a * sum_q) / total)
        else:
            # What is stored is rounded to float16; the minimum answers for the rounded step.
            a = a.to(torch.float16).float()
            b = ((sum_x - a * sum_q) / total).to(torch.float16).float()
        error = sum_xx + a * a * sum_qq + b * b * total + 2 * (a * b * sum_q - a * sum_qx - b * sum_x)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, a, scale)
        minimum = torch.where(better, b, minimum)

    for factor in factors:
        step = _nonzero(span * factor)
        for tilt in (-0.5, 0.0, 0.5):  # which end a narrower span clips
            consider(step.reciprocal(), ((low + high) * 0.5 - step * top * 0.5) + tilt * (span - step * top))
    for _ in range(_REFINEMENTS):
        consider(_nonzero(scale).reciprocal(), minimum)
    return torch.stack((scale, minimum))


def _compiled(kernel: Callable[..., NDArray[np.float32]], x: Tensor, h: Tensor | None, *arguments: Any) -> Tensor:
    return torch.from_numpy(kernel(x.contiguous().numpy(), None if h is None else h.contiguous().numpy(), *arguments))


def _parts(x: Tensor, h: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Groups and what they count, a group a column [group_size, some], so many at a time."""
    h = _counts(x, h)
    step = max(1, _CHUNK // h.numel()) * len(h)
    for start in range(0, len(x), step):
        part = x[start : start + step]
        yield part.T.contiguous(), h.repeat(-(-len(part) // len(h)), 1)[: len(part)].T.contiguous()


def _counts(x: Tensor, h: Tensor | None) -> Tensor:
    """``h``, or that all values of groups ``x`` count the same."""
    return torch.ones(1, x.shape[1], device=x.device) if h is None else h


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator.clamp_min(1e-38), torch.zeros_like(numerator))


def _nonzero(step: Tensor) -> Tensor:
    return torch.where(step == 0, torch.ones_like(step), step)


def _sum(values: Tensor) -> Tensor:
    """Sums over the first axis of [group_size, n], four rows after four: one order on every machine and device."""
    if more := -len(values) % 4:
        values = torch.cat((values, values.new_zeros(more, *values.shape[1:])))
    total = torch.zeros_like(values[0])
    for first, second, third, fourth in values.reshape(-1, 4, *values.shape[1:]):
        total += (first + second).add_(third + fourth)
    return total


def _nested(grid: NestedGrid, x: Tensor, h: Tensor | None) -> Params:
    blocks = (-1, grid.scheme.unit // grid.scheme.group_size)
    if grid.scheme.symmetric:
        a = _symmetric(grid, x, h)
        b = a * -grid.middle
    else:
        a, b = _with_minimum(grid, x, h)
    h = _counts(x, h)
    h = h.repeat(len(x) // len(h), 1) if len(h) > 1 else h.expand_as(x)
    x, h = x.reshape(*blocks, x.shape[1]), h.reshape(*blocks, h.shape[1])
    trial = found = grid.store(a.reshape(blocks), b.reshape(blocks), h.sum(2))
    best = torch.full((x.shape[0], 1), torch.inf, device=x.device)
    for reach in _REACHES["symmetric" if grid.scheme.symmetric else "with minimum"]:
        trial, error = _near(grid, trial, x, h, *reach)
        better = error < best
        best = torch.where(better, error, best)
        found = {field: torch.where(better, trial[field], found[field]) for field in grid.fields}
        trial = _shared(grid, trial, x, h)
    return found


def _near(grid: NestedGrid, params: Params, x: Tensor, h: Tensor, far: int, far_min: int) -> tuple[Params, Tensor]:
    """Whole numbers at most ``far`` and ``far_min`` off that lose least, and what a super-block loses: [blocks, 1]."""
    low, high = grid.sub_range
    d, s = params["scales"].float(), params["sub_scales"].float()
    dmin, m = (params["mins"].float(), params["sub_mins"].float()) if "mins" in params else (d, s)
    best, best_s, best_m = torch.full_like(s, torch.inf), s, m
    for off in range(-far, far + 1):
        trial_s = (s + off).clamp_(low, high)
        a = (d * trial_s)[..., None]
        inverse = reciprocal(a)
        # Codes about the middle keep their values when the minimum makes good what the scale changes.
        middle_m = m + (d * (trial_s - s) * (grid.high / 2) * reciprocal(dmin)).round_()
        for off_min in range(-far_min, far_min + 1):
            trial_m = (middle_m + off_min).clamp_(low, high)
            lowest = a * -grid.middle if grid.scheme.symmetric else -(dmin * trial_m)[..., None]
            rest = x - lowest
            q = (rest * inverse).round_().clamp_(grid.low, grid.high)
            error = rest.sub_(q.mul_(a)).square_().mul_(h).sum(2)
            better = error < best
            best = torch.where(better, error, best)
            best_s, best_m = torch.where(better, trial_s, best_s), torch.where(better, trial_m, best_m)
    whole = {"sub_scales": best_s, "sub_mins": best_m}
    found = {field: whole[field].to(params[field].dtype) if field in whole else params[field] for field in grid.fields}
    return found, best.sum(1, keepdim=True)


def _shared(grid: NestedGrid, params: Params, x: Tensor, h: Tensor) -> Params:
    """The same whole numbers with the d and dmin that lose least on the codes that ``params`` give."""
    a, b = (step[..., None] for step in grid.steps(params))
    q, s = grid.encode(x, a, b), params["sub_scales"].float()
    if grid.scheme.symmetric:
        q = (q - grid.middle) * s[..., None]
        d = (h * x * q).sum((1, 2)) * reciprocal((h * q * q).sum((1, 2)))
        return {**params, "scales": d[:, None].to(torch.float16)}
    # The squared error is that of d·sq − dmin·m.
    m, sq, hx = params["sub_mins"].float(), q * s[..., None], h * x
    dd, dm, mm = (h * sq * sq).sum((1, 2)), ((h * sq).sum(2) * m).sum(1), (h.sum(2) * m * m).sum(1)
    dx, mx = (hx * sq).sum((1, 2)), (hx.sum(2) * m).sum(1)
    inverse = reciprocal(dd * mm - dm * dm)  # 0 where there are no minima
    d = torch.where(mm > 0, (mm * dx - dm * mx) * inverse, dx * reciprocal(dd))
    dmin = (dm * dx - dd * mx) * inverse
    return {**params, "scales": d[:, None].to(torch.float16), "mins": dmin[:, None].to(torch.float16)}
