"""Cold and sustained speed: one measurement repeated until the device has settled, or the time is over.

    first     what a person gets who asks one question
    settled   the longest run of samples at the end, of at least three, in which each lies within 5 % of their median
    cold      the samples before that run; where the run is all there is, nothing was lost to heat

A phone starts with its battery at 38 to 43 °C, as it lies in a hand that uses it; another start is not wrong, and is
told. Phones lose up to half of their speed within minutes, so a figure that names neither is of no use.
"""

from __future__ import annotations

__all__ = ["RULE", "START_RANGE_C", "run_sustained", "settled_from"]

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from phi4edge.measurement.result import Measurement, mean_of

START_RANGE_C = (38.0, 43.0)
_FEWEST, _WITHIN = 3, 0.05
RULE = "settled: the longest run of at least 3 samples at the end, each within 5 % of their median; cold: those before"


def run_sustained(
    measure: Callable[[], float],
    *,
    seconds: float,
    name: str = "decode_tps",
    unit: str = "token/s",
    temperature: Callable[[], float | None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Call ``measure`` again and again for ``seconds``, at least once; the JSON object of what it gave.

    ``measure`` returns one value in ``unit``, more is faster; ``temperature`` the battery's °C, or None. An error of
    theirs is the caller's.
    """
    start, begin_c = clock(), temperature()
    samples: list[dict[str, float | None]] = []
    values: list[float] = []
    while not values or clock() - start < seconds:
        values.append(measure())
        samples.append({"at_s": clock() - start, "value": values[-1], "temperature_c": temperature()})
    tail = settled_from(values)
    first = Measurement("first", values[0], unit, 1)
    if tail is None:
        reason = f"{len(values)} samples did not settle in {seconds:g} s: repeat for longer"
        settled = Measurement.missing("settled", unit, reason)
        cold = Measurement.missing("cold", unit, reason)
    else:
        settled = mean_of("settled", unit, values[tail:])
        cold = mean_of("cold", unit, values[:tail] or values[:1])
    return {
        "metric": name,
        "rule": RULE,
        "asked_s": seconds,
        "start_temperature_c": begin_c,
        "start_range_c": list(START_RANGE_C),
        "start_in_range": None if begin_c is None else START_RANGE_C[0] <= begin_c <= START_RANGE_C[1],
        "samples": samples,
        "first": first.as_dict(),
        "cold": cold.as_dict(),
        "settled": settled.as_dict(),
        "settled_after_s": None if tail is None else samples[tail - 1]["at_s"] if tail else 0.0,
        "settled_to_first": None if settled.value is None or not values[0] else settled.value / values[0],
    }


def settled_from(values: Sequence[float]) -> int | None:
    """Where the settled run begins, or None where there is none."""
    for begin in range(len(values) - _FEWEST + 1):
        run = values[begin:]
        middle = statistics.median(run)
        if all(abs(value - middle) <= _WITHIN * abs(middle) for value in run):
            return begin
    return None
