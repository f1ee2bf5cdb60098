"""The layer objective."""

from __future__ import annotations

__all__ = ["layer_loss"]

import torch
from torch import Tensor

from phi4edge.quant.linear import QuantizedLinear
from phi4edge.solvers._api import Problem

_ROWS = 4096
_COLUMNS = 1024  # of H multiplied together; what lies below the diagonal is what lies above


def layer_loss(problem: Problem, linear: QuantizedLinear) -> float:
    """tr(E H Eᵀ) / out_features with E = W − Ŵ; H is its diagonal, or the identity, where no more is known."""
    total = 0.0
    H, h = problem.hessian, problem.importance
    for start in range(0, linear.out_features, _ROWS):
        E = problem.weight[start : start + _ROWS] - linear.rows(start, start + _ROWS).dequantize()
        if H is not None:
            total += _quadratic(E, H)
        else:
            total += float(((E if h is None else E * h) * E).sum(dtype=torch.float64))
    return total / linear.out_features


def _quadratic(E: Tensor, H: Tensor) -> float:
    """tr(E H Eᵀ) for a symmetric H, with half of the products that E H would take."""
    total = 0.0
    for start in range(0, H.shape[0], _COLUMNS):
        here = slice(start, min(start + _COLUMNS, H.shape[0]))
        weighed = E[:, here] @ H[here, here]
        if start:
            weighed.addmm_(E[:, :start], H[:start, here], alpha=2)
        total += float(weighed.mul_(E[:, here]).sum(dtype=torch.float64))
    return total
