"""What a linear's inputs look like: the Hessian H = XᵀX / tokens and its diagonal, the imatrix.

H is symmetric, so only block columns at or right of the diagonal are multiplied (a blocked rank-k update: half the
work of a full product for wide layers) and mirrored once at the end. Sums are float32, in a fixed order.

Beside H there may be D = (X − X̃)ᵀX̃ / tokens: how far the inputs of the full-precision model, X, lie from those that
H is made of, X̃, and in which directions of them. Weights and shrinkage are those of H, so that X = cX̃ gives (c − 1)H.
"""

from __future__ import annotations

__all__ = ["InputMoments", "LayerStats"]

from dataclasses import dataclass

import torch
from torch import Tensor

_MIN_BLOCK = 256
_BLOCKS = 8


@dataclass(frozen=True)
class LayerStats:
    """Second moments of the inputs of one (fused) projection, means over tokens."""

    mean_square: Tensor  # [in_features] float32: the imatrix, the diagonal of H
    hessian: Tensor | None  # [in_features, in_features] float32, where it was asked for
    tokens: int
    shift: Tensor | None = None  # D, [in_features, in_features] float32, where full-precision inputs were given


class InputMoments:
    """Accumulates XᵀX, or its diagonal alone, over samples; first positions are kept apart until the end."""

    def __init__(self, width: int, *, full: bool, exact: bool = False, device: torch.device | str = "cpu") -> None:
        assert full or not exact
        self._shift = torch.zeros((width, width), device=device) if exact else None
        self._first_shift: list[Tensor] = []  # [count, width] of each batch, full-precision less own
        self._sum = torch.zeros((width, width) if full else (width,), device=device)
        self._first: list[Tensor] = []  # [count, width] of each batch
        self._block = max(_MIN_BLOCK, -(-width // _BLOCKS))
        self._full = full
        self._tokens = 0  # after the first positions

    def add(self, x: Tensor, exact: Tensor | None = None) -> None:
        """Add samples ``x`` [count, length, width] float32; ``exact`` is what full precision has in their place."""
        assert (exact is None) == (self._shift is None)
        if exact is not None and self._shift is not None:
            shift = exact - x
            self._first_shift.append(shift[:, 0].clone())
            self._shift.addmm_(shift[:, 1:].reshape(-1, x.shape[-1]).T, x[:, 1:].reshape(-1, x.shape[-1]))
        self._first.append(x[:, 0].clone())
        rows = x[:, 1:].reshape(-1, x.shape[-1])
        self._tokens += rows.shape[0]
        if not self._full:
            self._sum.add_(rows.pow(2).sum(0))
            return
        for start in range(0, x.shape[-1], self._block):
            stop = min(start + self._block, x.shape[-1])
            self._sum[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])

    def result(self, sink_share: float | None = None, shrinkage: float = 0.0) -> LayerStats:
        """Means over all rows added; ends the accumulation.

        ``sink_share`` is the share of H's trace that first positions get; None leaves them what they have.
        ``shrinkage`` scales all that is off the diagonal by one less it: what channels have in common on this text
        is believed that much less.
        """
        first = torch.cat(self._first)
        tokens = self._tokens + first.shape[0]
        H = self._sum
        rest_diagonal = (H.diagonal() if self._full else H).clone()
        first_diagonal = first.pow(2).sum(0)
        mean_square = (rest_diagonal + first_diagonal) / max(tokens, 1)
        if not self._full:
            return LayerStats(mean_square, None, tokens)
        rest_energy, first_energy = float(rest_diagonal.sum()), float(first_diagonal.sum())
        weight = 1.0
        if sink_share is not None and rest_energy > 0 and first_energy > 0:
            weight = sink_share / (1 - sink_share) * rest_energy / first_energy
        H.addmm_(first.T, first, alpha=weight).div_(max(tokens, 1))
        for start in range(0, H.shape[0], self._block):
            stop = min(start + self._block, H.shape[0])
            H[stop:, start:stop] = H[start:stop, stop:].T
            square = H[start:stop, start:stop]
            square.copy_((square + square.T) / 2)
        D = self._shift
        if D is not None:
            D.addmm_(torch.cat(self._first_shift).T, first, alpha=weight).div_(max(tokens, 1))
        if shrinkage > 0:
            for moments in (H,) if D is None else (H, D):
                diagonal = moments.diagonal().clone()
                moments.mul_(1 - shrinkage)
                moments.diagonal().copy_(diagonal)
        return LayerStats(mean_square, H, tokens, D)
