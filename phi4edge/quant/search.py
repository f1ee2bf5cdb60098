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

__all__ = ["search", "search_again"]

import math

import torch
from torch import Tensor

from phi4edge.quant.grid import Grid, NestedGrid, Params, half, reciprocal
from phi4edge.quant.scheme import Scheme

_CHUNK = 1 << 17  # weights searched at a time: what they need stays in a core's cache
_TOGETHER = 1 << 19  # of those, times candidates, computed in one operation
_REFINEMENTS = 2
_LANES, _CHAINS, _LINKS = 8, 4, 16  # of torch's sums: float32 in a vector, sums side by side, links without a cascade
# In a super-block, how far from the whole numbers found others are tried, (scales, minima), turn by turn.
_REACHES = {"symmetric": ((8, 0), (0, 0)), "with minimum": ((2, 2), (0, 0))}
_REACH_AGAIN = {"symmetric": (8, 0), "with minimum": (4, 2)}  # where weights have changed since


def _ratios(scheme: Scheme) -> list[float]:
    """Candidate spans of the codes over the absmax span: above 1 the extremes are clipped."""
    if scheme.bits >= 8:
        return [0.98, 1.0, 1.02, 1.05]
    if not scheme.symmetric and (scheme.bits == 5 or scheme.nested):
        return [0.9 + 0.025 * i for i in range(13)]
    return [0.85 + 0.05 * i for i in range(17)]


def search(grid: Grid, values: Tensor, importance: Tensor | None = None) -> Params:
    """Parameters of every group of ``values``.

    ``values`` [rows, groups, group_size] float32; ``importance`` [groups, group_size], [rows, groups, group_size]
    or None for equal weights; whole super-blocks where the scheme has them. Returns what the grid stores.

    Raises:
        InputError: a scale exceeds float16.
    """
    rows, groups, size = values.shape
    weight = None if importance is None else _importance(importance, values)
    step = max(1, _CHUNK // max(groups * size, 1))
    scratch = _Scratch(max(_TOGETHER, step * groups * size), values.device)
    parts = [
        _search(
            grid,
            values[r : r + step].reshape(-1, size),
            None if weight is None else weight[r : r + step].reshape(-1, size),
            scratch,
        )
        for r in range(0, rows, step)
    ]
    return {field: torch.cat([part[field] for part in parts]).reshape(rows, -1) for field in grid.fields}


def search_again(grid: NestedGrid, params: Params, group: int, values: Tensor, importance: Tensor) -> Params:
    """``params`` of one super-block a row, with the whole numbers of one ``group`` fit to what has become of it.

    ``values`` [rows, group_size] float32, ``importance`` [group_size]. The float16 numbers that groups share stay.
    """
    x = values[:, None, :]
    part = slice(group, group + 1)
    before = {field: p if field in grid.tunable else p[:, part] for field, p in params.items()}
    reach = _REACH_AGAIN["symmetric" if grid.scheme.symmetric else "with minimum"]
    after, _ = _near(grid, before, x, _importance(importance[None, :], x), *reach)
    return {
        field: p if field in grid.tunable else torch.cat((p[:, :group], after[field], p[:, group + 1 :]), dim=1)
        for field, p in params.items()
    }


def _importance(importance: Tensor, values: Tensor) -> Tensor:
    # A channel that calibration never excited still counts a little: its weights must stay near.
    floor = importance.mean(-1, keepdim=True) * 1e-4 + torch.finfo(torch.float32).tiny
    return torch.maximum(importance, floor).expand_as(values)


class _Scratch:
    """Memory for what is computed of all candidates at once: asking for it anew each time costs more than the work."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._flat = [torch.empty(count, device=device) for _ in range(2)]

    def pair(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Two tensors of ``shape``, of any content."""
        count = math.prod(shape)
        first, second = (flat[:count].reshape(shape) for flat in self._flat)
        return first, second


def _search(grid: Grid, x: Tensor, h: Tensor | None, scratch: _Scratch) -> Params:
    if grid.scheme.symmetric and not grid.scheme.nested:
        return {"scales": half(_symmetric(grid, x, h, scratch))}
    h = torch.ones(1, device=x.device).expand_as(x) if h is None else h
    if isinstance(grid, NestedGrid):
        return _nested(grid, x, h, scratch)
    if grid.scheme.grid == "affine":
        return _with_zero_point(grid, x, h)
    scale, minimum = _with_minimum(grid, x, h)
    return {"scales": half(scale), "mins": half(minimum)}


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator.clamp_min(1e-38), torch.zeros_like(numerator))


def _symmetric(grid: Grid, x: Tensor, h: Tensor | None, scratch: _Scratch) -> Tensor:
    """Steps of the groups ``x`` [n, group_size]: [n]; None for ``h`` weighs all alike."""
    low, high = float(grid.low - grid.middle), float(grid.high - grid.middle)
    extreme = _extreme(x)
    safe = torch.where(extreme == 0, torch.ones_like(extreme), extreme)
    ends = (low,) if low == -high else (low, high)
    inverses = torch.stack([end * ratio / safe for ratio in _ratios(grid.scheme) for end in ends])
    # A group a column, so that sums within a group are over rows, and every operation over long ones.
    weight = None if h is None else h.T.contiguous()
    x = x.T.contiguous()
    hx = x if weight is None else weight * x
    together = max(1, _TOGETHER // (x.shape[0] * inverses.shape[0]))
    fits = []
    for start in range(0, x.shape[1], together):
        some = slice(start, start + together)
        part = None if weight is None else weight[:, some]
        fits.append(_fit(x[:, some], hx[:, some], part, inverses[:, some], low, high, scratch))
    along, square = (torch.cat(parts, dim=1) for parts in zip(*fits, strict=True))
    score = _ratio(along * along, square)  # what the group's error falls by at the best step
    best = score.amax(0)
    turn = torch.arange(len(score), 0, -1, device=x.device, dtype=torch.float32)[:, None]
    first = (len(score) - ((score == best) * turn).amax(0, keepdim=True)).long()  # of equals; argmax is slow here
    scale = _ratio(along.gather(0, first), square.gather(0, first)).squeeze(0)
    for _ in range(_REFINEMENTS):
        again = _ratio(torch.ones_like(scale), scale.abs()) * scale.sign()
        along, square = (found.squeeze(0) for found in _fit(x, hx, weight, again[None], low, high, scratch))
        score = _ratio(along * along, square)
        better = score > best
        best = torch.where(better, score, best)
        scale = torch.where(better, _ratio(along, square), scale)
    return torch.where(extreme == 0, torch.zeros_like(scale), scale)


def _extreme(x: Tensor) -> Tensor:
    """The value of each row of ``x`` that is furthest from zero, with its sign; the first of equals."""
    least, most = x.amin(1), x.amax(1)
    found = torch.where(most > -least, most, least)
    equal = (most == -least).nonzero().squeeze(1)
    if equal.numel():
        rows = x[equal]
        found[equal] = rows.gather(1, rows.abs().argmax(1, keepdim=True)).squeeze(1)
    return found


def _fit(
    x: Tensor, hx: Tensor, h: Tensor | None, inverses: Tensor, low: float, high: float, scratch: _Scratch
) -> tuple[Tensor, Tensor]:
    """Σ h·x·q and Σ h·q² of the codes q that each candidate [candidates, n] gives to ``x`` [group_size, n]."""
    q, terms = scratch.pair(x.shape[0], *inverses.shape)
    torch.mul(x[:, None], inverses, out=q).round_().clamp_(low, high)
    along = _sum(torch.mul(hx[:, None], q, out=terms))
    return along, _sum(q.square_() if h is None else torch.mul(h[:, None], q, out=terms).mul_(q))


def _sum(values: Tensor) -> Tensor:
    """Sums over the first axis of [group_size, candidates, n]; overwrites ``values``.

    Added in the order in which torch adds numbers that lie side by side, eight lanes and four chains at a time: which
    candidate wins does not depend on how groups lie in memory, nor on how wide a machine's vectors are.
    """
    size, shape = values.shape[0], values.shape[1:]
    if size % _LANES or size > _LANES * _CHAINS * _LINKS:
        return values.permute(1, 2, 0).contiguous().sum(2)
    lanes = values.reshape(size // _LANES, -1)
    chains = min(_CHAINS, lanes.shape[0]) if lanes.shape[0] >= _CHAINS else 1
    whole = lanes.shape[0] // chains * chains if chains > 1 else 1
    for link in range(chains, whole, chains):
        lanes[:chains].add_(lanes[link : link + chains])
    for rest in range(whole, lanes.shape[0]):
        lanes[0].add_(lanes[rest])
    for chain in range(1, chains):
        lanes[0].add_(lanes[chain])
    total = lanes[0].reshape(_LANES, -1)
    for lane in range(1, _LANES):
        total[0].add_(total[lane])
    return total[0].reshape(shape).clone()


def _with_zero_point(grid: Grid, x: Tensor, h: Tensor) -> Params:
    top = float(grid.high)
    low, high = x.amin(1, keepdim=True).clamp_max(0), x.amax(1, keepdim=True).clamp_min(0)
    hx = h * x
    best = torch.full_like(low, -1.0)
    scale, zero = torch.zeros_like(low), torch.zeros_like(low)

    def consider(step: Tensor, point: Tensor) -> None:
        nonlocal best, scale, zero
        q = torch.round(x / step + point).clamp_(0, top) - point
        along = (hx * q).sum(1, keepdim=True)
        square = (h * q).mul_(q).sum(1, keepdim=True)
        score = _ratio(along * along, square)
        better = score > best
        best = torch.where(better, score, best)
        scale = torch.where(better, _ratio(along, square), scale)
        zero = torch.where(better, point, zero)

    for ratio in _ratios(grid.scheme):
        step = (high - low) / (top * ratio)
        step = torch.where(step == 0, torch.ones_like(step), step)
        point = torch.round(-low / (step * ratio)).clamp_(0, top)
        for shift in (-1.0, 0.0, 1.0) if grid.scheme.bits < 8 else (0.0,):
            consider(step, (point + shift).clamp(0, top))
    for _ in range(_REFINEMENTS):
        consider(torch.where(scale == 0, torch.ones_like(scale), scale), zero)
    return {"scales": half(scale.squeeze(1)), "zeros": zero.squeeze(1).to(torch.uint8)}


def _with_minimum(grid: Grid, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    top, nested = float(grid.high), grid.scheme.nested
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    if nested:
        low = low.clamp_max(0)
    total, hx = h.sum(1, keepdim=True), h * x
    sum_x, sum_xx = hx.sum(1, keepdim=True), (hx * x).sum(1, keepdim=True)
    best = torch.full_like(low, torch.inf)
    scale, minimum = torch.zeros_like(low), low.clone()

    def consider(step: Tensor, offset: Tensor) -> None:
        nonlocal best, scale, minimum
        q = torch.round((x - offset) / step).clamp_(0, top)
        hq = h * q
        sum_q, sum_qq, sum_qx = hq.sum(1, keepdim=True), (hq * q).sum(1, keepdim=True), (hx * q).sum(1, keepdim=True)
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

    span = high - low
    for ratio in _ratios(grid.scheme):
        step = span / (top * ratio)
        step = torch.where(step == 0, torch.ones_like(step), step)
        middle = (low + high) / 2
        for tilt in (-0.5, 0.0, 0.5):  # which end a narrower span clips
            consider(step, middle - step * top / 2 + tilt * (span - step * top))
    for _ in range(_REFINEMENTS):
        consider(torch.where(scale == 0, torch.ones_like(scale), scale), minimum)
    return scale.squeeze(1), minimum.squeeze(1)


def _nested(grid: NestedGrid, x: Tensor, h: Tensor, scratch: _Scratch) -> Params:
    blocks = (-1, grid.scheme.unit // grid.scheme.group_size)
    if grid.scheme.symmetric:
        a = _symmetric(grid, x, h, scratch)
        b = a * -grid.middle
    else:
        a, b = _with_minimum(grid, x, h)
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
