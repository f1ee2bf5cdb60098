"""What the full-precision model makes of a small error at the output of each linear.

With G the gradient of −ln P(y) at a linear's outputs, y drawn from the model's own distribution, an error E of its
weight costs, to second order and taking positions one by one,

    KLD ≈ ½ mean_t (G_t · E x_t)²  ≈  ½ tr(F E H Eᵀ)      F = mean_t G_t G_tᵀ,  H = mean_t x_t x_tᵀ

so diag F says how much a row's error counts, and what is beside it, which errors of two rows add up and which cancel.
Source: the Kronecker-factored Fisher of Martens and Grosse, arXiv 1503.05671.
"""

from __future__ import annotations

__all__ = ["OutputMoments", "backward_block"]

import torch
from torch import Tensor

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.distillation.block import Observer, run_block
from phi4edge.model.block import Block
from phi4edge.model.crossed import Part, add_products, over_tokens, upper_rows
from phi4edge.model.rope import Rotary


def backward_block(
    block: Block, x: Tensor, dy: Tensor, rotary: Rotary, config: ModelConfig, observe: Observer
) -> Tensor:
    """Send ``dy`` back through ``block`` at input ``x``, both [batch, length, hidden] float32: the input's gradient.

    ``observe`` is called for each of the four linears with its inputs and the gradient of its outputs.
    """
    weights = (block.qkv, block.o, block.gate_up, block.down)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        out = run_block(leaf, weights, (block.input_norm, block.post_norm), rotary, config, observe)
        out.backward(dy)  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad


class OutputMoments:
    """Accumulates F of one linear; block columns at or right of the diagonal are multiplied, the rest mirrored."""

    def __init__(self, rows: int) -> None:
        self._sum = torch.zeros(rows, rows)
        self._positions = 0

    def add(self, gradient: Tensor) -> None:
        """Add gradients of the outputs, [..., out_features] float32."""
        G = gradient.reshape(-1, self._sum.shape[0])
        self._positions += G.shape[0]
        parts = [Part(self._sum[here, here.start :], here.start, here.start) for here in upper_rows(G.shape[1])]
        factor = over_tokens(G)
        add_products(parts, factor, factor, symmetric=True)

    def result(self) -> Tensor:
        """F [out_features, out_features] float32, means over all positions; ends the accumulation."""
        F = self._sum.triu_().div_(max(self._positions, 1))
        return F.add_(F.triu(1).T)
