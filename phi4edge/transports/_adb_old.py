"""Devices older than Android 7: their adb joins stdout and stderr, says no exit status, and its stdin never ends.

So a program runs from a script whose stderr goes to a file that is printed after a line with a secret word, its stdin
comes from a file, and nobody keeps watch: when the connection is lost, the time limit on the device is what ends it.
"""

from __future__ import annotations

__all__ = ["OldKeeper", "exchange"]

import os
import re
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path, PurePosixPath

from phi4edge.core.errors import MissingToolError, TargetError
from phi4edge.transports._adb_client import Client, last_line
from phi4edge.transports._shell import keeper_line, quote, word_of_its_own

_ASK_S = 30.0

_SCRIPT = """\
exec 2>/dev/null
cd {running} && exec 3<{stdin} 4>said-{word} 5<said-{word} || exit
rm -f said-{word} stdin-{word} line-{word}
({line}) <&3 2>&4 3<&- 4>&- 5<&-
printf '\\n%s said\\n' {word}
cat <&5
"""


class OldKeeper:
    """Makes the folder as the keeper of ``_shell`` does, and ends programs; see there for what it cannot do."""

    def __init__(self, client: Client, serial: str, place: str, folder: str) -> None:
        self.word = word_of_its_own()
        self._client, self._serial = client, serial
        said = self._ask(f"{keeper_line(self.word, folder)} </dev/null")
        found = re.search(rf"^{self.word} folder (.+?)\r?$", said, re.M)
        if f"{self.word} refused" in said:
            raise TargetError(
                f"{place}: the folder {folder} cannot be made: {last_line(said)}", "name another folder on the device"
            )
        if found is None:
            raise MissingToolError(f"{place}: its shell does not answer: {last_line(said)}")
        self.folder = PurePosixPath(found[1])
        self.running = self.folder / ".phi4edge" / f"running-{self.word}"
        self._ask(f"mkdir -p {quote(str(self.running))}")

    def kill(self, word: str) -> None:
        """End the program of that word on the device."""
        files = f"{quote(str(self.running / word))}.[0-9]*"
        with suppress(MissingToolError):
            self._ask(f'for f in {files}; do kill -KILL "-${{f##*.}}"; rm -f "$f"; done')

    def close(self) -> None:
        """End all there."""
        with suppress(MissingToolError):
            running = quote(str(self.running))
            self._ask(f'for f in {running}/*.[0-9]*; do kill -KILL "-${{f##*.}}"; done; rm -rf {running}')

    def _ask(self, line: str) -> str:
        return self._client.ask("exec-out", line, serial=self._serial, timeout_s=_ASK_S)[1]


def exchange(
    client: Client, serial: str, running: PurePosixPath, line: str, word: str, stdin: bytes, timeout_s: float
) -> tuple[bytes, bytes]:
    """Run a line of the guard's; its stdout and its stderr, both empty where the connection was lost.

    Raises:
        TargetError: it cannot be sent.
        subprocess.TimeoutExpired: it has not ended by then.
    """
    script = _SCRIPT.format(
        running=quote(str(running)), line=line, word=word, stdin=f"stdin-{word}" if stdin else "/dev/null"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, data in ((f"line-{word}", os.fsencode(script)), (f"stdin-{word}", stdin)):
            if data:
                Path(folder, name).write_bytes(data)
                client.push(Path(folder, name), running / name, serial=serial)
    done = subprocess.run(
        client.words("exec-out", f"sh {quote(str(running / f'line-{word}'))}", serial=serial),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=timeout_s,
        check=False,
        start_new_session=True,
    )
    stdout, whole, stderr = done.stdout.partition(f"\n{word} said\n".encode())
    return (stdout, stderr) if whole else (b"", done.stderr)
