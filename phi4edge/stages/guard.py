"""The guard: how a linear fares on samples that no Hessian has seen, against rounding to nearest.

Error compensation can fit the calibration rows and lose elsewhere; where a few rows hold nearly all the energy of
an input (an attention sink: the first position of a chunk), the total hides it. So the output error
‖X (W − Ŵ)ᵀ‖² is taken over the first positions and over all others apart.
"""

from __future__ import annotations

__all__ = ["HeldOut", "held_out_errors", "output_energies", "relative_errors"]

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phi4edge.calibration.judging import CHECKED_WEIGHTS
from phi4edge.calibration.streams import Arrival
from phi4edge.model.compute import prepared, product
from phi4edge.quant.parallel import row_pieces


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
    return relative_errors(output_energies(inputs, weight, candidates), len(candidates))


def output_energies(
    inputs: Callable[[], Iterable[Arrival]], weight: Tensor, candidates: Sequence[Callable[[slice], Tensor]]
) -> Iterator[Iterator[Tensor]]:
    """Energies by rows of the weight and by sample: [1 + candidates, 2] float64, of first positions and all others.

    The first row is that of the output aimed at, the others those of the candidates' errors.
    """
    for rows in row_pieces(weight.shape[0], weight.shape[1], max(1, CHECKED_WEIGHTS // weight.shape[1])):
        yield _energies(inputs(), weight[rows], [weight[rows] - candidate(rows) for candidate in candidates])


def _energies(arriving: Iterable[Arrival], W: Tensor, errors: Sequence[Tensor]) -> Iterator[Tensor]:
    W, errors = prepared(W), [prepared(error) for error in errors]
    for _, x, exact in arriving:
        away = torch.zeros(()) if exact is None else product(exact - x, W)
        outputs = [product(x if exact is None else exact, W)]
        outputs += [product(x, error) + away.to(x.device) for error in errors]
        energies = [output.pow(2).sum(-1, dtype=torch.float64) for output in outputs]  # [count, length]
        yield torch.stack([torch.stack((energy[:, 0].sum(), energy[:, 1:].sum())) for energy in energies]).cpu()


def relative_errors(energies: Iterable[Iterable[Tensor]], candidates: int) -> list[HeldOut]:
    """The candidates' errors, summed in the order that :func:`output_energies` gives them in."""
    sums = torch.zeros(candidates + 1, 2, dtype=torch.float64)
    for by_sample in energies:
        for found in by_sample:
            sums += found
    whole = sums[0].clamp_min(1e-300)
    return [HeldOut(float(first), float(rest)) for first, rest in (sums[1:] / whole).tolist()]
