"""What the full-precision model makes of a small error at the output of each linear.

With G the gradient of −ln P(y) at a linear's outputs, y drawn from the model's own distribution, an error E of its
weight costs, to second order and taking positions one by one,

    KLD ≈ ½ mean_t (G_t · E x_t)²  ≈  ½ Σ_r s_r (E H Eᵀ)_rr      s_r = mean_t G_tr²,  H = mean_t x_t x_tᵀ

so s says how much a row's error counts. Source: the Kronecker-factored Fisher
of Martens and Grosse, arXiv 1503.05671, with its output side kept to the diagonal.
"""

from __future__ import annotations

__all__ = ["Sensitivity", "backward_block"]

from dataclasses import dataclass

import torch
from torch import Tensor

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.distillation.block import run_block
from phi4edge.model.block import Block
from phi4edge.model.rope import Rotary


@dataclass(frozen=True)
class Sensitivity:
    """Energies at one linear, over some samples."""

    outputs: Tensor  # [out_features] float32: Σ over positions of G²
    inputs: Tensor  # [in_features] float32: Σ over positions of x²


def backward_block(
    block: Block, x: Tensor, dy: Tensor, rotary: Rotary, config: ModelConfig
) -> tuple[Tensor, list[Sensitivity]]:
    """Send ``dy`` back through ``block`` at input ``x``, both [batch, length, hidden] float32.

    Returns the gradient of the input, and the sensitivity of the four linears in order of use.
    """
    found: dict[int, Sensitivity] = {}

    def observe(index: int, inputs: Tensor, gradient: Tensor) -> None:
        found[index] = Sensitivity(gradient.square().sum((0, 1)), inputs.square().sum((0, 1)))

    weights = (block.qkv, block.o, block.gate_up, block.down)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        out = run_block(leaf, weights, (block.input_norm, block.post_norm), rotary, config, observe)
        out.backward(dy)  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad, [found[index] for index in range(len(weights))]
