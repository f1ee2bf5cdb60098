"""Beyond GPTQ: codes moved one at a time, steps refitted, for as long as that lowers a row's own objective.

    min tr(E H Eᵀ),  E = W − Q,  H = XᵀX / tokens + λ (what the solver was given, damped as it damped it)

    e, g [n]   errors of a row, and e H: half the gradient
    a, b       steps of a group: its values are v = a·q + b
    ε          1e-4, which keeps a code that has nothing to gain from moving to and fro

*Sweep* (coordinate descent): with all other codes fixed, the objective along code qᵢ is a parabola with its minimum
at qᵢ + gᵢ / (Hᵢᵢ a). The nearest whole number to it lowers the objective whenever it is not qᵢ itself.

*Refit* (least squares): with the codes fixed the objective is quadratic in the steps. On a grid whose ``b`` hangs on
``a`` (by the middle code, or by a whole-numbered zero point, which stays) the best stretch of a group's values is
t = v·g / (v H v); where ``b`` is free as well it is the solution of a 2 × 2 system in (q, 1). What is stored is
rounded (``Grid.store``) before it is judged, groups that share a stored parameter together, and a row takes it only
if its objective falls.

Both go through the columns once a pass, a block at a time, with g computed anew from E at each block: one matrix
product, n² a row, as much as GPTQ's own; on tiles of bfloat16 units (:mod:`phi4edge.model.tiles`) its factors are
rounded. The refit is therefore Gauss–Seidel over groups: each answers for the
roundings before it. Two passes come to within 0.1 % of the joint optimum of all groups of a row before that is rounded,
and (measured on real layers, q4_1) below it after; the joint system would take as long to build, and be solved beside.
Passes end when one moves fewer than 1 code in 10,000.
"""

from __future__ import annotations

__all__ = ["refine"]

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from phi4edge.model.tiles import in_pairs, needed_tiles, tiles
from phi4edge.quant.grid import Grid, grid_for, reciprocal
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.parallel import row_pieces
from phi4edge.solvers._api import Problem, Solution, SolverOptions
from phi4edge.solvers._columns import move_columns
from phi4edge.solvers._loss import layer_loss

_BLOCK = 128  # columns between two products with all errors
_SUB = 32  # columns between two products inside a block
_SETTLED = 1e-4  # share of codes moved by a pass that is not worth another
_REFITS = 2  # passes where codes stay
_EPSILON = 1e-4
_HALF_MAX = 65504.0  # float16's largest


def refine(problem: Problem, solution: Solution, options: SolverOptions) -> Solution:
    """``solution`` after at most ``options.sweeps`` sweeps over its codes, its steps refitted if ``options.refit``.

    No row's objective rises; on bfloat16 units that is so of the objective with what those make of H. Without a
    Hessian there is nothing that rounding did not see: the solution comes back as it is.
    """
    H = problem.hessian
    if H is None or not (options.refit or options.sweeps):
        return solution
    grid, linear = grid_for(problem.scheme), solution.linear
    damp_percent = max(solution.damp_percent, options.damp_percent)
    damp = damp_percent * float(H.diagonal().mean())
    pieces = [
        partial(
            _refine_rows,
            grid,
            problem.weight[piece],
            linear.rows(piece.start, piece.stop),
            H,
            damp,
            options.refit,
            options.sweeps,
            options.on_units and H.device.type == "cpu" and tiles() is not None,
        )
        for piece in row_pieces(linear.out_features, linear.in_features, options.rows)
    ]
    parts = options.run(pieces)
    codes = torch.cat([part.codes for part in parts])
    params = {field: torch.cat([part.params[field] for part in parts]) for field in grid.fields}
    refined = QuantizedLinear(linear.name, linear.scheme, codes, params)
    loss = layer_loss(problem, refined)
    return replace(solution, linear=refined, loss=loss, loss_unrefined=solution.loss, damp_percent=damp_percent)


def _refine_rows(
    grid: Grid, W: Tensor, linear: QuantizedLinear, H: Tensor, damp: float, refit: bool, sweeps: int, on_tiles: bool
) -> QuantizedLinear:
    rows = _Rows(grid, W, linear, H, damp, on_tiles)
    for _ in range(sweeps or _REFITS):
        moved = rows.go_through(move=sweeps > 0, refit=refit)
        if sweeps and moved < _SETTLED:
            break
    return rows.result(linear)


class _Rows:
    """Some rows on their way through passes. Works on transposes, where a column is contiguous."""

    def __init__(self, grid: Grid, W: Tensor, linear: QuantizedLinear, H: Tensor, damp: float, on_tiles: bool) -> None:
        self._grid, self._H, self._damp = grid, H, damp
        self._E = (W - linear.dequantize()).T.contiguous()  # [n, rows]
        self._Q = linear.codes.T.contiguous()  # [n, rows] uint8
        self._params = {field: values.clone() for field, values in linear.params.items()}
        a, b = grid.steps(linear.params)
        self._a, self._b = a.T.contiguous(), b.T.contiguous()  # [groups, rows]
        n, groups = self._E.shape[0], self._a.shape[0]
        self._size = n // groups  # columns that share a and b
        self._units = min(values.shape[1] for values in self._params.values())
        self._unit = n // self._units  # columns that share a stored parameter
        self._tiles = needed_tiles() if on_tiles else None
        self._pairs = in_pairs(self._E) if on_tiles else None  # E as it stands, for products with it

    def result(self, linear: QuantizedLinear) -> QuantizedLinear:
        """What became of ``linear``."""
        return QuantizedLinear(linear.name, linear.scheme, self._Q.T.contiguous(), self._params)

    def go_through(self, *, move: bool, refit: bool) -> float:
        """One pass over all columns; the share of codes that it moved."""
        n, moved = self._E.shape[0], 0
        block = self._unit * math.ceil(_BLOCK / self._unit)
        for start in range(0, n, block):
            part = slice(start, min(start + block, n))
            G = self._product(part).add_(self._E[part], alpha=self._damp)  # [block, rows]
            square = self._H[part, part].clone()
            square.diagonal().add_(self._damp)
            for first in range(0, G.shape[0], self._unit):
                unit = slice(first, first + self._unit)
                if move:
                    moved += self._move(start, unit, G, square)
                if refit:
                    self._refit(start, unit, G, square)
            if self._pairs is not None:
                self._pairs[part.start // 2 : part.stop // 2] = in_pairs(self._E[part])
        return moved / max(self._Q.numel(), 1)

    def _product(self, part: slice) -> Tensor:
        """Rows of H E, [block, rows] float32."""
        if self._tiles is None or self._pairs is None:
            return self._H[part] @ self._E
        out = torch.zeros(part.stop - part.start, self._E.shape[1])
        self._tiles.add(out, self._H[part].bfloat16(), self._pairs)
        return out

    def _move(self, start: int, unit: slice, G: Tensor, H: Tensor) -> int:
        """Coordinate descent over the codes of a unit; G of the whole block is kept up. Returns how many moved."""
        moved, curvature = 0, H.diagonal()
        # 1 / Hᵢᵢ, and 0 for a column that has no say at all.
        inverse = torch.where(curvature > 0, (1 - _EPSILON) / curvature, torch.zeros_like(curvature))
        sub = math.gcd(self._size, _SUB)
        for first in range(unit.start, unit.stop, sub):
            part, there = slice(first, first + sub), slice(start + first, start + first + sub)
            step, codes = self._a[there.start // self._size], self._Q[there]
            change, changed = move_columns(self._grid, G[part], step, H[part, part], inverse[part], codes)
            if changed:
                self._E[there] += change
                G.addmm_(H[:, part], change)
                moved += changed
        return moved

    def _refit(self, start: int, unit: slice, G: Tensor, H: Tensor) -> None:
        """Least squares for the steps of a unit's groups, rounded as they are stored, row by row if that is better."""
        there = slice(start + unit.start, start + unit.stop)
        groups = slice(there.start // self._size, there.stop // self._size)
        square, q = H[unit, unit], self._Q[there].float()
        a, b = self._a[groups], self._b[groups]
        wanted_a, wanted_b, weight = self._least_squares(q, a, b, G[unit], square)
        index = there.start // self._unit
        stored = self._grid.store(
            wanted_a.T.clamp(-_HALF_MAX, _HALF_MAX), wanted_b.T.clamp(-_HALF_MAX, _HALF_MAX), weight.T
        )
        new_a, new_b = (step.T for step in self._grid.steps(stored))
        change = self._values(q, a, b) - self._values(q, new_a, new_b)  # of E
        gain = -((2 * G[unit] + square @ change) * change).sum(0)
        better = gain > 0
        if not bool(better.any()):
            return
        change *= better
        self._a[groups] = torch.where(better, new_a, a)
        self._b[groups] = torch.where(better, new_b, b)
        for field, values in self._params.items():
            width = values.shape[1] // self._units
            held = values[:, index * width : (index + 1) * width]
            held.copy_(torch.where(better[:, None], stored[field], held))
        self._E[there] += change
        if unit.stop < G.shape[0]:  # nobody asks for G behind the block's last unit
            G.addmm_(H[:, unit], change)

    def _values(self, q: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """a·q + b of some groups; q [groups · size, rows], a and b [groups, rows]."""
        return (q.reshape(a.shape[0], self._size, -1) * a[:, None] + b[:, None]).reshape(q.shape)

    def _least_squares(self, q: Tensor, a: Tensor, b: Tensor, G: Tensor, H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Best a and b of each group of a unit, one after the other, and each group's curvature; all [groups, rows]."""
        free = "mins" in self._grid.fields  # whole-numbered zero points stay: a shift by one is never worth it
        best_a, best_b, weight = a.clone(), b.clone(), torch.ones_like(a)
        g = G.clone()
        for k in range(a.shape[0]):
            part = slice(k * self._size, (k + 1) * self._size)
            codes, square, pull = q[part], H[part, part], g[part]
            if free:
                along = square.sum(1)  # H·1
                Hq = square @ codes
                qq, q1, one = (codes * Hq).sum(0), (codes * along[:, None]).sum(0), along.sum()
                gq, g1 = (codes * pull).sum(0), pull.sum(0)
                determinant = qq * one - q1 * q1
                # All codes alike: only the sum of a·q and b is known, and b takes it.
                sound = determinant > 1e-6 * qq * one
                da = torch.where(sound, (gq * one - g1 * q1) / torch.where(sound, determinant, 1), 0)
                db = torch.where(one > 0, (g1 - da * q1) / torch.where(one > 0, one, 1), 0)
                best_a[k] += da
                best_b[k] += db
                weight[k] = qq
                change = -(codes * da + db)
            else:
                values = codes * a[k] + b[k]
                energy = (values * (square @ values)).sum(0)
                stretch = torch.where(energy > 0, (values * pull).sum(0) / torch.where(energy > 0, energy, 1), 0)
                best_a[k] += stretch * a[k]
                best_b[k] += stretch * b[k]
                weight[k] = energy * reciprocal(a[k]) ** 2
                change = -values * stretch
            if k + 1 < a.shape[0]:
                g.addmm_(H[:, part], change)
        return best_a, best_b, weight
