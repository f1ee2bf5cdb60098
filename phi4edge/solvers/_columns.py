"""Walks over the columns of a panel: compiled on the CPU, elsewhere the same with tensors, operation by operation."""

from __future__ import annotations

__all__ = ["Steps", "move_columns", "round_columns"]

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


def round_columns(
    grid: Grid,
    work: Tensor,
    original: Tensor,
    triangle: Tensor,
    steps: Steps,
    groups: Tensor,
    places: Tensor,
    d: Tensor,
    damp: float,
    errors: Tensor,
    codes: Tensor,
) -> float:
    """Round the columns of a panel one after the other; what they lose, Σ d·(w̃ − q)² − damp·e².

    ``work``, ``original`` [columns, rows]: w̃ before this panel's own errors, and w. ``triangle`` [columns, columns]:
    what an error adds to later columns, above the diagonal. Column i is of group ``groups[i]``; its codes go to row
    ``places[i]`` of ``codes`` [n, rows] uint8, its errors to row i of ``errors`` [columns, rows]. ``work`` is used up.
    """
    if work.device.type == "cpu":
        return round_panel(
            work.numpy(),
            original.numpy(),
            triangle.contiguous().numpy(),
            (steps.a.numpy(), steps.b.numpy(), steps.divisor.numpy()),
            places.numpy(),
            groups.numpy(),
            d.numpy(),
            damp,
            (grid.low, grid.high),
            errors.numpy(),
            codes.numpy(),
        )
    return _round_columns(grid, work, original, triangle, steps, groups, places, d, damp, errors, codes)


def _round_columns(
    grid: Grid,
    work: Tensor,
    original: Tensor,
    triangle: Tensor,
    steps: Steps,
    groups: Tensor,
    places: Tensor,
    d: Tensor,
    damp: float,
    errors: Tensor,
    codes: Tensor,
) -> float:
    lost = torch.zeros((), dtype=torch.float64, device=work.device)
    for i, (group, place) in enumerate(zip(groups.tolist(), places.tolist(), strict=True)):
        w, a, b = work[i], steps.a[group], steps.b[group]
        q = ((w - b) / steps.divisor[group]).round_().clamp_(grid.low, grid.high)
        codes[place] = q.to(torch.uint8)
        value = q.mul_(a).add_(b)
        torch.sub(original[i], value, out=errors[i])
        lost += (d[i] * (w - value).square() - damp * errors[i].square()).sum(dtype=torch.float64)
        work[i + 1 :].addr_(triangle[i, i + 1 :], errors[i])
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
