"""KLD(P ‖ Q) at the head, and its gradient, a slice of the vocabulary at a time.

P comes from the full-precision model's final hidden states, kept as they are after its last norm: hidden_size numbers a
position in place of vocab_size. Both sides go through the same full-precision head. ∂KLD/∂logits of Q is Q − P.

A slice of the head is read once for all positions of both models, and its logits are forgotten: a first pass sums
exp z and exp z_P · (z_P − z_Q) as softmax over a stream does (Milakov and Gimelshein, arXiv 1805.02867), and a second
one, for the gradient, computes the same logits again. So RAM does not grow with the vocabulary.
"""

from __future__ import annotations

__all__ = ["Head"]

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from phi4edge.model.summed import add_times, times_transposed


class Head:
    """The head's matrix [vocab, hidden]: ``read(start, stop)`` gives rows of it, ``rows`` are multiplied at a time."""

    def __init__(self, read: Callable[[int, int], Tensor], vocabulary: int, rows: int) -> None:
        self._read, self._vocabulary, self._rows = read, vocabulary, rows

    def _slices(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the matrix as they are stored, and where they stand."""
        for start in range(0, self._vocabulary, self._rows):
            stop = min(start + self._rows, self._vocabulary)
            yield slice(start, stop), self._read(start, stop)

    @torch.no_grad()
    def divergence(self, hidden: Tensor, reference: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """KLD of every position, [positions] float64 nat, and the gradient of its sum.

        ``hidden``, ``reference`` [positions, hidden] float32: what the last norm gave in the tuned and in the
        full-precision model. The gradient is that with respect to ``hidden``.
        """
        n = hidden.shape[0]
        both = torch.cat((hidden, reference))
        sums, apart = _Sums(2 * n), torch.zeros(n, dtype=torch.float64)
        for _, weight in self._slices():
            z = times_transposed(both, weight)
            difference = z[n:] - z[:n]
            shrunk, e = sums.add(z)
            apart.mul_(shrunk[n:]).add_(torch.linalg.vecdot(e[n:], difference))
        ln_total = sums.ln_total()
        values = apart / sums.total[n:] - ln_total[n:] + ln_total[:n]
        if not gradient:
            return values, None
        slope, shift = torch.zeros_like(hidden), ln_total.float()[:, None]
        for _, weight in self._slices():
            p = times_transposed(both, weight).sub_(shift).exp_()
            add_times(slope, p[:n].sub_(p[n:]), weight)
        return values, slope

    @torch.no_grad()
    def sampled_slope(self, hidden: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Gradient of −ln P(y) with respect to ``hidden`` [positions, hidden], y drawn from P itself at every position.

        The mean of its outer product is the Fisher information, the curvature of KLD at its minimum. Also returns
        Σ P(1 − P) over the positions, [vocab]: the same at the logits.
        """
        sums = _Sums(hidden.shape[0])
        for _, weight in self._slices():
            sums.add(times_transposed(hidden, weight))
        shift = sums.ln_total().float()[:, None]
        slope, spread = torch.zeros_like(hidden), torch.zeros(self._vocabulary)
        ahead = torch.rand(hidden.shape[0], 1, generator=generator)  # probability that y lies beyond; negative: behind
        for rows, weight in self._slices():
            p = times_transposed(hidden, weight).sub_(shift).exp_()
            spread[rows] = (p - p * p).sum(0)
            reached = p.cumsum(1)
            last = rows.stop == self._vocabulary  # where sums of rounded P stay below one, y is the last word
            here = ((ahead >= 0) & ((reached[:, -1:] > ahead) | last))[:, 0]
            word = torch.searchsorted(reached[here], ahead[here], right=True).clamp_(max=p.shape[1] - 1)
            p[here] = p[here].scatter_add_(1, word, torch.full(word.shape, -1.0))
            ahead = torch.where((ahead < 0) | here[:, None], -1.0, ahead - reached[:, -1:])
            add_times(slope, p, weight)
        return slope, spread


class _Sums:
    """Σ exp(z − max z) over a stream of logits, for each of ``positions``."""

    def __init__(self, positions: int) -> None:
        self._largest = torch.full((positions,), -torch.inf)
        self.total = torch.zeros(positions, dtype=torch.float64)

    def add(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Add logits [positions, some], which become exp(z − max z); what earlier sums are multiplied by, and those."""
        largest = torch.maximum(self._largest, z.amax(1))
        shrunk = (self._largest - largest).exp_().double()
        self._largest = largest
        e = z.sub_(largest[:, None]).exp_()
        self.total.mul_(shrunk).add_(e.sum(1))
        return shrunk, e

    def ln_total(self) -> Tensor:
        """ln Σ exp z, float64."""
        return self.total.log().add_(self._largest)
