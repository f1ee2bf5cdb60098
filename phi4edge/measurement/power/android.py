"""Android, over adb, without root: SoC, clusters, battery, thermal status. Not measured on hardware.

Power is current_now · voltage_now of the battery, and only where the shell may read them and nothing charges the phone:
on a cable the current is the charger's business as well. The fuel gauge may renew its reading more seldom than it is
asked for it, so that samples repeat themselves and the error of their mean is too small.
"""

from __future__ import annotations

__all__ = ["THERMAL_STATUS", "Android", "battery", "thermal_status"]

import re
from collections.abc import Mapping, Sequence
from typing import Any

from phi4edge.measurement.power._api import Line, Sample, State, Whole
from phi4edge.measurement.power._ask import ask, first_lines, loop, number, shell
from phi4edge.measurement.power.clusters import PATTERNS, big_cores, clusters
from phi4edge.transports._api import Device

THERMAL_STATUS = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
_STATUS = {1: "unknown", 2: "charging", 3: "discharging", 4: "not charging", 5: "full"}  # BatteryManager's numbers
_PROPERTIES = {
    "soc": "ro.soc.model",
    "soc_maker": "ro.soc.manufacturer",
    "platform": "ro.board.platform",
    "model": "ro.product.model",
    "android": "ro.build.version.release",
}
_BATTERY = "sys/class/power_supply/battery"
_INTERVAL_S = 0.5
_LEAST_UA = 20_000  # a phone that decodes draws amperes: less is a reading in mA


class Android:
    """See :class:`phi4edge.measurement.power._api.Platform`."""

    source = "battery"
    note = "Android's readings are not measured on hardware"

    def __init__(self, device: Device, root: str = "/") -> None:
        self._device, self._root = device, root
        self._watched: list[str] = []
        self._charging = "the phone was not asked"

    def state(self) -> State:
        """What the phone is, and how warm and how full it is."""
        missing: dict[str, str] = {}
        script = 'for p in "$@"; do echo "$p=$(getprop "$p")"; done'
        said = shell(self._device, script, *_PROPERTIES.values(), name="getprop")
        values = dict(line.split("=", 1) for line in (said.text or "").splitlines() if "=" in line)
        facts: dict[str, Any] = {}
        for fact, name in _PROPERTIES.items():
            facts[fact] = values.get(name) or None
            if facts[fact] is None:
                missing[fact] = said.reason or f"{name} is empty"
        self._cores(facts, missing)
        cells = ask(self._device, "dumpsys", "battery")
        facts |= battery(cells.text or "")
        missing |= {n: cells.reason or "dumpsys battery does not say" for n in battery("") if facts[n] is None}
        heat = ask(self._device, "dumpsys", "thermalservice")
        facts["thermal_status"] = thermal_status(heat.text or "")
        if facts["thermal_status"] is None:
            missing["thermal_status"] = heat.reason or "dumpsys thermalservice names no status"
        self._charging = _charging(facts)
        temperature = facts["battery_temperature_c"]
        return State(facts, missing, facts["governor"], "battery" if temperature is not None else None, temperature)

    def _cores(self, facts: dict[str, Any], missing: dict[str, str]) -> None:
        current = "sys/devices/system/cpu/cpufreq/policy*/scaling_cur_freq"
        meters = (f"{_BATTERY}/current_now", f"{_BATTERY}/voltage_now", current)
        files = first_lines(self._device, self._root, (*PATTERNS, *meters))
        found = clusters(files)
        big = big_cores(found)
        governors = sorted({cluster.governor for cluster in found if cluster.governor})
        facts["clusters"] = [cluster.as_dict() for cluster in found]
        facts["governor"] = f"governor {'/'.join(governors)}" if governors else None
        facts["big_core_mask"], facts["big_core_rule"] = big.mask, big.rule
        if not governors:
            missing["governor"] = "the shell may not read cpufreq"
        readable = [name for name in files if number(files[name]) is not None]
        power = [name for name in meters[:2] if name in readable]
        self._watched = power if len(power) == 2 else []
        self._watched += [name for name in readable if name.endswith("scaling_cur_freq")]

    def has_power(self) -> bool:
        """Where nothing charges the phone and its meters can be read."""
        return not self._charging and f"{_BATTERY}/current_now" in self._watched

    def command(self) -> Sequence[str] | str:
        """A loop over the battery's meters and the clocks, two lines a second."""
        if not self._watched:
            return "the shell may read neither the battery's current nor the clocks"
        return loop(self._root, self._watched, _INTERVAL_S)

    def samples(self, lines: Sequence[Line]) -> list[Sample]:
        """Power and the fastest core's clock, one sample a line."""
        samples = []
        for line in lines:
            values = [number(word) for word in line.text.split()]
            if len(values) != len(self._watched):
                continue
            found = dict(zip(self._watched, values, strict=True))
            current, voltage = found.get(f"{_BATTERY}/current_now"), found.get(f"{_BATTERY}/voltage_now")
            clocks = [v for name, v in found.items() if name.endswith("scaling_cur_freq") and v is not None]
            rails = {}
            if current is not None and voltage is not None and abs(current) >= _LEAST_UA:
                rails["battery"] = abs(current) * voltage / 1e9  # µA · µV; makers differ in the sign
            if rails or clocks:
                samples.append(Sample(line.at_s, rails, clock_mhz=max(clocks) / 1000 if clocks else None))
        return samples

    def whole(self, samples: Sequence[Sample]) -> Whole:
        """The battery, while nothing charges it."""
        if self._charging:
            return Whole(reason=self._charging)
        if f"{_BATTERY}/current_now" not in self._watched:
            return Whole(reason="the shell may not read the battery's current_now and voltage_now")
        if not any(sample.rails_mw for sample in samples):
            return Whole(reason=f"current_now stays below {_LEAST_UA} µA: it is no current of a phone at work in µA")
        return Whole(("battery",), "battery", "the whole phone, its display too")

    def throttled(self, before: State, after: State) -> list[str] | None:
        """By the thermal status, or by a cap on a cluster's clock."""
        status = after.facts["thermal_status"]
        if status is None and not after.facts["clusters"]:
            return None
        return ([f"thermal status {status}"] if status not in (None, "none") else []) + _caps(after)


def _caps(state: State) -> list[str]:
    return [
        f"cores {', '.join(map(str, cluster['cpus']))} are capped at {cluster['limit_mhz']:.0f} of "
        f"{cluster['max_mhz']:.0f} MHz"
        for cluster in state.facts["clusters"]
        if cluster["limit_mhz"] and cluster["max_mhz"] and cluster["limit_mhz"] < cluster["max_mhz"]
    ]


def _charging(facts: Mapping[str, Any]) -> str:
    """Why the battery's current is not what the phone draws; "" where it is."""
    if facts["battery_powered_by"]:
        return f"the phone is on {', '.join(facts['battery_powered_by'])}: its battery's current is not what it draws"
    if facts["battery_status"] != "discharging":
        return f"the battery is {facts['battery_status'] or 'in an unknown state'}, not discharging"
    return ""


def battery(text: str) -> dict[str, Any]:
    """``dumpsys battery``: level, status, °C, V, and what powers the phone."""

    def value(key: str) -> float | None:
        found = re.search(rf"^\s*{key}: (-?\d+)\s*$", text, re.MULTILINE)  # not "Max charging voltage"
        return float(found[1]) if found else None

    level, scale, status = value("level"), value("scale"), value("status")
    tenths, volts = value("temperature"), value("voltage")
    powered = re.findall(r"^\s*(\w+) powered: true\s*$", text, re.MULTILINE)
    return {
        "battery_percent": level * 100 / scale if level is not None and scale else level,
        "battery_status": _STATUS.get(int(status)) if status is not None else None,
        "battery_temperature_c": None if tenths is None else tenths / 10,
        "battery_voltage_v": None if not volts else volts / 1000,
        "battery_powered_by": powered if "powered:" in text else None,
    }


def thermal_status(text: str) -> str | None:
    """``dumpsys thermalservice``: the status in Android's word."""
    found = re.search(r"Thermal Status: (\d+)", text)
    return THERMAL_STATUS[int(found[1])] if found and int(found[1]) < len(THERMAL_STATUS) else None
