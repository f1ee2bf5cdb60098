"""The guard: how a linear fares on samples that no Hessian has seen, against rounding to nearest.

Error compensation can fit the calibration rows and lose elsewhere; where a few rows hold nearly all the energy of
an input (an attention sink: the first position of a chunk), the total hides it. So the output error
‖X (W − Ŵ)ᵀ‖² is taken over the first positions and over all others apart.
"""

from __future__ import annotations

__all__ = ["HeldOut", "held_out_errors"]

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from phi4edge.calibration.streams import Arrival

_ROWS = 8192  # of the weight, and as many errors of each candidate


@dataclass(frozen=True)
class HeldOut:
    """Output error of a quantized linear on held-out samples, relative to the energy of the output aimed at."""

    first: float  # first position of each sample
    rest: float  # all others

    def loses_to(self, other: HeldOut) -> bool:
        """Whether this is worse than ``other`` on either kind of position."""
        return self.rest > other.rest or self.first > other.first


def held_out_errors(
    inputs: Callable[[], Iterable[Arrival]], weight: Tensor, candidates: Sequence[Callable[[slice], Tensor]]
) -> list[HeldOut]:
    """Errors of each candidate, which gives rows of its values, for the ``inputs`` of the held-out samples.

    Beside an input [count, length, in_features] may stand what full precision has in its place; the outputs aimed at
    are then those of that. Outputs are computed some rows of ``weight`` [out_features, in_features] at a time.
    """
    sums = torch.zeros(len(candidates) + 1, 2, dtype=torch.float64)
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, min(start + _ROWS, weight.shape[0]))
        W = weight[rows]
        errors = [W - candidate(rows) for candidate in candidates]
        for _, x, exact in inputs():
            away = torch.zeros(()) if exact is None else linear(exact - x, W)
            outputs = [linear(x if exact is None else exact, W)]
            outputs += [linear(x, error) + away.to(x.device) for error in errors]
            for row, output in enumerate(outputs):
                energy = output.pow(2).sum(-1, dtype=torch.float64)  # [count, length]
                sums[row, 0] += energy[:, 0].sum().cpu()
                sums[row, 1] += energy[:, 1:].sum().cpu()
    whole = sums[0].clamp_min(1e-300)
    return [HeldOut(float(first), float(rest)) for first, rest in (sums[1:] / whole).tolist()]
