"""rsync, over an ssh that is told to it: one file, its bytes counted, its complaints read."""

from __future__ import annotations

__all__ = ["FULL_DISK", "STALL_S", "Connected", "carry"]

import os
import re
import subprocess
import tempfile
from typing import BinaryIO, Protocol

from phi4edge.core.errors import TargetError
from phi4edge.core.events import Progress
from phi4edge.transports._api import Device, Finished

STALL_S = 120.0  # a transfer that has not moved for so long is over
FULL_DISK = re.compile("No space left|[Qq]uota exceeded|File too large")
_LOST = (10, 12, 30, 35, 255)  # rsync's exit status where the other side is gone


class Connected(Device, Protocol):
    """A device whose connection may be lost."""

    def lost(self, when: str, stderr: bytes = b"") -> TargetError:
        """The error of a connection that was lost."""
        ...


def carry(device: Connected, shell: str, paths: list[str], done: int, size: int, progress: Progress) -> None:
    """Carry one file; a partial file is gone on from, and an older one of that name is looked at for what it shares."""
    how = ["--append"] if done else ["--inplace", "--fuzzy"]
    words = ["rsync", "-s", "-e", shell, *how, f"--timeout={STALL_S:.0f}", "--info=progress2", "--no-human-readable"]
    said: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115
    with (
        said,
        subprocess.Popen(
            [*words, "--outbuf=N", "--", *paths],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            seen, rest = done, b""
            while piece := os.read(process.stdout.fileno(), 4096):
                *lines, rest = re.split(rb"[\r\n]", rest + piece)
                for count in (int(told[0]) for line in lines if (told := line.split()) and told[0].isdigit()):
                    if seen < (now := done + count) <= size:
                        progress.advance(now - seen)
                        seen = now
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        said.seek(0)
        stderr = said.read()
    cause = next((line for line in stderr.decode(errors="replace").splitlines() if FULL_DISK.search(line)), "")
    if code in _LOST and not cause:
        raise device.lost("while a file was carried", stderr)
    if code:
        raise TargetError(f"{device.name}: {cause or Finished(code, b'', stderr).last_words or f'rsync: {code}'}")
    progress.advance(size - seen)
