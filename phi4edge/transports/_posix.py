"""A device that a client program gives us a shell on: programs there, by the scripts of ``_shell``."""

from __future__ import annotations

__all__ = ["PosixDevice", "PosixStream", "read_until"]

import os
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import PurePosixPath
from types import TracebackType
from typing import IO, BinaryIO, Self

from phi4edge.core.errors import TargetError
from phi4edge.transports._api import Finished
from phi4edge.transports._keeper import Start, Watch
from phi4edge.transports._shell import Ended, guard_line, program_stderr, word_of_its_own

_START_S = 30.0  # a program has said by then that it starts
_END_S = 10.0  # the client of a program that was refused has ended by then


class PosixStream:
    """See :class:`phi4edge.transports._api.Stream`."""

    def __init__(
        self, device: PosixDevice, program: str, word: str, process: subprocess.Popen[bytes], said: BinaryIO
    ) -> None:
        assert process.stdout is not None
        self._device, self._program, self._word, self._process, self._said = device, program, word, process, said
        # IO[bytes] has all of BinaryIO; without a pipe there is nothing to write to.
        self.stdin: BinaryIO = process.stdin or open(os.devnull, "wb")  # type: ignore[assignment]  # noqa: SIM115
        self.stdout: BinaryIO = process.stdout  # type: ignore[assignment]

    def wait(self, timeout_s: float) -> int:
        """See :class:`phi4edge.transports._api.Stream`."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TargetError(f"{self._device.name}: {self._program} has not ended within {timeout_s:g} s") from error
        return self._device.status(self._program, self._ended())

    @property
    def running(self) -> bool:
        """Whether it still runs, as far as is known here."""
        return self._process.poll() is None

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


class PosixDevice:
    """What :class:`phi4edge.transports._api.Device` says of programs."""

    name: str
    folder: PurePosixPath

    def __init__(self, name: str, start: Start, keeper: Watch) -> None:
        self.name, self.folder = name, keeper.folder
        self._popen, self._keeper = start, keeper

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
        try:
            stdout, stderr = self._exchange(self._line(argv, environment, timeout_s, word), word, stdin, timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TargetError(f"{self.name}: {argv[0]} took longer than {timeout_s:g} s") from error
        _, started, rest = stdout.partition(f"{word} start\n".encode())
        ended = program_stderr(stderr, word)
        if not started and ended.started:  # stderr was quicker than the loss of the connection
            raise self.lost(f"while {argv[0]} ran", ended.stderr)
        if not started:
            raise self._refusal(argv[0], stdout, stderr, word)
        return Finished(self.status(argv[0], ended), rest, ended.stderr)

    def start(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
        stdin: int | BinaryIO = subprocess.PIPE,
    ) -> PosixStream:
        """See :class:`phi4edge.transports._api.Device`; ``stdin`` can be a file, which the client reads by itself."""
        word = word_of_its_own()
        said: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115
        process = self._popen(self._line(argv, environment, timeout_s, word), stdin=stdin, stderr=said)
        stream = PosixStream(self, argv[0], word, process, said)
        try:
            heard = read_until(stream.stdout, f"{word} start\n".encode(), _START_S)
            if heard is not None:
                process.wait(_END_S)
                said.seek(0)
                raise self._refusal(argv[0], heard, said.read(), word)
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            stream.close()
            raise TargetError(f"{self.name}: {argv[0]} does not start within {_START_S:g} s") from error
        except BaseException:
            stream.close()
            raise
        return stream

    def end(self, word: str) -> None:
        """End the program of that word on the device."""
        self._keeper.kill(word)

    def _exchange(self, line: str, word: str, stdin: bytes, timeout_s: float) -> tuple[bytes, bytes]:
        """Run a line of the guard's to its end: stdout and stderr.

        Raises:
            subprocess.TimeoutExpired: it has not ended by then; it is ended on the device.
        """
        process = self._popen(line, stdin=subprocess.PIPE if stdin else subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            return process.communicate(stdin or None, timeout=timeout_s)
        finally:
            if process.returncode is None:
                self.end(word)
                process.kill()
                process.communicate()

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

    def _line(self, argv: Sequence[str], environment: Mapping[str, str] | None, timeout_s: float, word: str) -> str:
        return guard_line(
            argv,
            environment or {},
            word=word,
            timeout_s=timeout_s,
            folder=str(self.folder),
            keeper=self._keeper.word,
        )

    def _refusal(self, program: str, stdout: bytes, stderr: bytes, word: str) -> TargetError:
        """Why a program did not start."""
        for line in stdout.decode(errors="replace").splitlines():
            match line.split(" "):
                case [said, "refused", "folder"] if said == word:
                    return TargetError(f"{self.name}: {self.folder} is no longer there")
                case [said, "refused", "program"] if said == word:
                    return TargetError(f"{self.name}: {program}: does not start: no such program")
        return self.lost(f"before {program} started", stderr)

    def awake(self) -> AbstractContextManager[None]:
        """See :class:`phi4edge.transports._api.Device`: such a machine does not sleep while it works."""
        return nullcontext()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what still runs there."""
        self._keeper.close()


def read_until(stream: IO[bytes], end: bytes, timeout_s: float) -> bytes | None:
    """Read up to and with ``end``, and not a byte more; what came instead, where the stream ended without it.

    Raises:
        TimeoutError: neither within the time.
    """
    deadline, heard = time.monotonic() + timeout_s, bytearray()
    while not heard.endswith(end):
        ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        byte = os.read(stream.fileno(), 1)
        if not byte:
            return bytes(heard)
        heard += byte
    return None
