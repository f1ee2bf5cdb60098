"""Commands in processes of their own, and what each cost as the kernel counts it."""

from __future__ import annotations

__all__ = ["Cost", "child", "phi4edge"]

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from launch import launch  # noqa: E402


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
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        ran = launch(command, env=variables, cwd=None, output=file)
        file.seek(0)
        output = file.read()
    if ran.code:
        raise SystemExit(f"{' '.join(command[:5])} … ended with {ran.code}\n{output[-2000:]}")
    return Cost(ran.seconds, ran.cpu_seconds, ran.peak_rss_bytes, output)
