"""The clusters of a CPU with big and little cores, and the mask for ``taskset`` that keeps a program on the big ones.

A token waits for the slowest thread, so a thread on a little core costs more than it brings.
"""

from __future__ import annotations

__all__ = ["PATTERNS", "BigCores", "Cluster", "big_core_mask", "big_cores", "clusters"]

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from phi4edge.measurement.power._ask import first_lines, number
from phi4edge.transports._api import Device

_CPU = "sys/devices/system/cpu"
_KEYS = ("related_cpus", "scaling_governor", "cpuinfo_max_freq", "scaling_max_freq", "scaling_min_freq")
PATTERNS = (*(f"{_CPU}/cpufreq/policy*/{key}" for key in _KEYS), f"{_CPU}/cpu[0-9]*/cpu_capacity")
_BIG = 0.5  # of the largest capacity


@dataclass(frozen=True)
class Cluster:
    """Cores that share a clock."""

    cpus: tuple[int, ...]
    governor: str | None
    max_mhz: float | None  # of the hardware
    limit_mhz: float | None  # that the system allows at the moment
    floor_mhz: float | None  # and the least
    capacity: float | None  # the kernel's measure of speed, 1024 for the fastest core there is

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self) | {"cpus": list(self.cpus)}


@dataclass(frozen=True)
class BigCores:
    """The cores to decode on. ``mask`` is hexadecimal, as taskset takes it; None where all cores are alike."""

    mask: str | None
    cpus: tuple[int, ...]
    rule: str  # how they were told from the others, or why they were not


def clusters(files: Mapping[str, str | None]) -> tuple[Cluster, ...]:
    """The clusters in what :data:`PATTERNS` found, slowest first."""
    found = []
    for policy in sorted({name.rsplit("/", 1)[0] for name in files if "/cpufreq/policy" in name}):
        values = {key: files.get(f"{policy}/{key}") for key in _KEYS}
        cpus = tuple(sorted(int(cpu) for cpu in re.findall(r"\d+", values["related_cpus"] or "")))
        if not cpus:
            continue
        found.append(
            Cluster(
                cpus,
                values["scaling_governor"],
                _mhz(values["cpuinfo_max_freq"]),
                _mhz(values["scaling_max_freq"]),
                _mhz(values["scaling_min_freq"]),
                number(files.get(f"{_CPU}/cpu{cpus[0]}/cpu_capacity")),
            )
        )
    return tuple(sorted(found, key=lambda cluster: (cluster.capacity or 0, cluster.max_mhz or 0, cluster.cpus)))


def _mhz(text: str | None) -> float | None:
    khz = number(text)
    return None if khz is None else khz / 1000


def big_cores(found: Sequence[Cluster]) -> BigCores:
    """The big cores: those of more than half the largest capacity; by clock, all but the slowest cluster.

    Clocks alone can mislead (a little core of 2.0 GHz beside a big one of 2.2 GHz), so capacity goes first.
    """
    if not found:
        return BigCores(None, (), "the device shows no clusters")
    capacities = [cluster.capacity for cluster in found if cluster.capacity is not None]
    clocks = [cluster.max_mhz for cluster in found if cluster.max_mhz is not None]
    if len(capacities) == len(found):
        big = [cluster for cluster in found if (cluster.capacity or 0) > _BIG * max(capacities)]
        rule = f"cpu_capacity above half of {max(capacities):g}"
    elif len(clocks) == len(found):
        big = [cluster for cluster in found if (cluster.max_mhz or 0) > min(clocks)] or list(found)
        rule = f"cpuinfo_max_freq above the slowest cluster's {min(clocks):g} MHz"
    else:
        return BigCores(None, (), "neither cpu_capacity nor cpuinfo_max_freq of every cluster can be read")
    cpus = tuple(sorted(cpu for cluster in big for cpu in cluster.cpus))
    if len(big) == len(found):
        return BigCores(None, cpus, "all cores are alike")
    return BigCores(f"{sum(1 << cpu for cpu in cpus):x}", cpus, rule)


def big_core_mask(device: Device, root: str = "/") -> BigCores:
    """Ask ``device`` for its clusters; for ``taskset MASK program`` in front of what decodes."""
    return big_cores(clusters(first_lines(device, root, PATTERNS)))
