"""Progress on stderr: a live bar on a terminal, a line now and then in a log."""

from __future__ import annotations

__all__ = ["TerminalProgress", "progress_for"]

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from phi4edge.cli.render import duration
from phi4edge.core.events import SILENT, Progress

_LOG_SECONDS = 15.0
_PLAIN: dict[str, Any] = {"markup": False, "soft_wrap": True}


class _Left(ProgressColumn):
    """Seconds left, as the display has them at each refresh."""

    max_refresh = 0.5

    def __init__(self, left: Callable[[], float | None]) -> None:
        super().__init__()
        self._left = left

    def render(self, task: Task) -> Text:
        left = self._left()
        return Text("-:--:--" if left is None else str(timedelta(seconds=round(left))), style="progress.remaining")


class TerminalProgress(Progress):
    """Blocks or linears done, what is in work, RSS, elapsed and remaining time.

    What is left is what the stage last said, less the time since; a stage that says nothing is taken to go on as it
    went so far.
    """

    estimates = True

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._stage, self._unit, self._total, self._done, self._text = "", "", 0, 0, ""
        self._first_done, self._began, self._logged = 0, 0.0, 0.0
        self._told: tuple[float, float] | None = None  # seconds that were left, and when

    def start(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        """See :class:`Progress`."""
        self._stage, self._unit, self._total, self._done, self._text = stage, unit, total, done, ""
        self._first_done, self._began, self._logged = done, time.monotonic(), time.monotonic()
        self._told = None
        if not self._console.is_terminal:
            return
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit + "s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            _Left(self.left),
            TextColumn("{task.fields[status]}"),
            console=self._console,
            transient=False,
        )
        self._task = self._bar.add_task(stage, total=total, completed=done, status="")
        self._bar.start()

    def advance(self, count: int = 1) -> None:
        """See :class:`Progress`."""
        self._done += count
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, count)
            return
        now = time.monotonic()
        if now - self._logged >= _LOG_SECONDS:
            self._logged = now
            counted = f"{self._done}/{self._total} {self._unit}s"
            left = self.left()
            assert left is not None  # a unit is done
            self._console.print(f"{self._stage}: {counted}, about {duration(left)} left · {self._text}", **_PLAIN)

    def remaining(self, seconds: float) -> None:
        """See :class:`Progress`."""
        self._told = (seconds, time.monotonic())

    def left(self) -> float | None:
        """Seconds left, estimated; None before anything is known."""
        now, fresh = time.monotonic(), self._done - self._first_done
        if self._told is not None:
            seconds, when = self._told
            return max(0.0, seconds - (now - when))
        return (now - self._began) / fresh * (self._total - self._done) if fresh else None

    def status(self, text: str) -> None:
        """See :class:`Progress`."""
        self._text = text
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, status=text)

    def finish(self) -> None:
        """See :class:`Progress`."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, status="")
            self._bar.stop()
            self._bar, self._task = None, None
        elif self._began:
            spent = time.monotonic() - self._began
            self._console.print(
                f"{self._stage}: {self._done}/{self._total} {self._unit}s in {spent:.1f} s", markup=False
            )
        sys.stderr.flush()

    def note(self, text: str) -> None:
        """See :class:`Progress`."""
        self._console.print(text, **_PLAIN)


def progress_for(quiet: bool) -> Progress:
    """The display that a command uses: none with ``--quiet``."""
    return SILENT if quiet else TerminalProgress()
