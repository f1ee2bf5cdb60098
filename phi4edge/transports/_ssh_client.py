"""OpenSSH's client: its command line, its one connection, and what its complaints mean."""

from __future__ import annotations

__all__ = ["Client", "Keeper", "explain"]

import os
import re
import select
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from phi4edge.core.errors import MissingToolError, Phi4EdgeError, TargetError, UsageError
from phi4edge.transports._api import Address, Finished
from phi4edge.transports._shell import keeper_line, word_of_its_own

_OPEN_S = 60.0  # to connect, be let in, and have a shell
_ANSWER_S = 10.0
_SOCKET_ROOM = 70  # bytes; a socket's path has 104 on some systems, and ssh adds 17 to it while it makes it

# ssh takes the first value that it is told, so these come before what the user says …
_FIXED = (
    *("-T", "-o", "BatchMode=yes", "-o", "RemoteCommand=none", "-o", "ClearAllForwardings=yes"),
    *("-o", "PermitLocalCommand=no", "-o", "LogLevel=INFO"),
)
# … and these after it.
_USUAL = ("-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")


class Client:
    """How this device is spoken to: an ssh command line, and a private folder for the connection's socket."""

    def __init__(self, address: Address) -> None:
        if shutil.which("ssh") is None:
            raise MissingToolError("ssh: not found", "install OpenSSH's client (openssh-client, openssh-clients)")
        self._host, port = _host_and_port(address.place)
        self.place = address.place or ""
        root = tempfile.gettempdir()
        self._folder = Path(tempfile.mkdtemp(prefix="p4e-", dir=root if len(root) < _SOCKET_ROOM else "/tmp"))
        socket = str(self._folder / "s").replace("%", "%%")
        self._words = ["ssh", *_FIXED, *address.options, *port, *_USUAL, "-o", f"ControlPath={socket}"]

    def popen(self, line: str, stderr: int | BinaryIO, *, master: bool = False) -> subprocess.Popen[bytes]:
        """Start ``line`` in the login shell of the device, with pipes; ``master``: its connection serves the others.

        It is in a session of its own: Ctrl-C is ours to act upon, and must not cut the connection first.
        """
        how = ["-o", f"ControlMaster={'yes' if master else 'no'}", "-o", "ControlPersist=no"]
        words = [*self._words, *how, "--", self._host, line]
        return subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True
        )

    @property
    def rsync_shell(self) -> str | None:
        """What rsync's ``-e`` takes, whatever host it then names; None where no rsync here can do it."""
        if not _knows_progress():
            return None
        script = self._folder / "rsh"
        if not script.exists():  # rsync splits at spaces: words of the user's would not survive
            words = [*self._words, "-o", "ControlMaster=no", "-o", "ControlPersist=no", "--", self._host]
            script.write_bytes(os.fsencode(f'shift\nexec {shlex.join(words)} "$@"\n'))
        return f"sh {script}"

    def close(self) -> None:
        """Remove the socket's folder."""
        shutil.rmtree(self._folder, ignore_errors=True)


class Keeper:
    """The script that keeps watch on the device, and the facts that it told: see ``_shell``."""

    def __init__(self, client: Client, folder: str | None) -> None:
        self.word, self._client, self._lock = word_of_its_own(), client, threading.Lock()
        self._said: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = client.popen(keeper_line(self.word, folder), self._said, master=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._heard, self._buffer = self._process.stdout, b""
        try:
            facts = self._facts(folder)
        except BaseException:
            self.close()
            raise
        self.folder = facts["folder"]
        self.rsync = "rsync" in facts and "noise" not in facts  # rsync takes a login shell's words for its peer's

    def kill(self, word: str) -> None:
        """End the program of that word on the device; where the connection is lost, the device does so by itself."""
        with self._lock, suppress(BrokenPipeError, TimeoutError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(f"kill {word}\n".encode())
            self._process.stdin.flush()
            deadline = time.monotonic() + _ANSWER_S
            while (line := self._line(deadline)) is not None and line != f"{self.word} killed {word}":
                pass

    def close(self) -> None:
        """End all there, and the connection."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_ANSWER_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._heard.close()
        self._said.close()

    def _facts(self, folder: str | None) -> dict[str, str]:
        facts: dict[str, str] = {}
        deadline = time.monotonic() + _OPEN_S
        while "ready" not in facts:
            try:
                line = self._line(deadline)
            except TimeoutError as error:
                raise MissingToolError(
                    f"{self._client.place}: has not let us in within {_OPEN_S:g} s",
                    "does `ssh` to it come to a prompt? a key to be touched, or a slow login shell, may hold it up",
                ) from error
            if line is None:
                self._process.wait()
                self._said.seek(0)
                raise explain(self._client.place, self._said.read())
            word, key, value = [*line.split(" ", 2), "", ""][:3]
            facts.update({key: value} if word == self.word else {"noise": line})
            if "refused" in facts:
                self._process.wait()
                self._said.seek(0)
                words = Finished(1, b"", self._said.read()).last_words
                raise TargetError(
                    f"{self._client.place}: the folder {folder or '~/.cache/phi4edge'} cannot be made: {words}",
                    "name another folder on the device",
                )
        if "groups" not in facts:
            raise MissingToolError(
                f"{self._client.place}: has no `setsid`, without which a program's children could be left running",
                "install it on the device: util-linux or busybox has it",
            )
        return facts

    def _line(self, deadline: float) -> str | None:
        """The keeper's next line; None where it has ended."""
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._heard], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            piece = os.read(self._heard.fileno(), 4096)
            if not piece:
                return None
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return os.fsdecode(line)


@cache
def _knows_progress() -> bool:
    """Whether the rsync here is 3.1 or newer, and none of those that call themselves so; no rsync does not."""
    try:
        said = subprocess.run(["rsync", "--version"], capture_output=True, text=True, check=False, errors="replace")
    except OSError:
        return False
    version = re.match(r"rsync\s+version (\d+)\.(\d+)", said.stdout)
    return version is not None and (int(version[1]), int(version[2])) >= (3, 1)


def _host_and_port(place: str | None) -> tuple[str, list[str]]:
    """The host as ssh takes it, and the words for the port."""
    if not place:
        raise UsageError("ssh: no device is named", "name a host of your ssh configuration, or user@host[:port]")
    host, port = place, ""
    if url := re.fullmatch(r"ssh://([^/]+)/?", place):
        host = unquote(url[1])
    if bracketed := re.fullmatch(r"((?:.*@)?)\[([^]]+)\](?::(\d+))?", host):
        host, port = bracketed[1] + bracketed[2], bracketed[3] or ""
    elif host.count(":") == 1:
        host, _, port = host.partition(":")
        if not port.isdecimal():
            raise UsageError(f"ssh: {place}: {port!r} is not a port", "write user@host:port")
    if host.startswith("-") or not host.rpartition("@")[2] or "://" in host or any(c.isspace() for c in host):
        raise UsageError(f"ssh: {place!r} is not a host", "name a host of your ssh configuration, or user@host[:port]")
    return host, ["-p", port] if port else []


def explain(place: str, stderr: bytes) -> Phi4EdgeError:
    """The error of an ssh that did not get in, from what it said."""
    said = stderr.decode(errors="replace")
    words = Finished(255, b"", stderr).last_words
    if "IDENTIFICATION HAS CHANGED" in said:
        where = re.search(r"^Offending \S+ key in (.+):(\d+)\s*$", said, re.M)
        line = f"line {where[2]} of {where[1]}" if where else "your known_hosts file"
        remove = re.search(r"^\s*(ssh-keygen .*-R .+?)\s*$", said, re.M)
        return MissingToolError(
            f"{place}: its host key is not the one of {line}",
            "if the device was set up anew, compare the new key with it and remove the old one "
            f"({f'`{remove[1]}`' if remove else 'that line'}); else someone may be between you and it",
        )
    for pattern, what, hint in _COMPLAINTS:
        if re.search(pattern, said):
            return MissingToolError(f"{place}: {what} ({words})", hint.format(place=place))
    if wrong := re.search(f"^.*(?:{_MISUSE}).*$", said, re.MULTILINE):
        return UsageError(f"ssh refuses its options: {wrong[0].strip()}", "see `man ssh` and `man ssh_config`")
    if not words:
        return MissingToolError(f"{place}: lets us in, but has no POSIX shell", "is its login shell a common one?")
    return MissingToolError(f"{place}: runs no program for us: {words}", "does `ssh` to it give you a shell?")


_MISUSE = (
    "[Bb]ad configuration option|(?:unknown|illegal|unsupported) option|[Cc]an't open user config|Bad port"
    "|extra arguments at end of line|[Mm]issing argument"
)

_COMPLAINTS = (
    (
        "Could not resolve hostname|Name or service not known",
        "no such host",
        "check the name: it is a host of your ssh configuration, user@host, or an address",
    ),
    (
        "Host key verification failed|No .* host key is known",
        "its host key is not known here",
        "run `ssh {place}` once, compare the fingerprint that it shows with the device's, and accept it",
    ),
    (
        "Connection refused",
        "no ssh server answers there",
        "is sshd running on the device, and at that port?",
    ),
    (
        "[Tt]imed out|No route to host|Network is unreachable|Host is down",
        "cannot be reached",
        "is the device on, and in the same network? a firewall may also keep silent",
    ),
    (
        "Permission denied|Too many authentication failures|No more authentication methods",
        "it refuses our key",
        "passwords are not asked for: `ssh-copy-id {place}` gives it your key, `ssh-add` unlocks one with a passphrase",
    ),
)
