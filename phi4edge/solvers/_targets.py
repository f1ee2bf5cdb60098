"""Full-precision targets: solve for what the full-precision model computes, from what the quantized one is fed.

Source: Li et al., "GPTAQ", arXiv 2504.02692 (asymmetric calibration). The objective, over all tokens, is

    min ‖W X − Q X̃‖²

    X [n, tokens]  inputs of this linear in the full-precision model
    X̃              inputs in the model whose earlier linears are quantized
    H [n, n]       X̃ X̃ᵀ / tokens (damped)
    D [n, n]       (X − X̃) X̃ᵀ / tokens

What differs from the reference on purpose: GPTAQ carries a second term through GPTQ's loop. Completing the square,
‖W X − Q X̃‖² = tr((W′ − Q) H (W′ − Q)ᵀ) + const with W′ = W + W D H⁻¹, so it is a shift of the weights that any
solver can take instead of W, and the loop stays as it is; H is factored once for both. A strength α takes a part of the
shift, W + α W D H⁻¹: how X − X̃ hangs on X̃ is learnt from the same tokens as H, and does not carry over whole to others.
"""

from __future__ import annotations

__all__ = ["shifted_target"]

from collections.abc import Callable

import torch
from torch import Tensor

from phi4edge.solvers._factor import Factor

_ROWS = 2048


def shifted_target(weight: Tensor, factor: Factor, cross: Callable[[slice], Tensor], strength: float) -> Tensor:
    """W + α W D H⁻¹, H as ``factor`` has it (damped).

    ``weight`` [out_features, in_features] float32; ``cross`` gives rows of W D; ``strength`` is α.
    """
    target = torch.empty_like(weight)
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, min(start + _ROWS, weight.shape[0]))
        torch.add(weight[rows], factor.divide(cross(rows)), alpha=strength, out=target[rows])
    return target
