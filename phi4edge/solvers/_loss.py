"""The layer objective."""

from __future__ import annotations

__all__ = ["layer_loss"]

import torch
from torch import Tensor

from phi4edge.quant.linear import QuantizedLinear

_ROWS = 4096


def layer_loss(weight: Tensor, linear: QuantizedLinear, hessian: Tensor | None) -> float:
    """tr(E H Eᵀ) / out_features with E = W − Ŵ, or the mean of E² a row where there is no Hessian."""
    total = 0.0
    dequantized = linear.dequantize()
    for start in range(0, weight.shape[0], _ROWS):
        E = weight[start : start + _ROWS] - dequantized[start : start + _ROWS]
        total += float(((E @ hessian if hessian is not None else E) * E).sum(dtype=torch.float64))
    return total / weight.shape[0]
