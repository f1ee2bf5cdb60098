"""Questions to a device: what a program prints, and what small files hold. Few round trips, nothing written."""

from __future__ import annotations

__all__ = ["Answer", "ask", "first_lines", "loop", "number", "shell"]

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from phi4edge.core.errors import Phi4EdgeError
from phi4edge.transports._api import Device

_LIMIT_S = 15.0
# nvpmodel and its like live in sbin, which a plain user's PATH may lack.
_PATH = "PATH=$PATH:/usr/sbin:/sbin; "
# Only built-in commands: a device has hundreds of such files, and a program for each would take seconds.
_FIRST_LINES = """
cd "$1" || exit 1
for f in $2; do
  [ -f "$f" ] || continue
  v=
  if { IFS= read -r v || [ -n "$v" ]; } < "$f" 2>/dev/null; then echo "$f=$v"; else echo "$f!"; fi
done 2>/dev/null
"""
# One process a sample, the sleep: what watches a device must not be what it does.
_LOOP = """
cd "$1" || exit 1
while :; do
  line=
  for f in $2; do v=-; read -r v rest < "$f"; line="$line $v"; done
  echo "$line" || exit
  sleep "$3"
done 2>/dev/null
"""


@dataclass(frozen=True)
class Answer:
    """``text``, or None and the reason."""

    text: str | None
    reason: str = ""


def ask(device: Device, *argv: str) -> Answer:
    """What ``argv`` prints on the device; a program that is missing, fails or hangs is a reason."""
    return shell(device, 'exec "$@"', *argv, name=argv[0])


def shell(device: Device, script: str, *arguments: str, name: str = "sh") -> Answer:
    """What a POSIX shell script prints on the device; reasons are about ``name``."""
    try:
        done = device.run(["sh", "-c", _PATH + script, "sh", *arguments], timeout_s=_LIMIT_S)
    except Phi4EdgeError as error:
        return Answer(None, error.message)
    if done.code == 127:
        return Answer(None, f"{name}: not on the device")
    if done.code != 0:
        return Answer(
            None, f"{name} ended with {done.code}: {done.last_words}" if done.last_words else f"{name} failed"
        )
    return Answer(done.text)


def first_lines(device: Device, root: str, patterns: Iterable[str]) -> Mapping[str, str | None]:
    """The first line of every file under ``root`` that a pattern of the shell matches; None: it cannot be read.

    ``root`` is "/" on a device. Names in the patterns and in the result are relative to it.
    """
    answer = shell(device, _FIRST_LINES, root, " ".join(patterns))
    found: dict[str, str | None] = {}
    for line in (answer.text or "").splitlines():
        if line.endswith("!") and "=" not in line:
            found[line[:-1]] = None
        elif "=" in line:
            name, _, value = line.partition("=")
            found[name] = value.strip()
    return found


def loop(root: str, files: Sequence[str], every_s: float) -> list[str]:
    """A program that prints the first word of each file, one line ``every_s``; "-" stands for one without any."""
    return ["sh", "-c", _LOOP, "sh", root, " ".join(files), str(every_s)]


def number(text: str | None) -> float | None:
    """A plain number, or None."""
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
