"""Full-precision targets: solve for what the full-precision model computes, from what the quantized one is fed.

Source: Li et al., "GPTAQ", arXiv 2504.02692 (asymmetric calibration). The objective, over all tokens, is

    min ‖W X − Q X̃‖²

    X [n, tokens]  inputs of this linear in the full-precision model
    X̃              inputs in the model whose earlier linears are quantized
    H [n, n]       X̃ X̃ᵀ / tokens (damped)
    D [n, n]       (X − X̃) X̃ᵀ / tokens

What differs from the reference on purpose: GPTAQ carries a second term through GPTQ's loop. Completing the square,
‖W X − Q X̃‖² = tr((W′ − Q) H (W′ − Q)ᵀ) + const with W′ = W + W D H⁻¹, so it is a shift of the weights that any
solver can take instead of W, and the loop stays as it is. A strength α takes a part of the shift, W + α W D H⁻¹:
how X − X̃ hangs on X̃ is learnt from the same tokens as H, and does not carry over whole to others.
"""

from __future__ import annotations

__all__ = ["shifted_target"]

import torch
from torch import Tensor

from phi4edge.core.errors import Phi4EdgeError
from phi4edge.core.events import Event

_ROWS = 4096
_MAX_DAMP = 1.0


def shifted_target(
    weight: Tensor, hessian: Tensor, shift: Tensor, strength: float, damp_percent: float, name: str
) -> tuple[Tensor, tuple[Event, ...]]:
    """W + α W D (H + λ)⁻¹, and an event if λ had to be raised.

    ``weight`` [out_features, in_features], ``hessian`` H and ``shift`` D [in_features, in_features], all float32;
    ``strength`` is α; λ is ``damp_percent`` of the mean of diag H, raised tenfold until H can be factored.

    Raises:
        Phi4EdgeError: H cannot be factored even when damped by its whole mean diagonal.
    """
    mean, damp = float(hessian.diagonal().mean()), damp_percent
    while True:
        damped = hessian.clone()
        # Where no input was ever other than zero D is zero too, and any diagonal will do.
        damped.diagonal().add_(damp * mean if mean > 0 else 1.0)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            break
        damp = max(damp * 10, 1e-4)
        if not damp <= _MAX_DAMP:
            raise Phi4EdgeError(f"{name}: the Hessian cannot be factored even with damping {damp / 10:g}")
    del damped
    target = torch.empty_like(weight)
    for start in range(0, weight.shape[0], _ROWS):
        W = weight[start : start + _ROWS]
        solved = torch.cholesky_solve((W @ shift).T, lower)  # [n, rows]
        torch.add(W, solved.T, alpha=strength, out=target[start : start + _ROWS])
    if damp == damp_percent:
        return target, ()
    detail = f"the shift towards full precision is not solvable with damp_percent {damp_percent:g}; raised to {damp:g}"
    return target, (Event("damping_raised", name, detail, {"asked": damp_percent, "used": damp}),)
