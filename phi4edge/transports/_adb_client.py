"""Google's adb client as a program: where it is, what it lists, and which of the devices is meant."""

from __future__ import annotations

__all__ = ["Client", "Listed", "find_adb", "last_line"]

import importlib.util
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from phi4edge.core.errors import MissingToolError, TargetError, UsageError

ANSWER_S = 30.0  # within which the client and its server answer what needs no work of the device
CONNECT_S = 15.0  # within which a device on the network answers; the client itself gives up after ten
SEND_S = 120.0  # within which a small file is sent
SETTLE_S = 3.0  # within which a device that was just connected is ready

_OPTIONS = ("-H", "-P", "-L")  # adb's own options of where its server is; each has a value
_ON_THE_NETWORK = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[\w.-]+):\d{1,5}")
_LISTED = re.compile(r"(?P<serial>\S+)\s+(?P<state>no permissions.*?|\S+)(?P<facts>(?:\s+\w+:\S*)*)\s*")
_SETTLING = ("authorizing", "connecting", "offline")
_TURN_ON = "on the phone: Settings, Developer options, USB debugging"

# What to do about a device that adb sees but cannot speak to.
_REMEDIES = {
    "unauthorized": "unlock the phone and accept 'Allow USB debugging?'; if it does not ask, choose 'Revoke USB "
    "debugging authorizations' in its Developer options and plug it in again",
    "authorizing": "unlock the phone and accept 'Allow USB debugging?'",
    "offline": "unlock the phone, unplug it and plug it in again; on the network, turn wireless debugging off and on",
    "no permissions": "this user may not open the USB device: add adb's udev rules (Debian: package "
    "android-sdk-platform-tools-common) or join the group plugdev, then: adb kill-server",
}
_REMEDIES["connecting"] = _REMEDIES["offline"]
_BOOTED_ELSEWHERE = "start Android on it (adb reboot), and unlock it once"


@dataclass(frozen=True)
class Listed:
    """A device as ``adb devices -l`` has it."""

    serial: str
    state: str  # "device" where all is well
    model: str | None

    @property
    def name(self) -> str:
        """As messages name it."""
        return f"{self.model} ({self.serial})" if self.model else self.serial


def find_adb() -> Path:
    """The adb client: the user's on PATH or of the Android SDK, else the one in the package ``adbutils``.

    The user's comes first, because a client ends a server of another version than its own.

    Raises:
        MissingToolError: there is none.
    """
    if found := shutil.which("adb"):
        return Path(found)
    for variable in ("ANDROID_HOME", "ANDROID_SDK_ROOT"):
        if os.environ.get(variable) and (
            found := shutil.which("adb", path=str(Path(os.environ[variable]) / "platform-tools"))
        ):
            return Path(found)
    spec = importlib.util.find_spec("adbutils")  # finds it and imports nothing
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "binaries"
        if found := shutil.which("adb", path=str(bundled)):
            return Path(found)
    raise MissingToolError("adb is not installed", "install Android's platform-tools, or: pip install 'phi4edge[adb]'")


@dataclass(frozen=True)
class Client:
    """The client with its options, which say where adb's server is."""

    options: tuple[str, ...] = ()
    program: Path = field(default_factory=find_adb)

    @classmethod
    def of(cls, options: Sequence[str]) -> Client:
        """The client with a user's options, ``("-P", "5038")`` or ``("-P 5038",)``.

        Raises:
            UsageError: an option of another kind.
            MissingToolError: there is no client.
        """
        words = [word for option in options for word in option.split()]
        for name, value in zip(words[::2], [*words[1::2], ""][: len(words[::2])], strict=True):
            if name not in _OPTIONS or not value:
                raise UsageError(
                    f"adb is given {name} {value}".rstrip(),
                    "it takes '-H HOST' and '-P PORT' of its server, or '-L SOCKET', with a value each",
                )
        return cls(tuple(words))

    def words(self, *arguments: str, serial: str | None = None) -> list[str]:
        """The command line for ``arguments``."""
        return [str(self.program), *self.options, *(("-s", serial) if serial else ()), *arguments]

    def ask(self, *arguments: str, serial: str | None = None, timeout_s: float = ANSWER_S) -> tuple[int, str]:
        """Run the client to its end: its exit status, and all that it said.

        Raises:
            MissingToolError: it does not start, or has not ended by then.
        """
        try:
            done = subprocess.run(
                self.words(*arguments, serial=serial),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
                check=False,
                start_new_session=True,  # Ctrl-C is ours, and must not end a server that this starts
            )
        except OSError as error:
            raise MissingToolError(f"{self.program}: does not start: {error.strerror}") from error
        except subprocess.TimeoutExpired as error:
            raise MissingToolError(
                f"adb {arguments[0]}: no answer within {timeout_s:g} s", "end its server with: adb kill-server"
            ) from error
        return done.returncode, done.stdout.decode(errors="replace").strip()

    def push(self, local: Path, remote: PurePosixPath, *, serial: str) -> None:
        """Send a small file.

        Raises:
            TargetError: it does not arrive.
        """
        try:
            code, said = self.ask("push", str(local), str(remote), serial=serial, timeout_s=SEND_S)
        except MissingToolError as error:
            raise TargetError(f"{serial}: {error.message}", error.hint) from error
        if code:
            raise TargetError(f"{serial}: {remote.name} was not sent: {last_line(said).removeprefix('adb: error: ')}")

    def devices(self) -> list[Listed]:
        """All that adb sees; its server is started where none runs.

        Raises:
            MissingToolError: there is no server, and none starts.
        """
        code, said = self.ask("devices", "-l")
        if code:
            raise MissingToolError(f"adb's server does not answer: {last_line(said)}", "see -H and -P of adb")
        matches = [_LISTED.fullmatch(line) for line in said.partition("List of devices attached")[2].splitlines()]
        return [_listed(match) for match in matches if match]

    def pick(self, place: str | None) -> Listed:
        """The device that is meant, ready to be spoken to; one on the network is connected.

        Raises:
            UsageError: several devices, and no word which.
            MissingToolError: none, or one that adb cannot speak to; the hint says what to do on the phone.
        """
        place = place or os.environ.get("ANDROID_SERIAL")
        there = self.devices()
        if place is None:
            if len(there) > 1:
                names = ", ".join(d.name + ("" if d.state == "device" else f", {d.state}") for d in there)
                raise UsageError(f"adb sees {len(there)} devices", f"--address SERIAL chooses one of: {names}")
            if not there:
                raise MissingToolError("adb sees no device", f"plug one in ({_TURN_ON}), or give --address HOST:PORT")
            return self._settled(there[0])
        mine = [device for device in there if device.serial == place]
        if _ON_THE_NETWORK.fullmatch(place) and not (mine and mine[0].state in ("device", "unauthorized")):
            return self._settled(self._connect(place, known=bool(mine)))
        if not mine:
            names = ", ".join(device.name for device in there) or "none"
            raise MissingToolError(f"{place}: adb sees no such device", f"it sees: {names}; {_TURN_ON}")
        return self._settled(mine[0])

    def _connect(self, place: str, *, known: bool) -> Listed:
        if known:
            self.ask("disconnect", place)  # what is offline there stays so otherwise
        _, said = self.ask("connect", place, timeout_s=CONNECT_S)  # its exit status is 0 whatever happens
        for device in self.devices():
            if device.serial == place:
                return device
        raise MissingToolError(
            f"{place}: {last_line(said)}", "is wireless debugging on, and the phone in the same network? see: adb pair"
        )

    def _settled(self, device: Listed) -> Listed:
        until = time.monotonic() + SETTLE_S
        while device.state in _SETTLING and time.monotonic() < until:
            time.sleep(0.1)
            device = next((d for d in self.devices() if d.serial == device.serial), device)
        if device.state == "device":
            return device
        state = "no permissions" if device.state.startswith("no permissions") else device.state
        raise MissingToolError(f"{device.name}: {device.state}", _REMEDIES.get(state, _BOOTED_ELSEWHERE))


def last_line(said: str) -> str:
    """The last line of what a program said."""
    return (said.splitlines() or ["it says nothing"])[-1].strip()


def _listed(match: re.Match[str]) -> Listed:
    facts = dict(fact.split(":", 1) for fact in match["facts"].split())
    model = facts.get("model")
    return Listed(match["serial"], match["state"], model.replace("_", " ") if model else None)
