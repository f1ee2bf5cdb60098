"""Code that a model wrote, run where it can do no harm: in a child process that has nothing.

The child (_sandboxed.py) has namespaces of its own: no network but a loopback that is down, no other process to see or
to signal, every file system read-only but a working folder of 16 MiB in RAM, which is also its home; no capability, an
empty environment, limits on processor time, address space, file size and processes; and its whole group is killed
after a wall time. Files that its user may read can be read, and go nowhere (root's program runs as nobody). Where the
kernel refuses any of this, nothing is run: there is no weaker level.
"""

from __future__ import annotations

__all__ = ["ISOLATION", "SandboxLimits", "check_sandbox", "run_program"]

import json
import os
import secrets
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from phi4edge.core.errors import MissingToolError
from phi4edge.measurement.tasks import _sandboxed

ISOLATION = "namespaces: user, mount (read-only), process, network, IPC; no capabilities; resource limits"
_PASSED, _NOT_ISOLATED = 0, 97


@dataclass(frozen=True)
class SandboxLimits:
    """What a program may use."""

    wall_s: float = 10.0  # then its process group is killed
    cpu_s: int = 5
    memory_bytes: int = 512 * 2**20  # address space of a process
    disk_bytes: int = 16 * 2**20  # of the working folder, and of a file in it
    processes: int = 8  # three of them the sandbox's


def run_program(program: str, limits: SandboxLimits | None = None) -> bool:
    """Whether ``program`` (Python source) came to its end without an exception, within ``limits``.

    Raises:
        MissingToolError: this machine cannot isolate it; nothing was run.
    """
    if sys.platform != "linux":
        raise MissingToolError(f"code is run in Linux namespaces, and this is {sys.platform}", _HINT)
    limits = limits or SandboxLimits()
    request = {"program": program, "word": secrets.token_hex(16), "limits": asdict(limits)}
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}  # of Python itself
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(Path(_sandboxed.__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", **kept},
        cwd="/",
        start_new_session=True,
    )
    try:
        _, said = child.communicate(json.dumps(request).encode(), timeout=limits.wall_s)
    except subprocess.TimeoutExpired:
        return False
    finally:
        _kill_group(child)
    if child.returncode == _NOT_ISOLATED:
        reason = said.decode(errors="replace").strip()
        raise MissingToolError(f"this machine cannot isolate code that a model wrote: {reason}", _HINT)
    return child.returncode == _PASSED


_HINT = "allow unprivileged user namespaces (sysctl user.max_user_namespaces), or leave humaneval out"


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """End it if it runs: with process 1 of its namespace, which is in the group, goes everything in there."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    for stream in (child.stdin, child.stderr):
        if stream is not None:
            stream.close()


def check_sandbox() -> str:
    """How code is isolated here, after a trial.

    Raises:
        MissingToolError: it cannot be, or not even an empty program passes.
    """
    if not run_program("pass"):
        raise MissingToolError("an empty program does not pass in the sandbox", _HINT)
    return ISOLATION
