"""The calibration samples before one block, and all that its linears ask of them.

This is where a run can be spread: samples are independent of each other, and sums over them are taken in shards
(:mod:`phi4edge.calibration.statistics`), whose order is fixed.
"""

from __future__ import annotations

__all__ = ["BlockSamples", "LocalSamples"]

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from phi4edge.calibration.statistics import InputMoments, shards
from phi4edge.calibration.streams import Arrival, Streams
from phi4edge.core.parts import PartTimes
from phi4edge.model.compute import computing, decoded
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.stages.guard import HeldOut, held_out_errors


class BlockSamples(Protocol):
    """Samples that stand before linear ``stage`` (0 … 3) of a block, or at the block's outputs."""

    @property
    def norms(self) -> tuple[Tensor, Tensor]:
        """The gains of the block's norms in the quantized model, [hidden] each."""
        ...

    def moments(self, stage: int, weight: Tensor, *, full: bool) -> InputMoments:
        """Moments of the inputs of the linear of ``stage``, with weight ``weight``, over the samples to learn from."""
        ...

    def advance(self, stage: int, linear: QuantizedLinear) -> None:
        """Send the quantized model's samples through the linear of ``stage``; full precision's went before."""
        ...

    def advance_exact(self, stage: int, weight: Tensor) -> None:
        """Send the full-precision model's samples through it, where there are any."""
        ...

    def regain(self, norms: tuple[Tensor, Tensor]) -> None:
        """Give the norms of the quantized model other gains."""
        ...

    def held_out(
        self, stage: int, weight: Tensor, candidates: Sequence[Callable[[slice], Tensor]], factors: Tensor | None
    ) -> list[HeldOut]:
        """Errors of candidates for ``weight`` on the samples kept aside; ``factors`` divide full precision's inputs."""
        ...


class LocalSamples:
    """All samples in this process."""

    def __init__(self, streams: Streams, kept: int, total: int, parts: PartTimes, compute: str) -> None:
        """Samples 0 … ``kept`` − 1 are learned from, the others of ``total`` are kept aside."""
        self._streams, self._kept, self._total = streams, kept, total
        self._parts, self._compute = parts, compute

    @property
    def norms(self) -> tuple[Tensor, Tensor]:
        """See :class:`BlockSamples`."""
        return self._streams.own.input_norm, self._streams.own.post_norm

    def moments(self, stage: int, weight: Tensor, *, full: bool) -> InputMoments:
        """See :class:`BlockSamples`."""
        exact = weight if self._streams.exact is not None else None
        with self._parts.part("moments"), computing(self._compute):
            total = InputMoments(weight.shape[1], full=full, exact=exact, device=self._streams.own.device)
            first, *others = shards(self._kept)
            self._streams.add_moments(stage, first, total)
            part = total.empty() if others else total
            for shard in others:
                part.clear()
                self._streams.add_moments(stage, shard, part)
                total.merge(part)
            return total

    def advance(self, stage: int, linear: QuantizedLinear) -> None:
        """See :class:`BlockSamples`."""
        with self._parts.part("forward"), computing(self._compute):
            # Prepared here, so that nobody holds on to float32 values where products are of bfloat16 ones.
            self._streams.own.advance(stage, decoded(linear))

    def advance_exact(self, stage: int, weight: Tensor) -> None:
        """See :class:`BlockSamples`."""
        if self._streams.exact is not None:
            with self._parts.part("forward"), computing(self._compute):
                self._streams.exact.advance(stage, weight)

    def regain(self, norms: tuple[Tensor, Tensor]) -> None:
        """See :class:`BlockSamples`."""
        self._streams = replace(self._streams, own=replace(self._streams.own, input_norm=norms[0], post_norm=norms[1]))

    def held_out(
        self, stage: int, weight: Tensor, candidates: Sequence[Callable[[slice], Tensor]], factors: Tensor | None
    ) -> list[HeldOut]:
        """See :class:`BlockSamples`."""
        rest = range(self._kept, self._total)

        def inputs() -> Iterator[Arrival]:
            for sample, x, exact in self._streams.inputs(stage, rest):
                yield sample, x, exact if exact is None or factors is None else exact / factors

        with self._parts.part("check"), computing(self._compute):
            return held_out_errors(inputs, weight, candidates)
