"""From samples to energy.

    energy a token = (mean power while decoding − mean power at rest) · seconds of decoding / tokens
    its error      = √(se² of the one mean + se² of the other) · seconds / tokens

The error is that of the two means, with samples taken as independent. Neighbouring ones are not quite: a supply and a
filter stand between the work and the reading, so the true error is somewhat larger.
"""

from __future__ import annotations

__all__ = ["clock_fell", "decode_part", "idle_part"]

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from phi4edge.measurement.power._api import Decoded, Sample, Whole
from phi4edge.measurement.result import Measurement, mean_of

_FEWEST = 5  # samples that a mean of power is given for
_GAP_S = 2.0  # of decoding, at its begin or end, without a sample
_FELL = 0.9


def _power(name: str, samples: Sequence[Sample], whole: Whole) -> Measurement:
    """What the device drew, W; samples that are means over an interval weigh by its length."""
    if not whole.rails:
        return Measurement.missing(name, "W", whole.reason)
    have = [sample for sample in samples if all(rail in sample.rails_mw for rail in whole.rails)]
    if len(have) < _FEWEST:
        return Measurement.missing(name, "W", f"{len(have)} samples of {whole.name}, {_FEWEST} are needed")
    watts = [sum(sample.rails_mw[rail] for rail in whole.rails) / 1000 for sample in have]
    weights = [sample.seconds for sample in have]
    mean = math.fsum(w * s for w, s in zip(watts, weights, strict=True)) / math.fsum(weights)
    return replace(mean_of(name, "W", watts), value=mean)


def _energy(power: Measurement, idle: Measurement, decoded: Decoded | None) -> Measurement:
    name, unit = "energy_j_per_token", "J/token"
    if decoded is None or decoded.tokens < 1 or decoded.seconds <= 0:
        return Measurement.missing(name, unit, "nothing was decoded while the device was watched")
    for each in (power, idle):
        if each.value is None:
            return Measurement.missing(name, unit, str(each.reason))
    assert power.value is not None
    assert idle.value is not None
    if power.value <= idle.value:
        reason = f"{power.value:.2f} W while decoding is not above the {idle.value:.2f} W at rest"
        return Measurement.missing(name, unit, reason)
    scale = decoded.seconds / decoded.tokens
    error = math.hypot(power.se or 0.0, idle.se or 0.0) * scale
    return Measurement(name, (power.value - idle.value) * scale, unit, power.n, error)


def _window(samples: Sequence[Sample], decoded: Decoded | None) -> tuple[list[Sample], str | None]:
    """The samples of the decoding, and why they do not cover it where they do not."""
    if decoded is None:
        return list(samples), None
    begin, end = decoded.ended_s - decoded.seconds, decoded.ended_s
    inside = [sample for sample in samples if begin <= sample.at_s <= end]
    if not inside:
        return [], "no sample came while the device decoded"
    for missed, where in ((inside[0].at_s - begin, "first"), (end - inside[-1].at_s, "last")):
        if missed > _GAP_S:
            return inside, f"no sample came in the {where} {missed:.1f} s of {decoded.seconds:.1f} s of decoding"
    return inside, None


def idle_part(samples: Sequence[Sample], whole: Whole) -> Measurement:
    """The power at rest, W."""
    return _power("idle_power_w", samples, whole)


def decode_part(
    samples: Sequence[Sample], idle: Measurement, decoded: Decoded | None, whole: Whole
) -> tuple[dict[str, Any], list[Sample]]:
    """The part of the document about the decoding, and the samples that it rests on."""
    inside, hole = _window(samples, decoded)
    power = _power("power_w", inside, whole)
    if hole is not None and whole.rails and (power.value is not None or not inside):
        power = Measurement.missing("power_w", "W", hole)
    part: dict[str, Any] = {
        "samples": len(inside),
        "tokens": decoded.tokens if decoded else None,
        "seconds": decoded.seconds if decoded else None,
        "rail": whole.name or None,
        "rail_scope": whole.scope or None,
        "idle_power_w": idle.as_dict(),
        "power_w": power.as_dict(),
        "energy_j_per_token": _energy(power, idle, decoded).as_dict(),
        "rails_mw": {rail: _range([s.rails_mw[rail] for s in inside if rail in s.rails_mw]) for rail in _rails(inside)},
        "peak_temperature_c": max((max(s.temperatures_c.values()) for s in inside if s.temperatures_c), default=None),
    }
    for name, key in (
        ("clock_mhz", "clock_mhz"),
        ("load_percent", "load_percent"),
        ("cpu_percent", "cpu_percent"),
        ("emc_percent", "emc_percent"),
        ("ram_mb", "ram_mb"),
    ):
        values = [value for sample in inside if (value := getattr(sample, key)) is not None]
        part[name] = _range(values)
    return part, inside


def _rails(samples: Sequence[Sample]) -> list[str]:
    return list(dict.fromkeys(rail for sample in samples for rail in sample.rails_mw))


def _range(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values), "n": len(values)}


def clock_fell(samples: Sequence[Sample]) -> str | None:
    """Whether the clock fell under load: the median of the last quarter below 90 % of the first quarter's highest.

    A clock that follows a load of less than 80 % tells nothing, nor do fewer than eight samples.
    """
    clocked = [sample for sample in samples if sample.clock_mhz]
    quarter = len(clocked) // 4
    if quarter < 2:
        return None
    loads = [sample.load_percent for sample in clocked[-quarter:] if sample.load_percent is not None]
    if loads and statistics.median(loads) < 80:
        return None
    first = max(sample.clock_mhz or 0.0 for sample in clocked[:quarter])
    last = statistics.median(sample.clock_mhz or 0.0 for sample in clocked[-quarter:])
    return f"the clock fell from {first:.0f} to {last:.0f} MHz" if last < _FELL * first else None
