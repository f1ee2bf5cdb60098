"""The one factorisation of a Hessian that solvers and targets share.

    H [n, n]     second moments of the inputs, damped
    R            upper triangular, H = R Rᵀ
    M, d         R with each column divided by its diagonal entry, and these entries squared: H = M diag(d) Mᵀ

Damping is raised tenfold until H can be factored. Only what lies on and above a diagonal is ever made of H, so that
what lies below it stays H's: from there it comes back for another try, and where nobody asks for H behind its factor
and the columns stay as they stand, both are one matrix, not two.
"""

from __future__ import annotations

__all__ = ["Factor", "factor_matrix"]

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from phi4edge.core.errors import Phi4EdgeError
from phi4edge.core.events import Event
from phi4edge.quant.parallel import row_pieces, run_parallel

_FACTOR_BLOCK = 384  # columns of R made together
_MAX_DAMP = 1.0


@dataclass(frozen=True)
class Factor:
    """What the solvers need of a damped H, whatever the weights are."""

    M: Tensor  # [in_features, in_features] float32; only the upper triangle is of use
    d: Tensor  # [in_features] float32
    order: Tensor | None  # of the columns; None: as they stand
    damp_percent: float  # that was used
    damp: float  # what was added to the diagonal
    diagonal: Tensor  # [in_features] float32: what it was before, columns as they stand in the weight
    events: tuple[Event, ...]
    on_tiles: bool = False  # whether the lower triangle of M holds what phi4edge.solvers._finished puts there

    def divide(self, B: Tensor) -> Tensor:
        """B H⁻¹ for ``B`` [rows, in_features] float32, columns as they stand in the weight."""
        X: Tensor = B if self.order is None else B[:, self.order]
        X = torch.linalg.solve_triangular(self.M.T, X, upper=False, left=False, unitriangular=True)
        X.div_(self.d)
        X = torch.linalg.solve_triangular(self.M, X, upper=True, left=False, unitriangular=True)
        return X if self.order is None else X[:, self.order.argsort()]


def factor_matrix(H: Tensor, order: Tensor | None, damp: float, name: str, *, in_place: bool = False) -> Factor:
    """The factor of H damped by ``damp`` of its mean diagonal, in the given column order.

    ``in_place``: H may be used up; without an order, its memory becomes M's.

    Raises:
        Phi4EdgeError: H cannot be factored even when damped by its whole mean diagonal.
    """
    diagonal = H.diagonal().clone()
    mean = float(diagonal.mean())
    events: list[Event] = []
    # A dead column (input always zero) has no say: any diagonal will do.
    dead = int((diagonal == 0).sum())
    if dead:
        events.append(Event("dead_columns", name, f"{dead} of {H.shape[0]} inputs were zero on all calibration tokens"))
    asked = damp
    if order is not None:
        R, undamped = _ordered(H, order), diagonal[order]
    else:
        R, undamped = H if in_place else H.clone(memory_format=torch.contiguous_format), diagonal
    while True:
        added = damp * mean if mean > 0 else 1.0
        R.diagonal().copy_(undamped + added)
        if _factor_upper(R):
            break
        damp = max(damp * 10, 1e-4)
        if damp > _MAX_DAMP or not math.isfinite(mean):
            raise Phi4EdgeError(f"{name}: the Hessian cannot be factored even with damping {damp / 10:g}")
        _mirror_lower(R)
    if damp != asked:
        detail = f"H is not positive definite with damp_percent {asked:g}; raised to {damp:g}"
        events.append(Event("damping_raised", name, detail, {"asked": asked, "used": damp}))
    r = R.diagonal().clone()
    for start, here in _blocks(R.shape[0]):
        R[:start, here].div_(r[here])
        _put_upper(R[here, here], R[here, here] / r[here])
    return Factor(R, r.square(), order, damp, added, diagonal, tuple(events))


def _blocks(n: int) -> list[tuple[int, slice]]:
    """Where each block of columns starts, and which they are, the last first."""
    starts = range((n - 1) // _FACTOR_BLOCK * _FACTOR_BLOCK, -1, -_FACTOR_BLOCK)
    return [(start, slice(start, min(start + _FACTOR_BLOCK, n))) for start in starts]


def _put_upper(square: Tensor, values: Tensor) -> None:
    """``values`` on and above the diagonal of ``square``, which keeps what lies below."""
    square.tril_(-1).add_(values.triu())


def _mirror_lower(H: Tensor) -> None:
    """Above the diagonal of ``H`` what lies below it."""
    for start, here in _blocks(H.shape[0]):
        H[:start, here] = H[here, :start].T
        square = H[here, here]
        _put_upper(square, square.T.clone())


def _ordered(H: Tensor, order: Tensor) -> Tensor:
    """H[order][:, order], some rows at a time on each core, with no second copy of the whole on the way."""
    R = torch.empty_like(H)

    def copy(rows: slice) -> None:
        torch.index_select(H.index_select(0, order[rows]), 1, order, out=R[rows])

    run_parallel([partial(copy, rows) for rows in row_pieces(H.shape[0], H.shape[1], _FACTOR_BLOCK)])
    return R


def _factor_upper(H: Tensor) -> bool:
    """Put R, H = R Rᵀ, into the upper triangle of ``H``; False where H is not positive definite.

    What lies below the diagonal is left as it was. Block columns go from the last to the first, with nearly all of the
    work in matrix products.
    """
    n = H.shape[0]
    for start, here in _blocks(n):
        stop, square = here.stop, H[here, here]
        below = square.tril(-1)
        if stop < n:
            H[:stop, here].addmm_(H[:stop, stop:], H[here, stop:].T, alpha=-1)
        # The upper factor of a small H is the flipped lower factor of the flipped H.
        lower, info = torch.linalg.cholesky_ex(square.flip(0, 1))
        if int(info) != 0 or not bool(torch.isfinite(lower.diagonal()).all()):
            square.copy_(below)
            return False
        R = lower.flip(0, 1)
        torch.add(R, below, out=square)
        if start:
            H[:start, here] = torch.linalg.solve_triangular(R.T, H[:start, here], upper=False, left=False)
    return True
