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

    def solve_rows(piece: slice) -> tuple[torch.Tensor, Params]:
        part = W[piece].reshape(-1, groups, columns // groups)
        params = search(grid, part, importance)
        a, b = grid.steps(params)
        return grid.encode(part, a[:, :, None], b[:, :, None]).reshape(-1, columns).to(torch.uint8), params

    parts = run_parallel([partial(solve_rows, piece) for piece in row_pieces(rows, columns, options.rows)])
    codes = torch.cat([found for found, _ in parts])
    params = {field: torch.cat([found[field] for _, found in parts]) for field in grid.fields}
    linear = QuantizedLinear(problem.name, problem.scheme, codes, params)
    return Solution(linear, layer_loss(problem, linear), 0.0)
