"""The layer objective."""

from __future__ import annotations

__all__ = ["layer_loss"]

import torch

from phi4edge.quant.linear import QuantizedLinear
from phi4edge.solvers._api import Problem

_ROWS = 4096


def layer_loss(problem: Problem, linear: QuantizedLinear) -> float:
    """tr(E H Eᵀ) / out_features with E = W − Ŵ; H is its diagonal, or the identity, where no more is known."""
    total = 0.0
    H, h = problem.hessian, problem.importance
    for start in range(0, linear.out_features, _ROWS):
        E = problem.weight[start : start + _ROWS] - linear.rows(start, start + _ROWS).dequantize()
        weighed = E @ H if H is not None else E * h if h is not None else E
        total += float((weighed * E).sum(dtype=torch.float64))
    return total / linear.out_features
