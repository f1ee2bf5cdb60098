"""The HTTP server behind the page: one token, one visitor, files from disk, and what the page says in a queue.

    GET  /open/TOKEN     the page; the first that comes with the token gets the cookie, and the token is spent
    GET  /               the page again, for the one with the cookie
    GET  /page/…         style and scripts          GET  /wllama/…   the WebAssembly runtime
    GET  /job            what is to be measured     GET  /model/N    file N of the model; Range is understood
    POST /say/KIND, /row/C/P                        see _page_messages.py

Everything but the first needs the cookie. Paths are looked up in a table, never in a file system.
"""

from __future__ import annotations

__all__ = ["make_server"]

import json
import re
import socket
import time
from collections.abc import Mapping
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

from phi4edge.transports._page_messages import ROW, Done, Failed, Message, NonsenseError, Row, read_message
from phi4edge.transports._page_site import Piece, Site

_COOKIE = "phi4edge"
_SAY_BYTES = 256 * 1024
_QUIET_S = 60.0  # a connection that says nothing for so long is closed
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css",
    ".js": "text/javascript",
    ".wasm": "application/wasm",
}
_PAGE = ("index.html", "style.css", "main.js", "device.js", "model.js", "measure.js")

# Cross-origin isolation gives the page threads and a finer clock; nothing may come from anywhere else.
_HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'wasm-unsafe-eval' blob:; worker-src blob:; "
    "connect-src 'self' blob:; style-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "phi4edge", ""
    timeout = _QUIET_S
    site: Site  # of the class that make_server makes

    def do_GET(self) -> None:
        path = self.path.split("?", 1)[0]
        if path.startswith("/open/"):
            self._open(path.removeprefix("/open/"))
        elif not self._is_visitor():
            self._refuse()
        elif path == "/":
            self._page()
        elif path == "/job":
            self._send(json.dumps(self.site.job).encode(), "application/json")
        elif path.startswith("/page/") and (name := path.removeprefix("/page/")) in _PAGE:
            self._send(files("phi4edge.transports").joinpath("page", name).read_bytes(), _TYPES[Path(name).suffix])
        elif path.startswith("/wllama/") and (name := path.removeprefix("/wllama/")) in self.site.runtime:
            found = self.site.runtime[name]
            self._piece(Piece(b"", found, 0, found.stat().st_size), _TYPES.get(found.suffix, "text/plain"))
        elif (number := re.fullmatch(r"/model/(\d{1,5})", path)) and int(number[1]) < len(self.site.pieces):
            self._piece(self.site.pieces[int(number[1])], "application/octet-stream")
        else:
            self._say(HTTPStatus.NOT_FOUND, "There is nothing here.")

    do_HEAD = do_GET  # noqa: N815  the name that the library asks for

    def do_POST(self) -> None:
        path = self.path.split("?", 1)[0]
        length = self.headers.get("Content-Length", "")
        row = ROW.fullmatch(path)
        most = self.site.row_bytes if row else _SAY_BYTES
        if not self._is_visitor():
            self._refuse()
        elif self.site.closed:
            self._say(HTTPStatus.GONE, "The measurement has ended.")
        elif not re.fullmatch(r"\d{1,12}", length) or int(length) > most:
            self._bad(f"a body of {length or 'unknown'} bytes; at most {most} are taken")
        else:
            body = self.rfile.read(int(length))
            try:
                if row:
                    if len(body) != self.site.row_bytes:
                        raise NonsenseError(f"a row of {len(body)} bytes, not {self.site.row_bytes}")
                    message: Message = Row(int(row[1]), int(row[2]), body)
                else:
                    message = read_message(path.removeprefix("/say/"), body)
            except NonsenseError as error:
                self._bad(str(error))
                return
            last = isinstance(message, Done | Failed)
            if last:  # after which nobody may be here to answer
                self._say(HTTPStatus.NO_CONTENT, "")
            self.site.put(message)
            if not last:
                self._say(HTTPStatus.NO_CONTENT, "")

    # --- who it is ----------------------------------------------------------------------------------------------

    def _open(self, token: str) -> None:
        # A preview, such as a messenger's or a browser's own, is not the visitor.
        ahead = self.headers.get("Sec-Purpose", "") + self.headers.get("Purpose", "")
        if self.command != "GET" or "prefetch" in ahead or "preview" in ahead:
            self._say(HTTPStatus.SERVICE_UNAVAILABLE, "Open the page itself.")
        elif cookie := self.site.admit(token):
            self.site.heard = time.monotonic()
            flags = "; Secure" if self.site.secure else ""
            self._page({"Set-Cookie": f"{self._cookie_name}={cookie}; Path=/; HttpOnly; SameSite=Lax{flags}"})
        elif self._is_visitor():
            self._page()
        else:
            self._refuse()

    @property
    def _cookie_name(self) -> str:
        """Cookies know hosts, not ports: of two measurements beside each other each has its own."""
        return f"{_COOKIE}-{self.server.server_address[1]}"  # type: ignore[index]  # a pair, or four of IPv6

    def _is_visitor(self) -> bool:
        try:
            morsel = SimpleCookie(self.headers.get("Cookie", "")).get(self._cookie_name)
        except CookieError:
            return False
        if morsel is None or not self.site.knows(morsel.value):
            return False
        self.site.heard = time.monotonic()
        return True

    def _refuse(self) -> None:
        self.close_connection = True  # a body that was not read would be taken for the next request
        self._say(HTTPStatus.FORBIDDEN, "This link is not valid, or another device has opened it already.")

    def _bad(self, reason: str) -> None:
        self.close_connection = True
        self.site.put(Failed(f"the page sent what cannot be: {reason}"))
        self._say(HTTPStatus.BAD_REQUEST, reason)

    # --- answers ------------------------------------------------------------------------------------------------

    def _page(self, headers: Mapping[str, str] | None = None) -> None:
        data = files("phi4edge.transports").joinpath("page", "index.html").read_bytes()
        self._send(data, _TYPES[".html"], headers=headers)

    def _say(self, status: HTTPStatus, text: str) -> None:
        self._send(text.encode(), "text/plain; charset=utf-8", status)

    def _send(
        self,
        data: bytes,
        kind: str,
        status: HTTPStatus = HTTPStatus.OK,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._head(status, kind, len(data), headers)
        if self.command != "HEAD":
            self.wfile.write(data)

    def _piece(self, piece: Piece, kind: str) -> None:
        size, asked = piece.size, self.headers.get("Range")
        start, stop, status = 0, size, HTTPStatus.OK
        match = _RANGE.fullmatch(asked) if asked else None
        if match and (match[1] or match[2]):
            if match[1]:
                start, stop = int(match[1]), min(int(match[2]) + 1, size) if match[2] else size
            else:
                start = max(size - int(match[2]), 0)
            status = HTTPStatus.PARTIAL_CONTENT
            if start >= stop:
                headers = {"Content-Range": f"bytes */{size}"}
                self._send(b"", kind, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, headers)
                return
        headers = {"Accept-Ranges": "bytes"}
        if status == HTTPStatus.PARTIAL_CONTENT:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._head(status, kind, stop - start, headers)
        if self.command == "HEAD":
            return
        for data in piece.read(start, stop):
            self.wfile.write(data)
            self.site.heard = time.monotonic()

    def _head(self, status: HTTPStatus, kind: str, length: int, headers: Mapping[str, str] | None) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(length), **(headers or {})}.items():
            if not (status == HTTPStatus.NO_CONTENT and name.startswith("Content-")):
                self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what happens is told by the messages."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A visitor that vanishes is noticed by its silence; its broken connection is no defect of ours."""


class _Server6(_Server):
    address_family = socket.AF_INET6


def make_server(host: str, port: int, site: Site) -> ThreadingHTTPServer:
    """A server of ``site``, listening, not yet serving.

    Raises:
        OSError: the address is not this machine's, or the port is taken.
    """

    class Handler(_Handler):
        pass

    Handler.site = site
    return (_Server6 if ":" in host else _Server)((host, port), Handler)
