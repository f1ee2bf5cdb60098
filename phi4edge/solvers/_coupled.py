"""Rows that answer for each other: GPTQ's feedback along the outputs as well as along the inputs.

The objective of a linear is not the error of its outputs but what the model makes of it (phi4edge.distillation.fisher),

    min tr(F E H Eᵀ),  E = W − Q

    F [m, m]  curvature of KLD at the outputs: diag F alone leaves rows independent, as GPTQ takes them
    H [n, n]  second moments of the inputs
    N, D      F = N D Nᵀ, N unit upper triangular, D diagonal

Source: Tseng et al., "Model-Preserving Adaptive Rounding" (YAQA), arXiv 2505.22988, whose two-sided feedback this is.
With that factor the objective is Σ_r D_r ‖(Nᵀ E)_r‖²_H, and row r of Nᵀ E is e_r + Σ_{s<r} N_sr e_s. So once the rows
before it are rounded, what is left to choose for row r is an ordinary GPTQ problem for the weights

    w_r + Σ_{s<r} N_sr e_s

What differs from the reference on purpose: a row is shifted whole, before any solver sees it, so scale search, refit,
sweeps and every grid stay what they are. Rows are solved STEPS blocks one after the other, not one by one; inside a
block they are independent. They are dealt out in turn, so that rows beside each other, which have most in common, are
in different blocks.
"""

from __future__ import annotations

__all__ = ["STEPS", "solve_coupled"]

from dataclasses import replace

import torch
from torch import Tensor

from phi4edge.quant.grid import grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.solvers import gptq
from phi4edge.solvers._api import Problem, Solution, SolverOptions
from phi4edge.solvers._factor import factor_matrix
from phi4edge.solvers._loss import layer_loss
from phi4edge.solvers._refine import refine

STEPS = 8  # blocks of rows; twice as many, each half as wide, walk over all columns twice as often


def solve_coupled(problem: Problem, curvature: Tensor, options: SolverOptions) -> Solution:
    """Codes of ``problem.weight`` by GPTQ, refined as ``options`` say, with rows coupled by F.

    ``curvature`` is F [out_features, out_features] float32. The loss is that of independent rows, as every solver
    gives it: what is gained is gained at the price of that.

    Raises:
        InputError: the group size does not divide in_features.
        Phi4EdgeError: H or F cannot be factored even when damped by its whole mean diagonal.
    """
    W, grid, rows = problem.weight, grid_for(problem.scheme), problem.weight.shape[0]
    order = torch.arange(rows, device=W.device)
    order = order[torch.argsort(order % STEPS, stable=True)]
    coupled = factor_matrix(curvature, order, 0.0, f"{problem.name} (rows)")
    N = coupled.M
    if problem.factor is None:
        problem = replace(problem, factor=gptq.factor(problem, options))
    E = torch.empty_like(W)  # of the rows in that order
    found: list[Solution] = []
    start = 0
    for step in range(STEPS):
        stop = start + len(range(step, rows, STEPS))
        here = W[order[start:stop]]
        if start < stop:
            part = replace(problem, weight=torch.addmm(here, N[:start, start:stop].T, E[:start]) if start else here)
            found.append(refine(part, gptq.solve(part, options), options))
            E[start:stop] = here - found[-1].linear.dequantize()
        start = stop
    back = order.argsort()
    codes = torch.cat([part.linear.codes for part in found])[back]
    params = {field: torch.cat([part.linear.params[field] for part in found])[back] for field in grid.fields}
    linear = QuantizedLinear(problem.name, problem.scheme, codes, params)
    return replace(
        found[0],
        linear=linear,
        loss=layer_loss(problem, linear),
        events=(*found[0].events, *coupled.events),
        loss_unrefined=None,
    )
