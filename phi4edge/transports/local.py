"""This machine itself, reached as any other device would be: for runners that are programs of their own."""

from __future__ import annotations

__all__ = ["DESCRIPTION", "TOOLS", "LocalDevice", "open"]

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO, Self

from phi4edge.core.atomic import atomic_file
from phi4edge.core.errors import TargetError, UsageError
from phi4edge.core.events import SILENT, Progress
from phi4edge.transports._api import Address, Finished

DESCRIPTION = "this machine"
TOOLS: tuple[str, ...] = ()  # programs that the transport needs on this side


class LocalStream:
    """A program that runs beside us, in a group of processes of its own."""

    def __init__(self, process: subprocess.Popen[bytes], words: BinaryIO) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._words = process, words
        self.stdin: BinaryIO = process.stdin  # type: ignore[assignment]  # IO[bytes], which has all of it
        self.stdout: BinaryIO = process.stdout  # type: ignore[assignment]

    def wait(self, timeout_s: float) -> int:
        """See :class:`phi4edge.transports._api.Stream`."""
        try:
            return _status(self._process.wait(timeout_s))
        except subprocess.TimeoutExpired as error:
            raise TargetError(f"{self._process.args!r} has not ended within {timeout_s:g} s") from error

    def last_words(self) -> str:
        """See :class:`phi4edge.transports._api.Stream`."""
        self._words.seek(0)
        return Finished(0, b"", self._words.read()).last_words

    def close(self) -> None:
        """See :class:`phi4edge.transports._api.Stream`."""
        _end(self._process)
        for stream in (self.stdin, self.stdout, self._words):
            with suppress(BrokenPipeError):  # what the program never read
                stream.close()


class LocalDevice:
    """See :class:`phi4edge.transports._api.Device`."""

    transport = "local"
    name = "this machine"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.folder = PurePosixPath(folder)

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
        stdin: bytes = b"",
    ) -> Finished:
        """See :class:`phi4edge.transports._api.Device`."""
        process = self._popen(argv, environment, subprocess.PIPE)
        try:
            stdout, stderr = process.communicate(stdin, timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TargetError(f"{argv[0]}: took longer than {timeout_s:g} s") from error
        finally:
            _end(process)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    with suppress(BrokenPipeError):  # what the program never read
                        stream.close()
        return Finished(_status(process.returncode), stdout, stderr)

    def start(
        self, argv: Sequence[str], *, timeout_s: float, environment: Mapping[str, str] | None = None
    ) -> LocalStream:
        """See :class:`phi4edge.transports._api.Device`; the limit is the caller's to keep here."""
        words: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            return LocalStream(self._popen(argv, environment, words), words)
        except BaseException:
            words.close()
            raise

    def _popen(
        self, argv: Sequence[str], environment: Mapping[str, str] | None, stderr: int | BinaryIO
    ) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                list(argv),
                cwd=self._folder,
                env=os.environ | dict(environment or {}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
        except OSError as error:
            raise TargetError(f"{argv[0]}: does not start: {error.strerror}") from error

    def push(self, local: Path, remote: PurePosixPath, progress: Progress = SILENT) -> None:
        """See :class:`phi4edge.transports._api.Device`; a copy, with the permissions of the file."""
        _copy(local, self._folder / remote)

    def pull(self, remote: PurePosixPath, local: Path, progress: Progress = SILENT) -> None:
        """See :class:`phi4edge.transports._api.Device`."""
        _copy(self._folder / remote, local)

    def awake(self) -> AbstractContextManager[None]:
        """See :class:`phi4edge.transports._api.Device`: such a machine does not sleep while it works."""
        return nullcontext()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to let go of."""


def open(address: Address) -> LocalDevice:
    """This machine; its folder is ``address.folder`` or ``phi4edge-device`` in the user's cache.

    Raises:
        UsageError: a place or options, of which this machine has none.
    """
    if address.place is not None or address.options:
        raise UsageError("this machine has no address", "leave --address and --transport-option out")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(address.folder) if address.folder else cache / "phi4edge" / "device"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be made: {error.strerror}", "name another folder") from error
    return LocalDevice(folder.resolve())


def _copy(source: Path, destination: Path) -> None:
    try:
        with source.open("rb") as file, atomic_file(destination) as out:
            shutil.copyfileobj(file, out, 1 << 20)
        destination.chmod(source.stat().st_mode & 0o777)
    except OSError as error:
        raise TargetError(f"{error.filename or destination}: {error.strerror}") from error


def _status(code: int) -> int:
    return code if code >= 0 else 128 - code


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the program and whatever it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
