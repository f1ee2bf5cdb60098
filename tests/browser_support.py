"""A real Chromium without a window, and a client of the page's server that does what no page would."""

from __future__ import annotations

import http.client
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from phi4edge.core.errors import MissingToolError
from phi4edge.transports import _wllama

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--ignore-certificate-errors",
    "--disable-dev-shm-usage", "--host-resolver-rules=MAP phone.test 127.0.0.1", "--remote-debugging-port=0",
)  # fmt: skip


def wllama_or_skip() -> None:
    """The WebAssembly runtime is in the user's cache, fetched now where it is not; or the test is skipped."""
    try:
        _wllama.installed()
    except MissingToolError:
        try:
            _wllama.fetch()
        except MissingToolError as error:
            pytest.skip(f"{_wllama.PACKAGE} is not here and cannot be fetched: {error.message}")


class Visitor:
    """Takes the announcement and opens the link, as ``chromium`` or by hand."""

    def __init__(self) -> None:
        self.link, self.notes, self._known = "", list[str](), threading.Event()

    def announce(self, link: str, notes: Sequence[str]) -> None:
        """What the product calls."""
        self.link, self.notes = link, list(notes)
        self._known.set()

    def wait(self) -> str:
        """The link, when there is one."""
        assert self._known.wait(60), "no link was announced"
        return self.link


@contextmanager
def chromium(visitor: Visitor, folder: Path, *, host: str | None = None) -> Iterator[None]:
    """A browser of its own profile that opens the visitor's link as soon as there is one, under ``host``."""
    program = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no Chromium is installed ({', '.join(_NAMES)})")
    running: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        link = visitor.wait()
        if host:
            link = link.replace("127.0.0.1", host)
        with (folder / "chromium.log").open("wb") as log:
            command = [program, *_FLAGS, f"--user-data-dir={folder / 'profile'}", link]
            running.append(subprocess.Popen(command, stdout=log, stderr=log))

    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join(60)
        for process in running:
            process.terminate()
            process.wait(20)


class Client:
    """HTTP requests to the server behind ``link``, with whatever cookie it was given."""

    def __init__(self, link: str) -> None:
        self.url = urlsplit(link)
        self.cookie = ""

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, bytes]:
        """Status, headers and body of the answer; ``path`` is sent as it is."""
        connection = http.client.HTTPConnection(str(self.url.hostname), self.url.port, timeout=20)
        try:
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            if self.cookie:
                sent["Cookie"] = self.cookie
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def open(self) -> int:
        """Open the link, and keep the cookie."""
        status, headers, _ = self.ask("GET", self.url.path)
        self.cookie = headers.get("Set-Cookie", "").split(";")[0]
        return status


@contextmanager
def acting(visitor: Visitor, act: Callable[[Client], None]) -> Iterator[None]:
    """Run ``act`` with a client of the visitor's link beside the block; its failure is the test's."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            act(Client(visitor.wait()))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join(30)
    assert not thread.is_alive()
    if failed:
        raise failed[0]


def until(true: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for something."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
