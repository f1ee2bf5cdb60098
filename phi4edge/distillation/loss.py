"""KLD(P ‖ Q) at the head, and its gradient, a slice of positions at a time.

P comes from the full-precision model's final hidden states, kept as they are after its last norm: hidden_size numbers a
position in place of vocab_size. Both sides go through the same full-precision head. ∂KLD/∂logits of Q is Q − P.
"""

from __future__ import annotations

__all__ = ["Head"]

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from phi4edge.model.source import WeightSource

_ROWS = 16384  # rows of the head in float32 at a time


class Head:
    """The head's matrix, held in the checkpoint's precision."""

    def __init__(self, source: WeightSource, name: str, dtype: torch.dtype, logit_bytes: int) -> None:
        config = source.config
        self._weight = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
        for start in range(0, config.vocab_size, _ROWS):
            stop = min(start + _ROWS, config.vocab_size)
            self._weight[start:stop] = source.tensor(name, slice(start, stop)).to(dtype)
        self._step = max(1, logit_bytes // (config.vocab_size * 4))

    def _slices(self) -> list[slice]:
        return [slice(start, start + _ROWS) for start in range(0, self._weight.shape[0], _ROWS)]

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        logits = torch.empty(hidden.shape[0], self._weight.shape[0])
        for rows in self._slices():
            logits[:, rows] = F.linear(hidden, self._weight[rows].float())
        return logits.sub_(logits.logsumexp(1, keepdim=True))

    @torch.no_grad()
    def divergence(self, hidden: Tensor, reference: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """KLD of every position, [positions] float64 nat, and the gradient of its sum.

        ``hidden``, ``reference`` [positions, hidden] float32: what the last norm gave in the tuned and in the
        full-precision model. The gradient is that with respect to ``hidden``.
        """
        values = torch.empty(hidden.shape[0], dtype=torch.float64)
        slope = torch.empty_like(hidden) if gradient else None
        for start in range(0, hidden.shape[0], self._step):
            rows = slice(start, start + self._step)
            ln_p = self._log_probabilities(reference[rows])
            ln_q = self._log_probabilities(hidden[rows])
            p = ln_p.exp()
            values[rows] = torch.linalg.vecdot(p, ln_p.sub_(ln_q)).double()
            if slope is not None:
                difference = ln_q.exp_().sub_(p)
                slope[rows] = 0
                for piece in self._slices():
                    slope[rows].addmm_(difference[:, piece], self._weight[piece].float())
        return values, slope

    @torch.no_grad()
    def sampled_slope(self, hidden: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Gradient of −ln P(y) with respect to ``hidden`` [positions, hidden], y drawn from P itself at every position.

        The mean of its outer product is the Fisher information, the curvature of KLD at its minimum. Also returns
        Σ P(1 − P) over the positions, [vocab]: the same at the logits.
        """
        slope, spread = torch.zeros_like(hidden), torch.zeros(self._weight.shape[0])
        for start in range(0, hidden.shape[0], self._step):
            rows = slice(start, start + self._step)
            p = self._log_probabilities(hidden[rows]).exp_()
            spread += (p - p * p).sum(0)
            drawn = torch.multinomial(p, 1, generator=generator)
            p.scatter_add_(1, drawn, torch.full(drawn.shape, -1.0))
            for piece in self._slices():
                slope[rows].addmm_(p[:, piece], self._weight[piece].float())
        return slope, spread
