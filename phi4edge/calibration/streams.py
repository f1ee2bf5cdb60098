"""The two streams of calibration samples through one block, side by side.

Where a recipe aims at full precision there are two: what the quantized blocks make of the samples, and what the
full-precision ones make of them. Everything here works on a range of samples and asks nothing else of them, so that
samples may be spread over processes.
"""

from __future__ import annotations

__all__ = ["Arrival", "Streams"]

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from phi4edge.calibration.blockpass import COMPUTED_TOKENS, BlockPass
from phi4edge.calibration.statistics import InputMoments

# The first of a few samples, their [count, length, in_features] in the quantized model, and in full precision where
# that is asked for.
Arrival = tuple[int, Tensor, Tensor | None]


@dataclass(frozen=True)
class Streams:
    """Some samples before one block."""

    own: BlockPass  # as the quantized model has them
    exact: BlockPass | None  # as full precision has them

    def inputs(self, stage: int, samples: range, *, tokens: int = COMPUTED_TOKENS) -> Iterator[Arrival]:
        """What arrives at the linear of ``stage``, at most so many tokens at a time."""
        start, stop = samples.start, samples.stop
        arriving = self.own.inputs(stage, start, stop, tokens=tokens)
        beside = None if self.exact is None else self.exact.inputs(stage, start, stop, tokens=tokens)
        for sample, x in arriving:
            yield sample, x, None if beside is None else next(beside)[1]

    def add_moments(self, stage: int, samples: range, moments: InputMoments) -> None:
        """Add the inputs of the linear of ``stage`` to its moments, sample by sample: several at once are no faster."""
        for _, x, exact in self.inputs(stage, samples, tokens=1):
            moments.add(x, exact)
