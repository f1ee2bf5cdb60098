"""What the full-precision model makes of a small error at the output of each linear.

With G the gradient of −ln P(y) at a linear's outputs, y drawn from the model's own distribution, an error E of its
weight costs, to second order and taking positions one by one,

    KLD ≈ ½ mean_t (G_t · E x_t)²  ≈  ½ tr(F E H Eᵀ)      F = mean_t G_t G_tᵀ,  H = mean_t x_t x_tᵀ

so diag F says how much a row's error counts, and what is beside it, which errors of two rows add up and which cancel.
Source: the Kronecker-factored Fisher of Martens and Grosse, arXiv 1503.05671.

F of a wide linear has more numbers than the linear. So rows are dealt out in turn to as many groups as keep a group at
or below COUPLED_ROWS rows, and F is known within each: all of it up to that width.
"""

from __future__ import annotations

__all__ = ["OutputMoments", "RowCurvature", "backward_block", "row_groups"]

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.core.recipe import COUPLED_ROWS
from phi4edge.distillation.block import Observer, run_block
from phi4edge.model.block import Block
from phi4edge.model.rope import Rotary

_MIN_BLOCK = 256


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


def row_groups(rows: int) -> list[Tensor]:
    """The rows of each coupled group, [n] int64: row r is in group r mod their number."""
    count = -(-rows // COUPLED_ROWS)
    return [torch.arange(first, rows, count) for first in range(count)]


@dataclass(frozen=True)
class RowCurvature:
    """F of a linear as far as it is known: its diagonal, and what rows of a group have in common."""

    diagonal: Tensor  # [out_features] float32
    correlations: tuple[Tensor, ...]  # of each group, [n, n] float16: F_rs / √(F_rr F_ss), ones on the diagonal

    def group(self, index: int, strength: float, damp_percent: float, device: torch.device | str = "cpu") -> Tensor:
        """F of a group, [n, n] float32, all beside the diagonal times ``strength``.

        ``damp_percent`` of the mean diagonal is added to it.
        """
        rows = row_groups(self.diagonal.shape[0])[index]
        scale = self.diagonal[rows].to(device).sqrt()
        F = self.correlations[index].to(device).float().mul_(strength).mul_(scale[:, None]).mul_(scale)
        F.diagonal().copy_(scale.square())
        F.diagonal().add_(damp_percent * F.diagonal().mean())
        return F

    def to_tensors(self, name: str) -> dict[str, Tensor]:
        """What is stored."""
        stored = {f"{name}.diagonal": self.diagonal}
        return stored | {f"{name}.correlations.{i}": values for i, values in enumerate(self.correlations)}

    @classmethod
    def from_tensors(cls, name: str, tensors: Mapping[str, Tensor]) -> RowCurvature:
        """The inverse of :meth:`to_tensors`."""
        diagonal = tensors[f"{name}.diagonal"]
        count = len(row_groups(diagonal.shape[0]))
        return cls(diagonal, tuple(tensors[f"{name}.correlations.{i}"] for i in range(count)))


class OutputMoments:
    """Accumulates F of one linear; block columns at or right of the diagonal are multiplied, the rest mirrored."""

    def __init__(self, rows: int) -> None:
        self._groups = row_groups(rows)
        self._rows = rows
        self._sums = [torch.zeros(len(group), len(group)) for group in self._groups]
        self._tokens = 0

    def add(self, gradient: Tensor) -> None:
        """Add gradients of the outputs, [..., out_features] float32."""
        flat = gradient.reshape(-1, self._rows)
        self._tokens += flat.shape[0]
        for first, total in enumerate(self._sums):
            G = flat[:, first :: len(self._sums)]
            step = max(_MIN_BLOCK, -(-G.shape[1] // 6))
            for start in range(0, G.shape[1], step):
                total[start : start + step, start:].addmm_(G[:, start : start + step].T, G[:, start:])

    def result(self) -> RowCurvature:
        """Means over all positions; ends the accumulation."""
        diagonal = torch.zeros(self._rows)
        correlations = []
        for rows, total in zip(self._groups, self._sums, strict=True):
            energy = total.diagonal().clone()
            diagonal[rows] = energy / max(self._tokens, 1)
            inverse = torch.where(energy > 0, energy.rsqrt(), torch.zeros_like(energy))
            upper = total.triu_(1).mul_(inverse[:, None]).mul_(inverse)
            C = upper.add_(upper.T.clone())
            C.diagonal().fill_(1)
            correlations.append(C.to(torch.float16))
        return RowCurvature(diagonal, tuple(correlations))
