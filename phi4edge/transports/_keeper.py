"""Our side of the script that keeps watch on a device: see ``_shell``."""

from __future__ import annotations

__all__ = ["Keeper", "Start", "Watch"]

import os
import select
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import PurePosixPath
from typing import BinaryIO, Protocol

from phi4edge.core.errors import MissingToolError, Phi4EdgeError, TargetError
from phi4edge.transports._api import Finished
from phi4edge.transports._shell import keeper_line, word_of_its_own

_OPEN_S = 60.0  # a shell that is reached has answered by then
_ANSWER_S = 10.0  # a program has been ended by then


class Start(Protocol):
    """Starts a line in the device's shell; our end of its stdout is a pipe."""

    def __call__(self, line: str, *, stdin: int | BinaryIO, stderr: int | BinaryIO) -> subprocess.Popen[bytes]: ...


class Watch(Protocol):
    """What a device needs of a keeper."""

    word: str
    folder: PurePosixPath

    def kill(self, word: str) -> None: ...

    def close(self) -> None: ...


class Keeper:
    """The script that keeps watch on the device, and the facts that it told: see ``_shell``.

    A line that is not the script's (a login shell that speaks) is the fact ``noise``. A transport whose client says
    itself why nobody answers overrides :meth:`silent` and :meth:`gone`.

    Raises:
        MissingToolError: nothing answers, or the device cannot give a program a group of its own.
        TargetError: the folder cannot be made.
    """

    def __init__(self, start: Start, place: str, folder: str | None) -> None:
        self.word, self.place, self._lock = word_of_its_own(), place, threading.Lock()
        self._said: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = start(keeper_line(self.word, folder), stdin=subprocess.PIPE, stderr=self._said)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._heard, self._buffer = self._process.stdout, b""
        try:
            self.facts = self._facts(folder)
        except BaseException:
            self.close()
            raise
        self.folder = PurePosixPath(self.facts["folder"])

    def kill(self, word: str) -> None:
        """End the program of that word on the device; where the connection is lost, the device does so by itself."""
        with self._lock, suppress(BrokenPipeError, TimeoutError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(f"kill {word}\n".encode())
            self._process.stdin.flush()
            deadline = time.monotonic() + _ANSWER_S
            while (line := self._line(deadline)) is not None and line != f"{self.word} killed {word}":
                pass

    def close(self) -> None:
        """End all there."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_ANSWER_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._heard.close()
        self._said.close()

    def silent(self, waited_s: float) -> Phi4EdgeError:
        """The error of a device that has said nothing for so long."""
        return MissingToolError(f"{self.place}: its shell has not answered within {waited_s:g} s")

    def gone(self, stderr: bytes) -> Phi4EdgeError:
        """The error of a client that ended before a shell answered."""
        return MissingToolError(f"{self.place}: its shell does not answer{_after_colon(stderr)}")

    def _facts(self, folder: str | None) -> dict[str, str]:
        facts: dict[str, str] = {}
        deadline = time.monotonic() + _OPEN_S
        while "ready" not in facts:
            try:
                line = self._line(deadline)
            except TimeoutError as error:
                raise self.silent(_OPEN_S) from error
            if line is None:
                raise self.gone(self._last_said())
            word, key, value = [*line.split(" ", 2), "", ""][:3]
            facts.update({key: value} if word == self.word else {"noise": line})
            if "refused" in facts:
                raise TargetError(
                    f"{self.place}: the folder {folder or '~/.cache/phi4edge'} cannot be made"
                    f"{_after_colon(self._last_said())}",
                    "name another folder on the device",
                )
        if "groups" not in facts:
            raise MissingToolError(
                f"{self.place}: has no `setsid`, without which a program's children could be left running",
                "install it on the device: util-linux, busybox and toybox have it",
            )
        return facts

    def _last_said(self) -> bytes:
        """Its stderr, once it has ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_ANSWER_S)
        self._said.seek(0)
        return self._said.read()

    def _line(self, deadline: float) -> str | None:
        """The keeper's next line; None where it has ended."""
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._heard], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            piece = os.read(self._heard.fileno(), 4096)
            if not piece:
                return None
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return os.fsdecode(line)


def _after_colon(stderr: bytes) -> str:
    words = Finished(1, b"", stderr).last_words
    return f": {words}" if words else ""
