"""macOS: what the system says of heat, and of its supply. Not measured on hardware.

Power is what ``powermetrics`` gives, and that needs root, which phi4edge does not ask for.
"""

from __future__ import annotations

__all__ = ["Mac", "speed_limit"]

import re
from collections.abc import Sequence

from phi4edge.measurement.power._api import Line, Sample, State, Whole
from phi4edge.measurement.power._ask import ask
from phi4edge.transports._api import Device

_NO_POWER = "powermetrics needs root"


class Mac:
    """See :class:`phi4edge.measurement.power._api.Platform`."""

    source = "pmset"
    note = "macOS's readings are not measured on hardware"

    def __init__(self, device: Device) -> None:
        self._device = device

    def state(self) -> State:
        """The thermal limit and the supply."""
        therm, batt = ask(self._device, "pmset", "-g", "therm"), ask(self._device, "pmset", "-g", "batt")
        limit = speed_limit(therm.text or "")
        supply = re.search(r"drawing from '(AC|Battery) Power'", batt.text or "")
        missing = {"temperature_c": "macOS shows no temperature without root"}
        if limit is None:
            missing["cpu_speed_limit_percent"] = therm.reason or "pmset names no limit"
        if supply is None:
            missing["supply"] = batt.reason or "pmset names no supply"
        facts = {
            "cpu_speed_limit_percent": limit,
            "supply": {"AC": "AC", "Battery": "battery"}[supply[1]] if supply else None,
        }
        return State(facts, missing)

    def has_power(self) -> bool:
        """Never."""
        return False

    def command(self) -> Sequence[str] | str:
        """Nothing."""
        return _NO_POWER

    def samples(self, lines: Sequence[Line]) -> list[Sample]:
        """None."""
        return []

    def whole(self, samples: Sequence[Sample]) -> Whole:
        """None."""
        return Whole(reason=_NO_POWER)

    def throttled(self, before: State, after: State) -> list[str] | None:
        """Where the system holds the cores below their speed."""
        limit = after.facts["cpu_speed_limit_percent"]
        if limit is None:
            return None
        return [f"macOS holds the cores at {limit:.0f} % of their speed"] if limit < 100 else []


def speed_limit(text: str) -> float | None:
    """The limit in ``pmset -g therm``'s answer, percent; a machine that never was limited only says so in words."""
    found = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", text)
    if found:
        return float(found[1])
    return 100.0 if "No thermal warning level has been recorded" in text else None
