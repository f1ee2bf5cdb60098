"""A program on the device whose lines are kept with the time of their arrival; nothing is parsed while it runs."""

from __future__ import annotations

__all__ = ["Watch"]

import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from phi4edge.core.errors import Phi4EdgeError
from phi4edge.measurement.power._api import Line
from phi4edge.transports._api import Device

_LIMIT_S = 6 * 3600.0  # a sampler that nobody ends is ended on the device
_MOST_LINES, _MOST_BYTES = 200_000, 4096  # a program gone wild fills no memory and takes no core


class Watch:
    """Runs from its making until :meth:`close`.

    Raises:
        Phi4EdgeError: the device refuses to start it.
    """

    def __init__(self, device: Device, argv: Sequence[str]) -> None:
        self._lines: list[Line] = []
        self._stream = device.start(argv, timeout_s=_LIMIT_S)
        self._reader = threading.Thread(target=self._read, name="power sampler", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError, ValueError):  # ValueError: closed by the other thread
            for _ in range(_MOST_LINES):
                line = self._stream.stdout.readline(_MOST_BYTES)
                if not line:
                    return
                if line.endswith(b"\n"):  # half a line tells half a number
                    self._lines.append(Line(time.monotonic(), line.decode("utf-8", errors="replace").strip()))

    def close(self) -> tuple[list[Line], str | None]:
        """End it; its lines, and what it said last where it had ended by itself."""
        last = None
        if not self._reader.is_alive():
            with suppress(Phi4EdgeError, OSError):
                last = self._stream.last_words()
            last = last or (self._lines[-1].text[:200] if self._lines else "it said nothing")
        try:
            self._stream.close()
        finally:
            self._reader.join(10)
        return self._lines, last
