"""Adam on the dimensionless θ of a tensor, with a one-cycle learning rate.

Source: Kingma and Ba, "Adam", arXiv 1412.6980, Algorithm 1; the schedule is Smith's, arXiv 1708.07120: up along half a
cosine to the peak, then down along another to next to nothing.
"""

from __future__ import annotations

__all__ = ["adam_step", "learning_rate", "new_state"]

import math

import torch
from torch import Tensor

_BETA1, _BETA2, _EPSILON = 0.9, 0.95, 1e-12
_RISE = 0.2  # share of the steps on the way up
_FIRST, _LAST = 0.1, 0.01  # of the peak


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The rate of step ``step`` (from 0) of ``steps``."""
    rise = max(1.0, _RISE * steps)
    if step < rise:
        low, share = _FIRST, 0.5 - 0.5 * math.cos(math.pi * (step + 0.5) / rise)
    else:
        low, share = _LAST, 0.5 + 0.5 * math.cos(math.pi * (step + 0.5 - rise) / max(steps - rise, 1.0))
    return peak * (low + (1 - low) * share)


def new_state(like: Tensor) -> Tensor:
    """θ, first and second moment, all zero: [3, *shape] float32."""
    return torch.zeros(3, *like.shape)


def adam_step(state: Tensor, gradient: Tensor, step: int, rate: float) -> Tensor:
    """The state after step ``step`` (from 0) with ``gradient`` of θ; the old one is left alone."""
    theta, first, second = state
    first = torch.lerp(gradient, first, _BETA1)
    second = torch.lerp(gradient * gradient, second, _BETA2)
    m = first / (1 - _BETA1 ** (step + 1))
    v = second / (1 - _BETA2 ** (step + 1))
    return torch.stack((theta - rate * m / (v.sqrt() + _EPSILON), first, second))
