"""Round to nearest on searched scales: no error compensation, no interaction between columns.

Objective: min Σ diag(H)·(W − Ŵ)² a group at a time, by :mod:`phi4edge.quant.search`; without a Hessian all
columns count the same. This is also the fallback where error compensation loses on rows it has not seen.
"""

from __future__ import annotations

__all__ = ["NEEDS_HESSIAN", "solve"]

from functools import partial

import torch

from phi4edge.quant.grid import Params, grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.parallel import row_pieces, run_parallel
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
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=W.device)
    step = max(1, _WEIGHTS // columns)

    def solve_rows(piece: slice) -> Params:
        params = search(grid, W[piece].reshape(-1, groups, columns // groups), importance)
        a, b = (found[:, :, None] for found in grid.steps(params))
        for start in range(0, piece.stop - piece.start, step):
            some, rows = (
                slice(start, start + step),
                slice(piece.start + start, min(piece.start + start + step, piece.stop)),
            )
            part = W[rows].reshape(-1, groups, columns // groups)
            codes[rows] = grid.encode(part, a[some], b[some]).reshape(-1, columns)
        return params

    pieces = row_pieces(rows, columns, options.rows)
    parts = run_parallel([partial(solve_rows, piece) for piece in pieces])
    params = {field: torch.cat([part[field] for part in parts]) for field in grid.fields}
    linear = QuantizedLinear(problem.name, problem.scheme, codes, params)
    return Solution(linear, layer_loss(problem, linear), 0.0)
