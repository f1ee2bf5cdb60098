"""What a device is asked about one file that is sent to it or fetched from it, in POSIX shell."""

from __future__ import annotations

__all__ = ["Parcel", "facts", "finish", "partial_name", "prepare", "told"]

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from phi4edge.core.atomic import PARTIAL
from phi4edge.core.errors import TargetError
from phi4edge.transports._folder import SHA256_OF, hashing_s
from phi4edge.transports._posix import PosixDevice

_QUICK_S = 60.0
_HOUR_S = 3600.0  # to hash a file of unknown size

# $1 folder, $2 final name, $3 partial name, $4 what every partial name of that file begins with. Says how many bytes of
# the partial file are there, and what df says: not every device that has df has awk.
_PREPARE = r"""
mkdir -p "$1" && cd "$1" || exit 1
if [ -d "./$2" ]; then echo 'a folder of that name is there' >&2; exit 1; fi
for file in "$4"????????????????.partial; do [ "$file" = "$3" ] || rm -f "./$file"; done
if [ -f "./$3" ]; then wc -c <"./$3"; else echo 0; fi
df -Pk . 2>/dev/null || df -k . 2>/dev/null || :
"""
# $1 partial name, $2 final name, $3 mode, $4 sha256. What arrived with other bytes is removed.
_FINISH = (
    SHA256_OF
    + r"""
said=$(sha256_of "$1") || exit 1
echo "$said"
case $said in
none) ;;
"$4"*) chmod "$3" "$1" && mv -f "$1" "$2" ;;
*) rm -f "$1" ;;
esac
"""
)
# Says size, permissions and sha256 of $1. Android 5 has no stat, and its ls follows no links.
_FACTS = (
    SHA256_OF
    + r"""
if [ -d "$1" ]; then echo 'a folder' >&2; exit 1; fi
if ! [ -f "$1" ]; then echo 'no such file' >&2; exit 1; fi
wc -c <"$1" || exit 1
listed=$(ls -lnL "$1" 2>/dev/null || ls -ln "$1") || exit 1
echo "${listed%% *}"
sha256_of "$1"
"""
)


@dataclass(frozen=True)
class Parcel:
    """A file, and where it goes."""

    local: Path
    target: PurePosixPath
    size: int  # bytes
    mode: int
    sha256: str
    versions: str  # what the names of all that was sent of any version of it begin with

    @property
    def partial(self) -> PurePosixPath:
        """What is sent of this version."""
        return self.target.with_name(f"{self.versions}{self.sha256[:16]}{PARTIAL}")


def prepare(device: PosixDevice, parcel: Parcel) -> tuple[int, int | None]:
    """Bytes that are there already, and bytes that are free; None where the device does not say."""
    target = parcel.target
    words = ["sh", "-c", _PREPARE, "sh", str(target.parent), target.name, parcel.partial.name, parcel.versions]
    said = told(device, words, target)
    free = re.search(r"\s\d+\s+-?\d+\s+(-?\d+)\s+\d+%", said)  # 1K-blocks, used, available, use
    return int(said.split()[0]), max(0, int(free[1])) * 1024 if free else None


def finish(device: PosixDevice, parcel: Parcel) -> str:
    """Give what was sent its name if it is the file, and remove it if it is not: what the device says of its sha256.

    That is "none" where nothing there computes it; what was sent is then left as it is.
    """
    words = ["sh", "-c", _FINISH, "sh", str(parcel.partial), str(parcel.target), f"{parcel.mode:o}", parcel.sha256]
    return told(device, words, parcel.target, hashing_s(parcel.size))


def facts(device: PosixDevice, source: PurePosixPath) -> tuple[int, int, str]:
    """Size in bytes, mode, and what the device says of the sha256 ("none" where nothing there computes it)."""
    size, permissions, digest, *_ = told(device, ["sh", "-c", _FACTS, "sh", str(source)], source, _HOUR_S).split()
    return int(size), _mode(permissions), digest


def told(device: PosixDevice, argv: Sequence[str], path: PurePosixPath, timeout_s: float = _QUICK_S) -> str:
    """What a program said that had to succeed.

    Raises:
        TargetError: it did not; ``path`` is what it was about.
    """
    done = device.run(argv, timeout_s=timeout_s)
    if done.code:
        raise TargetError(f"{device.name}: {path}: {done.last_words or f'{argv[0]} ended with {done.code}'}")
    return done.text


def partial_name(name: str) -> str:
    """A hidden name beside the final one, but for 16 characters and PARTIAL; 255 bytes fit every common file system."""
    return f".{os.fsdecode(os.fsencode(name)[: 255 - len(PARTIAL) - 18])}."


def _mode(words: str) -> int:
    """Permissions as ``ls -l`` shows them: ``-rwxr-x---``."""
    return sum(1 << (8 - i) for i, letter in enumerate(words[1:10]) if letter not in "-ST")
