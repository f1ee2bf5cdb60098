"""What happened on the way, as values: events that the manifest keeps, progress that the screen shows.

An :class:`Event` is something a reader of the result must know (a fallback, a damping raised, too
few calibration tokens). :class:`Progress` is where the pipeline reports to; the command line draws
it, everything else leaves it silent.
"""

from __future__ import annotations

__all__ = ["SILENT", "Event", "Progress"]

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """One noteworthy thing: ``kind`` is a stable word, ``where`` names the tensor or stage."""

    kind: str
    where: str
    detail: str
    values: dict[str, float | int | str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The event as a JSON object."""
        return asdict(self)


class Progress:
    """Receiver of progress; this base class shows nothing."""

    estimates = False  # whether it shows what is left from the start on: measuring the machine for that takes seconds

    def start(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        """A stage of ``total`` units begins; ``done`` of them were finished by an earlier process."""

    def advance(self, count: int = 1) -> None:
        """``count`` further units of the current stage are finished."""

    def remaining(self, seconds: float) -> None:
        """From now on the command will take about ``seconds``, estimated; until the stage or the next word ends."""

    def status(self, text: str) -> None:
        """What is being worked on right now, a few words."""

    def finish(self) -> None:
        """The current stage ended."""

    def note(self, text: str) -> None:
        """A line that should stay on the screen."""


SILENT = Progress()
