"""What the page's server has to give, who it gives it to, and what it was told."""

from __future__ import annotations

__all__ = ["Piece", "Site"]

import hmac
import queue
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phi4edge.transports._page_messages import Message

_SLICE = 1 << 20  # bytes read and sent at a time


@dataclass(frozen=True)
class Piece:
    """A file of the model as the page sees it: ``head``, then ``nbytes`` of ``path`` from ``offset`` on."""

    head: bytes
    path: Path
    offset: int
    nbytes: int

    @property
    def size(self) -> int:
        """Bytes of the whole."""
        return len(self.head) + self.nbytes

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Bytes ``start`` to ``stop`` (exclusive) in slices; a slice is all that is in memory."""
        if start < len(self.head):
            yield self.head[start:stop]
            start = len(self.head)
        with self.path.open("rb") as file:
            file.seek(self.offset + start - len(self.head))
            while start < stop:
                data = file.read(min(_SLICE, stop - start))
                if not data:
                    raise OSError(f"{self.path}: became shorter while it was sent")
                start += len(data)
                yield data


@dataclass
class Site:
    """What is served, and what the visitor said; shared by the server's threads."""

    pieces: tuple[Piece, ...]
    job: Mapping[str, Any]  # for the page, as JSON
    runtime: Mapping[str, Path]  # name → file of the WebAssembly runtime
    row_bytes: int  # of one row of probabilities
    secure: bool = False
    token: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    messages: queue.Queue[Message] = field(default_factory=lambda: queue.Queue(maxsize=64))
    heard: float = field(default_factory=time.monotonic)  # when the visitor was last heard of
    closed: bool = False  # nothing more is wanted
    _cookie: str | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def admit(self, token: str) -> str | None:
        """The cookie for who comes with ``token`` first; None for everybody else."""
        with self._lock:
            if self._cookie is not None or not hmac.compare_digest(token.encode(), self.token.encode()):
                return None
            self._cookie = secrets.token_urlsafe(32)
            return self._cookie

    def knows(self, cookie: str) -> bool:
        """Whether ``cookie`` is the visitor's."""
        return self._cookie is not None and hmac.compare_digest(cookie.encode(), self._cookie.encode())

    @property
    def visited(self) -> bool:
        """Whether the token is spent."""
        return self._cookie is not None

    def put(self, message: Message) -> None:
        """Hand a message on; waits while the other side is behind, and gives up when it has stopped."""
        while not self.closed:
            try:
                self.messages.put(message, timeout=0.5)
                return
            except queue.Full:
                self.heard = time.monotonic()  # it is we who are slow
