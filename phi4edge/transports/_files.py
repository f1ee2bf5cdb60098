"""Files over a connection: sent aside under a name that says what they will hold, compared by sha256, then renamed.

What an interrupted transfer left is gone on from where the transport can: its name holds the sha256 of the whole file,
so it is a beginning of just this file; and where the whole differs after all, it is carried once more from the
beginning. How the bytes move is the transport's own: a :class:`Carrier`.
"""

from __future__ import annotations

__all__ = ["FULL_DISK", "STALLED_S", "Carrier", "RefusedError", "append", "pull", "push"]

import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Protocol

from phi4edge.core.atomic import PARTIAL
from phi4edge.core.errors import InputError, TargetError
from phi4edge.core.events import SILENT, Progress
from phi4edge.core.hashing import sha256_file
from phi4edge.transports._folder import digest_in, local_sha256
from phi4edge.transports._parcel import Parcel, facts, finish, partial_name, prepare, told
from phi4edge.transports._posix import PosixDevice

STALLED_S = 60.0  # a connection that has not moved a byte for so long is dead
FULL_DISK = re.compile("no space|quota exceeded|file too large", re.IGNORECASE)
_QUICK_S = 60.0
_DAY_S = 86400.0  # a transfer may take as long as it moves …
_POLL_S = 0.05


class RefusedError(TargetError):
    """What received the bytes ended with an error; the device still answers, and may say what is wrong."""


class Carrier(Protocol):
    """How a transport moves the bytes of one file."""

    resumes_push: bool
    resumes_pull: bool
    must_hash: bool  # a device that computes no sha256 is an error; else what was sent is fetched back

    def versions(self, name: str) -> str:
        """What the partial names of a file of that name begin with; 16 characters of its sha256 follow."""
        ...

    def send(self, parcel: Parcel, done: int, progress: Progress) -> None:
        """Send what the partial file lacks after its first ``done`` bytes.

        Raises:
            RefusedError: the disk is full, or the device refuses.
            TargetError: the connection was lost.
        """
        ...

    def fetch(self, source: PurePosixPath, partial: Path, done: int, size: int, progress: Progress) -> None:
        """Fetch what the partial file lacks after its first ``done`` of ``size`` bytes; raises as :meth:`send`."""
        ...

    def no_room(self, parcel: Parcel, needed: int, free: int | None, said: str | None) -> TargetError:
        """The error of a full disk: bytes that are needed (beyond what was sent, where it already ``said`` so)."""
        ...


def push(device: PosixDevice, carrier: Carrier, local: Path, target: PurePosixPath, progress: Progress) -> None:
    """Send ``local``.

    Raises:
        InputError: ``local`` cannot be read.
        MissingToolError: the device computes no sha256, and the transport needs it.
        TargetError: the device is full or refuses, the connection was lost, or other bytes arrived.
    """
    digest = local_sha256(local)
    try:
        size, mode = local.stat().st_size, local.stat().st_mode & 0o777
    except OSError as error:
        raise InputError(f"{local}: cannot be read: {error.strerror}") from error
    parcel = Parcel(local, target, size, mode, digest, carrier.versions(target.name))
    arrived, again = "", True
    while again:
        done, free = prepare(device, parcel)
        again = done > 0  # what was there may be wrong; from the beginning, there is no second try
        if done > size or (done and not carrier.resumes_push):
            told(device, ["rm", "-f", str(parcel.partial)], target)
            continue
        if free is not None and free < size - done:
            raise carrier.no_room(parcel, size - done, free, None)
        progress.start(f"push {local.name}", size, "B", done)
        try:
            carrier.send(parcel, done, progress)
        except RefusedError as error:
            raise _cause(device, carrier, parcel, error) from error
        progress.finish()
        arrived = _arrived(device, carrier, parcel)
        if arrived == digest:
            return
    raise _differs(f"{device.name}: {target}", arrived, digest)


def pull(device: PosixDevice, carrier: Carrier, source: PurePosixPath, local: Path, progress: Progress) -> None:
    """Fetch ``source``.

    Raises:
        MissingToolError: the device computes no sha256, and the transport needs it.
        TargetError: it is not there, the device refuses, the connection was lost, or other bytes arrived.
    """
    size, mode, said = facts(device, source)
    digest = _digest(device, carrier, said)
    partial = local.with_name(f"{partial_name(local.name)}{digest[:16]}{PARTIAL}")
    arrived, again = "", True
    try:
        local.parent.mkdir(parents=True, exist_ok=True)
        while again:
            done = partial.stat().st_size if partial.exists() else 0
            again = done > 0
            if done > size or (done and not carrier.resumes_pull):
                partial.unlink()
                continue
            if (free := shutil.disk_usage(local.parent).free) < size - done:
                raise TargetError(f"{local}: needs {size - done} bytes, {free} are free", "free some space here")
            progress.start(f"pull {source.name}", size, "B", done)
            carrier.fetch(source, partial, done, size, progress)
            progress.finish()
            arrived = sha256_file(partial)
            if digest in (arrived, "none"):
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
                partial.chmod(mode)
                partial.replace(local)
                return
            partial.unlink()
    except OSError as error:
        raise TargetError(f"{error.filename or local}: {error.strerror}") from error
    finally:
        if not carrier.resumes_pull:
            with suppress(OSError):
                partial.unlink()
    raise _differs(f"{device.name}: {source}", digest, arrived)


def append(device: PosixDevice, parcel: Parcel, done: int, progress: Progress, stalled_s: float) -> None:
    """Send what is missing after the first ``done`` bytes, by ``cat`` on the device, which every device has.

    Raises:
        RefusedError: cat ended with an error.
        TargetError: the connection was lost, or nothing was taken for ``stalled_s``.
    """
    words = ["sh", "-c", 'exec cat >>"$1"', "sh", str(parcel.partial)]
    with parcel.local.open("rb", buffering=0) as file:
        file.seek(done)
        stream = device.start(words, timeout_s=_DAY_S, stdin=file)
        try:
            at, since = done, time.monotonic()
            while stream.running:
                time.sleep(_POLL_S if parcel.size - done > 1 << 20 else 0.005)
                # The client reads through the same descriptor.
                now = min(parcel.size, os.lseek(file.fileno(), 0, os.SEEK_CUR))
                if now > at:
                    progress.advance(now - at)
                    at, since = now, time.monotonic()
                elif time.monotonic() - since > stalled_s:
                    raise device.lost(f"while {parcel.target} was sent: nothing was taken for {stalled_s:g} s")
            if code := stream.wait(_QUICK_S):
                raise RefusedError(f"{device.name}: {parcel.target}: {stream.last_words() or f'cat ended with {code}'}")
        finally:
            stream.close()
    progress.advance(parcel.size - at)


def _arrived(device: PosixDevice, carrier: Carrier, parcel: Parcel) -> str:
    """Give what was sent its name if it is the file; its sha256, by the device or of what is fetched back from it."""
    said = _digest(device, carrier, finish(device, parcel))
    if said != "none":
        return said
    with tempfile.TemporaryDirectory() as folder:
        back = Path(folder) / "back"
        carrier.fetch(parcel.partial, back, 0, parcel.size, SILENT)
        arrived = sha256_file(back)
    script = 'chmod "$1" "$2" && mv -f "$2" "$3"' if arrived == parcel.sha256 else 'rm -f "$2"'
    words = ["sh", "-c", script, "sh", f"{parcel.mode:o}", str(parcel.partial), str(parcel.target)]
    told(device, words, parcel.target)
    return arrived


def _digest(device: PosixDevice, carrier: Carrier, said: str) -> str:
    return digest_in(said.encode(), device.name) if carrier.must_hash else said.split()[0]


def _cause(device: PosixDevice, carrier: Carrier, parcel: Parcel, error: RefusedError) -> TargetError:
    """``error``, or that of a full disk where the device says so."""
    there, free = prepare(device, parcel)
    needed = parcel.size - there
    if FULL_DISK.search(error.message) or (free is not None and free < needed):
        return carrier.no_room(parcel, needed, free, error.message)
    return error


def _differs(what: str, there: str, here: str) -> TargetError:
    return TargetError(
        f"{what} arrived with other bytes: sha256 {there[:12]}… there, {here[:12]}… here",
        "try again; does the file change meanwhile, or is the cable a bad one?",
    )
