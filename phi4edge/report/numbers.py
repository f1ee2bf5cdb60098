"""Figures as they are printed: four significant digits, three where the standard error is above 5 % of the value.

A value and its error end at the same decimal place. Digits beyond the error stay, because figures of one column share
their text and differ by less than each one's error. Whole thousands are written out; below 0.001 there is an exponent.
"""

from __future__ import annotations

__all__ = ["Figure", "figure", "mebibytes", "plain", "with_error"]

from dataclasses import dataclass

MINUS = "\u2212"
_SMALL = 1e-3  # below this a value is written with an exponent
_LOOSE = 0.05  # relative error above which the fourth digit goes


@dataclass(frozen=True)
class Figure:
    """A printed value and its printed standard error, empty where there is none."""

    value: str
    se: str = ""

    def __str__(self) -> str:
        return f"{self.value} ± {self.se}" if self.se else self.value


def _exponent(value: float) -> int:
    """Of the first significant digit, after rounding to four."""
    return int(f"{abs(value):.3e}".split("e")[1])


def _fixed(value: float, decimals: int) -> str:
    text = f"{value:,.{max(decimals, 0)}f}"
    return text.replace("-", MINUS) if float(text.replace(",", "")) else text.lstrip("-")


def _scientific(value: float, exponent: int, decimals: int) -> str:
    return f"{_fixed(value / 10.0**exponent, decimals)}e{MINUS if exponent < 0 else ''}{abs(exponent)}"


def _error(se: float, decimals: int) -> str:
    """An error at ``decimals``, or with one digit of its own where that would read 0."""
    text = _fixed(se, decimals)
    if float(text.replace(",", "")):
        return text
    digit, exponent = (int(part) for part in f"{se:.0e}".split("e"))
    return _scientific(digit * 10.0**exponent, exponent, 0) if se < _SMALL / 10 else _fixed(se, -exponent)


def figure(value: float, se: float | None = None) -> Figure:
    """``value`` and ``se`` as they are printed together."""
    exponent = _exponent(value)
    decimals = 3 - exponent
    if se and abs(value) < se:
        decimals = 1 - _exponent(se)
    elif se and se > _LOOSE * abs(value):
        decimals -= 1
    if value and abs(value) < _SMALL and not (se and se >= _SMALL):
        error = "" if se is None else _scientific(se, _exponent(se), 1) if se else "0"
        return Figure(_scientific(value, exponent, max(decimals + exponent, 0)), error)
    error = "" if se is None else _error(se, decimals) if se else "0"
    return Figure(_fixed(value, decimals) if value else "0", error)


def plain(value: float) -> str:
    """A value without an error."""
    return figure(value).value


def with_error(value: float, se: float | None) -> str:
    """``value ± se`` in a sentence, ``value`` alone where no error is known."""
    return str(figure(value, se))


def mebibytes(count: float) -> str:
    """Bytes in MiB."""
    return plain(count / 2**20)
