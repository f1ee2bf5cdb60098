"""Room on disk: asked for before long work begins, and said plainly where it ends all the same."""

from __future__ import annotations

__all__ = ["free_bytes", "full_disk", "is_full", "require_space"]

import errno
import shutil
from pathlib import Path

from phi4edge.core.errors import TargetError
from phi4edge.core.memory import format_bytes

# EFBIG: a limit on the size of one file, the shell's or the file system's.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def free_bytes(path: Path) -> int:
    """Bytes that may still be written where ``path`` lies, or will lie: its nearest folder that exists is asked."""
    place = path.resolve()
    while not place.is_dir():
        place = place.parent
    return shutil.disk_usage(place).free


def require_space(path: Path, needed: int, what: str, hint: str = "free space, or choose another place") -> None:
    """Refuse to begin ``what`` where fewer than ``needed`` bytes are free.

    Raises:
        TargetError: the disk at ``path`` has less; both figures are named.
    """
    free = free_bytes(path)
    if needed > free:
        raise TargetError(f"{path}: {what} needs {format_bytes(needed)}, but {format_bytes(free)} are free", hint)


def is_full(error: OSError) -> bool:
    """Whether ``error`` says that there is no room left: no space, a quota, or a limit on a file's size."""
    return error.errno in _FULL


def full_disk(where: Path | str, error: OSError) -> TargetError:
    """What is said when a write failed for want of room."""
    return TargetError(
        f"{where}: no room left on the disk ({error.strerror})",
        "free space and give the same command again; finished work is kept, and nothing half-written has its name",
    )
