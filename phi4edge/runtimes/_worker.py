"""A worker: a runtime's process of its own, here or on a device, and the pipes to it."""

from __future__ import annotations

__all__ = ["LocalWorker", "Place", "Worker"]

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import phi4edge


class Worker(Protocol):
    """A running worker: what is written to it, what it answers, and how it ended."""

    @property
    def stdin(self) -> BinaryIO:
        """Requests."""
        ...

    @property
    def stdout(self) -> BinaryIO:
        """Answers."""
        ...

    def ending(self, marks: Sequence[str]) -> tuple[int, str]:
        """Once its stdout has ended: its exit status, 128 + n where signal n ended it, and its last words.

        They are the first line of its stderr with one of ``marks`` in it, where that is at hand, or the last line.
        """
        ...

    def close(self) -> None:
        """End it; it holds nothing that must be kept."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a worker runs, when it is not here."""

    start: Callable[[str], Worker]  # a worker's module by its full name → the worker, running
    path: str  # of the artifact there
    threads: int  # where nobody says
    version: str  # of the runtime's package there
    install: str  # how to get it there


class LocalWorker(subprocess.Popen[bytes]):
    """A worker that is a child of this process."""

    stdin: BinaryIO  # both are pipes here
    stdout: BinaryIO

    def __init__(self, module: str, shared: int) -> None:
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  its stderr, read when it dies
        super().__init__(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            env=_environment(),
            pass_fds=(shared,),  # what both see
        )

    def ending(self, marks: Sequence[str]) -> tuple[int, str]:
        """See :class:`Worker`."""
        code = self.wait()
        self._words.seek(0)
        lines = self._words.read().decode("utf-8", errors="replace").splitlines()
        said = next((line for line in lines if any(mark in line for mark in marks)), lines[-1] if lines else "")
        return (code if code >= 0 else 128 - code), said.strip()

    def close(self) -> None:
        """See :class:`Worker`."""
        self.kill()
        self.wait()
        for stream in (self.stdin, self.stdout, self._words):
            with suppress(BrokenPipeError):  # a request that the child never read
                stream.close()


def _environment() -> dict[str, str]:
    """The child finds this very phi4edge, installed or not."""
    root = str(Path(phi4edge.__file__).parent.parent)
    path = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
