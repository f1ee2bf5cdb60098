"""How adb carries files: a push by ``cat`` on the device, a pull by ``adb pull``.

``adb push`` begins anew whenever it is interrupted, which for 8 GB over USB 2 is minutes; ``cat`` goes on. A pull
begins anew.
"""

from __future__ import annotations

__all__ = ["AdbCarrier"]

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from phi4edge.core.errors import TargetError
from phi4edge.core.events import Progress
from phi4edge.core.hashing import sha256_bytes
from phi4edge.core.memory import format_bytes
from phi4edge.transports._adb_client import last_line
from phi4edge.transports._files import STALLED_S, RefusedError, append
from phi4edge.transports._parcel import Parcel
from phi4edge.transports._posix import PosixDevice


class AdbCarrier:
    """See :class:`phi4edge.transports._files.Carrier`.

    Args:
        device: the device.
        adb: starts the client with arguments for this device; what it says is one pipe.
        resumes_push: False: by ``adb push``, for a device whose shell takes no stdin.
    """

    resumes_pull = False
    must_hash = False  # before Android 7 there may be no sha256sum

    def __init__(self, device: PosixDevice, adb: Callable[..., subprocess.Popen[bytes]], *, resumes_push: bool) -> None:
        self._device, self._adb, self.resumes_push = device, adb, resumes_push

    def versions(self, name: str) -> str:
        """See :class:`phi4edge.transports._files.Carrier`; plain characters, which ``adb push`` takes everywhere."""
        return f".{sha256_bytes(os.fsencode(name))[:8]}-"

    def send(self, parcel: Parcel, done: int, progress: Progress) -> None:
        """See :class:`phi4edge.transports._files.Carrier`."""
        if self.resumes_push:
            append(self._device, parcel, done, progress, STALLED_S)
        else:
            self._call(("push", str(parcel.local), str(parcel.partial)), f"push {parcel.target}")
            progress.advance(parcel.size)

    def fetch(self, source: PurePosixPath, partial: Path, done: int, size: int, progress: Progress) -> None:
        """See :class:`phi4edge.transports._files.Carrier`; the whole file."""
        have = 0

        def look() -> None:
            nonlocal have
            if partial.is_file():
                now = partial.stat().st_size
                progress.advance(max(0, now - have))
                have = max(have, now)

        self._call(("pull", str(source), str(partial)), f"pull {source}", look)

    def no_room(self, parcel: Parcel, needed: int, free: int | None, said: str | None) -> TargetError:
        """See :class:`phi4edge.transports._files.Carrier`."""
        room = "an unknown number free" if free is None else f"{free} free ({format_bytes(free)})"
        return TargetError(
            f"{self._device.name}: {parcel.target.parent} has no room for {parcel.target.name}: "
            f"{needed} bytes needed ({format_bytes(needed)}), {room}",
            "make room on the device; what was sent is kept, and gone on from",
        )

    def _call(self, arguments: tuple[str, ...], what: str, look: Callable[[], None] = lambda: None) -> None:
        """Run the client to its end."""
        process = self._adb(*arguments)
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
            raise RefusedError(f"{self._device.name}: {what}: {last_line(said).removeprefix('adb: error: ')}")
