"""A phone or another Android device, by Google's own adb client, over USB or the network.

No root is assumed: programs run as Android's user ``shell``, in a folder below /data/local/tmp, the one place where
that user may both write and execute. Words for adb's own command line are ``Address.options``: ``-H HOST`` and
``-P PORT`` of its server. A push goes on from where an earlier one was interrupted, a pull begins anew: see
``_adb_files``.

Written for Android 7 and newer, whose shell tells stdout, stderr and the exit status apart; ``_adb_old`` has what
differs before that. Tried with Google's clients 29 and 36 and an emulated device whose shell and tools are Android's
(mksh, toybox); not measured on hardware.
"""

from __future__ import annotations

__all__ = ["DESCRIPTION", "TOOLS", "AdbDevice", "open"]

import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from phi4edge.core.errors import MissingToolError, TargetError, UsageError
from phi4edge.core.events import SILENT, Progress
from phi4edge.transports import _files
from phi4edge.transports._adb_client import Client, Listed, last_line
from phi4edge.transports._adb_files import AdbCarrier
from phi4edge.transports._adb_old import OldKeeper, exchange
from phi4edge.transports._api import Address
from phi4edge.transports._keeper import Keeper, Start, Watch
from phi4edge.transports._posix import PosixDevice, PosixStream, read_until
from phi4edge.transports._shell import quote

DESCRIPTION = "an Android device reached by adb"
TOOLS: tuple[str, ...] = (
    "adb",
)  # programs that the transport needs on this side; or the package adbutils, which has it

FOLDER = "/data/local/tmp/phi4edge"
_LONG_LINE = 30_000  # bytes; adb's request has four hexadecimal digits for its length
_AWAKE_S = 20.0
_STAY_ON = "stay_on_while_plugged_in"
_BY_HAND = "set 'Stay awake' in its Developer options by hand"

# The screen stays on for as long as stdin is open: when the cable is pulled, the device itself restores what was set.
_AWAKE = """
exec 2>&1
key='global {key}'
old=$(settings get $key) && svc power stayon {on} || exit 1
echo awake
cat >/dev/null
case $old in
[0-9]*) settings put $key "$old" ;;
*) settings delete $key ;;
esac >/dev/null
"""


class AdbDevice(PosixDevice):
    """See :class:`phi4edge.transports._api.Device`."""

    transport = "adb"
    _resumes_push = True

    def __init__(self, client: Client, listed: Listed, start: Start, keeper: Watch) -> None:
        super().__init__(listed.name, start, keeper)
        self._client, self._serial = client, listed.serial
        self._carrier = AdbCarrier(self, self.adb, resumes_push=self._resumes_push)

    def push(self, local: Path, remote: PurePosixPath, progress: Progress = SILENT) -> None:
        """See :class:`phi4edge.transports._api.Device`; goes on from where an interrupted one stopped."""
        _files.push(self, self._carrier, local, self.folder / remote, progress)

    def pull(self, remote: PurePosixPath, local: Path, progress: Progress = SILENT) -> None:
        """See :class:`phi4edge.transports._api.Device`; an interrupted one begins anew."""
        _files.pull(self, self._carrier, self.folder / remote, local, progress)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Keep the device awake, its screen on, while it is plugged in; then restore what its settings said.

        The device restores them by itself when the connection is lost, or this process is killed.

        Raises:
            TargetError: it refuses.
        """
        on = "true" if re.search(r":|\._adb", self._serial) else "usb"  # by whatever cable, where adb has none
        process = self._popen(_AWAKE.format(on=on, key=_STAY_ON), stdin=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdout as heard:
            try:
                try:
                    refused = read_until(heard, b"awake\n", _AWAKE_S)
                except TimeoutError:
                    refused = b"no answer"
                if refused is not None:
                    words = last_line(refused.decode(errors="replace"))
                    raise TargetError(f"{self.name}: does not stay awake: {words}", _BY_HAND)
                yield
            finally:
                process.stdin.close()
                try:
                    process.wait(_AWAKE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def adb(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start the client with ``arguments`` for this device; stdout and stderr are one pipe."""
        return subprocess.Popen(
            self._client.words(*arguments, serial=self._serial),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


class OldAdbDevice(AdbDevice):
    """A device of before Android 7; an interrupted push begins anew."""

    _resumes_push = False
    _keeper: OldKeeper

    def start(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
        stdin: int | BinaryIO = subprocess.PIPE,
    ) -> PosixStream:
        """Not on this device.

        Raises:
            TargetError: always.
        """
        raise TargetError(f"{self.name}: its adb cannot speak to a program while it runs", "Android 7 or newer can")

    @contextmanager
    def awake(self) -> Iterator[None]:
        """As for newer devices, but that nothing is restored when the connection is lost."""
        get, on = ("settings", "get", "global", _STAY_ON), ("svc", "power", "stayon", "usb")
        before = self.run(get, timeout_s=_AWAKE_S).text.strip()
        if self.run(on, timeout_s=_AWAKE_S).code:
            raise TargetError(f"{self.name}: does not stay awake", _BY_HAND)
        try:
            yield
        finally:
            value = before if before.isdecimal() else "0"
            self.run(("settings", "put", "global", _STAY_ON, value), timeout_s=_AWAKE_S)

    def lost(self, when: str, stderr: bytes = b"") -> TargetError:
        """The error of a connection that was lost."""
        return TargetError(super().lost(when, stderr).message, "what ran there goes on until its time limit")

    def _exchange(self, line: str, word: str, stdin: bytes, timeout_s: float) -> tuple[bytes, bytes]:
        try:
            return exchange(self._client, self._serial, self._keeper.running, line, word, stdin, timeout_s)
        except BaseException:
            self.end(word)
            raise


def open(address: Address) -> AdbDevice:
    """The device of serial ``address.place``, of ``$ANDROID_SERIAL``, or the only one; HOST:PORT is connected first.

    Its folder is ``address.folder`` or /data/local/tmp/phi4edge.

    Raises:
        UsageError: several devices and no serial, an option that is not one of adb's server, a folder that is relative.
        MissingToolError: no adb here, or no device, or one that is offline or not authorized: the hint says what to do.
        TargetError: the folder cannot be made.
    """
    folder = address.folder or FOLDER
    if not folder.startswith("/"):
        raise UsageError(f"{folder}: not a folder on the device", f"name it from the root, as {FOLDER}")
    client = Client.of(address.options)
    listed = client.pick(address.place)
    code, features = client.ask("features", serial=listed.serial)
    if code:
        raise MissingToolError(f"{listed.name}: {last_line(features)}", "unplug it and plug it in again")
    start = _Shell(client, listed.serial)
    if "shell_v2" not in features.split():
        return OldAdbDevice(client, listed, start, OldKeeper(client, listed.serial, listed.name, folder))
    keeper = Keeper(start, listed.name, folder)
    start.folder = keeper.folder / ".phi4edge" / f"running-{keeper.word}"
    return AdbDevice(client, listed, start, keeper)


class _Shell:
    """Starts lines in a device's shell."""

    def __init__(self, client: Client, serial: str) -> None:
        self._client, self._serial = client, serial
        self.folder: PurePosixPath | None = None  # for lines that are too long; the keeper removes it
        self._count = itertools.count()

    def __call__(self, line: str, *, stdin: int | BinaryIO, stderr: int | BinaryIO) -> subprocess.Popen[bytes]:
        if len(os.fsencode(line)) > _LONG_LINE:
            line = self._in_a_file(line)
        return subprocess.Popen(
            self._client.words("shell", "-T", line, serial=self._serial),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,  # Ctrl-C is ours to act upon, and must not cut the connection first
        )

    def _in_a_file(self, line: str) -> str:
        assert self.folder is not None
        remote = self.folder / f"line-{next(self._count)}"
        with tempfile.NamedTemporaryFile() as file:
            file.write(os.fsencode(line))
            file.flush()
            self._client.push(Path(file.name), remote, serial=self._serial)
        return f"exec sh {quote(str(remote))}"
