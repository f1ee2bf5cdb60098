"""The number that an answer ends with, in the language that it is written in.

German, Spanish, French and Russian write 1.234,5 or 1 234,5; the other languages of MGSM write 1,234.5. A separator of
thousands stands before exactly three digits; a point before other than three digits is a decimal point everywhere.
Digits of other scripts (bn, te, th, full-width) count as digits.
"""

from __future__ import annotations

__all__ = ["last_number", "same_number"]

import re
import unicodedata
from decimal import Decimal

_DECIMAL_COMMA = ("de", "es", "fr", "ru")
_SPACES = " \u00a0\u2009\u202f"
_SIGN = r"(?P<sign>(?<![\w.,)])[-−])?[$€£¥₹]?"  # a minus behind a digit is a subtraction or a range
_COMMA = re.compile(
    rf"{_SIGN}(?P<whole>\d{{1,3}}(?:\.\d{{3}})+(?!\d)|\d{{1,3}}(?:[{_SPACES}]\d{{3}})+(?!\d)|\d+)(?:[,.](?P<part>\d+))?"
)
_POINT = re.compile(rf"{_SIGN}(?P<whole>\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.(?P<part>\d+))?")


def last_number(text: str, language: str = "en") -> str | None:
    """The last number in ``text`` as ASCII digits with a decimal point, or None."""
    pattern = _COMMA if language in _DECIMAL_COMMA else _POINT
    last = max(pattern.finditer(_ascii_digits(text)), key=lambda found: found.start(), default=None)
    if last is None:
        return None
    whole = re.sub(r"\D", "", last["whole"])
    return ("-" if last["sign"] else "") + whole + (f".{last['part']}" if last["part"] else "")


def _ascii_digits(text: str) -> str:
    return "".join(str(unicodedata.digit(c)) if c.isdecimal() else c for c in text)


def same_number(found: str | None, target: str) -> bool:
    """Whether two numbers of :func:`last_number` are the same: 18 is 18.0."""
    return found is not None and Decimal(found) == Decimal(target)
