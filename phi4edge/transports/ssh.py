"""A device that is reached by ssh, with the user's own OpenSSH client and configuration.

One connection carries everything, where the server allows several sessions on one (ssh itself opens further connections
where it does not). Passwords are never asked for, and host keys are the user's to accept. Words for ssh's own command
line are ``Address.options``: ``-F FILE``, ``-i FILE``, ``-p PORT``, ``-o KEY=VALUE``, ``-J HOST``.
"""

from __future__ import annotations

__all__ = ["DESCRIPTION", "TOOLS", "SshDevice", "open"]

import os
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO, Self

from phi4edge.core.errors import TargetError
from phi4edge.core.events import SILENT, Progress
from phi4edge.transports import _ssh_files
from phi4edge.transports._api import Address, Finished
from phi4edge.transports._shell import Ended, guard_line, program_stderr, word_of_its_own
from phi4edge.transports._ssh_client import Client, Keeper

DESCRIPTION = "a machine reached by ssh"
TOOLS: tuple[str, ...] = ("ssh",)  # programs that the transport needs on this side

_START_S = 30.0  # a program that is reached has said that it starts by then


class SshStream:
    """See :class:`phi4edge.transports._api.Stream`."""

    def __init__(self, device: SshDevice, program: str, word: str, process: subprocess.Popen[bytes], said: BinaryIO):
        assert process.stdin is not None
        assert process.stdout is not None
        self._device, self._program, self._word, self._process, self._said = device, program, word, process, said
        self.stdin: BinaryIO = process.stdin  # type: ignore[assignment]  # IO[bytes], which has all of it
        self.stdout: BinaryIO = process.stdout  # type: ignore[assignment]

    def wait(self, timeout_s: float) -> int:
        """See :class:`phi4edge.transports._api.Stream`."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TargetError(f"{self._device.name}: {self._program} has not ended within {timeout_s:g} s") from error
        return self._device.status(self._program, self._ended())

    def last_words(self) -> str:
        """See :class:`phi4edge.transports._api.Stream`."""
        return Finished(0, b"", self._ended().stderr).last_words

    def close(self) -> None:
        """See :class:`phi4edge.transports._api.Stream`."""
        if not self._said.closed:
            if self._process.poll() is None:
                self._device.end(self._word)
                self._process.kill()
            self._process.wait()
        for stream in (self.stdin, self.stdout, self._said):
            with suppress(BrokenPipeError):  # what the program never read
                stream.close()

    def _ended(self) -> Ended:
        self._said.seek(0)
        return program_stderr(self._said.read(), self._word)


class SshDevice:
    """See :class:`phi4edge.transports._api.Device`."""

    transport = "ssh"

    def __init__(self, client: Client, keeper: Keeper) -> None:
        self._client, self._keeper = client, keeper
        self.name = client.place
        self.folder = PurePosixPath(keeper.folder)

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
        stdin: bytes = b"",
    ) -> Finished:
        """See :class:`phi4edge.transports._api.Device`."""
        word = word_of_its_own()
        process = self._popen(argv, environment, timeout_s, word, subprocess.PIPE)
        try:
            stdout, stderr = process.communicate(stdin, timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TargetError(f"{self.name}: {argv[0]} took longer than {timeout_s:g} s") from error
        finally:
            if process.returncode is None:
                self.end(word)
                process.kill()
                process.communicate()
        ended = program_stderr(stderr, word)
        _, started, rest = stdout.partition(f"{word} start\n".encode())
        if not started:
            self._refuse(argv[0], stdout, stderr, word)
        return Finished(self.status(argv[0], ended), rest, ended.stderr)

    def start(
        self, argv: Sequence[str], *, timeout_s: float, environment: Mapping[str, str] | None = None
    ) -> SshStream:
        """See :class:`phi4edge.transports._api.Device`."""
        word = word_of_its_own()
        said: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115
        process = self._popen(argv, environment, timeout_s, word, said)
        stream = SshStream(self, argv[0], word, process, said)
        try:
            heard = _read_until(stream.stdout, f"{word} start\n".encode(), word.encode(), _START_S)
            if heard is not None:
                process.wait(5)
                said.seek(0)
                self._refuse(argv[0], heard, said.read(), word)
        except subprocess.TimeoutExpired as error:
            stream.close()
            raise TargetError(f"{self.name}: {argv[0]} does not start within {_START_S:g} s") from error
        except BaseException:
            stream.close()
            raise
        return stream

    def push(self, local: Path, remote: PurePosixPath, progress: Progress = SILENT) -> None:
        """See :class:`phi4edge.transports._api.Device`."""
        _ssh_files.push(self, self._rsync, local, self.folder / remote, progress)

    def pull(self, remote: PurePosixPath, local: Path, progress: Progress = SILENT) -> None:
        """See :class:`phi4edge.transports._api.Device`."""
        _ssh_files.pull(self, self._rsync, self.folder / remote, local, progress)

    @property
    def _rsync(self) -> str | None:
        return self._client.rsync_shell if self._keeper.rsync else None

    def end(self, word: str) -> None:
        """End the program of that word on the device."""
        self._keeper.kill(word)

    def status(self, program: str, ended: Ended) -> int:
        """The exit status of a program that was started.

        Raises:
            TargetError: it did not end by itself.
        """
        if ended.limit:
            raise TargetError(f"{self.name}: {program} took longer than it was given, and was ended there")
        if ended.code is None:
            raise self.lost(f"while {program} ran", ended.stderr)
        return ended.code

    def lost(self, when: str, stderr: bytes = b"") -> TargetError:
        """The error of a connection that was lost."""
        words = Finished(255, b"", stderr).last_words
        return TargetError(
            f"{self.name}: the connection was lost {when}{f': {words}' if words else ''}",
            "nothing of it is left running there; run the command again, files go on from where they stopped",
        )

    def _refuse(self, program: str, stdout: bytes, stderr: bytes, word: str) -> None:
        for line in stdout.decode(errors="replace").splitlines():
            match line.split(" "):
                case [said, "refused", "folder"] if said == word:
                    raise TargetError(f"{self.name}: {self.folder} is no longer there")
                case [said, "refused", "program"] if said == word:
                    raise TargetError(f"{self.name}: {program}: does not start: no such program")
        raise self.lost(f"before {program} started", stderr)

    def _popen(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str] | None,
        timeout_s: float,
        word: str,
        stderr: int | BinaryIO,
    ) -> subprocess.Popen[bytes]:
        line = guard_line(
            argv,
            environment or {},
            word=word,
            timeout_s=timeout_s,
            folder=str(self.folder),
            keeper=self._keeper.word,
        )
        return self._client.popen(line, stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what still runs there, and the connection."""
        self._keeper.close()
        self._client.close()


def open(address: Address) -> SshDevice:
    """Connect to ``address.place``; its folder is ``address.folder`` or ``phi4edge`` in the user's cache there.

    Raises:
        MissingToolError: no ssh here, or the device does not answer, or lets nobody in: the message says which.
        UsageError: there is no such address.
    """
    client = Client(address)
    try:
        keeper = Keeper(client, address.folder)
    except BaseException:
        client.close()
        raise
    return SshDevice(client, keeper)


def _read_until(stream: BinaryIO, end: bytes, refusal: bytes, timeout_s: float) -> bytes | None:
    """Read up to and with ``end``, and not a byte more; what came instead, where the stream ended without it."""
    deadline, heard = time.monotonic() + timeout_s, bytearray()
    while not heard.endswith(end):
        ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise subprocess.TimeoutExpired(refusal.decode(), timeout_s)
        byte = os.read(stream.fileno(), 1)
        if not byte:
            return bytes(heard)
        heard += byte
    return None
