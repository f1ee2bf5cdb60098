"""A laptop or desktop with Linux: governor, turbo, load, AC or battery, heat, and RAPL where it can be read."""

from __future__ import annotations

__all__ = ["Linux"]

from collections.abc import Mapping, Sequence
from typing import Any

from phi4edge.measurement.power import rapl
from phi4edge.measurement.power._api import Line, Sample, State, Whole
from phi4edge.measurement.power._ask import first_lines, number
from phi4edge.measurement.power._thermal import HWMON, ZONES, hwmon, zones
from phi4edge.measurement.power.clusters import PATTERNS, clusters
from phi4edge.transports._api import Device

_CPU = "sys/devices/system/cpu"
_FILES = (
    *PATTERNS,
    *rapl.PATTERNS,
    *ZONES,
    *HWMON,
    *(f"sys/class/power_supply/*/{key}" for key in ("type", "online", "status", "capacity", "scope")),
    f"{_CPU}/intel_pstate/no_turbo",
    f"{_CPU}/cpufreq/boost",
    f"{_CPU}/cpu*/thermal_throttle/*_throttle_count",
    f"{_CPU}/cpufreq/policy*/scaling_cur_freq",
    "proc/loadavg",
)
_MOST_CLOCKS = 16  # that are read while the machine works


class Linux:
    """See :class:`phi4edge.measurement.power._api.Platform`."""

    source = "rapl"

    def __init__(self, device: Device, root: str = "/", *, gpu: bool = False) -> None:
        self._device, self._root = device, root
        self._domains: tuple[rapl.Domain, ...] = ()
        self._reason = "the machine was not asked"
        self._zone: tuple[str, str] | None = None  # the sensor's name and its file
        self._clocks: list[str] = []
        self.note = "power is the processor's; what the graphics card draws is not in it" if gpu else None

    def state(self) -> State:
        """Governor, turbo, supply, load, temperature, and the counters of throttling."""
        files = first_lines(self._device, self._root, _FILES)
        self._domains, self._reason = rapl.domains(files)
        self._clocks = [name for name, value in files.items() if name.endswith("scaling_cur_freq") and number(value)]
        self._clocks = self._clocks[:_MOST_CLOCKS]
        missing: dict[str, str] = {}
        cores = clusters(files)
        governors = sorted({cluster.governor for cluster in cores if cluster.governor})
        if not governors:
            missing["governor"] = "the machine shows no cpufreq (a virtual machine or a container, mostly)"
        sensor, temperature = hwmon(files, ("coretemp", "k10temp", "zenpower"))
        zone, zone_c, all_zones = zones(files, ("x86_pkg_temp",))
        self._zone = next(((zone, f"{n[:-4]}temp") for n, kind in files.items() if zone and kind == zone), None)
        if temperature is None:
            sensor, temperature = zone, zone_c
        if temperature is None:
            missing["temperature_c"] = "the machine shows no sensor of the processor"
        load = number((files.get("proc/loadavg") or "").split(" ")[0])
        facts: dict[str, Any] = {
            "governor": "/".join(governors) or None,
            "clusters": [cluster.as_dict() for cluster in cores],
            "turbo": _turbo(files),
            "supply": _supply(files),
            "battery_percent": _battery(files),
            "load_average_1min": load,
            "temperatures_c": all_zones,
            "throttle_count": _throttle_count(files),
        }
        for fact, why in (("turbo", "neither intel_pstate nor cpufreq/boost"), ("supply", "no power supply")):
            if facts[fact] is None:
                missing[fact] = f"the machine shows {why}"
        mode = f"governor {facts['governor']}" if governors else None
        return State(facts, missing, mode, sensor, temperature)

    def has_power(self) -> bool:
        """Where a counter can be read."""
        return bool(self._domains)

    def command(self) -> Sequence[str] | str:
        """A loop over the counters, a temperature and the clocks; nothing runs where there is none of them."""
        if not self._domains and not self._clocks:
            return f"{self._reason}, nor a clock"
        return rapl.command(self._root, self._domains, self._zone[1] if self._zone else None, self._clocks)

    def samples(self, lines: Sequence[Line]) -> list[Sample]:
        """One sample between every two lines."""
        return rapl.samples_of(lines, self._domains, self._zone[0] if self._zone else None)

    def whole(self, samples: Sequence[Sample]) -> Whole:
        """See :mod:`phi4edge.measurement.power.rapl`."""
        return rapl.whole_of(self._domains, self._reason)

    def throttled(self, before: State, after: State) -> list[str] | None:
        """By heat, where the processor counted it; a clock that fell is the sampler's to see."""
        first, last = before.facts["throttle_count"], after.facts["throttle_count"]
        if first is None or last is None:
            return None
        return [f"{last - first:.0f} thermal throttle events"] if last > first else []


def _turbo(files: Mapping[str, str | None]) -> bool | None:
    off, on = number(files.get(f"{_CPU}/intel_pstate/no_turbo")), number(files.get(f"{_CPU}/cpufreq/boost"))
    if off is not None:
        return not off
    return None if on is None else bool(on)


def _supplies(files: Mapping[str, str | None], kind: str, key: str) -> list[str]:
    """``key`` of every supply of a kind; a mouse's or a headset's battery (scope Device) is none of ours."""
    return [
        value
        for name, found in files.items()
        if name.startswith("sys/class/power_supply/") and name.endswith("/type") and found == kind
        if files.get(f"{name[:-4]}scope") != "Device" and (value := files.get(f"{name[:-4]}{key}"))
    ]


def _supply(files: Mapping[str, str | None]) -> str | None:
    if any(value == "1" for kind in ("Mains", "USB") for value in _supplies(files, kind, "online")):
        return "AC"
    status = _supplies(files, "Battery", "status")
    if "Discharging" in status:
        return "battery"
    return "AC" if status else None


def _battery(files: Mapping[str, str | None]) -> float | None:
    return next((number(value) for value in _supplies(files, "Battery", "capacity")), None)


def _throttle_count(files: Mapping[str, str | None]) -> float | None:
    """Times that cores and packages were slowed down by heat since the machine started."""
    counts = [number(value) for name, value in files.items() if "/thermal_throttle/" in name]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
