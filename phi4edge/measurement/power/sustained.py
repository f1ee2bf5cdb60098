"""Cold and sustained speed: generations that follow each other without a break, until the device has settled.

    first     what a person gets who asks one question
    settled   the longest run of samples at the end, of at least three, in which each lies within 5 % of their median
    cold      the samples before that run; where the run is all there is, nothing was lost to heat

A phone starts with its battery at 38 to 43 °C, as it lies in a hand that uses it; another start is not wrong, and is
told. Phones lose up to half of their speed within minutes, so a figure that names neither is of no use.
"""

from __future__ import annotations

__all__ = ["RULE", "START_RANGE_C", "repetitions_for", "settled_from", "sustained_of", "sustained_text"]

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from phi4edge.core.errors import UsageError
from phi4edge.measurement.result import Measurement, mean_of

START_RANGE_C = (38.0, 43.0)
_FEWEST, _WITHIN = 3, 0.05
RULE = "settled: the longest run of at least 3 samples at the end, each within 5 % of their median; cold: those before"


def sustained_of(bench: Mapping[str, Any], asked_s: float) -> dict[str, Any]:
    """Cold and settled decode speed from a bench document whose generations followed each other without a break.

    ``asked_s`` is for how long; temperatures are the sampler's, before the first generation and after the last.
    """
    decode, gen_tokens = bench["metrics"]["decode_tps"], bench["settings"]["gen_tokens"]
    values = list(decode["samples"])
    at_s = list(accumulate(gen_tokens / value for value in values))
    heat = (bench.get("power") or {}).get("temperature_c") or {}
    begin_c = heat.get("before")
    tail = settled_from(values)
    first = Measurement("first", values[0], "token/s", 1)
    if tail is None:
        reason = f"{len(values)} generations in {at_s[-1]:.0f} s did not settle: repeat for longer"
        settled = Measurement.missing("settled", "token/s", reason)
        cold = Measurement.missing("cold", "token/s", reason)
    else:
        settled = mean_of("settled", "token/s", values[tail:])
        cold = mean_of("cold", "token/s", values[:tail] or values[:1])
    return {
        "metric": "decode_tps",
        "rule": RULE,
        "asked_s": asked_s,
        "sensor": heat.get("sensor"),
        "start_temperature_c": begin_c,
        "end_temperature_c": heat.get("after"),
        "start_range_c": list(START_RANGE_C),
        "start_in_range": None if begin_c is None else START_RANGE_C[0] <= begin_c <= START_RANGE_C[1],
        "samples": [{"at_s": at, "value": value} for at, value in zip(at_s, values, strict=True)],
        "first": first.as_dict(),
        "cold": cold.as_dict(),
        "settled": settled.as_dict(),
        "settled_after_s": None if tail is None else at_s[tail - 1] if tail else 0.0,
        "settled_to_first": None if settled.value is None else settled.value / values[0],
    }


def repetitions_for(seconds: float, bench: Mapping[str, Any]) -> int:
    """How many generations of ``bench`` take about ``seconds``; at least three.

    Raises:
        UsageError: it measured none.
    """
    speed = bench["metrics"]["decode_tps"].get("median")
    if not speed:
        raise UsageError("--sustained repeats a generation, and none was asked for", "give --gen-tokens")
    return max(_FEWEST, math.ceil(seconds * float(speed) / int(bench["settings"]["gen_tokens"])))


def sustained_text(found: Mapping[str, Any]) -> str:
    """One line: ``"sustained: first 10.0, settled 6.0 tok/s (60 % of the first) after 34 s; 39 → 44 °C (battery)"``."""
    settled = found["settled"]
    words = f"sustained: first {found['first']['value']:.2f}, "
    if settled["value"] is None:
        words += f"not settled ({settled['reason']})"
    else:
        share = 100 * found["settled_to_first"]
        words += (
            f"settled {settled['value']:.2f} tok/s ({share:.0f} % of the first) after {found['settled_after_s']:.0f} s"
        )
    if found["start_temperature_c"] is not None and found["end_temperature_c"] is not None:
        words += f"; {found['start_temperature_c']:.0f} → {found['end_temperature_c']:.0f} °C ({found['sensor']})"
    if found["start_in_range"] is False and found["sensor"] == "battery":
        words += "; the battery did not start at 38 to 43 °C"
    return words


def settled_from(values: Sequence[float]) -> int | None:
    """Where the settled run begins, or None where there is none."""
    for begin in range(len(values) - _FEWEST + 1):
        run = values[begin:]
        middle = statistics.median(run)
        if all(abs(value - middle) <= _WITHIN * abs(middle) for value in run):
            return begin
    return None
