"""Round to nearest on searched scales: no error compensation, no interaction between columns.

Objective: min Σ diag(H)·(W − Ŵ)² a group at a time, by :mod:`phi4edge.quant.search`; without a Hessian all
columns count the same. This is also the fallback where error compensation loses on rows it has not seen.
"""

from __future__ import annotations

__all__ = ["NEEDS_HESSIAN", "solve"]

from functools import partial

import torch
from torch import Tensor

from phi4edge.quant.grid import Grid, Params, grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.parallel import row_pieces
from phi4edge.quant.search import search
from phi4edge.solvers._api import Problem, Solution, SolverOptions
from phi4edge.solvers._loss import layer_loss

NEEDS_HESSIAN = False
_WEIGHTS = 1 << 17  # rounded at a time: what that needs stays in a core's cache


def solve(problem: Problem, options: SolverOptions) -> Solution:
    """Round ``problem.weight`` to the nearest codes on scales searched with weights diag H.

    Raises:
        InputError: the group size does not divide in_features.
    """
    W, h = problem.weight, problem.importance
    rows, columns = W.shape
    groups = problem.scheme.groups(columns, problem.name)
    grid = grid_for(problem.scheme)
    importance = None if h is None else h.reshape(groups, -1)
    pieces = [
        partial(_solve_rows, grid, W[piece], groups, importance) for piece in row_pieces(rows, columns, options.rows)
    ]
    parts = options.run(pieces)
    codes = torch.cat([found for found, _ in parts])
    params = {field: torch.cat([found[field] for _, found in parts]) for field in grid.fields}
    linear = QuantizedLinear(problem.name, problem.scheme, codes, params)
    return Solution(linear, layer_loss(problem, linear), 0.0)


def _solve_rows(grid: Grid, W: Tensor, groups: int, importance: Tensor | None) -> tuple[Tensor, Params]:
    rows, columns = W.shape
    params = search(grid, W.reshape(rows, groups, -1), importance)
    a, b = (found[:, :, None] for found in grid.steps(params))
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=W.device)
    step = max(1, _WEIGHTS // columns)
    for start in range(0, rows, step):
        some = slice(start, start + step)
        part = W[some].reshape(-1, groups, columns // groups)
        codes[some] = grid.encode(part, a[some], b[some]).reshape(-1, columns)
    return codes, params
