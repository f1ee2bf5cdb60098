"""How many threads a runtime should use: the physical cores that this process may run on."""

from __future__ import annotations

__all__ = ["physical_cores"]

import math
import os
from pathlib import Path

import psutil

_CPU = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


def physical_cores(cpu: Path = _CPU, cgroup: Path = _CGROUP) -> int:
    """Physical cores within the process's affinity mask and its cgroup's CPU quota; at least one."""
    if not hasattr(os, "sched_getaffinity"):
        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    cores = {_siblings(cpu / f"cpu{number}" / "topology", number) for number in allowed}
    quota = _quota(cgroup)
    return max(1, len(cores) if quota is None else min(len(cores), quota))


def _siblings(topology: Path, number: int) -> str:
    """A name of the core that logical CPU ``number`` is a thread of."""
    for file in ("core_cpus_list", "thread_siblings_list"):
        try:
            return (topology / file).read_text().strip()
        except OSError:
            continue
    return str(number)


def _quota(cgroup: Path) -> int | None:
    """Whole CPUs that the cgroup grants, rounded up; None where it grants all."""
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()
        return None if limit == "max" else math.ceil(int(limit) / int(period))
    except (OSError, ValueError):
        pass
    try:
        limit_us = int((cgroup / "cpu" / "cpu.cfs_quota_us").read_text())
        period_us = int((cgroup / "cpu" / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return math.ceil(limit_us / period_us) if limit_us > 0 else None
