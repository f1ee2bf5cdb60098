"""Room on disk: asked for before long work begins, so that it does not end for want of it."""

from __future__ import annotations

__all__ = ["free_bytes", "require_space"]

import shutil
from pathlib import Path

from phi4edge.core.errors import TargetError
from phi4edge.core.memory import format_bytes


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
        raise TargetError(f"{path}: {what} takes {format_bytes(needed)}, and {format_bytes(free)} are free there", hint)
