"""GPTQ: round column by column, each rounding error made good by the columns that follow.

Source: Frantar et al., "GPTQ", arXiv 2210.17323, Algorithm 1; the objective is

    min tr(E H Eᵀ),  E = W − Q,  H = XᵀX / tokens (damped)

    W [rows, n]  weights             Q  their values on the grid
    R [n, n]     upper triangular, H = R Rᵀ
    M            R with each column divided by its diagonal entry

What differs from the reference on purpose: no inverse is formed. With H = R Rᵀ the objective is ‖E R‖², whose
column i is Rᵢᵢ (eᵢ + Σ_{j<i} eⱼ Mⱼᵢ), so the choice that the paper makes greedily is to round

    w̃ᵢ = wᵢ + Σ_{j<i} (wⱼ − qⱼ) Mⱼᵢ.

One Cholesky factorisation (n³/3) takes the place of Cholesky, inverse and Cholesky (4n³/3), W is read only, and the
sum over finished columns is one matrix product a block (:mod:`phi4edge.solvers._finished`). R takes the place of the
one copy of H that is made. What the codes lose is Σᵢ Rᵢᵢ² (w̃ᵢ − qᵢ)², less the damping's share λ‖E‖², and costs no
product with H.

Scales: searched at the start of each group (of a super-block, where several groups share something), weighted by
diag H, on what the paper's updates have made of it by then, w_G + S M_GG⁻¹ with S the sum above over finished
columns, so that they answer for the errors handed on to it. Inside a super-block each group's whole numbers are
searched again as the loop comes to the group, while what is shared stays: 15 to 25 % off the loss. With ``act_order``
columns go in order of falling diag H while the groups stay where they are (static groups, scales searched on W). With
``group_aware`` (arXiv 2505.14638) groups go whole, in order of their falling largest diag H, and so do the columns
inside each and the groups of a super-block, so that scales are still searched as the loop comes to a group. Neither
ever puts a permuted g_idx into an artifact.

Damping is raised tenfold until H can be factored, and what was used is in the solution. It is not searched for: on an
H drawn to its diagonal (``shrinkage``) held-out errors of a real model's layers lie within 2 % of each other for .001
to .03 of the mean diagonal, while every candidate costs a factorisation and a solution.
"""

from __future__ import annotations

__all__ = ["NEEDS_HESSIAN", "factor", "solve"]

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from phi4edge.model.tiles import tiles
from phi4edge.quant.grid import Grid, NestedGrid, Params, grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.parallel import row_pieces
from phi4edge.quant.search import search, search_again
from phi4edge.solvers._api import Problem, Solution, SolverOptions
from phi4edge.solvers._columns import Panel, Steps, round_columns
from phi4edge.solvers._factor import Factor, factor_matrix
from phi4edge.solvers._finished import Finished, put_transpose, span

NEEDS_HESSIAN = True
_SUB = 32  # columns between two products inside a block: a panel


def factor(problem: Problem, options: SolverOptions, *, in_place: bool = False) -> Factor:
    """The factor of the problem's H, of None as of the identity, in the order that columns are visited.

    ``in_place``: H may be used up, and is where columns go as they stand.

    Raises:
        InputError: the group size does not divide in_features.
        Phi4EdgeError: H cannot be factored even when damped by its whole mean diagonal.
    """
    W, n = problem.weight, problem.weight.shape[1]
    groups = problem.scheme.groups(n, problem.name)
    H = problem.hessian if problem.hessian is not None else torch.eye(n, device=W.device)
    unit = _unit(problem, groups)
    order = _order(H.diagonal().clone(), n // groups, unit, options)
    made = factor_matrix(H, order, options.damp_percent, problem.name, in_place=in_place)
    far = span(n if options.act_order else unit, n, on_tiles=True).far
    if not options.on_units or made.M.device.type != "cpu" or tiles() is None:
        return made
    put_transpose(made.M, far)
    return replace(made, on_tiles=True)


def _unit(problem: Problem, groups: int) -> int:
    """Columns whose parameters are found together."""
    return problem.scheme.unit if problem.scheme.nested else problem.weight.shape[1] // groups


def solve(problem: Problem, options: SolverOptions) -> Solution:
    """Codes of ``problem.weight`` by GPTQ; a Hessian of None is the identity, which gives RTN's codes.

    H is factored unless ``problem.factor`` is what :func:`factor` made of it under the same options.

    Raises:
        InputError: the group size does not divide in_features.
        Phi4EdgeError: H cannot be factored even when damped by its whole mean diagonal.
    """
    W, n = problem.weight, problem.weight.shape[1]
    groups = problem.scheme.groups(n, problem.name)
    made = problem.factor if problem.factor is not None else factor(problem, options)
    unit = _unit(problem, groups)
    static = options.act_order or unit == n
    grid = grid_for(problem.scheme)
    pieces = [
        partial(_loop, grid, W[piece], groups, n if static else unit, made)
        for piece in row_pieces(W.shape[0], n, options.rows)
    ]
    parts = options.run(pieces)
    params = {field: torch.cat([found[field] for _, found, _ in parts]) for field in grid.fields}
    loss = max(0.0, sum(lost for _, _, lost in parts)) / W.shape[0]
    codes, start = torch.empty_like(W, dtype=torch.uint8), 0
    while parts:  # each part goes as its rows are filled
        part, _, _ = parts.pop(0)
        codes[start : start + len(part)] = part
        start += len(part)
    linear = QuantizedLinear(problem.name, problem.scheme, codes, params)
    return Solution(linear, loss, made.damp_percent, made.events)


def _order(diagonal: Tensor, size: int, unit: int, options: SolverOptions) -> Tensor | None:
    """The columns as they are to be visited, or None for the order that they stand in."""
    if options.act_order:
        return torch.argsort(diagonal, descending=True, stable=True)
    if not options.group_aware:
        return None
    grouped = diagonal.reshape(-1, unit // size, size)
    inside, outside = (grouped.argsort(dim=2, descending=True, stable=True), grouped.amax(2))
    columns = torch.arange(diagonal.numel(), device=diagonal.device).reshape(grouped.shape).gather(2, inside)
    groups = outside.argsort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, groups[:, :, None].expand_as(columns))
    return columns[outside.amax(1).argsort(descending=True, stable=True)].reshape(-1)


def _loop(
    grid: Grid, W: Tensor, groups: int, unit: int, factor: Factor, fixed: Params | None = None
) -> tuple[Tensor, Params, float]:
    """Codes [rows, n] and parameters of some rows, and tr(E H Eᵀ).

    Parameters are found as the loop comes to each ``unit`` of columns; where that is n all of them beforehand, on W,
    unless they are given (``fixed``). Works on transposes, where a column is contiguous.
    """
    (rows, n), (diagonal, M, order) = W.shape, (factor.diagonal, factor.M, factor.order)
    static = unit == n
    if static and fixed is None:
        fixed = search(grid, W.reshape(rows, groups, -1), diagonal.reshape(groups, -1))
    size = n // groups
    places = torch.arange(n) if order is None else order.cpu()
    original = W.T.contiguous() if order is None else W.T.contiguous()[order]  # [n, rows]
    Q = torch.empty(n, rows, dtype=torch.uint8, device=W.device)
    found: dict[int, Params] = {}  # by first column
    steps, lost = Steps(grid, groups, rows, W.device), 0.0
    if fixed is not None:
        found[0] = fixed
        steps.put(0, fixed)
    wide = span(unit, n, on_tiles=factor.on_tiles)
    done = Finished(M, rows, wide.far, on_tiles=factor.on_tiles)
    sub = _SUB if static else math.gcd(size, _SUB)
    for start in range(0, n, wide.block):
        stop = min(start + wide.block, n)
        before = start % wide.far  # columns of the far block that are done
        far = start - before
        if before == 0:
            sums = done.begin(far, original[far : far + wide.far])
        work = torch.addmm(sums[before : before + wide.block], M[far:start, start:stop].T, done.errors(far, start))
        for first in range(start, stop, sub):
            last = min(first + sub, stop)
            if not static and first % size == 0:
                group = slice(first, first + (unit if first % unit == 0 else size))
                values = _updated(original, work[first - start :], M, group)
                untouched = torch.equal(values, original[group])
                if order is not None:
                    values = values[order[group].argsort()]  # as the columns stand in the group
                values, place = values.T.contiguous(), int(places[group].min())
                block_place = place // unit * unit
                if first % unit == 0:
                    found[place] = search(
                        grid, values.reshape(rows, -1, size), diagonal[place : place + unit].reshape(-1, size)
                    )
                elif not untouched:  # else its steps are those that were searched on these very values
                    assert isinstance(grid, NestedGrid)
                    index, h = (place - block_place) // size, diagonal[place : place + size]
                    found[block_place] = search_again(grid, found[block_place], index, values, h)
                steps.put(block_place // size, found[block_place])
            here = slice(first, last)
            there = places[here]
            panel = Panel(
                work[first - start : last - start], original[here], M[here, here], factor.d[here], there // size, there
            )
            errors = done.errors(first, last)
            lost += round_columns(grid, panel, steps, factor.damp, errors, Q)
            if last < stop:
                work[last - start :].addmm_(M[first:last, last:stop].T, errors)
    params = {field: torch.cat([found[place][field] for place in sorted(found)], dim=1) for field in grid.fields}
    return _settle(grid, Q.T, params).contiguous(), params, lost


def _settle(grid: Grid, codes: Tensor, params: Params) -> Tensor:
    """``codes`` with those of groups whose step is zero, which stand for ``b`` alone, as Grid.encode has them."""
    a, b = grid.steps(params)
    if not bool((a == 0).any()):
        return codes
    grouped, constant = codes.reshape(*a.shape, -1), grid.encode(b, a, b).to(torch.uint8)
    return torch.where((a == 0)[..., None], constant[..., None], grouped).reshape(codes.shape)


def _updated(original: Tensor, work: Tensor, M: Tensor, group: slice) -> Tensor:
    """What GPTQ's updates make of columns ``group`` before the first of them is rounded: w + shift · M_GG⁻¹.

    ``original`` [n, rows]; ``work`` begins with those columns and all that finished ones have handed on to them.
    """
    shift = work[: group.stop - group.start] - original[group]
    torch.linalg.solve_triangular(M[group, group].T, shift, upper=False, unitriangular=True, out=shift)
    return shift.add_(original[group])
