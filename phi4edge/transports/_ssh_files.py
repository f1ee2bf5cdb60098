"""How ssh carries files: by rsync where both sides have it, else by ``cat`` and ``tail`` on the device.

rsync spares what an older file of that name shares with the new one. The others ask for nothing that a small server
lacks, such as sftp. All go on from where an interrupted attempt stopped.
"""

from __future__ import annotations

__all__ = ["SshCarrier"]

import os
import select
from pathlib import Path, PurePosixPath

from phi4edge.core.errors import TargetError
from phi4edge.core.events import Progress
from phi4edge.transports._files import STALLED_S, RefusedError, append
from phi4edge.transports._parcel import Parcel, partial_name
from phi4edge.transports._posix import PosixDevice
from phi4edge.transports._rsync import carry

_DAY_S = 86400.0
_PIECE = 1 << 20  # bytes


class SshCarrier:
    """See :class:`phi4edge.transports._files.Carrier`."""

    resumes_push = True
    resumes_pull = True
    must_hash = True

    def __init__(self, device: PosixDevice, rsync_shell: str | None) -> None:
        """``rsync_shell`` is what rsync's ``-e`` takes, None where a side has no rsync."""
        self._device, self._rsync_shell = device, rsync_shell

    def versions(self, name: str) -> str:
        """See :class:`phi4edge.transports._files.Carrier`; like the final name, by which rsync finds what to share."""
        return partial_name(name)

    def send(self, parcel: Parcel, done: int, progress: Progress) -> None:
        """See :class:`phi4edge.transports._files.Carrier`."""
        if self._rsync_shell is None:
            append(self._device, parcel, done, progress, STALLED_S)
        else:
            paths = [str(parcel.local.resolve()), f"device:{parcel.partial}"]
            carry(self._device, self._rsync_shell, paths, done, parcel.size, progress)

    def fetch(self, source: PurePosixPath, partial: Path, done: int, size: int, progress: Progress) -> None:
        """See :class:`phi4edge.transports._files.Carrier`."""
        if self._rsync_shell is None:
            self._drain(source, partial, done, progress)
        else:
            paths = [f"device:{source}", str(partial.absolute())]
            carry(self._device, self._rsync_shell, paths, done, size, progress)

    def no_room(self, parcel: Parcel, needed: int, free: int | None, said: str | None) -> TargetError:
        """See :class:`phi4edge.transports._files.Carrier`."""
        room = "an unknown number of" if free is None else str(free)
        more, why = (" more", f" ({said})") if said else ("", "")
        return TargetError(
            f"{self._device.name}: {parcel.target} needs {needed} bytes{more}, {room} are free there{why}",
            "free some space on the device, or name a folder on another disk of it; the file then goes on from there",
        )

    def _drain(self, source: PurePosixPath, partial: Path, done: int, progress: Progress) -> None:
        """Append what is missing of ``source`` to the partial file."""
        name = self._device.name
        stream = self._device.start(["tail", "-c", f"+{done + 1}", str(source)], timeout_s=_DAY_S)
        try:
            with partial.open("ab") as file:
                descriptor = stream.stdout.fileno()
                while True:
                    if not select.select([descriptor], [], [], STALLED_S)[0]:
                        raise TargetError(f"{name}: {source}: sent no byte for {STALLED_S:g} s")
                    piece = os.read(descriptor, _PIECE)
                    if not piece:
                        break
                    file.write(piece)
                    progress.advance(len(piece))
            if code := stream.wait(STALLED_S):
                raise RefusedError(f"{name}: {source}: {stream.last_words() or f'tail ended with {code}'}")
        finally:
            stream.close()
