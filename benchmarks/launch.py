"""Run a command and write what it cost, as the kernel counts it, to a file.

    python launch.py COST.json COMMAND [ARGUMENT …]

Linux counts into a process's peak RSS that of the one that started it, up to the moment where it becomes another
program. So measured commands are started from this small process, and not from a benchmark that holds a model.
"""

from __future__ import annotations

__all__ = ["Launched", "launch"]

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any


@dataclass(frozen=True)
class Launched:
    """A process that ended, its children included."""

    code: int  # exit status; 128 + the signal that ended it; 127 where it could not be started
    seconds: float  # by the wall's clock
    cpu_seconds: float
    peak_rss_bytes: int  # the largest of any of them


def launch(command: Sequence[str], *, env: Mapping[str, str], cwd: Path | None, output: IO[Any]) -> Launched:
    """Run ``command`` to its end, what it prints going to ``output``."""
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "cost.json"
        words = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(note), *command]
        subprocess.run(words, env=env, cwd=cwd, stdout=output, stderr=subprocess.STDOUT, check=False)
        return Launched(**json.loads(note.read_text(encoding="utf-8")))


def main() -> int:
    """See the module."""
    note, *command = sys.argv[1:]
    began = time.perf_counter()
    try:
        process = subprocess.Popen(command)
    except OSError as error:
        print(error, file=sys.stderr)
        Path(note).write_text(json.dumps({"code": 127, "seconds": 0.0, "cpu_seconds": 0.0, "peak_rss_bytes": 0}))
        return 127
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    cost = {
        "code": code,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }
    Path(note).write_text(json.dumps(cost), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
