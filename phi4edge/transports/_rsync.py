"""rsync, over an ssh that is told to it: one file, its bytes counted, its complaints read."""

from __future__ import annotations

__all__ = ["carry"]

import os
import re
import subprocess
import tempfile
from typing import BinaryIO

from phi4edge.core.events import Progress
from phi4edge.transports._api import Finished
from phi4edge.transports._files import FULL_DISK, RefusedError
from phi4edge.transports._posix import PosixDevice

_STALLED_S = 120.0  # a transfer that has not moved for so long is over; longer than cat's: it reads files meanwhile
_LOST = (10, 12, 30, 35, 255)  # rsync's exit status where the other side is gone
_FILE = 11  # an error of a file, which the other side names; its words can be lost as both ends close


def carry(device: PosixDevice, shell: str, paths: list[str], done: int, size: int, progress: Progress) -> None:
    """Carry one file; a partial file is gone on from, and an older one of that name is looked at for what it shares.

    Raises:
        RefusedError: either side's rsync ended with an error.
        TargetError: the connection was lost.
    """
    code, stderr, seen = _run(shell, paths, done, size, progress)
    if code == _FILE and not stderr.strip():  # the same again, to hear what it was
        code, stderr, seen = _run(shell, paths, seen, size, progress)
    cause = next((line for line in stderr.decode(errors="replace").splitlines() if FULL_DISK.search(line)), "")
    if code in _LOST and not cause:
        raise device.lost("while a file was carried", stderr)
    if code:
        raise RefusedError(f"{device.name}: {cause or Finished(code, b'', stderr).last_words or f'rsync: {code}'}")
    progress.advance(size - seen)


def _run(shell: str, paths: list[str], done: int, size: int, progress: Progress) -> tuple[int, bytes, int]:
    """rsync once: its exit status, what it said, and how many bytes of the file are there by its own count."""
    how = ["--append"] if done else ["--inplace", "--fuzzy"]
    words = [
        "rsync",
        "-sL",
        "-e",
        shell,
        *how,
        f"--timeout={_STALLED_S:.0f}",
        "--info=progress2",
        "--no-human-readable",
    ]
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
        return code, said.read(), seen
