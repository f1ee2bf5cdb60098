"""The layer objective."""

from __future__ import annotations

__all__ = ["LOSS_COLUMNS", "layer_loss"]

from functools import partial

import torch
from torch import Tensor

from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.parallel import row_pieces, run_parallel
from phi4edge.solvers._api import Problem

_MULTIPLIED = 1 << 24  # weights at a time whose errors are multiplied with H
LOSS_COLUMNS = 1024  # of H multiplied together; what lies below the diagonal is what lies above
_WEIGHTS = 1 << 17  # without H: what stays in a core's cache


def layer_loss(problem: Problem, linear: QuantizedLinear) -> float:
    """tr(E H Eᵀ) / out_features with E = W − Ŵ; H is its diagonal, or the identity, where no more is known."""
    H, h = problem.hessian, problem.importance
    rows, columns = problem.weight.shape

    def loss(piece: slice) -> float:
        total = 0.0
        step = max(1, (_MULTIPLIED if H is not None else _WEIGHTS) // columns)
        for start in range(piece.start, piece.stop, step):
            stop = min(start + step, piece.stop)
            E = problem.weight[start:stop] - linear.rows(start, stop).dequantize()
            total += _quadratic(E, H) if H is not None else _weighed(E, h)
        return total

    if H is not None:  # products use all cores as they are
        return loss(slice(0, rows)) / rows
    return sum(run_parallel([partial(loss, piece) for piece in row_pieces(rows, columns)])) / rows


def _weighed(E: Tensor, h: Tensor | None) -> float:
    return float(((E if h is None else E * h) * E).sum(dtype=torch.float64))


def _quadratic(E: Tensor, H: Tensor) -> float:
    """tr(E H Eᵀ) for a symmetric H, with half of the products that E H would take."""
    total = 0.0
    for start in range(0, H.shape[0], LOSS_COLUMNS):
        here = slice(start, min(start + LOSS_COLUMNS, H.shape[0]))
        weighed = E[:, here] @ H[here, here]
        if start:
            weighed.addmm_(E[:, :start], H[:start, here], alpha=2)
        total += float(weighed.mul_(E[:, here]).sum(dtype=torch.float64))
    return total
