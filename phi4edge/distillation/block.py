"""One block, forward and backward.

Nothing need be kept between the two but the block's input: the backward pass then computes the forward pass again, to
the same bits. The gradient of a weight is summed over the sequences of a batch and only then reduced to its groups'
parameters, so codes are looked at once a step.
"""

from __future__ import annotations

__all__ = ["BlockRunner", "Observer", "run_block"]

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.distillation.parameters import QuantizedBlock, gradients_of_steps
from phi4edge.model.block import down_input, o_input, rms_norm
from phi4edge.model.compute import decoded, product
from phi4edge.model.crossed import Part, add_products, over_tokens
from phi4edge.model.rope import Rotary

Observer = Callable[[int, Tensor, Tensor], None]  # (index of the linear, its inputs x, gradient of its outputs)


class _Linear(torch.autograd.Function):
    """x Wᵀ that has no gradient for W, and shows what W's gradient is made of to an observer instead."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, index: int, observe: Observer) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.index, ctx.observe = index, observe
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (dy,) = gradients
        x, weight = ctx.saved_tensors
        ctx.observe(ctx.index, x, dy)
        return (dy.to(weight.dtype) @ weight).to(dy.dtype), None, None, None


def run_block(
    x: Tensor,
    weights: Sequence[Tensor],
    gains: Sequence[Tensor],
    rotary: Rotary,
    config: ModelConfig,
    observe: Observer | None = None,
) -> Tensor:
    """A block's output for hidden states ``x`` [batch, length, hidden] float32.

    ``weights`` of the four linears in order of use, prepared; ``gains`` of the two norms. With ``observe`` the graph is
    kept, and the backward pass through it calls ``observe`` for each linear.
    """

    def linear(values: Tensor, index: int) -> Tensor:
        if observe is None:
            return product(values, weights[index])
        out: Tensor = _Linear.apply(values, weights[index], index, observe)  # type: ignore[no-untyped-call]
        return out

    eps = config.rms_norm_eps
    x = x + linear(o_input(linear(rms_norm(x, gains[0], eps), 0), rotary, config), 1)
    return x + linear(down_input(linear(rms_norm(x, gains[1], eps), 2)), 3)


class BlockRunner:
    """A quantized block's dequantized weights, for as long as they are needed."""

    def __init__(self, block: QuantizedBlock, rotary: Rotary, config: ModelConfig) -> None:
        self._block, self._rotary, self._config = block, rotary, config
        self._weights = [decoded(linear) for linear in block.linears]
        self._gains = {name: gain.clone().requires_grad_() for name, gain in block.gains.items()}
        self._gradients: list[Tensor] = []
        self._kept: list[tuple[Tensor, Tensor]] = []  # input and output of each piece whose graph is alive

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The block's output for hidden states ``x`` [batch, length, hidden] float32."""
        return run_block(x, self._weights, list(self._block.gains.values()), self._rotary, self._config)

    def forward_kept(self, x: Tensor) -> Tensor:
        """The same, and what the way back needs stays in RAM."""
        self._kept.append(self._graph(x))
        return self._kept[-1][1].detach()

    def backward(
        self, slopes: list[Tensor], inputs: list[Tensor] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Gradients for the pieces of a batch, from those of their outputs, ``slopes`` [batch, length, hidden].

        ``inputs`` of the pieces, where their graphs were not kept and the forward pass is computed again.

        Returns the gradients of the inputs; of everything continuous by name; and of the dequantized weights by the
        linear's name; all but the first summed over the pieces.
        """
        self._begin()
        arriving = []
        for i, slope in enumerate(slopes):
            leaf, out = self._graph(inputs[i]) if inputs is not None else self._kept[i]
            out.backward(slope)  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            arriving.append(leaf.grad)
        self._kept = []
        return arriving, *self._finish()

    def learn(
        self, pieces: Iterable[Tensor], slope_of: Callable[[int, Tensor], Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Forward and back with one piece after the other: only one's graph is in RAM.

        ``slope_of`` gives the gradient of the output of a piece, by its number and that output. Returns what
        :meth:`backward` does but for the gradients of inputs, which nobody asks for.
        """
        self._begin()
        for number, x in enumerate(pieces):
            _, out = self._graph(x)
            out.backward(slope_of(number, out.detach()))  # type: ignore[no-untyped-call]
        return self._finish()

    def _begin(self) -> None:
        self._gradients = [
            torch.zeros(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
            for weight in self._weights
        ]

    def _finish(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of everything continuous, and of the weights, which are let go of here."""
        found = {name: gain.grad for name, gain in self._gains.items() if gain.grad is not None}
        of_weights = {}
        for linear, dW in zip(self._block.linears, self._gradients, strict=True):
            found |= gradients_of_steps(linear, dW)
            of_weights[linear.name] = dW
        self._gradients = []
        return found, of_weights

    def _graph(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            gains = list(self._gains.values())
            return leaf, run_block(leaf, self._weights, gains, self._rotary, self._config, self._gather)

    def _gather(self, index: int, x: Tensor, dy: Tensor) -> None:
        left, right = (values.reshape(-1, values.shape[-1]) for values in (dy, x))
        add_products([Part(self._gradients[index])], over_tokens(left), over_tokens(right))
