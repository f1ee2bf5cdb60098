"""Commands in processes of their own, and what each cost as the kernel counts it."""

from __future__ import annotations

__all__ = ["Cost", "child", "phi4edge"]

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Cost:
    """Of one process, its children included."""

    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    output: str  # what it printed


def phi4edge(*words: str | Path) -> list[str]:
    """A command of this clone's phi4edge."""
    return [sys.executable, "-m", "phi4edge", *map(str, words)]


def child(command: Sequence[str]) -> Cost:
    """Run ``command`` to its end.

    Raises:
        SystemExit: it failed; the end of what it said is shown.
    """
    variables = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:5])} … ended with {process.returncode}\n{output[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    cpu = usage.ru_utime + usage.ru_stime
    return Cost(time.perf_counter() - began, cpu, usage.ru_maxrss * unit, output)
