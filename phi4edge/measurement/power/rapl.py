"""RAPL: the energy counters of x86 processors, in ``/sys/class/powercap/intel-rapl:*`` (AMD's too).

A counter counts µJ up to ``max_energy_range_uj`` and begins again at 0. Since Linux 5.10 it is readable by root alone
unless the machine's owner changed that; phi4edge never asks for root. A package counts its cores and its caches, not
always the memory: where the machine has a counter of its own for that (``dram``), it is added.
"""

from __future__ import annotations

__all__ = ["PATTERNS", "Domain", "command", "domains", "samples_of", "whole_of"]

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phi4edge.measurement.power._api import Line, Sample, Whole
from phi4edge.measurement.power._ask import loop, number

PATTERNS = tuple(f"sys/class/powercap/intel-rapl:*/{key}" for key in ("name", "energy_uj", "max_energy_range_uj"))
INTERVAL_S = 0.5


@dataclass(frozen=True)
class Domain:
    """One counter."""

    name: str  # "package-0", "package-0/dram"
    file: str  # of its energy, relative to the root
    range_uj: float  # where it begins again


def domains(files: Mapping[str, str | None]) -> tuple[tuple[Domain, ...], str]:
    """The counters that can be read, and why there are none where there are none."""
    found, closed = [], False
    for file, value in files.items():
        if not file.startswith("sys/class/powercap/") or not file.endswith("/energy_uj"):
            continue
        folder = file.rsplit("/", 1)[0]
        span = number(files.get(f"{folder}/max_energy_range_uj"))
        if number(value) is None:
            closed = True
        elif span is not None:
            found.append(Domain(_name(folder, files), file, span))
    if found:
        return tuple(found), ""
    why = "energy_uj is readable by root alone" if closed else "this machine shows no RAPL counter"
    return (), why


def _name(folder: str, files: Mapping[str, str | None]) -> str:
    own = files.get(f"{folder}/name") or folder.rsplit("/", 1)[1]
    parent = re.sub(r":\d+$", "", folder)
    above = files.get(f"{parent}/name") if parent.count(":") else None
    return f"{above}/{own}" if above else own


def command(root: str, found: Sequence[Domain], temperature: str | None, clocks: Sequence[str]) -> list[str]:
    """What prints the uptime, every counter, the temperature's file and the clocks', two lines a second.

    The uptime is the machine's own clock: how a line travelled does not matter.
    """
    heat = [temperature] if temperature else []
    return loop(root, ["proc/uptime", *(domain.file for domain in found), *heat, *clocks], INTERVAL_S)


def samples_of(lines: Sequence[Line], found: Sequence[Domain], sensor: str | None) -> list[Sample]:
    """One sample between every two lines of :func:`command`: the mean power of that time, heat and clock at its end."""
    samples: list[Sample] = []
    last: list[float] | None = None
    for line in lines:
        values = [number(word) for word in line.text.split()]
        known = [value for value in values[: 1 + len(found)] if value is not None]
        if len(known) != 1 + len(found):
            continue
        if last is not None and known[0] > last[0]:
            seconds = known[0] - last[0]
            rails = {
                domain.name: _spent(old, new, domain.range_uj) / seconds / 1000
                for domain, old, new in zip(found, last[1:], known[1:], strict=True)
            }
            rest = values[1 + len(found) :]
            milli = rest.pop(0) if sensor and rest else None
            heat = {sensor: milli / 1000} if sensor and milli is not None else {}
            khz = max((clock for clock in rest if clock is not None), default=None)
            mhz = None if khz is None else khz / 1000
            samples.append(Sample(line.at_s, rails, heat, clock_mhz=mhz, seconds=seconds))
        last = known
    return samples


def _spent(old: float, new: float, span: float) -> float:
    """µJ between two readings; a counter that is lower than before began again."""
    return new - old if new >= old else new - old + span


def whole_of(found: Sequence[Domain], reason: str) -> Whole:
    """Packages, and their memory where it is counted apart."""
    packages = [d.name for d in found if re.fullmatch(r"package-\d+", d.name)]
    if not packages:
        return Whole(reason=reason or f"none of the counters {', '.join(d.name for d in found)} is a package's")
    memory = [d.name for d in found if d.name.endswith("/dram")]
    scope = "the processor and its memory" if memory else "the processor"
    return Whole((*packages, *memory), "RAPL package + DRAM" if memory else "RAPL package", scope)
