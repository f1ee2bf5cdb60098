"""Servers for ssh on this machine's loopback: OpenSSH's, unprivileged, and asyncssh's in this process."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from phi4edge.transports._api import Address

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def need(*programs: str) -> None:
    """Skip the test where a program is missing."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def new_key(path: Path) -> Path:
    """A key of no passphrase, and its public half beside it."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Keys:
    """What both kinds of server need, made once."""

    folder: Path
    host: Path = field(init=False)
    user: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.host, self.user = new_key(self.folder / "host"), new_key(self.folder / "user")
        authorized = self.folder / "authorized"
        authorized.write_bytes(self.user.with_suffix(".pub").read_bytes())
        authorized.chmod(0o600)

    def known_hosts(self, path: Path, port: int, key: Path | None = None) -> Path:
        """A file by which the client knows the server, or takes another's key for its."""
        public = (key or self.host).with_suffix(".pub").read_text()
        path.write_text(f"[127.0.0.1]:{port} {public}")
        return path


@dataclass
class Server(ABC):
    """A server on the loopback, and where it is found. Its devices' folders are below ``folder``."""

    keys: Keys
    folder: Path
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)  # a server that could not start leaves it
        self.known_hosts = self.keys.known_hosts(self.folder / "known_hosts", self.port)

    @property
    def options(self) -> tuple[str, ...]:
        """What a client needs that has no configuration of its own."""
        return (
            *("-F", "/dev/null", "-i", str(self.keys.user), "-o", "IdentitiesOnly=yes"),
            *("-o", f"UserKnownHostsFile={self.known_hosts}", "-o", "GlobalKnownHostsFile=/dev/null"),
        )

    def address(self, *options: str, folder: str | None = None) -> Address:
        """The device; its folder is one that is not there yet, unless it is named."""
        place = f"127.0.0.1:{self.port}"
        return Address(place, folder or str(self.folder / "device" / "our folder"), (*options, *self.options))

    @abstractmethod
    def start(self) -> None:
        """Listen."""

    @abstractmethod
    def kill(self) -> None:
        """End the server and its connections at once, as a power cut of the network would; not what it runs."""


@dataclass
class OpenSsh(Server):
    """OpenSSH's sshd, run by the user who runs the tests."""

    settings: tuple[str, ...] = ()  # further lines of its configuration
    path: str = os.environ.get("PATH", "")  # where the device finds programs
    _process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if SSHD is None:
            pytest.skip("OpenSSH's sshd is not installed")
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where it separates privileges
        config = self.folder / "sshd_config"
        lines = (
            f"ListenAddress 127.0.0.1\nPort {self.port}\nHostKey {self.keys.host}\nPidFile none",
            f"AuthorizedKeysFile {self.keys.folder / 'authorized'}\nUsePAM no\nStrictModes no",
            "PermitRootLogin yes\nLogLevel ERROR",
            f'SetEnv "PATH={self.path}" "HOME={self.folder}"',
            *self.settings,
        )
        config.write_text("\n".join(lines) + "\n")
        log = (self.folder / "sshd.log").open("ab")
        with log:
            self._process = subprocess.Popen([SSHD, "-D", "-e", "-f", config], stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while True:
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert self._process.poll() is None, (self.folder / "sshd.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def kill(self) -> None:
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Fall silent."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After :meth:`stop`."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        """To the server and what it forked for its connections, not to what runs there."""
        assert self._process is not None
        own = psutil.Process(self._process.pid)
        for process in (own, *own.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                if process.name().startswith("sshd"):
                    process.send_signal(number)


@dataclass
class AsyncSsh(Server):
    """asyncssh's server, in a thread. It starts programs in its own group, as some small servers do."""

    shell: tuple[str, ...] = ("sh", "-c")
    _loop: asyncio.AbstractEventLoop | None = None
    _connections: list[object] = field(default_factory=list)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        asyncssh = pytest.importorskip("asyncssh", reason="asyncssh is not installed")
        self._loop = asyncio.new_event_loop()
        server, shell = self, self.shell

        class Connection(asyncssh.SSHServer):  # type: ignore[misc,name-defined]
            def connection_made(self, conn: object) -> None:
                server._connections.append(conn)

        async def run(process: asyncssh.SSHServerProcess[bytes]) -> None:  # type: ignore[name-defined]
            pipe = asyncio.subprocess.PIPE
            words = (*shell, process.command or "")
            program = await asyncio.create_subprocess_exec(
                *words, stdin=pipe, stdout=pipe, stderr=pipe, env={**os.environ, "HOME": str(self.folder)}
            )
            gone = (ConnectionError, asyncssh.Error)

            async def carry(source: Any, sink: Any) -> None:
                with suppress(*gone):
                    while data := await source.read(1 << 16):
                        sink.write(data)
                        await sink.drain()

            async def stdin() -> None:
                await carry(process.stdin, program.stdin)
                program.stdin.close()  # type: ignore[union-attr]

            feeding = asyncio.create_task(stdin())
            await asyncio.gather(carry(program.stdout, process.stdout), carry(program.stderr, process.stderr))
            code = await program.wait()
            feeding.cancel()
            with suppress(*gone):
                process.exit(code) if code >= 0 else process.exit_with_signal(signal.Signals(-code).name[3:])

        async def listen() -> None:
            self._listener = await asyncssh.listen(
                "127.0.0.1",
                self.port,
                server_host_keys=[str(self.keys.host)],
                authorized_client_keys=str(self.keys.folder / "authorized"),
                server_factory=Connection,
                process_factory=run,
                encoding=None,
            )

        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(listen(), self._loop).result(10)

    def kill(self) -> None:
        if self._loop is None:
            return

        async def end() -> None:
            self._listener.close()
            for connection in self._connections:
                connection.abort()  # type: ignore[attr-defined]
            await asyncio.sleep(0.1)
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0.05)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        assert self._thread is not None
        self._thread.join(10)
        self._loop.close()
        self._loop = None


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """A server for as long as the block lasts."""
    server.start()
    try:
        yield server
    finally:
        server.kill()
