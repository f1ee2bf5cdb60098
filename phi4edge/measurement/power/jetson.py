"""Jetson: power mode, clocks, heat and rails, without root. Not measured on hardware.

``jetson_clocks --show`` needs root on most releases; the same clocks can be read in sysfs, so those are the second
source of whether they are pinned. A Jetson slows down by heat (the ``…-alert`` cooling devices) and by current (the
over-current counters of soctherm); both are read before and after.
"""

from __future__ import annotations

__all__ = ["Jetson", "clocks_pinned", "power_mode"]

import re
from collections.abc import Mapping, Sequence
from typing import Any

from phi4edge.measurement.power._api import Line, Sample, State, Whole
from phi4edge.measurement.power._ask import Answer, ask, first_lines, number
from phi4edge.measurement.power._thermal import ZONES, zones
from phi4edge.measurement.power.clusters import PATTERNS, clusters
from phi4edge.measurement.power.tegrastats import parse_line, whole_of
from phi4edge.transports._api import Device

INTERVAL_MS = 200
_FILES = (
    *PATTERNS,
    *ZONES,
    *(f"sys/class/devfreq/*/{key}" for key in ("min_freq", "max_freq", "cur_freq")),
    *(f"sys/class/thermal/cooling_device*/{key}" for key in ("type", "cur_state")),
    "sys/class/hwmon/hwmon*/oc[0-9]_event_cnt",
    "proc/device-tree/model",
    "etc/nv_tegra_release",
)
_GPU = re.compile(r"devfreq/[^/]*(?:gpu|gpc|ga10b|gv11b|gp10b|gm20b)[^/]*/(min_freq|max_freq|cur_freq)$")


class Jetson:
    """See :class:`phi4edge.measurement.power._api.Platform`."""

    source = "tegrastats"
    note = "Jetson's readings are not measured on hardware: their forms are those of published lines"

    def __init__(self, device: Device, root: str = "/") -> None:
        self._device, self._root = device, root

    def state(self) -> State:
        """Power mode, clocks, temperatures, and the counters of throttling."""
        files = first_lines(self._device, self._root, _FILES)
        asked, shown = ask(self._device, "nvpmodel", "-q"), ask(self._device, "jetson_clocks", "--show")
        missing: dict[str, str] = {}
        mode = power_mode(asked.text or "")
        if mode is None:
            missing["power_mode"] = asked.reason or "nvpmodel names no mode"
        pinned = self._pinned(shown, files, missing)
        sensor, temperature, all_zones = zones(files, ("tj-thermal", "tj_therm"))
        if temperature is None:
            missing["temperature_c"] = "no thermal zone can be read"
        facts: dict[str, Any] = {
            "model": (files.get("proc/device-tree/model") or "").strip("\0 ") or None,
            "release": files.get("etc/nv_tegra_release"),
            "power_mode": mode,
            "clocks_pinned": pinned,
            "clusters": [cluster.as_dict() for cluster in clusters(files)],
            "gpu_clock_hz": {key: number(value) for name, value in files.items() for key in _GPU.findall(name)} or None,
            "temperatures_c": all_zones,
            "thermal_alerts": _alerts(files),
            "over_current_events": _events(files),
        }
        return State(facts, missing, mode, sensor, temperature)

    def _pinned(self, shown: Answer, files: Mapping[str, str | None], missing: dict[str, str]) -> bool | None:
        pinned = clocks_pinned(shown.text) if shown.text is not None else None
        if pinned is None:
            pinned = _pinned_in_sysfs(files)
        if pinned is None:
            missing["clocks_pinned"] = shown.reason or "jetson_clocks names no clock of the GPU"
        return pinned

    def has_power(self) -> bool:
        """It may; only its lines can say."""
        return True

    def command(self) -> Sequence[str] | str:
        """``tegrastats`` at five lines a second."""
        there = ask(self._device, "sh", "-c", "command -v tegrastats")
        if there.text is None:
            return "tegrastats: not on the device's PATH"
        return ["tegrastats", "--interval", str(INTERVAL_MS)]

    def samples(self, lines: Sequence[Line]) -> list[Sample]:
        """One sample a line."""
        return [sample for line in lines if (sample := parse_line(line)) is not None]

    def whole(self, samples: Sequence[Sample]) -> Whole:
        """See :mod:`phi4edge.measurement.power.tegrastats`."""
        return whole_of(samples)

    def throttled(self, before: State, after: State) -> list[str] | None:
        """By heat where an alert is on afterwards, by current where a counter rose."""
        alerts, events = after.facts["thermal_alerts"], after.facts["over_current_events"]
        if alerts is None and events is None:
            return None
        causes = [f"{name} is on" for name, state in (alerts or {}).items() if state]
        earlier = before.facts["over_current_events"] or {}
        for name, count in (events or {}).items():
            if count > earlier.get(name, count):
                causes.append(f"{count - earlier[name]:.0f} over-current events ({name})")
        return causes


def power_mode(text: str) -> str | None:
    """The name in ``nvpmodel -q``'s answer; the number below it means something else on every module."""
    found = re.search(r"NV Power Mode:\s*(\S.*)", text)
    return found[1].strip() if found else None


def clocks_pinned(text: str) -> bool | None:
    """Whether ``jetson_clocks --show`` has every core and the GPU held at their highest; None: it does not say."""
    pairs = [
        (low, high)
        for state, low, high in re.findall(r"^\s*cpu\d+:(.*?)MinFreq=(\d+) MaxFreq=(\d+)", text, re.MULTILINE)
        if "Online=0" not in state
    ]
    gpus = re.findall(r"^\s*GPU\S*\s+MinFreq=(\d+) MaxFreq=(\d+)", text, re.MULTILINE)
    return all(low == high for low, high in (*pairs, *gpus)) if pairs and gpus else None


def _pinned_in_sysfs(files: Mapping[str, str | None]) -> bool | None:
    gpu = {key: value for name, value in files.items() for key in _GPU.findall(name)}
    cores = clusters(files)
    if not cores or not gpu.get("min_freq") or not gpu.get("max_freq"):
        return None
    return gpu["min_freq"] == gpu["max_freq"] and all(c.floor_mhz == c.limit_mhz is not None for c in cores)


def _alerts(files: Mapping[str, str | None]) -> dict[str, float] | None:
    """The state of every cooling device that stands for throttling; None where there are none."""
    found = {}
    for name, kind in files.items():
        if name.startswith("sys/class/thermal/cooling_device") and name.endswith("/type") and kind:
            state = number(files.get(name[: -len("type")] + "cur_state"))
            if kind.endswith("-alert") and state is not None:
                found[kind] = state
    return found or None


def _events(files: Mapping[str, str | None]) -> dict[str, float] | None:
    found = {
        name.rsplit("/", 1)[1].removesuffix("_event_cnt"): count
        for name, value in files.items()
        if name.endswith("_event_cnt") and (count := number(value)) is not None
    }
    return found or None
