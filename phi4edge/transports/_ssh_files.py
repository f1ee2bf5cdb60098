"""Files over ssh: sent aside under a name that says what they will hold, compared by sha256, then renamed.

rsync carries them where both sides have it: an older file of that name spares what it shares with the new one.
Elsewhere `cat` does, on the device: it asks for nothing that a small server lacks, such as sftp. Both go on from where
an interrupted attempt stopped; what they go on from has the right beginning, since its name holds the sha256.
"""

from __future__ import annotations

__all__ = ["pull", "push"]

import os
import select
import shutil
from contextlib import suppress
from pathlib import Path, PurePosixPath

from phi4edge.core.atomic import PARTIAL
from phi4edge.core.errors import InputError, TargetError
from phi4edge.core.events import Progress
from phi4edge.core.hashing import sha256_file
from phi4edge.transports._api import Device, Stream
from phi4edge.transports._folder import SHA256_OF, digest_in, hashing_s, local_sha256
from phi4edge.transports._rsync import FULL_DISK, STALL_S, Connected, carry

_QUICK_S = 60.0
_HOUR_S = 3600.0
_DAY_S = 86400.0  # a transfer may take as long as it moves …
_PIECE = 1 << 20  # bytes

# $1 folder, $2 final name, $3 partial name. Says what is there of the partial file, and what is free, in bytes.
_PREPARE = r"""
mkdir -p "$1" && cd "$1" || exit 1
if [ -d "./$2" ]; then echo "$1/$2: is a directory" >&2; exit 1; fi
for file in ".$2."????????????????.partial; do [ "$file" = "$3" ] || rm -f "./$file"; done
if [ -f "./$3" ]; then wc -c <"./$3"; else echo 0; fi
df -Pk . 2>/dev/null | awk 'NR == 2 { printf "%.0f\n", $4 * 1024 }'
"""
# $1 partial name, $2 final name, $3 mode, $4 sha256. What arrived with other bytes is removed.
_FINISH = (
    SHA256_OF
    + r"""
said=$(sha256_of "$1") || exit 1
echo "$said"
case $said in "$4"*) chmod "$3" "$1" && mv -f "$1" "$2" ;; *) rm -f "$1" ;; esac
"""
)
_LOOK = (
    SHA256_OF
    + r"""
if [ -f "$1" ]; then ls -ln "$1" && sha256_of "$1"; else echo "$1: no such file" >&2; exit 1; fi
"""
)


def push(device: Connected, rsync_shell: str | None, local: Path, remote: PurePosixPath, progress: Progress) -> None:
    """Send ``local``; ``rsync_shell`` is what rsync's ``-e`` takes, None where a side has no rsync.

    Raises:
        InputError: ``local`` cannot be read.
        TargetError: the device is full or refuses, the connection was lost, or other bytes arrived.
    """
    digest = local_sha256(local)
    try:
        size, mode = local.stat().st_size, local.stat().st_mode & 0o777
    except OSError as error:
        raise InputError(f"{local}: cannot be read: {error.strerror}") from error
    partial = remote.with_name(_partial_name(remote.name, digest))
    again = True
    while again:
        done, free = _prepare(device, remote, partial)
        _check_room(device, remote, size - done, free)
        again = done > 0  # what was there may be wrong; from the beginning, there is no second try
        if done > size:
            _told(device, ["rm", "-f", str(partial)])
            continue
        progress.start(f"send {local.name}", size, "B", done)
        try:
            if rsync_shell is not None:
                carry(device, rsync_shell, [str(local.resolve()), f"device:{partial}"], done, size, progress)
            else:
                _feed(device, local, partial, done, progress)
        except TargetError as error:
            raise _full(device, remote, partial, size, error) from error
        progress.finish()
        finish = ["sh", "-c", _FINISH, "sh", str(partial), str(remote), f"{mode:o}", digest]
        if digest_in(_told(device, finish, hashing_s(size)), device) == digest:
            return
    raise TargetError(f"{device.name}: {remote} arrived with other bytes", "did the file change meanwhile?")


def pull(device: Connected, rsync_shell: str | None, remote: PurePosixPath, local: Path, progress: Progress) -> None:
    """Fetch ``remote``; the arguments are those of :func:`push`.

    Raises:
        TargetError: it is not there, the device refuses, the connection was lost, or other bytes arrived.
    """
    first, *_, last = _told(device, ["sh", "-c", _LOOK, "sh", str(remote)], _HOUR_S).strip().splitlines()
    words = first.decode(errors="replace").split()
    mode, size, digest = _mode(words[0]), int(words[4]), digest_in(last, device)
    partial = local.with_name(_partial_name(local.name, digest))
    try:
        local.parent.mkdir(parents=True, exist_ok=True)
        again = True
        while again:
            done = partial.stat().st_size if partial.exists() else 0
            again = done > 0
            if done > size:
                partial.unlink()
                continue
            if (free := shutil.disk_usage(local.parent).free) < size - done:
                raise TargetError(f"{local}: needs {size - done} bytes, {free} are free", "free some space here")
            progress.start(f"fetch {remote.name}", size, "B", done)
            if rsync_shell is not None:
                carry(device, rsync_shell, [f"device:{remote}", str(partial.absolute())], done, size, progress)
            else:
                _drain(device, remote, partial, done, progress)
            progress.finish()
            if partial.exists() and sha256_file(partial) == digest:
                partial.chmod(mode)
                partial.replace(local)
                return
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise TargetError(f"{error.filename or local}: {error.strerror}") from error
    raise TargetError(f"{device.name}: {remote} came with other bytes than it holds there", "does it change there?")


def _partial_name(name: str, digest: str) -> str:
    """A hidden name beside the final one. A name has room for 255 bytes on every common file system."""
    room = os.fsencode(name)[: 255 - len(PARTIAL) - 18]
    return f".{os.fsdecode(room)}.{digest[:16]}{PARTIAL}"


def _mode(words: str) -> int:
    """Permissions as ``ls -l`` shows them: ``-rwxr-x---``."""
    return sum(1 << (8 - i) for i, letter in enumerate(words[1:10]) if letter not in "-ST")


def _told(device: Device, argv: list[str], timeout_s: float = _QUICK_S) -> bytes:
    done = device.run(argv, timeout_s=timeout_s)
    if done.code:
        raise TargetError(f"{device.name}: {done.last_words or f'{argv[0]} ended with {done.code}'}")
    return done.stdout


def _prepare(device: Device, remote: PurePosixPath, partial: PurePosixPath) -> tuple[int, int | None]:
    """Bytes that are there already, and bytes that are free; None where the device does not say."""
    said = _told(device, ["sh", "-c", _PREPARE, "sh", str(remote.parent), remote.name, partial.name]).split()
    return int(said[0]), int(said[1]) if len(said) > 1 else None


def _check_room(device: Device, remote: PurePosixPath, need: int, free: int | None) -> None:
    if free is not None and free < need:
        raise TargetError(
            f"{device.name}: {remote} needs {need} bytes, {free} are free there",
            "free some space on the device, or name a folder on another disk of it",
        )


def _full(device: Device, remote: PurePosixPath, partial: PurePosixPath, size: int, error: TargetError) -> TargetError:
    """``error``, or that of a full disk where the device says so."""
    if not FULL_DISK.search(error.message):
        return error
    there, free = _prepare(device, remote, partial)
    room = "an unknown number of" if free is None else str(free)
    return TargetError(
        f"{device.name}: {remote} needs {size - there} bytes more, {room} are free there ({error.message})",
        "free some space on the device, or name a folder on another disk of it; the file then goes on from there",
    )


def _feed(device: Connected, local: Path, partial: PurePosixPath, done: int, progress: Progress) -> None:
    """Append what is missing of ``local`` to the partial file."""
    stream = device.start(["sh", "-c", 'exec cat >>"$1"', "sh", str(partial)], timeout_s=_DAY_S)
    try:
        with local.open("rb") as file, suppress(BrokenPipeError):  # the stream's end says why
            file.seek(done)
            while piece := file.read(_PIECE):
                _write(stream, piece, device.name)
                progress.advance(len(piece))
            stream.stdin.close()
        if code := stream.wait(STALL_S):
            raise TargetError(f"{device.name}: {partial}: {stream.last_words() or f'cat ended with {code}'}")
    finally:
        stream.close()


def _write(stream: Stream, piece: bytes, name: str) -> None:
    """Write all of it, with an error where nothing moves for long: a write by itself would wait for ever."""
    descriptor, view = stream.stdin.fileno(), memoryview(piece)
    os.set_blocking(descriptor, False)
    while view:
        if not select.select([], [descriptor], [], STALL_S)[1]:
            raise TargetError(f"{name}: took no byte for {STALL_S:g} s")
        with suppress(BlockingIOError):
            view = view[os.write(descriptor, view) :]


def _drain(device: Connected, remote: PurePosixPath, partial: Path, done: int, progress: Progress) -> None:
    """Append what is missing of ``remote`` to the partial file."""
    stream = device.start(["tail", "-c", f"+{done + 1}", str(remote)], timeout_s=_DAY_S)
    try:
        with partial.open("ab") as file:
            descriptor = stream.stdout.fileno()
            while True:
                if not select.select([descriptor], [], [], STALL_S)[0]:
                    raise TargetError(f"{device.name}: sent no byte for {STALL_S:g} s")
                piece = os.read(descriptor, _PIECE)
                if not piece:
                    break
                file.write(piece)
                progress.advance(len(piece))
        if code := stream.wait(STALL_S):
            raise TargetError(f"{device.name}: {remote}: {stream.last_words() or f'tail ended with {code}'}")
    finally:
        stream.close()
