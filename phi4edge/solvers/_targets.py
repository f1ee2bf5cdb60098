"""Full-precision targets: solve for what the full-precision model computes, from what the quantized one is fed.

Source: Li et al., "GPTAQ", arXiv 2504.02692 (asymmetric calibration). The objective, over all tokens, is

    min ‖W X − Q X̃‖²

    X [n, tokens]  inputs of this linear in the full-precision model
    X̃              inputs in the model whose earlier linears are quantized
    H [n, n]       X̃ X̃ᵀ / tokens (damped)
    D [n, n]       (X − X̃) X̃ᵀ / tokens

What differs from the reference on purpose: GPTAQ carries a second term through GPTQ's loop. Completing the square,
‖W X − Q X̃‖² = tr((W′ − Q) H (W′ − Q)ᵀ) + const with W′ = W + W D H⁻¹, so it is a shift of the weights that any
solver can take instead of W, and the loop stays as it is; H is factored once for both, and it is D that is divided
by it, which has fewer rows than W D wherever that is not gathered in D's place. A strength α takes a part of the
shift, W + α W D H⁻¹: how X − X̃ hangs on X̃ is learnt from the same tokens as H, and does not carry over whole to others.
"""

from __future__ import annotations

__all__ = ["shifted_target"]

from functools import partial

from torch import Tensor

from phi4edge.model.tiles import Tiles, in_pairs, tiles
from phi4edge.quant.parallel import row_pieces, run_parallel
from phi4edge.solvers._factor import Factor

_ROWS = 2048


def shifted_target(
    weight: Tensor, factor: Factor, moments: Tensor, strength: float, *, multiplied: bool, on_units: bool = False
) -> Tensor:
    """W + α W D H⁻¹, H as ``factor`` has it (damped).

    ``weight`` [out_features, in_features] float32; ``moments`` are used up: D [in_features, in_features], or
    (``multiplied``) W D [out_features, in_features]. ``strength`` is α. ``on_units``: a product with the whole of D H⁻¹
    is bfloat16 units', where they have tiles.
    """
    for start in range(0, moments.shape[0], _ROWS):
        rows = slice(start, min(start + _ROWS, moments.shape[0]))
        moments[rows] = factor.divide(moments[rows]).mul_(strength)
    if multiplied:
        return moments.add_(weight)
    target = weight.clone()
    units = tiles() if on_units and weight.device.type == "cpu" else None
    if units is None:
        for start in range(0, weight.shape[0], _ROWS):
            target[start : start + _ROWS].addmm_(weight[start : start + _ROWS], moments)
        return target
    right = in_pairs(moments)
    pieces = row_pieces(weight.shape[0], weight.shape[1], _ROWS)
    run_parallel([partial(_shift, units, target[rows], weight[rows], right) for rows in pieces])
    return target


def _shift(units: Tiles, target: Tensor, weight: Tensor, right: Tensor) -> None:
    """Add W · ``right`` to some rows; they are rounded here, so that no more of them are than are in work."""
    units.add(target, weight.bfloat16(), right)
