"""Round to nearest on searched scales: no error compensation, no interaction between columns.

Objective: min Σ diag(H)·(W − Ŵ)² a group at a time, by :mod:`phi4edge.quant.search`; without a Hessian all
columns count the same. This is also the fallback where error compensation loses on rows it has not seen.
"""

from __future__ import annotations

__all__ = ["NEEDS_HESSIAN", "solve"]

import torch

from phi4edge.quant.grid import grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.search import search
from phi4edge.solvers._api import Problem, Solution, SolverOptions
from phi4edge.solvers._loss import layer_loss

NEEDS_HESSIAN = False


def solve(problem: Problem, options: SolverOptions) -> Solution:
    """Round ``problem.weight`` to the nearest codes on scales searched with weights diag H.

    Raises:
        InputError: the group size does not divide in_features.
    """
    W, H = problem.weight, problem.hessian
    rows, columns = W.shape
    groups = problem.scheme.groups(columns, problem.name)
    grid = grid_for(problem.scheme)
    importance = None if H is None else H.diagonal().reshape(groups, -1)
    params: dict[str, list[torch.Tensor]] = {field: [] for field in grid.fields}
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=W.device)
    for start in range(0, rows, options.rows):
        part = W[start : start + options.rows].reshape(-1, groups, columns // groups)
        found = search(grid, part, importance)
        a, b = grid.steps(found)
        codes[start : start + options.rows] = (
            grid.encode(part, a[:, :, None], b[:, :, None]).reshape(-1, columns).to(torch.uint8)
        )
        for field in grid.fields:
            params[field].append(found[field])
    linear = QuantizedLinear(problem.name, problem.scheme, codes, {f: torch.cat(p) for f, p in params.items()})
    return Solution(linear, layer_loss(W, linear, H), 0.0)
