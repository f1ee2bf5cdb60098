"""Processes that kill themselves at a chosen instant, as a power cut would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

# Where products are computed in float32, as conftest.py has it in this process.
IN_FLOAT32 = """
from phi4edge.model import compute
compute.measure_compute = lambda: compute.Speeds(1.0, 1.0, 0.0)
"""

# argv[1] is the number of the call that the process does not survive; the rest is the script's.
_DYING = """
import os, signal, sys
from pathlib import Path
count, stop = 0, int(sys.argv[1])
def dying(function):
    def wrapped(*arguments, **named):
        global count
        count += 1
        if count == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return wrapped
"""


def killed_at(stop: int, script: str, *arguments: str | Path, threads: int | None = None) -> bool:
    """Run ``script``, which wraps functions in ``dying(…)``; whether it was killed at their ``stop``-th call.

    ``script`` finds ``arguments`` from sys.argv[2] on. Any other end than that kill, or a good one, is an error.
    """
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    words = [sys.executable, "-c", IN_FLOAT32 + _DYING + script, str(stop), *map(str, arguments)]
    result = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode in (0, -signal.SIGKILL), result.stderr
    return result.returncode != 0
