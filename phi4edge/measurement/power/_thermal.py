"""Thermal zones and hwmon sensors, as Linux shows them."""

from __future__ import annotations

__all__ = ["HWMON", "ZONES", "hwmon", "zones"]

from collections.abc import Mapping, Sequence

from phi4edge.measurement.power._ask import number

ZONES = tuple(f"sys/class/thermal/thermal_zone*/{key}" for key in ("type", "temp"))
HWMON = tuple(f"sys/class/hwmon/hwmon*/{key}" for key in ("name", "temp1_input"))
_PROCESSORS = ("cpu", "gpu", "soc", "tj", "pkg")  # a zone of a processor: a PMIC's may be a constant of 100 °C


def zones(
    files: Mapping[str, str | None], preferred: Sequence[str]
) -> tuple[str | None, float | None, dict[str, float]]:
    """The zone that stands for the device, its °C, and all zones: the first preferred, else the hottest processor."""
    found: dict[str, float] = {}
    for name, kind in files.items():
        if name.startswith("sys/class/thermal/thermal_zone") and name.endswith("/type") and kind:
            milli = number(files.get(name[: -len("type")] + "temp"))
            if milli is not None and -100_000 < milli < 200_000:
                found[kind] = milli / 1000
    for kind in preferred:
        if kind in found:
            return kind, found[kind], found
    processors = {kind: value for kind, value in found.items() if any(word in kind.lower() for word in _PROCESSORS)}
    hottest = max(processors, key=lambda kind: processors[kind], default=None)
    return hottest, processors[hottest] if hottest else None, found


def hwmon(files: Mapping[str, str | None], drivers: Sequence[str]) -> tuple[str | None, float | None]:
    """The first sensor of one of ``drivers`` (coretemp, k10temp), °C."""
    for name, driver in files.items():
        if name.startswith("sys/class/hwmon/hwmon") and name.endswith("/name") and driver in drivers:
            milli = number(files.get(name[: -len("name")] + "temp1_input"))
            if milli is not None:
                return driver, milli / 1000
    return None, None
