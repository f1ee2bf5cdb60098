"""Programs on a device, told in POSIX shell: how they start, how long they may run, and who ends them.

Two scripts run on the device, each as one line that a login shell of any common kind takes (sh, bash, dash, zsh, mksh,
fish; not csh). Nothing but POSIX sh is asked of it, and one thing more: a program needs a group of processes of its
own, which OpenSSH gives and ``setsid`` makes.

*The guard* runs one program. It says that the program starts, and with which status it ended, on stdout and stderr in
lines with a secret word, so that whatever a connection or a login shell adds is told from the program's own bytes, and
a program that ends with 255 from a connection that does. It ends the program, and all that this started, at the time
limit.

*The keeper* runs for as long as the device is connected. It ends one program when it is asked to, and all of them when
its stdin ends: the connection was lost, or our process was killed. So nothing is left running, whatever happens here.

Not reached: a program that leaves its group by itself (a daemon); and a connection that neither side sees end, where
the time limit is what ends the program.
"""

from __future__ import annotations

__all__ = ["Ended", "guard_line", "keeper_line", "program_stderr", "quote", "shell_line", "word_of_its_own"]

import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_PLAIN = re.compile(r"[A-Za-z0-9_@+:,./-]+")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# `kill -0 -$$` finds a group of our number only if we lead it.
_LEAD = 'kill -0 -$$ 2>/dev/null && exec "$@"; exec setsid "$@"'

# $1 secret word, $2 seconds, $3 folder, $4 the keeper's folder, then KEY=VALUE …, --, and the program.
# The shell's own stderr is closed: it would speak of killed children. The words of the limit go out in the background,
# because a connection that is stuck would keep the limit from being kept, and what else is said in a shell of its own,
# because SIGPIPE from a lost one would end the guard before it ends the others.
_GUARD = r"""
exec 3>&2 2>/dev/null
id=$1 limit=$2 folder=$3 running=$4
shift 4
refuse() { printf '%s refused %s\n' "$id" "$1"; exit 1; }
cd "$folder" || refuse folder
while [ "$1" != -- ]; do export "$1"; shift; done
shift
case $1 in
*/*) [ -f "$1" ] && [ -x "$1" ] ;;
*) command -v "$1" >/dev/null ;;
esac || refuse program
mine=$running/$id.$$
printf '' >"$mine" || refuse closed
[ -e "$mine" ] && ! [ -e "$running/$id.no" ] || refuse closed
(
    sleep "$limit"
    rm -f "$mine"
    printf '\n%s limit\n' "$id" >&3 &
    sleep 1
    kill -KILL -$$
) </dev/null >/dev/null &
(printf '%s start\n' "$id"; printf '%s start\n' "$id" >&3) || kill -KILL -$$
(exec "$@" 2>&3 3>&-)
code=$?
rm -f "$mine"
(printf '\n%s end %s\n' "$id" "$code" >&3)
kill -KILL -$$
"""

# $1 secret word, $2 folder. A program's number is in the name of an empty file, so that a full disk can be cleaned.
# Whoever starts looks for the other's file after making its own: one of the two sees that it must not go on.
_KEEPER = r"""
id=$1 folder=$2
trap '' HUP INT PIPE TERM
case $folder in
'') folder=${XDG_CACHE_HOME:-$HOME/.cache}/phi4edge ;;
'~') folder=$HOME ;;
'~/'*) folder=$HOME/${folder#??} ;;
/*) ;;
*) folder=$HOME/$folder ;;
esac
fresh=
[ -d "$folder" ] || fresh=yes
mkdir -p "$folder" && cd "$folder" && folder=$(pwd -P) && running=$folder/.phi4edge/running-$id &&
    mkdir -p "$running" || { printf '%s refused folder\n' "$id"; exit 1; }
exec 2>/dev/null
[ -z "$fresh" ] || printf 'phi4edge made this folder, and removes it when it is asked to clean.\n' >.phi4edge/ours
printf '%s folder %s\n' "$id" "$folder"
if kill -0 -$$ || command -v setsid >/dev/null; then printf '%s groups yes\n' "$id"; fi
case $(rsync --version </dev/null | head -n 1) in *' version 3'*) printf '%s rsync yes\n' "$id" ;; esac
printf '%s ready \n' "$id"
while read -r word which; do
    [ "$word" = kill ] || continue
    printf '' >"$running/$which.no"
    for file in "$running/$which".[0-9]*; do
        kill -KILL "-${file##*.}"
        rm -f "$file"
    done
    printf '%s killed %s\n' "$id" "$which"
done
mv "$running" "$running.end"
for file in "$running.end"/*.[0-9]*; do kill -KILL "-${file##*.}"; done
rm -rf "$running.end"
rmdir .phi4edge
"""


def word_of_its_own() -> str:
    """A word that no program says by chance."""
    return f"phi4edge-{secrets.token_hex(8)}"


def quote(word: str) -> str:
    """``word`` as every common login shell reads it; fish knows backslashes in single quotes, the others do not."""
    if _PLAIN.fullmatch(word):
        return word
    parts = re.split(r"(['\\]+)", word)
    quoted = [f"'{part}'" for part in parts[::2]]
    escaped = ['"' + part.replace("\\", "\\\\") + '"' for part in parts[1::2]]
    return "".join(a + b for a, b in zip(quoted, [*escaped, ""], strict=True))


def shell_line(argv: Sequence[str]) -> str:
    """``argv`` as one line for a login shell, which it replaces."""
    return " ".join(["exec", *map(quote, argv)])


def guard_line(
    argv: Sequence[str],
    environment: Mapping[str, str],
    *,
    word: str,
    timeout_s: float,
    folder: str,
    keeper: str,
) -> str:
    """One line that runs ``argv`` in ``folder`` for at most ``timeout_s``, under the keeper of that word.

    The device says, in lines of their own, ``WORD start`` on stdout and on stderr before the program's first byte, or
    ``WORD refused folder|program|closed`` on stdout; at the end what :func:`program_stderr` reads.
    """
    assert argv, "no program"
    assert all(_NAME.fullmatch(name) for name in environment), f"not names of variables: {list(environment)}"
    running = f"{folder}/.phi4edge/running-{keeper}"
    settings = [f"{name}={value}" for name, value in environment.items()]
    guard = ["sh", "-c", _GUARD, "guard", word, str(math.ceil(timeout_s)), folder, running, *settings, "--", *argv]
    return shell_line(["sh", "-c", _LEAD, "lead", *guard])


def keeper_line(word: str, folder: str | None) -> str:
    """One line that makes ``folder`` and keeps watch; the device says ``WORD KEY VALUE``, until ``WORD ready``.

    ``folder`` begins with ``/`` or ``~/``, or is below the home; None is ``phi4edge`` in the user's cache.
    """
    return shell_line(["sh", "-c", _KEEPER, "keeper", word, folder or ""])


@dataclass(frozen=True)
class Ended:
    """What the guard said on stderr, and what the program did."""

    started: bool
    code: int | None  # the program's exit status; None: the guard did not see it end
    limit: bool  # the device's own time limit ended it
    stderr: bytes  # of the program alone; where it never started, everything


def program_stderr(said: bytes, word: str) -> Ended:
    """Tell the program's stderr from the guard's words and from what the connection added."""
    start = f"{word} start\n".encode()
    _, started, rest = said.partition(start)
    if not started:
        return Ended(started=False, code=None, limit=False, stderr=said)
    end = re.search(rb"\n%s (?:end (\d+)|limit)\n" % word.encode(), rest)
    if end is None:
        return Ended(started=True, code=None, limit=False, stderr=rest)
    code = int(end[1]) if end[1] else None
    return Ended(started=True, code=code, limit=code is None, stderr=rest[: end.start()])
