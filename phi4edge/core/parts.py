"""Where the seconds of a stage go: exclusive wall times of named parts."""

from __future__ import annotations

__all__ = ["PartTimes"]

import time
from collections.abc import Iterator
from contextlib import contextmanager


class PartTimes:
    """Seconds by part; a part that begins inside another stops the clock of that one until it ends."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Everything inside counts as ``name``."""
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def take(self) -> dict[str, float]:
        """Seconds of every part since the last call; call it outside all parts."""
        assert not self._running
        taken, self._seconds = self._seconds, {}
        return taken

    def _switch(self) -> None:
        now = time.monotonic()
        if self._running:
            name = self._running[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now
