"""Walks over the columns of a panel: compiled on the CPU, elsewhere the same with tensors, operation by operation."""

from __future__ import annotations

__all__ = ["Panel", "Steps", "move_columns", "round_columns"]

from dataclasses import dataclass

import torch
from torch import Tensor

from phi4edge.quant.grid import Grid, Params, reciprocal
from phi4edge.solvers._column_kernels import move_panel, round_panel


class Steps:
    """What a code of each group stands for, row by row: a, b, and what is divided by, [groups, rows] float32 each."""

    def __init__(self, grid: Grid, groups: int, rows: int, device: torch.device) -> None:
        self._grid = grid
        self.a, self.b, self.divisor = torch.empty(3, groups, rows, device=device).unbind()

    def put(self, first: int, params: Params) -> None:
        """Those of groups ``first`` and following, from their parameters."""
        a, b = (step.T for step in self._grid.steps(params))
        there = slice(first, first + len(a))
        self.a[there], self.b[there] = a, b
        self.divisor[there] = torch.where(a == 0, torch.ones_like(a), a)


@dataclass(frozen=True)
class Panel:
    """Columns that are rounded one after the other, and what is known of them; all [columns, …]."""

    work: Tensor  # [columns, rows]: w̃ before this panel's own errors; used up
    original: Tensor  # [columns, rows]: w
    triangle: Tensor  # [columns, columns]: above the diagonal, what an error adds to later columns
    d: Tensor  # [columns]: what (w̃ − q)² counts
    groups: Tensor  # [columns] int64: whose steps are theirs
    places: Tensor  # [columns] int64: where they stand in the weight


def round_columns(grid: Grid, panel: Panel, steps: Steps, damp: float, errors: Tensor, codes: Tensor) -> float:
    """Round the columns of ``panel``; what they lose, Σ d·(w̃ − q)² − damp·e².

    Codes go to their places in ``codes`` [n, rows] uint8, errors e = w − q to ``errors`` [columns, rows].
    """
    if panel.work.device.type == "cpu":
        return round_panel(
            panel.work.numpy(),
            panel.original.numpy(),
            panel.triangle.contiguous().numpy(),
            (steps.a.numpy(), steps.b.numpy(), steps.divisor.numpy()),
            panel.places.numpy(),
            panel.groups.numpy(),
            panel.d.numpy(),
            damp,
            (grid.low, grid.high),
            errors.numpy(),
            codes.numpy(),
        )
    return _round_columns(grid, panel, steps, damp, errors, codes)


def _round_columns(grid: Grid, panel: Panel, steps: Steps, damp: float, errors: Tensor, codes: Tensor) -> float:
    work, lost = panel.work, torch.zeros((), dtype=torch.float64, device=panel.work.device)
    for i, (group, place) in enumerate(zip(panel.groups.tolist(), panel.places.tolist(), strict=True)):
        w, a, b = work[i], steps.a[group], steps.b[group]
        q = ((w - b) / steps.divisor[group]).round_().clamp_(grid.low, grid.high)
        codes[place] = q.to(torch.uint8)
        value = q.mul_(a).add_(b)
        torch.sub(panel.original[i], value, out=errors[i])
        lost += (panel.d[i] * (w - value).square() - damp * errors[i].square()).sum(dtype=torch.float64)
        work[i + 1 :].addr_(panel.triangle[i, i + 1 :], errors[i])
    return float(lost)


def move_columns(
    grid: Grid, pull: Tensor, step: Tensor, hessian: Tensor, inverse: Tensor, codes: Tensor
) -> tuple[Tensor, int]:
    """Move the codes of a panel, in place, each to where its own loss is least; how errors changed, and how many moved.

    ``pull`` [columns, rows] is E H before, ``codes`` [columns, rows] uint8. ``step`` [rows] is what a code is worth;
    ``hessian`` [columns, columns], and ``inverse`` [columns] one over its diagonal, 0 for a column that stays.
    """
    if pull.device.type == "cpu":
        found, moved = move_panel(
            pull.numpy(),
            step.numpy(),
            reciprocal(step).numpy(),
            hessian.contiguous().numpy(),
            inverse.numpy(),
            (grid.low, grid.high),
            codes.numpy(),
        )
        return torch.from_numpy(found), moved
    return _move_columns(grid, pull, step, hessian, inverse, codes)


def _move_columns(
    grid: Grid, pull: Tensor, step: Tensor, hessian: Tensor, inverse: Tensor, codes: Tensor
) -> tuple[Tensor, int]:
    per_step = reciprocal(step)
    old, work, change = codes.float(), pull.clone(), torch.empty_like(pull)
    for i in range(len(work)):
        code = (work[i] * per_step).mul_(inverse[i]).round_().add_(old[i]).clamp_(grid.low, grid.high)
        codes[i] = code.to(torch.uint8)
        torch.sub(old[i], code, out=change[i]).mul_(step)
        work[i + 1 :].addr_(hessian[i, i + 1 :], change[i])
    return change, int((codes != old).sum())
