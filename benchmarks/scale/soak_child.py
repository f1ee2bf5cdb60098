"""What the soak kills: `phi4edge quantize` and `phi4edge export` in one process, with a log of what it begins.

The process is forked from one that has imported all of it and done nothing (multiprocessing's fork server), which
spares a life the seconds before it touches a file.
"""

from __future__ import annotations

__all__ = ["Order", "live"]

import os
import resource
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phi4edge.core.events import Progress

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGING = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}


@dataclass(frozen=True)
class Order:
    """What one process is to do, and when it is to die."""

    log: Path  # a line an event, and at a good end the count of operations
    errors: Path  # what it says on stderr
    run: Path
    artifact: Path
    arguments: tuple[str, ...]  # of quantize, the model first
    stop: int = 0  # it kills itself before the operation on files of this number; 0: never
    # The plan says what a RAM budget would make it say of a larger model: activations and states live in files.
    spilling: bool = False
    limit: int | None = None  # bytes that a file may have, by RLIMIT_FSIZE


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


def live(order: Order) -> None:
    """Quantize, then export; ends with the exit code of the one that failed, or 0."""
    from phi4edge.cli.commands import export, quantize
    from phi4edge.cli.main import main as phi4edge

    errors = os.open(order.errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(errors, sys.stderr.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if order.limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order.limit, order.limit))
    events = EventLog(order.log)
    for command in (quantize, export):
        command.progress_for = lambda quiet: events  # type: ignore[attr-defined]
    if order.spilling:
        spill()
    operations = FileOperations(order.run.parent, order.stop)
    events.line("begin")
    code = phi4edge(["quantize", *order.arguments, "--out", str(order.run)])
    if code == 0:
        code = phi4edge(["export", str(order.run), "--format", "gguf", "--out", str(order.artifact), "--force"])
    events.line("end", code, operations.count)
    sys.exit(code)
