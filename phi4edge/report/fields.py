"""Typed access to a JSON document, where every complaint names the file and the key.

``report.json: data.metrics.kld.value: is a string, expected a number``. Keys that nobody asks for are left alone: a
document may hold more than a report shows.
"""

from __future__ import annotations

__all__ = ["Field", "Metric", "parse_json", "read_metric"]

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from phi4edge.core.errors import InputError

_WORDS = {str: "a string", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def parse_json(text: str, file: str) -> Any:
    """The JSON value of ``text``; NaN and Infinity, which JSON does not have, are refused.

    Raises:
        InputError: not JSON; line and column are given.
    """

    def refuse(word: str) -> NoReturn:
        raise InputError(f"{file}: holds {word}, which is not a JSON number", "a missing value is null with a reason")

    try:
        return json.loads(text, parse_constant=refuse)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON ({error})", "the file may be cut off; make it again") from error


class Field:
    """One value of a document, with the place where it stands."""

    def __init__(self, value: Any, file: str, key: str = "") -> None:
        self.value, self.file, self.key = value, file, key

    def fail(self, what: str) -> NoReturn:
        """Raise InputError about this place."""
        raise InputError(f"{self.file}: {self.key}: {what}" if self.key else f"{self.file}: {what}")

    def _expected(self, words: str) -> NoReturn:
        found = "null" if self.value is None else _WORDS.get(type(self.value), f"a {type(self.value).__name__}")
        self.fail(f"is {found}, expected {words}")

    def object(self) -> dict[str, Any]:
        """The value, an object."""
        if not isinstance(self.value, dict):
            self._expected("an object")
        return self.value

    def __getitem__(self, key: str) -> Field:
        found = self.get(key)
        if found is None:
            state = "is null" if key in self.object() else "is missing"
            Field(None, self.file, self._inner(key)).fail(f"{state}, expected a value")
        return found

    def get(self, key: str) -> Field | None:
        """The value under ``key``, None where it is absent or null."""
        value = self.object().get(key)
        return None if value is None else Field(value, self.file, self._inner(key))

    def _inner(self, key: str) -> str:
        return f"{self.key}.{key}" if self.key else key

    def entries(self) -> Iterator[tuple[str, Field]]:
        """Names and values of an object, nulls included."""
        for key, value in self.object().items():
            yield key, Field(value, self.file, self._inner(key))

    def items(self) -> list[Field]:
        """The values of a list."""
        if not isinstance(self.value, list):
            self._expected("a list")
        return [Field(value, self.file, f"{self.key}[{i}]") for i, value in enumerate(self.value)]

    def text(self) -> str:
        """A string that is not empty."""
        if not isinstance(self.value, str):
            self._expected("a string")
        if not self.value.strip():
            self.fail("is empty, expected a string")
        return self.value

    def number(self, least: float = -math.inf) -> float:
        """A finite number, at least ``least``."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            self._expected("a number")
        if not (math.isfinite(self.value) and self.value >= least):
            limit = "a finite number" if math.isinf(least) else f"a number of at least {least:g}"
            self.fail(f"is {self.value:g}, expected {limit}")
        return float(self.value)

    def integer(self, least: int = 0) -> int:
        """A whole number, at least ``least``."""
        if isinstance(self.value, bool) or not isinstance(self.value, int):
            self._expected("a whole number")
        if self.value < least:
            self.fail(f"is {self.value}, expected a whole number of at least {least}")
        return self.value


@dataclass(frozen=True)
class Metric:
    """A measured value with what is known of its error, or the reason why there is none."""

    value: float | None
    unit: str | None = None
    n: int | None = None  # observations behind the value
    se: float | None = None  # standard error, in the unit of the value
    samples: tuple[float, ...] = ()  # raw repetitions
    reason: str | None = None  # why the value is missing
    median: float | None = None  # of the samples

    @classmethod
    def missing(cls, reason: str) -> Metric:
        """A value that was not measured."""
        return cls(None, reason=reason)

    def percent(self) -> Metric:
        """A share as a percentage, whichever way the result gives it."""
        if self.value is None or self.unit in ("%", "percent"):
            return self
        return Metric(self.value * 100, "%", self.n, None if self.se is None else self.se * 100)


def read_metric(field: Field) -> Metric:
    """A metric: a bare number, or ``{"value", "unit", "n", "se", "samples"}``, or ``{"value": null, "reason"}``."""
    if field.value is None:
        return Metric.missing("no reason given")
    if not isinstance(field.value, dict):
        return Metric(field.number())
    if "value" not in field.value:
        field["value"].fail("is missing")
    unit = field.get("unit")
    value, n, se, samples = field.get("value"), field.get("n"), field.get("se"), field.get("samples")
    reason, median = field.get("reason"), field.get("median")
    return Metric(
        value=value.number() if value else None,
        unit=unit.text() if unit and unit.value != "" else None,
        n=n.integer() if n else None,
        se=se.number(0.0) if se else None,
        samples=tuple(_numbers(samples)) if samples else (),
        reason=None if value else (reason.text() if reason else "no reason given"),
        median=median.number() if median else None,
    )


def _numbers(field: Field) -> Iterator[float]:
    """The numbers of a list, or of a list of lists (token times by repetition), in order."""
    for item in field.items():
        if isinstance(item.value, list):
            yield from _numbers(item)
        else:
            yield item.number()
