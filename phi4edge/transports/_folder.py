"""Our folder on a device: files are sent once, and all that is ours can be removed again.

``.phi4edge/ours`` in a folder says that phi4edge made it, or found it empty. ``.phi4edge/files.json`` says what it
holds: of each file that was sent the sha256, and its stamp (size, times and inode), by which a later look sees that
nobody touched it since. So a large file is hashed once here and once there.
"""

from __future__ import annotations

__all__ = ["SHA256_OF", "clean", "digest_in", "hashing_s", "local_sha256", "send"]

import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath

from phi4edge.core.errors import InputError, MissingToolError, TargetError, UsageError
from phi4edge.core.events import SILENT, Progress
from phi4edge.core.hashing import sha256_file
from phi4edge.transports._api import Device

_QUICK_S = 60.0
_SLOW_S = 600.0
_HASHED_A_SECOND = 500_000  # bytes; what is slower is taken for stuck

# Its first line: whether the folder is ours. It is, from now on, where it is empty.
_CLAIM = r"""
if [ ! -e .phi4edge/ours ]; then
    for file in * .[!.]* ..?*; do
        [ "$file" = .phi4edge ] || ! { [ -e "$file" ] || [ -h "$file" ]; } || { echo foreign; exit; }
    done
    mkdir -p .phi4edge && printf 'phi4edge found this folder empty, and removes it when it is asked to clean.\n' \
        >.phi4edge/ours || exit 1
fi
echo ours
cat .phi4edge/files.json 2>/dev/null || echo '{}'
"""

# One line a file: "SIZE INODE MTIME CTIME" as GNU and its like tell it, or BSD; "" where there is no file.
_STAMPS = r"""
for file; do
    if [ ! -f "$file" ]; then echo
    else stat -c '%s %i %y %z' "./$file" || stat -f '%z %i %Fm %Fc' "./$file" || echo unknown; fi 2>/dev/null
done
"""

# A function for scripts: prints the digest, and perhaps more, or "none" where nothing there computes it.
SHA256_OF = r"""
sha256_of() {
    if command -v sha256sum >/dev/null; then sha256sum <"$1"
    elif command -v shasum >/dev/null; then shasum -a 256 <"$1"
    elif command -v openssl >/dev/null; then openssl dgst -r -sha256 <"$1"
    else echo none; fi
}
"""

# Neither find nor rm follows a link.
_CLEAN = r"""
[ -e .phi4edge/ours ] || exit 0
find . -path ./.phi4edge -prune -o ! -type d -print0
cd / && rm -rf "$1"
"""


def send(device: Device, files: Mapping[str, Path], progress: Progress = SILENT) -> tuple[str, ...]:
    """Push each file that :attr:`Device.folder` does not hold already; returns the names of those that were pushed.

    Args:
        device: where to.
        files: what a file is called in the device's folder (``models/m.gguf``), and the file.
        progress: told of the bytes, file by file.

    Raises:
        UsageError: a name that leads out of the folder, or a folder that holds what others put there.
        InputError: a file that cannot be read.
        TargetError: the device is full, or vanished.
    """
    for name in files:
        _check(name)
    known = _claim(device)
    sent = []
    for (name, local), stamp in zip(files.items(), _stamps(device, *files), strict=True):
        digest = local_sha256(local)
        if known.get(name) == [digest, stamp] and stamp != "unknown":
            continue
        if not _holds(device, name, stamp, local, digest):
            device.push(local, device.folder / name, progress)
            sent.append(name)
        known[name] = [digest, *_stamps(device, name)]
        _remember(device, known)  # now: what has arrived is known even if the next file does not arrive
    return tuple(sent)


def clean(device: Device) -> tuple[PurePosixPath, ...]:
    """Remove :attr:`Device.folder` if it is ours; returns the files and links that were removed, absolute, sorted.

    Of a link, only itself is removed. A folder that is not ours is left as it is. The device is of no use afterwards.

    Raises:
        TargetError: something cannot be removed, or the device vanished.
    """
    listed = _script(device, _CLEAN, str(device.folder), timeout_s=_SLOW_S).split(b"\0")[:-1]
    return tuple(sorted(device.folder / os.fsdecode(name) for name in listed))


def local_sha256(path: Path) -> str:
    """The SHA-256 of a file on this side; computed once for as long as nobody touches the file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        seen = path.stat()
        return _local_sha256(path.resolve(), seen.st_size, seen.st_mtime_ns, seen.st_ino)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


@lru_cache(maxsize=1024)
def _local_sha256(path: Path, _size: int, _mtime: int, _inode: int) -> str:
    return sha256_file(path)


def hashing_s(size: int) -> float:
    """Seconds in which a file of ``size`` bytes is surely hashed on a device, were its card the slowest."""
    return _QUICK_S + size / _HASHED_A_SECOND


def digest_in(said: bytes, name: str) -> str:
    """The digest that ``sha256_of`` printed on the device of that name.

    Raises:
        MissingToolError: nothing on the device computes it.
    """
    word = said.split()[0].decode()
    if word == "none":
        raise MissingToolError(
            f"{name}: has none of sha256sum, shasum and openssl, so that files cannot be compared",
            "install one of them on the device (coreutils and busybox have sha256sum)",
        )
    return word


def _check(name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or path.parts[0] == ".phi4edge" or "\0" in name:
        raise UsageError(f"{name!r} is not a name in the device's folder", "name files below it")


def _claim(device: Device) -> dict[str, list[str]]:
    """What the folder holds, by name: sha256 and stamp."""
    first, _, rest = _script(device, _CLAIM).partition(b"\n")
    if first != b"ours":
        raise UsageError(
            f"{device.name}: {device.folder} was not made by phi4edge, and is not empty",
            "name a folder of its own: one that is not there yet is made",
        )
    try:
        known: dict[str, list[str]] = json.loads(rest)
    except ValueError:  # a device that lost power while it was written: files are hashed there once more
        return {}
    return known


def _remember(device: Device, known: Mapping[str, list[str]]) -> None:
    script = "cat >.phi4edge/files.json.partial && mv -f .phi4edge/files.json.partial .phi4edge/files.json"
    _script(device, script, stdin=json.dumps(known).encode())


def _stamps(device: Device, *names: str) -> list[str]:
    return _script(device, _STAMPS, *names).decode().split("\n")[:-1]


def _holds(device: Device, name: str, stamp: str, local: Path, digest: str) -> bool:
    size = local.stat().st_size
    if not stamp or (stamp != "unknown" and stamp.split()[0] != str(size)):
        return False
    said = _script(device, SHA256_OF + 'sha256_of "./$1"', name, timeout_s=hashing_s(size))
    return digest_in(said, device.name) == digest


def _script(device: Device, script: str, *words: str, timeout_s: float = _QUICK_S, stdin: bytes = b"") -> bytes:
    done = device.run(["sh", "-c", script, "sh", *words], timeout_s=timeout_s, stdin=stdin)
    if done.code:
        raise TargetError(f"{device.name}: {device.folder}: {done.last_words or f'exit status {done.code}'}")
    return done.stdout
