"""A phone or laptop that opens a page: nothing is installed there, and nothing is reached from here.

The page is served from this machine behind a link that works once. It fetches the GGUF, runs it in WebAssembly, and
says what it measured; :class:`Visit` hands that on. A browser has no shell and no folder, so it is no
:class:`phi4edge.transports._api.Device`, and this module offers an interface of its own.
"""

from __future__ import annotations

__all__ = ["DESCRIPTION", "TOOLS", "Piece", "Place", "Visit", "open", "runtime_version"]

import queue
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from phi4edge.core.errors import MissingToolError, TargetError, UsageError
from phi4edge.transports._api import Address
from phi4edge.transports._certificate import certify
from phi4edge.transports._page_messages import Done, Failed, Gone, Message
from phi4edge.transports._page_server import make_server
from phi4edge.transports._page_site import Piece, Site
from phi4edge.transports._wllama import NAME, VERSION, installed

DESCRIPTION = "a page that a phone or laptop opens in its browser"
TOOLS: tuple[str, ...] = ()  # programs that the transport needs on this side
_BACK_S = 15.0  # a page that was closed may be loaded anew within
_TEST_ADDRESS = "192.0.2.1"  # of RFC 5737: nobody's; the system says which of our addresses would speak to it


@dataclass(frozen=True)
class Place:
    """Where the page is served, and how long it is waited for."""

    host: str = "127.0.0.1"  # 0.0.0.0: every address of this machine, so that a phone reaches it
    port: int = 0  # 0: a free one
    tls: bool = False  # https, with a certificate of our own
    wait_s: float = 600.0  # until somebody opens the link
    idle_s: float = 120.0  # without a sign of life from the page
    limit_s: float = 4 * 3600.0  # for everything, from the opening on

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port {self.port} is not between 0 and 65535")
        try:
            ip_address(self.host)
        except ValueError:
            raise UsageError(
                f"--host {self.host!r} is not an address of this machine", "127.0.0.1, or 0.0.0.0 for a phone"
            ) from None

    @property
    def local(self) -> bool:
        """Whether only this machine reaches it."""
        return ip_address(self.host).is_loopback


def open(address: Address) -> NoReturn:
    """Nobody can connect to a browser.

    Raises:
        UsageError: always.
    """
    raise UsageError("a browser cannot be connected to: it opens a link", "bench or drift --transport browser shows it")


def runtime_version() -> tuple[str, str]:
    """Name and version of the runtime in the page."""
    return NAME, VERSION


class Visit:
    """One page, served to one visitor. Use as a context manager, and read :meth:`messages`.

    ``job`` goes to the page as it is. ``announce`` gets the link and what to know of it, line by line, when the server
    listens. ``vocab`` is the model's, tokens.
    """

    def __init__(
        self,
        place: Place,
        pieces: Sequence[Piece],
        job: Mapping[str, Any],
        vocab: int,
        announce: Callable[[str, Sequence[str]], None],
    ) -> None:
        """Check what is needed; nothing is served yet.

        Raises:
            MissingToolError: the WebAssembly runtime is not here.
        """
        document = {**job, "files": [piece.size for piece in pieces]}
        self._site = Site(tuple(pieces), document, installed(), 4 * vocab, place.tls)
        self._place, self._announce, self._left = place, announce, ExitStack()

    def __enter__(self) -> Self:
        """Listen, and announce the link.

        Raises:
            UsageError: the address is not this machine's, or the port is taken.
            MissingToolError: no certificate can be made.
        """
        place = self._place
        try:
            server = make_server(place.host, place.port, self._site)
        except (OSError, OverflowError) as error:
            raise UsageError(f"{place.host}:{place.port}: {error}", "another --host or --port") from error
        with ExitStack() as stack:
            stack.callback(server.server_close)
            names, notes = _addresses(place.host), list[str]()
            if place.tls:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="phi4edge-tls-"))
                context, digest = certify(Path(folder), [*names, "localhost"])
                server.socket = context.wrap_socket(
                    server.socket,
                    server_side=True,
                    do_handshake_on_connect=False,  # in the visitor's own thread
                )
                notes = [
                    "The device will say that the connection is not private, since nobody vouches for our certificate.",
                    "Safari: Show Details, then visit this website. Chrome: Advanced, then Proceed.",
                    f"Its SHA-256 fingerprint, if you want to compare: {digest}",
                ]
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
            thread.start()
            stack.callback(server.shutdown)
            stack.callback(setattr, self._site, "closed", True)
            self._left = stack.pop_all()
        port = server.server_address[1]
        scheme = "https" if place.tls else "http"
        links = [f"{scheme}://{_bracketed(name)}:{port}/open/{self._site.token}" for name in names]
        self._announce(links[0], [*_notes(place, links[1:]), *notes])
        return self

    def messages(self) -> Iterator[Message]:
        """What the page says, in order, :class:`Done` last; with each :class:`Hello` everything begins anew.

        Raises:
            MissingToolError: nobody opened the link in time.
            TargetError: the page failed, was closed, fell silent, sent nonsense, or took too long.
        """
        self._await_visitor()
        began, site, place = time.monotonic(), self._site, self._place
        gone: float | None = None
        while True:
            try:
                message = site.messages.get(timeout=0.2)
            except queue.Empty:
                now = time.monotonic()
                if gone is not None and now - gone > _BACK_S:
                    raise TargetError("the page was closed", "leave it open until it says that it is done") from None
                if now - site.heard > place.idle_s:
                    raise TargetError(
                        f"the page has not been heard of for {place.idle_s:.0f} s",
                        "keep the device awake, on the same network, and the page in front",
                    ) from None
                if now - began > place.limit_s:
                    raise TargetError(
                        f"the page was not done within {place.limit_s:.0f} s",
                        "ask for less, or --page-limit SECONDS",
                    ) from None
                continue
            if isinstance(message, Failed):
                raise TargetError(f"in the browser: {message.message}")
            if isinstance(message, Gone):
                gone = time.monotonic()
                continue
            gone = None
            yield message
            if isinstance(message, Done):
                return

    def _await_visitor(self) -> None:
        end = time.monotonic() + self._place.wait_s
        while not self._site.visited:
            if time.monotonic() > end:
                raise MissingToolError(
                    f"nobody opened the link within {self._place.wait_s:.0f} s",
                    "is the device on the same network, and is the port open? --page-wait SECONDS waits longer",
                )
            time.sleep(0.05)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop serving."""
        self._left.close()


def _addresses(host: str) -> list[str]:
    """Under which addresses ``host`` is reached, the likeliest first."""
    if not ip_address(host).is_unspecified:
        return [host]
    import psutil

    family = socket.AF_INET6 if ip_address(host).version == 6 else socket.AF_INET
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = [
        a.address for name, each in psutil.net_if_addrs().items() if name in up for a in each if a.family == family
    ]
    usable = [a for a in found if not ip_address(a.split("%")[0]).is_loopback and "%" not in a]
    first = _speaking()
    if first in usable:
        usable = [first, *(a for a in usable if a != first)]
    return usable or ["::1" if family == socket.AF_INET6 else "127.0.0.1"]


def _speaking() -> str | None:
    """The address from which this machine speaks to others; nothing is sent to find out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((_TEST_ADDRESS, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _notes(place: Place, others: Sequence[str]) -> list[str]:
    notes = ["The first who opens it is measured, and nobody else gets in."]
    if place.local:
        notes.append("Only this machine reaches it; for a phone: --host 0.0.0.0")
    elif not place.tls:
        notes.append("Without --tls a browser gives the page one thread only, and the measured speed is of that one.")
    if others:
        notes.append(f"Where that address does not answer: {', '.join(others)}")
    return notes
