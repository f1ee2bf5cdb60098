"""One block, forward and backward, with nothing kept between the two but its input.

The backward pass computes the forward pass again. The gradient of a weight is summed over the sequences of a batch and
only then reduced to its groups' parameters, so codes are looked at once a step.
"""

from __future__ import annotations

__all__ = ["BlockRunner"]

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.distillation.parameters import QuantizedBlock, gradients_of_steps
from phi4edge.model.block import down_input, o_input, rms_norm
from phi4edge.model.rope import Rotary


class _Linear(torch.autograd.Function):
    """x Wᵀ whose weight gradient is added to a buffer that the caller owns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gradient = gradient
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (dy,) = gradients
        x, weight = ctx.saved_tensors
        ctx.gradient.addmm_(dy.reshape(-1, dy.shape[-1]).T, x.reshape(-1, x.shape[-1]))
        return dy @ weight, None, None


class BlockRunner:
    """A block's dequantized weights, for as long as they are needed."""

    def __init__(self, block: QuantizedBlock, rotary: Rotary, config: ModelConfig) -> None:
        self._block, self._rotary, self._config = block, rotary, config
        self._weights = [linear.dequantize() for linear in block.linears]
        self._norms = list(block.gains)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The block's output for hidden states ``x`` [batch, length, hidden] float32."""
        return self._run(x, [self._block.gains[name] for name in self._norms], None)

    def backward(self, pieces: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Gradients for ``pieces`` of a batch, each (input, gradient of the output), [batch, length, hidden].

        Returns the gradients of the inputs, and of everything continuous by name, summed over the pieces.
        """
        buffers = [torch.zeros_like(weight) for weight in self._weights]
        gains = [self._block.gains[name].clone().requires_grad_() for name in self._norms]
        arriving = []
        for x, dy in pieces:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                self._run(leaf, gains, buffers).backward(dy)  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            arriving.append(leaf.grad)
        found = {name: gain.grad for name, gain in zip(self._norms, gains, strict=True) if gain.grad is not None}
        for linear, dW in zip(self._block.linears, buffers, strict=True):
            found |= gradients_of_steps(linear, dW)
        return arriving, found

    def _run(self, x: Tensor, gains: list[Tensor], buffers: list[Tensor] | None) -> Tensor:
        def linear(values: Tensor, index: int) -> Tensor:
            if buffers is None:
                return F.linear(values, self._weights[index])
            out: Tensor = _Linear.apply(values, self._weights[index], buffers[index])  # type: ignore[no-untyped-call]
            return out

        eps = self._config.rms_norm_eps
        x = x + linear(o_input(linear(rms_norm(x, gains[0], eps), 0), self._rotary, self._config), 1)
        return x + linear(down_input(linear(rms_norm(x, gains[1], eps), 2)), 3)
