"""Progress on stderr: a live bar on a terminal, a line now and then in a log."""

from __future__ import annotations

__all__ = ["TerminalProgress", "progress_for"]

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from phi4edge.core.events import SILENT, Progress

_LOG_SECONDS = 15.0
_PLAIN: dict[str, Any] = {"markup": False, "soft_wrap": True}


class TerminalProgress(Progress):
    """Blocks or linears done, what is in work, RSS, elapsed and remaining time."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._stage, self._unit, self._total, self._done, self._text = "", "", 0, 0, ""
        self._first_done, self._began, self._logged = 0, 0.0, 0.0

    def start(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        """See :class:`Progress`."""
        self._stage, self._unit, self._total, self._done, self._text = stage, unit, total, done, ""
        self._first_done, self._began, self._logged = done, time.monotonic(), time.monotonic()
        if not self._console.is_terminal:
            return
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit + "s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
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
            fresh = self._done - self._first_done
            left = (now - self._began) / fresh * (self._total - self._done)
            counted = f"{self._done}/{self._total} {self._unit}s"
            self._console.print(
                f"{self._stage}: {counted}, about {left:.0f} s left · {self._text}", markup=False, soft_wrap=True
            )

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
