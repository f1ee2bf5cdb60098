"""OpenSSH's client: its command line, its one connection, and what its complaints mean."""

from __future__ import annotations

__all__ = ["Client", "SshKeeper", "explain"]

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from phi4edge.core.errors import MissingToolError, Phi4EdgeError, UsageError
from phi4edge.transports._api import Address, Finished
from phi4edge.transports._keeper import Keeper

_SOCKET_ROOM = 70  # bytes; a socket's path has 104 on some systems, and ssh adds 17 to it while it makes it

_WITH_VALUE = "BbcDEeFIiJLlmOopPQRSWw"  # ssh's options of one letter whose value is the next word
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
        options = _options(address.options)
        self.place = address.place or ""
        root = tempfile.gettempdir()
        self._folder = Path(tempfile.mkdtemp(prefix="p4e-", dir=root if len(root) < _SOCKET_ROOM else "/tmp"))
        socket = str(self._folder / "s").replace("%", "%%")
        self._words = ["ssh", *_FIXED, *options, *port, *_USUAL, "-o", f"ControlPath={socket}"]

    def start(self, line: str, *, stdin: int | BinaryIO, stderr: int | BinaryIO) -> subprocess.Popen[bytes]:
        """Start ``line`` in the login shell of the device; our end of its stdout is a pipe."""
        return self._popen("no", line, stdin, stderr)

    def start_master(self, line: str, *, stdin: int | BinaryIO, stderr: int | BinaryIO) -> subprocess.Popen[bytes]:
        """Start ``line`` as :meth:`start` does; its connection serves the others."""
        return self._popen("yes", line, stdin, stderr)

    def _popen(self, master: str, line: str, stdin: int | BinaryIO, stderr: int | BinaryIO) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*self._words, "-o", f"ControlMaster={master}", "-o", "ControlPersist=no", "--", self._host, line],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,  # Ctrl-C is ours to act upon, and must not cut the connection first
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


class SshKeeper(Keeper):
    """The keeper whose connection serves all others, and what ssh says where it does not get in."""

    def __init__(self, client: Client, folder: str | None) -> None:
        super().__init__(client.start_master, client.place, folder)

    @property
    def rsync(self) -> bool:
        """Whether the device has one that is of use; it takes a login shell's words for its peer's."""
        return "rsync" in self.facts and "noise" not in self.facts

    def silent(self, waited_s: float) -> Phi4EdgeError:
        """See :class:`Keeper`."""
        return MissingToolError(
            f"{self.place}: has not let us in within {waited_s:g} s",
            "does `ssh` to it come to a prompt? a key to be touched, or a slow login shell, may hold it up",
        )

    def gone(self, stderr: bytes) -> Phi4EdgeError:
        """See :class:`Keeper`."""
        return explain(self.place, stderr)


@cache
def _knows_progress() -> bool:
    """Whether the rsync here is 3.1 or newer, and none of those that call themselves so; no rsync does not."""
    try:
        said = subprocess.run(["rsync", "--version"], capture_output=True, text=True, check=False, errors="replace")
    except OSError:
        return False
    version = re.match(r"rsync\s+version (\d+)\.(\d+)", said.stdout)
    return version is not None and (int(version[1]), int(version[2])) >= (3, 1)


def _options(given: tuple[str, ...]) -> list[str]:
    """``KEY=VALUE`` as ssh's ``-o`` takes it; words that begin with a dash, and their values, as they are."""
    words: list[str] = []
    value_due = False
    for word in given:
        if value_due or word.startswith("-"):
            words.append(word)
            value_due = not value_due and len(word) == 2 and word[1] in _WITH_VALUE
        elif "=" in word:
            words += ["-o", word]
        else:
            raise UsageError(f"ssh: {word!r} is not an option", "write KEY=VALUE as in ssh_config, or a word like -i")
    return words


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
