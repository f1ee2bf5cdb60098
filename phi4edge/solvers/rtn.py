"""Round to nearest on searched scales: no error compensation, no interaction between columns.

Objective: min Σ diag(H)·(W − Ŵ)² a group at a time, by :mod:`phi4edge.quant.search`; without a Hessian all
columns count the same. This is also the fallback where error compensation loses on rows it has not seen.

A few rows are read, searched, rounded, compared and packed at a time, and never leave a core's cache between.
"""

from __future__ import annotations

__all__ = ["NEEDS_HESSIAN", "Room", "solve", "solve_rows"]

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from phi4edge.checkpoint.rows_ahead import SomeRows
from phi4edge.quant.grid import Grid, grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.parallel import read_pieces, row_pieces
from phi4edge.quant.rounding import round_to
from phi4edge.quant.scheme import Scheme
from phi4edge.quant.search import nearest, search
from phi4edge.solvers._api import Problem, Solution, SolverOptions
from phi4edge.solvers._loss import layer_loss

NEEDS_HESSIAN = False
_TOGETHER = 1 << 18  # weights rounded at a time

Pieces = Callable[[slice], AbstractContextManager[SomeRows]]  # some rows of a weight, open for as long as they are used


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
    name: str,
    shape: tuple[int, int],
    opened: Pieces,
    scheme: Scheme,
    importance: Tensor | None,
    options: SolverOptions,
    room: Room | None = None,
) -> Solution:
    """The same of a weight of which ``opened`` gives a few rows at a time: all of it is never in RAM.

    ``shape`` is [out_features, in_features]; ``opened`` is asked for :func:`read_pieces`; ``importance`` [in_features]
    is diag H, or None. What is found lies in ``room``, until that is used again.

    Raises:
        InputError: the group size does not divide in_features; what ``opened`` raises.
    """
    pieces = [(opened, piece) for piece in read_pieces(*shape, options.rows)]
    return _rounded(name, scheme, shape[1], pieces, importance, options, room)


class Room:
    """Memory for codes and parameters of one weight at a time, where its pieces are rounded in this process.

    Codes of a weight are large, and memory that is new takes longer to come by than they to write.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def put(self, field: str, rows: int, piece: slice, parts: Sequence[Tensor]) -> None:
        """``parts``, one below the other, are the ``piece`` of a weight's ``rows``; in any thread."""
        shape, dtype = (rows, *parts[0].shape[1:]), parts[0].dtype
        with self._lock:
            there = self._tensors.get(field)
            if there is None or there.shape != shape or there.dtype != dtype:
                there = self._tensors[field] = torch.empty(shape, dtype=dtype)
        torch.cat(list(parts), out=there[piece])

    def named(self, name: str, fields: Sequence[str]) -> dict[str, Tensor]:
        """What was put, as :meth:`QuantizedLinear.from_tensors` takes it."""
        return {f"{name}.{field}": self._tensors[field] for field in fields}


def _all_of(W: Tensor, piece: slice) -> AbstractContextManager[SomeRows]:
    return nullcontext(SomeRows(W.__getitem__, W))


def _rounded(
    name: str,
    scheme: Scheme,
    columns: int,
    pieces: Sequence[tuple[Pieces, slice]],
    importance: Tensor | None,
    options: SolverOptions,
    room: Room | None = None,
) -> Solution:
    weights = None if importance is None else importance.reshape(scheme.groups(columns, name), -1)
    groups, grid = scheme.groups(columns, name), grid_for(scheme)
    work = [partial(_solve_piece, grid, *piece, columns, groups, weights) for piece in pieces]
    fields = ("codes", *grid.fields)
    if room is None:
        parts = options.run(work)
        tensors = {f"{name}.{field}": _whole([part[field] for part, _ in parts]) for field in fields}
        losses = [loss for _, loss in parts]
    else:
        rows = pieces[-1][1].stop
        losses = options.run(
            [partial(_put, room, rows, piece, one) for (_, piece), one in zip(pieces, work, strict=True)]
        )
        tensors = room.named(name, fields)
    linear = QuantizedLinear.from_tensors(name, scheme, tensors)
    return Solution(linear, sum(losses) / linear.out_features, 0.0)


def _solve_piece(
    grid: Grid, opened: Pieces, piece: slice, columns: int, groups: int, importance: Tensor | None
) -> tuple[dict[str, list[Tensor]], float]:
    """Codes as a run stores them and parameters of some rows, a few at a time; what they lose with diag H, summed."""
    with opened(piece) as rows:
        if importance is None:
            at_once = nearest(grid, rows.stored.reshape(len(rows.stored), groups, -1))
            if at_once is not None:
                codes, params, loss = at_once
                return {field: [values] for field, values in {"codes": codes, **params}.items()}, loss
        loss, found, step = 0.0, dict[str, list[Tensor]](), max(1, _TOGETHER // columns)
        for start in range(piece.start, piece.stop, step):
            W = rows.values(slice(start, min(start + step, piece.stop)))
            grouped = W.reshape(len(W), groups, -1)
            params = search(grid, grouped, importance)
            codes, lost = round_to(grid, grouped, params, importance)
            loss += lost
            for field, values in {"codes": codes, **params}.items():
                found.setdefault(field, []).append(values)
    return found, loss


def _put(room: Room, rows: int, piece: slice, work: Callable[[], tuple[dict[str, list[Tensor]], float]]) -> float:
    """Do a piece's ``work`` and put what it finds into ``room``; what is lost."""
    found, loss = work()
    for field, parts in found.items():
        room.put(field, rows, piece, parts)
    return loss


def _whole(parts: list[list[Tensor]]) -> Tensor:
    """All rows of what pieces found; each is a copy once, as the weight's codes are a good part of what is in RAM."""
    return torch.cat([values for part in parts for values in part])
