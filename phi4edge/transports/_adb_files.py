"""Files over adb: sent so that an interrupted push goes on, compared by sha256, renamed when whole.

``adb push`` begins anew whenever it is interrupted, which for 8 GB over USB 2 is minutes. So a push is ``cat`` on the
device that appends what it is sent to a file named after the whole file's hash: what is there already is a beginning
of just this file, and the hash of the whole is compared before it takes its name. A pull is ``adb pull``, which begins
anew.
"""

from __future__ import annotations

__all__ = ["Shell", "pull", "push"]

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from phi4edge.core.atomic import PARTIAL
from phi4edge.core.errors import InputError, TargetError
from phi4edge.core.events import Progress
from phi4edge.core.hashing import sha256_bytes, sha256_file
from phi4edge.core.memory import format_bytes
from phi4edge.transports._adb_client import last_line
from phi4edge.transports._api import Finished
from phi4edge.transports._folder import local_sha256
from phi4edge.transports._posix import PosixStream

STALLED_S = 60.0  # without a byte taken: the connection is dead
_ASK_S = 60.0
_SLOWEST = 500_000  # bytes a second, to write or to hash: what is slower is taken for stuck
_LONGEST_S = 3600.0  # to hash a file of unknown size
_POLL_S = 0.2

# $1 the folder, $2 the file, $3 what was sent of it, $4 what was sent of any version of it
_LOOK = r"""
mkdir -p "$1" && cd "$1" || exit
if [ -d "$2" ]; then echo 'a folder of that name is there' >&2; exit 1; fi
for old in "$4"*; do [ "$old" = "$3" ] || rm -f "$old"; done
if [ -f "$3" ]; then wc -c <"$3"; else echo 0; fi
df -k .
"""
# $1 what was sent, $2 its hash, $3 its mode, $4 the file. Says the hash.
_SEAL = """
command -v sha256sum >/dev/null || exit 3
sum=$(sha256sum <"$1") && sum=${sum%% *} && echo "$sum"
[ "$sum" != "$2" ] || { chmod "$3" "$1" && mv -f "$1" "$4"; }
"""
# Says size, mode and hash of $1. Android 5 has no stat, and before Android 7 there may be no sha256sum.
_FACTS = """
if [ -d "$1" ]; then echo 'a folder' >&2; exit 1; fi
wc -c <"$1" || exit
stat -c %a "$1" 2>/dev/null || echo 644
if command -v sha256sum >/dev/null; then sha256sum <"$1"; else echo unknown; fi
"""


class Shell(Protocol):
    """What is asked of the device here."""

    name: str

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
        stdin: bytes = b"",
    ) -> Finished: ...

    def start(self, argv: Sequence[str], *, timeout_s: float, stdin: int | BinaryIO) -> PosixStream: ...

    def adb(self, *arguments: str) -> subprocess.Popen[bytes]:
        """The client with ``arguments``, for this device; what it says is one pipe."""
        ...

    def lost(self, when: str, stderr: bytes = b"") -> TargetError: ...


@dataclass(frozen=True)
class _Parcel:
    """A file, and where it goes."""

    local: Path
    target: PurePosixPath
    size: int  # bytes
    sha256: str

    @property
    def versions(self) -> str:
        """What the names of all that was sent under the target's name begin with."""
        return f".{sha256_bytes(os.fsencode(self.target.name))[:8]}-"

    @property
    def partial(self) -> PurePosixPath:
        return self.target.with_name(f"{self.versions}{self.sha256[:16]}{PARTIAL}")


def push(device: Shell, local: Path, target: PurePosixPath, progress: Progress, *, resume: bool = True) -> None:
    """Send ``local``; with ``resume`` false by ``adb push``, for a device whose shell takes no stdin.

    Raises:
        InputError: ``local`` cannot be read.
        TargetError: see :class:`phi4edge.transports._api.Device`.
    """
    try:
        parcel = _Parcel(local, target, local.stat().st_size, local_sha256(local))
        mode = f"{local.stat().st_mode & 0o777:o}"
    except OSError as error:
        raise InputError(f"{local}: cannot be read: {error.strerror}") from error
    begun, free = _look(device, parcel)
    if begun > parcel.size or not resume:
        begun, free = _start_over(device, parcel)
    if free is not None and free < parcel.size - begun:
        raise _full(device, parcel, parcel.size - begun, free)
    progress.start(f"push {local.name}", parcel.size, "B", begun)
    if resume:
        _append(device, parcel, begun, progress)
        arrived = _seal(device, parcel, mode)
        if arrived != parcel.sha256 and begun:  # what was there was no beginning of this file
            _start_over(device, parcel)
            progress.start(f"push {local.name}", parcel.size, "B")
            _append(device, parcel, 0, progress)
            arrived = _seal(device, parcel, mode)
    else:
        _adb(device, ("push", str(local), str(parcel.partial)), f"push {target}")
        progress.advance(parcel.size)
        arrived = _seal(device, parcel, mode)
    if arrived != parcel.sha256:
        _start_over(device, parcel)
        raise TargetError(
            f"{device.name}: {target} arrived damaged: sha256 {arrived[:12]}… there, {parcel.sha256[:12]}… here",
            "try again, with another cable or port",
        )
    progress.finish()


def pull(device: Shell, source: PurePosixPath, local: Path, progress: Progress) -> None:
    """Fetch ``source``.

    Raises:
        TargetError: see :class:`phi4edge.transports._api.Device`.
    """
    done = device.run(("sh", "-c", _FACTS, "sh", str(source)), timeout_s=_LONGEST_S)
    if done.code:
        raise TargetError(f"{device.name}: {source}: {done.last_words}")
    size, mode, digest = int(done.text.split()[0]), int(done.text.split()[1], 8), done.text.split()[2]
    partial = local.with_name(local.name + PARTIAL)
    progress.start(f"pull {source.name}", size, "B")
    have = 0

    def look() -> None:
        nonlocal have
        if partial.is_file():
            now = partial.stat().st_size
            progress.advance(max(0, now - have))
            have = max(have, now)

    try:
        local.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        _adb(device, ("pull", str(source), str(partial)), f"pull {source}", look)
        arrived = sha256_file(partial)
        if arrived != digest and digest != "unknown":
            raise TargetError(
                f"{device.name}: {source} changed on its way: sha256 {digest[:12]}… there, {arrived[:12]}… here"
            )
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.chmod(mode)
        partial.replace(local)
    except OSError as error:
        raise TargetError(f"{error.filename or local}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            partial.unlink()
    progress.finish()


def _look(device: Shell, parcel: _Parcel) -> tuple[int, int | None]:
    """Bytes sent already, and bytes free on the device where it says so."""
    words = (
        "sh",
        "-c",
        _LOOK,
        "sh",
        str(parcel.target.parent),
        parcel.target.name,
        parcel.partial.name,
        parcel.versions,
    )
    said = _told(device, words, parcel.target)
    free = re.search(r"\s\d+\s+\d+\s+(\d+)\s+\d+%", said)  # 1K-blocks, used, available, use
    return int(said.split()[0]), int(free[1]) * 1024 if free else None


def _start_over(device: Shell, parcel: _Parcel) -> tuple[int, int | None]:
    _told(device, ("rm", "-f", str(parcel.partial)), parcel.target)
    return _look(device, parcel)


def _append(device: Shell, parcel: _Parcel, begun: int, progress: Progress) -> None:
    """Send what is missing after the first ``begun`` bytes."""
    left = parcel.size - begun
    with parcel.local.open("rb", buffering=0) as file:
        file.seek(begun)
        words = ("sh", "-c", 'cat >>"$1"', "sh", str(parcel.partial))
        stream = device.start(words, timeout_s=60 + left / _SLOWEST, stdin=file)
        try:
            at, since = begun, time.monotonic()
            while stream.running:
                time.sleep(_POLL_S if left > 1 << 20 else 0.005)
                now = os.lseek(file.fileno(), 0, os.SEEK_CUR)  # adb reads through the same descriptor
                if now > at:
                    progress.advance(now - at)
                    at, since = now, time.monotonic()
                elif time.monotonic() - since > STALLED_S:
                    raise device.lost(f"while {parcel.target} was sent: nothing was taken for {STALLED_S:g} s")
            code, words_said = stream.wait(_ASK_S), stream.last_words()
        finally:
            stream.close()
        progress.advance(parcel.size - at)
    if code:
        there, free = _look(device, parcel)
        if "space" in words_said.lower() or (free is not None and free < parcel.size - there):
            raise _full(device, parcel, parcel.size - there, free or 0)
        raise TargetError(f"{device.name}: {parcel.target}: {words_said}")


def _full(device: Shell, parcel: _Parcel, needed: int, free: int) -> TargetError:
    return TargetError(
        f"{device.name}: {parcel.target.parent} has no room for {parcel.target.name}: "
        f"{needed} bytes needed ({format_bytes(needed)}), {free} free ({format_bytes(free)})",
        "make room on the device; what was sent is kept, and gone on from",
    )


def _seal(device: Shell, parcel: _Parcel, mode: str) -> str:
    """Give what was sent its name if it is the file; its sha256, by the device, or of what is read back from it."""
    seal = ("sh", "-c", _SEAL, "sh", str(parcel.partial), parcel.sha256, mode, str(parcel.target))
    done = device.run(seal, timeout_s=_ASK_S + parcel.size / _SLOWEST)
    if done.code == 3:
        with tempfile.TemporaryDirectory() as folder:
            back = Path(folder) / "back"
            _adb(device, ("pull", str(parcel.partial), str(back)), f"pull {parcel.partial}")
            arrived = sha256_file(back)
        if arrived == parcel.sha256:
            name = (
                "sh",
                "-c",
                'chmod "$1" "$2" && mv -f "$2" "$3"',
                "sh",
                mode,
                str(parcel.partial),
                str(parcel.target),
            )
            _told(device, name, parcel.target)
        return arrived
    if done.code:
        raise TargetError(f"{device.name}: {parcel.target}: {done.last_words}")
    return done.text.split()[0]


def _told(device: Shell, argv: Sequence[str], path: PurePosixPath) -> str:
    done = device.run(argv, timeout_s=_ASK_S)
    if done.code:
        raise TargetError(f"{device.name}: {path}: {done.last_words or 'refused'}")
    return done.text


def _adb(device: Shell, arguments: Sequence[str], what: str, look: Callable[[], None] = lambda: None) -> None:
    """Run the client to its end."""
    process = device.adb(*arguments)
    assert process.stdout is not None
    with process.stdout as pipe:
        try:
            while process.poll() is None:
                time.sleep(0.01)
                look()
            said = pipe.read().decode(errors="replace").strip()
        finally:
            process.kill()
            process.wait()
    look()
    if process.returncode:
        raise TargetError(f"{device.name}: {what}: {last_line(said).removeprefix('adb: error: ')}")
