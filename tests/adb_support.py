"""Google's adb client with a server of its own, and emulated devices (adbd.py) for it to speak to."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from phi4edge.core.errors import MissingToolError
from phi4edge.transports._adb_client import find_adb
from phi4edge.transports._api import Address

ADBD = Path(__file__).with_name("adbd.py")

# Programs that Android has and no other system: its settings, of which the folder that is beside them keeps the values.
_SETTINGS = """#!/bin/sh
file=${0%/*}/../settings-$2-$3
case $1 in
get) cat "$file" 2>/dev/null || echo null ;;
put) echo "$4" >"$file" ;;
delete) rm -f "$file"; echo Deleted 1 rows ;;
esac
"""
_SVC = """#!/bin/sh
case $3 in true) on=7 ;; usb) on=2 ;; *) echo "bad $3" >&2; exit 1 ;; esac
"${0%/*}/settings" put global stay_on_while_plugged_in $on
"""


def toybox() -> str | None:
    """Android's own tools, where this machine has them."""
    return shutil.which("toybox") if shutil.which("mksh") else None


@dataclass
class Phone:
    """An emulated device: Android's shell and tools where this machine has them (mksh, toybox), else this machine's."""

    folder: Path  # all that is the device's
    options: Sequence[str] = ()
    android: bool = True
    prefix: Sequence[str] = ()  # the command that its process runs under
    port: int = 0
    process: subprocess.Popen[str] | None = field(default=None, repr=False)

    @property
    def serial(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def data(self) -> Path:
        """What /data/local/tmp is."""
        return self.folder / "tmp"

    def address(self, *, folder: str | None = "") -> Address:
        return Address(self.serial, str(self.data / "our folder") if folder == "" else folder)

    def setting(self, name: str = "stay_on_while_plugged_in") -> str | None:
        file = self.folder / f"settings-global-{name}"
        return file.read_text().strip() if file.exists() else None

    def set(self, value: str, name: str = "stay_on_while_plugged_in") -> None:
        (self.folder / f"settings-global-{name}").write_text(value + "\n")

    def start(self) -> None:
        tools = self.folder / "bin"
        tools.mkdir(parents=True)
        self.data.mkdir()
        path, shell = f"{tools}:/usr/bin:/bin", "/bin/sh"
        if self.android and (box := toybox()):
            path, shell = str(tools), str(shutil.which("mksh"))
            for name in subprocess.run([box], capture_output=True, text=True, check=True).stdout.split():
                (tools / name).symlink_to(box)
            (tools / "sh").symlink_to(shell)
            if not (tools / "dd").exists():  # Android's toybox has it, Debian's does not
                (tools / "dd").symlink_to("/bin/dd")
        for name, script in (("settings", _SETTINGS), ("svc", _SVC)):
            (tools / name).write_text(script)
            (tools / name).chmod(0o755)
        words = [*self.prefix, sys.executable, ADBD, "--data", self.data, "--shell", shell, *self.options]
        environment = {"PATH": path, "LC_ALL": "C.UTF-8"}
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def unplug(self) -> None:
        """Pull its cable: the connection is gone, what runs is not."""
        assert self.process is not None
        self.process.send_signal(signal.SIGUSR1)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()


@dataclass
class Server:
    """adb's server, on a port of its own; it finds no device by itself."""

    adb: Path
    port: int

    def ask(self, *words: str) -> str:
        done = subprocess.run([self.adb, *words], capture_output=True, text=True, timeout=30, check=False)
        return done.stdout + done.stderr

    def kill(self) -> None:
        self.ask("kill-server")


@contextmanager
def serving(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server for as long as the block lasts; it starts when it is asked something."""
    try:
        adb = find_adb()
    except MissingToolError:
        pytest.skip("adb is not installed (the package adbutils has it)")
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in {
        "ANDROID_ADB_SERVER_PORT": str(port),
        "HOME": str(folder),  # it writes its keys there
        "TMPDIR": str(folder),  # and its log
        "ADB_MDNS": "0",
        "ADB_USB": "0",
        "ADB_EMU": "0",
        "ADB_LOCAL_TRANSPORT_MAX_PORT": "5553",  # below the first emulator
    }.items():
        patch.setenv(name, value)
    for name in ("ANDROID_SERIAL", "ADB_VENDOR_KEYS", "ADB_SERVER_SOCKET", "ANDROID_HOME", "ANDROID_SDK_ROOT"):
        patch.delenv(name, raising=False)
    server = Server(adb, port)
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def phones(*wanted: Phone) -> Iterator[None]:
    """Devices that are on for as long as the block lasts."""
    try:
        for phone in wanted:
            phone.start()
        yield
    finally:
        for phone in wanted:
            phone.stop()


def eventually(true: Callable[[], bool], within_s: float = 10.0) -> None:
    """Wait until ``true()`` is."""
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process still runs."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
