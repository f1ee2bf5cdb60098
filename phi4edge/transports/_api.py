"""The shape of a transport: a device is a POSIX shell, and a folder on it that is ours.

A transport is one module, its name the value of ``--transport``, with the names of :class:`Transport`. What is done on
a device (which files it needs, what runs there, what that says) is the business of the layers above; a transport
carries bytes and commands, and says clearly when it cannot.

A browser is no such device: it has neither a shell nor a folder, and nobody can connect to it; it comes to us, opens a
page and answers what the page asks. :mod:`phi4edge.transports.browser` has an interface of its own for that, and of
:class:`Transport` only ``DESCRIPTION`` and ``TOOLS``.
"""

from __future__ import annotations

__all__ = ["Address", "Device", "Finished", "Stream", "Transport", "load_transport"]

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO, Protocol, Self, cast

from phi4edge.core import registry
from phi4edge.core.events import Progress


@dataclass(frozen=True)
class Address:
    """Where a device is found, in its transport's own words."""

    place: str | None = None  # ssh: a host of the user's config or user@host; adb: a serial; None: the only one there
    folder: str | None = None  # our folder on the device; None: the transport's own choice
    options: tuple[str, ...] = ()  # for the client: ssh's KEY=VALUE, -i FILE, …; adb's -H, -P


@dataclass(frozen=True)
class Finished:
    """A program on the device that has ended by itself."""

    code: int  # its exit status, 128 + n where signal n ended it
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """Its stdout; bytes that are not UTF-8 are replaced."""
        return self.stdout.decode("utf-8", errors="replace")

    @property
    def last_words(self) -> str:
        """The last line of its stderr, or of its stdout where it has none; "" where it said nothing."""
        for said in (self.stderr, self.stdout):
            lines = said.decode("utf-8", errors="replace").strip().splitlines()
            if lines:
                return lines[-1].strip()
        return ""


class Stream(Protocol):
    """A program on the device that is spoken to while it runs; bytes go through unchanged."""

    stdin: BinaryIO
    stdout: BinaryIO

    def wait(self, timeout_s: float) -> int:
        """Its exit status, as :class:`Finished` has it.

        Raises:
            TargetError: it has not ended by then, or the device is gone.
        """
        ...

    def last_words(self) -> str:
        """The last line of its stderr so far."""
        ...

    def close(self) -> None:
        """End it, on the device too."""
        ...


class Device(Protocol):
    """A device, connected. Use as a context manager.

    Every method raises TargetError when the device vanishes midway; nothing of ours is left running on it then.
    """

    transport: str  # the transport's name
    name: str  # as messages name the device
    folder: PurePosixPath  # ours, absolute; it exists

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
        stdin: bytes = b"",
    ) -> Finished:
        """Run ``argv`` in :attr:`folder` and wait; any word may have any character but NUL.

        The limit holds on the device as well: a program whose connection was lost is ended there.

        Raises:
            TargetError: it took longer than ``timeout_s``.
        """
        ...

    def start(self, argv: Sequence[str], *, timeout_s: float, environment: Mapping[str, str] | None = None) -> Stream:
        """Start ``argv`` as :meth:`run` does, and speak to it."""
        ...

    def push(self, local: Path, remote: PurePosixPath, progress: Progress = ...) -> None:
        """Send a file; ``remote`` appears under its name only when it is whole, and its folder is made.

        What an interrupted push left behind is gone on from where the transport can, and never taken for the file.

        Raises:
            TargetError: the device is full, or refuses.
        """
        ...

    def pull(self, remote: PurePosixPath, local: Path, progress: Progress = ...) -> None:
        """Fetch a file; ``local`` appears only when it is whole.

        Raises:
            TargetError: it is not there, or the device refuses.
        """
        ...

    def awake(self) -> AbstractContextManager[None]:
        """Keep the device from sleeping, where it would, and then restore what it was set to.

        Raises:
            TargetError: it refuses.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Transport(Protocol):
    """A transport module."""

    DESCRIPTION: str
    TOOLS: tuple[str, ...]  # programs that it needs on this side

    def open(self, address: Address) -> Device:
        """Connect.

        Raises:
            MissingToolError: a program is missing here, or no device answers (offline, unauthorized, a host key that
                changed: the message says which, the hint what to do).
            UsageError: an address that the transport does not understand, or one that several devices answer to.
        """
        ...


def load_transport(name: str) -> Transport:
    """Import transport ``name``.

    Raises:
        UsageError: there is none of that name; the closest one is offered.
    """
    return cast(Transport, registry.load("phi4edge.transports", name))
