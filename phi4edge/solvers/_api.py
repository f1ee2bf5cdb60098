"""The shape of a solver: a pure function from a :class:`Problem` to a :class:`Solution`.

NEEDS_HESSIAN: bool
def solve(problem: Problem, options: SolverOptions) -> Solution
"""

from __future__ import annotations

__all__ = ["Problem", "Solution", "SolverOptions"]

from dataclasses import dataclass

from torch import Tensor

from phi4edge.core.events import Event
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.parallel import RunPieces, run_parallel
from phi4edge.quant.scheme import Scheme
from phi4edge.solvers._factor import Factor


@dataclass(frozen=True)
class Problem:
    """One weight matrix to round: min tr((W − Ŵ) H (W − Ŵ)ᵀ) over the grid of ``scheme``."""

    name: str
    weight: Tensor  # [out_features, in_features] float32
    hessian: Tensor | None  # [in_features, in_features] float32, XᵀX / tokens; None: identity
    scheme: Scheme
    mean_square: Tensor | None = None  # [in_features]: diag H, where the whole of H was not needed
    factor: Factor | None = None  # of the Hessian under the solver's options, where it has been made

    @property
    def importance(self) -> Tensor | None:
        """diag H, [in_features], or None where nothing is known of the inputs."""
        return self.mean_square if self.hessian is None else self.hessian.diagonal()


@dataclass(frozen=True)
class SolverOptions:
    """What a user may set."""

    damp_percent: float = 0.01  # of the mean of diag H, added to the diagonal
    act_order: bool = False  # most excited columns first, groups fixed beforehand (static groups)
    rows: int | None = None  # of W solved together, on one core; None: see phi4edge.quant.parallel.row_pieces
    refit: bool = False  # least squares for the steps, given the codes
    sweeps: int = 0  # passes of coordinate descent over the codes, at most
    group_aware: bool = False  # most excited groups first, and columns inside each; not with act_order
    on_units: bool = False  # errors are handed on by bfloat16 units where they have tiles (phi4edge.model.tiles)
    run: RunPieces = run_parallel  # computes pieces of rows; codes do not depend on it


@dataclass(frozen=True)
class Solution:
    """Codes, and what a report needs to know of how they came about."""

    linear: QuantizedLinear
    loss: float  # tr(E H Eᵀ) / out_features with the undamped H, or with what is known of H
    damp_percent: float  # that was used in the end
    events: tuple[Event, ...] = ()
    loss_unrefined: float | None = None  # before codes and steps were refined, where they were
