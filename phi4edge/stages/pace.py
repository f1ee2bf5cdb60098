"""How much longer a quantization takes, told to the progress display at every linear.

Before the first block is done that is the prediction, scaled by what the linears so far took; then the mean of the
blocks that are done, those of earlier processes included. What comes after the blocks is predicted, and scaled by how
their forward passes went: that is what it consists of, and it has no solver.
"""

from __future__ import annotations

__all__ = ["Pace", "PacedProgress"]

import time
from collections.abc import Callable, Sequence

from phi4edge.core.events import Progress
from phi4edge.stages.predict import Prediction

_RECENT = 8  # blocks whose mean is what the next ones will take


class Pace:
    """The blocks of a run as they go by."""

    def __init__(
        self,
        blocks: int,
        finished: Sequence[float],
        prediction: Prediction | None,
        clock: Callable[[], float] = time.monotonic,
        forward: Sequence[float] = (),
    ) -> None:
        """``finished`` are the seconds of the blocks that are done; without a prediction the first of them must be.

        ``forward`` are the seconds of their forward passes, where they are known.
        """
        self._blocks, self._finished, self._prediction, self._clock = blocks, list(finished), prediction, clock
        self._forward = list(forward)
        self._began, self._linears = clock(), 0

    def linear_done(self) -> None:
        """A linear of the block in work is solved."""
        self._linears += 1

    def block_done(self, forward: float = 0.0) -> None:
        """The block in work is committed, and the next one begins; ``forward``: what its forward passes took."""
        now = self._clock()
        self._finished.append(now - self._began)
        self._forward += [forward] if forward else []
        self._began, self._linears = now, 0

    def remaining(self) -> float | None:
        """Seconds left of the whole run, estimated; None where nothing is known yet."""
        block, elapsed = self._block(), self._clock() - self._began
        if block is None:
            return None
        left = (self._blocks - len(self._finished)) * block
        if left:
            left -= min(elapsed, block)
        return left + self._afterwards(block)

    def _block(self) -> float | None:
        """What one block takes."""
        if self._finished:
            return _mean(self._finished)
        if self._prediction is None:
            return None
        whole, done = self._prediction.block_seconds, sum(self._prediction.linears[: self._linears])
        elapsed = self._clock() - self._began
        if not done:
            return max(whole, elapsed)
        return whole * elapsed / done

    def _afterwards(self, block: float) -> float:
        if self._prediction is None:
            return 0.0
        expected = self._prediction.block.get("forward", 0.0)
        if self._forward and expected:
            return self._prediction.tuning * _mean(self._forward) / expected
        return self._prediction.tuning * block / self._prediction.block_seconds


def _mean(seconds: Sequence[float]) -> float:
    """Of the last few."""
    recent = seconds[-_RECENT:]
    return sum(recent) / len(recent)


class PacedProgress(Progress):
    """Passes on what it is told, and says at every linear how much time is left."""

    def __init__(self, shown: Progress, pace: Pace) -> None:
        self._shown, self._pace = shown, pace

    def start(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        """See :class:`Progress`."""
        self._shown.start(stage, total, unit, done)
        self._tell()

    def advance(self, count: int = 1) -> None:
        """See :class:`Progress`; the unit is a linear."""
        for _ in range(count):
            self._pace.linear_done()
        self._tell()
        self._shown.advance(count)

    def status(self, text: str) -> None:
        """See :class:`Progress`."""
        self._shown.status(text)

    def finish(self) -> None:
        """See :class:`Progress`."""
        self._shown.finish()

    def note(self, text: str) -> None:
        """See :class:`Progress`."""
        self._shown.note(text)

    def block_done(self, forward: float = 0.0) -> None:
        """A block is committed."""
        self._pace.block_done(forward)
        self._tell()

    def _tell(self) -> None:
        left = self._pace.remaining()
        if left is not None:
            self._shown.remaining(left)
