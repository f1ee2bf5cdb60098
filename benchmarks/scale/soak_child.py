"""What the soak kills: `phi4edge quantize` and `phi4edge export` in one process, with a log of what it begins.

    python soak_child.py LOG DIE_AT ram|disk RUN ARTIFACT QUANTIZE_ARGUMENTS…

DIE_AT counts operations on files under RUN's folder (opened for writing, renamed, removed, made); the process kills
itself before the one of that number, 0 for none. With ``disk`` the plan says what a RAM budget would make it say of a
larger model: activations and states of tuning live in files. The log gets a line an event, and at a good end their
count.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from phi4edge.core.events import Progress

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGING = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}


class EventLog(Progress):
    """One line an event, in one write each, so that a kill tears none."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def line(self, *words: object) -> None:
        """Put a line into the log."""
        os.write(self._file, (" ".join(map(str, words)) + "\n").encode())

    def start(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        """See :class:`Progress`."""
        self.line("start", stage, done, total)

    def advance(self, count: int = 1) -> None:
        """See :class:`Progress`."""
        self.line("advance", count)

    def status(self, text: str) -> None:
        """See :class:`Progress`."""
        self.line("status", text)

    def note(self, text: str) -> None:
        """See :class:`Progress`."""
        self.line("note", text)


class FileOperations:
    """Counts what changes files below ``folder``; kills the process before number ``stop``."""

    def __init__(self, folder: Path, stop: int) -> None:
        self.count = 0
        self._folder, self._stop = str(folder.resolve()), stop
        sys.addaudithook(self._seen)

    def _seen(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if not isinstance(arguments[2], int) or not arguments[2] & _WRITING:
                return
        elif event not in _CHANGING:
            return
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike) or not os.fsdecode(path).startswith(self._folder):
            return
        self.count += 1
        if self.count == self._stop:
            os.kill(os.getpid(), signal.SIGKILL)


def spill() -> None:
    """Have every plan put into files what may be there."""
    from phi4edge.stages import job

    plan = job.plan_memory
    job.plan_memory = lambda *given: replace(plan(*given), spill=True, keep_graphs=False, spill_tuning=True)


def main() -> int:
    """Quantize, then export; the exit code of the one that failed, or 0."""
    log, stop, where, run, artifact = sys.argv[1:6]
    events = EventLog(Path(log))
    import phi4edge.cli.progress as display

    display.progress_for = lambda quiet: events  # type: ignore[assignment]
    from phi4edge.cli.main import main as phi4edge

    if where == "disk":
        spill()
    operations = FileOperations(Path(run).parent, int(stop))
    events.line("begin")
    code = phi4edge(["quantize", sys.argv[6], "--out", run, *sys.argv[7:]])
    if code == 0:
        code = phi4edge(["export", run, "--format", "gguf", "--out", artifact, "--force"])
    events.line("end", code, operations.count)
    return code


if __name__ == "__main__":
    sys.exit(main())
