"""Rows that answer for each other: GPTQ's feedback along the outputs as well as along the inputs.

The objective of a linear is not the error of its outputs but what the model makes of it (phi4edge.distillation.fisher),

    min tr(F E H Eᵀ),  E = W − Q

    F [m, m]  curvature of KLD at the outputs of coupled rows: diag F alone leaves rows independent, as GPTQ takes them
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

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from phi4edge.core.events import Event
from phi4edge.quant.grid import grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.solvers import gptq
from phi4edge.solvers._api import Problem, Solution, SolverOptions
from phi4edge.solvers._loss import layer_loss
from phi4edge.solvers._refine import refine

STEPS = 8  # blocks of rows; twice as many, each half as wide, walk over all columns twice as often
Group = tuple[Tensor, Tensor]  # rows [m] int64 that are coupled, and their F [m, m] float32, positive definite


def solve_coupled(problem: Problem, groups: Sequence[Group], options: SolverOptions) -> Solution:
    """Codes of ``problem.weight`` by GPTQ, refined as ``options`` say, with rows of each group coupled by its F.

    The groups hold every row once. The loss is that of independent rows, as every solver gives it.

    Raises:
        InputError: the group size does not divide in_features.
        Phi4EdgeError: H or an F cannot be factored even when damped by its whole mean diagonal.
    """
    W, grid = problem.weight, grid_for(problem.scheme)
    factor = gptq.factor(problem, options)
    orders, factors, events = [], [], list[Event]()
    for rows, F in groups:
        order = torch.arange(len(rows), device=W.device)
        order = order[torch.argsort(order % STEPS, stable=True)]
        N, _, raised = gptq.factor_matrix(F, order, 0.0, f"{problem.name} (rows)")
        orders.append(rows.to(W.device)[order])
        factors.append(N)
        events += raised
    E = torch.empty_like(W)
    parts: list[QuantizedLinear] = []
    places: list[Tensor] = []
    found: list[Solution] = []
    for step in range(STEPS):
        rows, target = _shifted(W, E, orders, factors, step)
        if not len(rows):
            continue
        part = replace(problem, weight=target)
        found.append(refine(part, gptq.solve(part, options, factor), options))
        E[rows] = W[rows] - found[-1].linear.dequantize()
        parts.append(found[-1].linear)
        places.append(rows)
    back = torch.cat(places).argsort()
    codes = torch.cat([part.codes for part in parts])[back]
    params = {field: torch.cat([part.params[field] for part in parts])[back] for field in grid.fields}
    linear = QuantizedLinear(problem.name, problem.scheme, codes, params)
    return replace(
        found[0],
        linear=linear,
        loss=layer_loss(problem, linear),
        events=(*found[0].events, *events),
        loss_unrefined=None,
    )


def _shifted(
    W: Tensor, E: Tensor, orders: Sequence[Tensor], factors: Sequence[Tensor], step: int
) -> tuple[Tensor, Tensor]:
    """The rows of a step in all groups, and their weights with the errors of the rows before them made good."""
    rows, targets = [], []
    for order, N in zip(orders, factors, strict=True):
        start, stop = (sum(len(range(i, len(order), STEPS)) for i in range(last)) for last in (step, step + 1))
        here, before = order[start:stop], order[:start]
        rows.append(here)
        targets.append(torch.addmm(W[here], N[:start, start:stop].T, E[before]) if start else W[here])
    return torch.cat(rows), torch.cat(targets)
