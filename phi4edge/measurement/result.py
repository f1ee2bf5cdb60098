"""A measured value: number, unit, how many observations, standard error, samples; or no number and why not."""

from __future__ import annotations

__all__ = ["Measurement", "mean_of"]

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """One value with its error. Either ``value`` is a finite number, or it is None and ``reason`` says why."""

    name: str
    value: float | None
    unit: str  # "nat", "fraction", "token/s", "s", "byte"; "1" for a plain number
    n: int  # observations that the value was made of
    se: float | None = None  # standard error of the value, same unit; None where there is none to give
    samples: tuple[float, ...] = ()  # raw, in order, where there are few enough to keep
    reason: str | None = None
    median: float | None = None  # of the samples

    def __post_init__(self) -> None:
        """A missing value is told from a measured one."""
        assert (self.value is None) == (self.reason is not None), f"{self.name}: a value or a reason, not both"
        assert self.value is None or math.isfinite(self.value), f"{self.name} is {self.value}"

    @classmethod
    def missing(cls, name: str, unit: str, reason: str) -> Measurement:
        """A value that was not measured."""
        return cls(name, None, unit, 0, reason=reason)

    def as_dict(self) -> dict[str, Any]:
        """The JSON form; the name is the key that it stands under."""
        document: dict[str, Any] = {"value": self.value, "unit": self.unit, "n": self.n, "se": self.se}
        if self.median is not None:
            document["median"] = self.median
        if self.samples:
            document["samples"] = list(self.samples)
        if self.reason is not None:
            document["reason"] = self.reason
        return document

    @classmethod
    def from_dict(cls, name: str, document: Mapping[str, Any]) -> Measurement:
        """The measurement that :meth:`as_dict` wrote."""
        return cls(
            name,
            document["value"],
            document["unit"],
            document["n"],
            document["se"],
            tuple(document.get("samples", ())),
            document.get("reason"),
            document.get("median"),
        )


def mean_of(name: str, unit: str, samples: Sequence[float]) -> Measurement:
    """The mean of ``samples`` (at least one) with its standard error s/√n, their median, and all of them."""
    n = len(samples)
    return Measurement(
        name,
        statistics.fmean(samples),
        unit,
        n,
        statistics.stdev(samples) / math.sqrt(n) if n > 1 else None,
        tuple(samples),
        median=statistics.median(samples),
    )
