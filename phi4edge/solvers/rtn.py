"""Round to nearest on searched scales: no error compensation, no interaction between columns.

Objective: min Σ diag(H)·(W − Ŵ)² a group at a time, by :mod:`phi4edge.quant.search`; without a Hessian all
columns count the same. This is also the fallback where error compensation loses on rows it has not seen.

A few rows are read, searched, rounded, compared and packed at a time, and never leave a core's cache between.
"""

from __future__ import annotations

__all__ = ["NEEDS_HESSIAN", "solve", "solve_rows"]

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from phi4edge.quant.grid import Grid, grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.parallel import read_pieces, row_pieces
from phi4edge.quant.rounding import round_to
from phi4edge.quant.scheme import Scheme
from phi4edge.quant.search import search
from phi4edge.solvers._api import Problem, Solution, SolverOptions
from phi4edge.solvers._loss import layer_loss

NEEDS_HESSIAN = False
_TOGETHER = 1 << 18  # weights rounded at a time

Rows = Callable[[slice], Tensor]  # some rows of a weight, float32
Pieces = Callable[[slice], AbstractContextManager[Rows]]  # the same, open for as long as rows are asked for


def solve(problem: Problem, options: SolverOptions) -> Solution:
    """Round ``problem.weight`` to the nearest codes on scales searched with weights diag H.

    Raises:
        InputError: the group size does not divide in_features.
    """
    W = problem.weight
    rows, columns = W.shape
    parts = [W[piece] for piece in row_pieces(rows, columns, options.rows)]
    pieces = [(partial(_all_of, part), slice(0, len(part))) for part in parts]
    found = _rounded(problem.name, problem.scheme, columns, pieces, problem.importance, options)
    return found if problem.hessian is None else replace(found, loss=layer_loss(problem, found.linear))


def solve_rows(
    name: str, shape: tuple[int, int], opened: Pieces, scheme: Scheme, importance: Tensor | None, options: SolverOptions
) -> Solution:
    """The same of a weight of which ``opened`` gives a few rows at a time: all of it is never in RAM.

    ``shape`` is [out_features, in_features]; ``opened`` is asked for :func:`read_pieces`, and within one for a few
    rows at a time; ``importance`` [in_features] is diag H, or None.

    Raises:
        InputError: the group size does not divide in_features; what ``opened`` raises.
    """
    pieces = [(opened, piece) for piece in read_pieces(*shape, options.rows)]
    return _rounded(name, scheme, shape[1], pieces, importance, options)


def _all_of(W: Tensor, piece: slice) -> AbstractContextManager[Rows]:
    return nullcontext(W.__getitem__)


def _rounded(
    name: str,
    scheme: Scheme,
    columns: int,
    pieces: Sequence[tuple[Pieces, slice]],
    importance: Tensor | None,
    options: SolverOptions,
) -> Solution:
    weights = None if importance is None else importance.reshape(scheme.groups(columns, name), -1)
    groups, grid = scheme.groups(columns, name), grid_for(scheme)
    parts = options.run([partial(_solve_piece, grid, *piece, columns, groups, weights) for piece in pieces])
    tensors = {f"{name}.{field}": _whole([part[field] for part, _ in parts]) for field in ("codes", *grid.fields)}
    linear = QuantizedLinear.from_tensors(name, scheme, tensors)
    return Solution(linear, sum(loss for _, loss in parts) / linear.out_features, 0.0)


def _solve_piece(
    grid: Grid, opened: Pieces, piece: slice, columns: int, groups: int, importance: Tensor | None
) -> tuple[dict[str, list[Tensor]], float]:
    """Codes as a run stores them and parameters of some rows, a few at a time; what they lose with diag H, summed."""
    step = max(1, _TOGETHER // columns)
    loss, found = 0.0, dict[str, list[Tensor]]()
    with opened(piece) as rows:
        for start in range(piece.start, piece.stop, step):
            W = rows(slice(start, min(start + step, piece.stop)))
            grouped = W.reshape(len(W), groups, -1)
            params = search(grid, grouped, importance)
            codes, lost = round_to(grid, grouped, params, importance)
            loss += lost
            for field, values in {"codes": codes, **params}.items():
                found.setdefault(field, []).append(values)
    return found, loss


def _whole(parts: list[list[Tensor]]) -> Tensor:
    """All rows of what pieces found; each is a copy once, as the weight's codes are a good part of what is in RAM."""
    return torch.cat([values for part in parts for values in part])
