"""TOML that people write, read strictly: an unknown key, a wrong type or a missing value says where and what instead.

:func:`read_toml` gives the document, :class:`Table` its values by name and type. Every message begins with the
file and the position in it (``phone.toml: runtimes[2].schemes``).
"""

from __future__ import annotations

__all__ = ["Table", "read_toml"]

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from phi4edge.core.errors import InputError, closest

_WORDS = {str: "a string", bool: "true or false", int: "a whole number", float: "a number"}
_FOUND = _WORDS | {list: "a list", dict: "a table"}


def _kind(value: object) -> str:
    return _FOUND.get(type(value), f"a {type(value).__name__}")


def read_toml(path: Path) -> dict[str, Any]:
    """The TOML document in ``path``.

    Raises:
        InputError: the file is missing, unreadable, or not TOML (the parser's line and column are given).
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML ({error})") from error


class Table:
    """One table of a TOML document whose keys are all known beforehand."""

    def __init__(self, data: Mapping[str, Any], known: Iterable[str], file: str, position: str = "") -> None:
        """Raises InputError when ``data`` has a key that is not in ``known``; the closest one is offered."""
        self.data, self.file, self.position = data, file, position
        allowed = tuple(known)
        for key in data:
            if key not in allowed:
                near = closest(key, allowed)
                hint = f"did you mean {near!r}?" if near else f"known keys: {', '.join(allowed)}"
                raise InputError(f"{self.where(key)}: unknown key", hint)

    def where(self, key: str = "") -> str:
        """``file: position.key``, the way every message names a place."""
        place = ".".join(part for part in (self.position, key) if part)
        return f"{self.file}: {place}" if place else self.file

    def __contains__(self, key: str) -> bool:
        return key in self.data

    def _raw(self, key: str, expected: str) -> Any:
        if key not in self.data:
            raise InputError(f"{self.where(key)}: missing, expected {expected}")
        return self.data[key]

    def string(self, key: str, default: str | None = None) -> str:
        """A string that is not empty; ``default`` (when given) where the key is absent."""
        if default is not None and key not in self.data:
            return default
        value = self._raw(key, "a string")
        if not isinstance(value, str):
            raise InputError(f"{self.where(key)}: is {_kind(value)}, expected a string")
        if not value.strip():
            raise InputError(f"{self.where(key)}: is empty, expected a string")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.data.get(key, default)
        if not isinstance(value, bool):
            raise InputError(f"{self.where(key)}: is {_kind(value)}, expected true or false")
        return value

    def number(self, key: str, *, least: float = 0.0, most: float = math.inf) -> float:
        """A finite number above ``least`` and at most ``most``."""
        value = self._raw(key, "a number")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{self.where(key)}: is {_kind(value)}, expected a number")
        if not (math.isfinite(value) and least < value <= most):
            limit = f"above {least:g}" + (f" and at most {most:g}" if math.isfinite(most) else "")
            raise InputError(f"{self.where(key)}: is {value:g}, expected a number {limit}")
        return float(value)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number above zero."""
        if default is not None and key not in self.data:
            return default
        value = self._raw(key, "a whole number")
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{self.where(key)}: is {_kind(value)}, expected a whole number")
        if value <= 0:
            raise InputError(f"{self.where(key)}: is {value}, expected a whole number above 0")
        return value

    def choice(self, key: str, allowed: Sequence[str], default: str | None = None) -> str:
        """One word out of ``allowed``; the closest one is offered for another."""
        return self._allowed(key, self.string(key, default), allowed)

    def strings(
        self,
        key: str,
        allowed: Sequence[str] | None = None,
        default: Sequence[str] | None = None,
        *,
        repeated: bool = False,
    ) -> list[str]:
        """A list of strings, without repetition unless ``repeated``, each out of ``allowed`` when that is given."""
        if default is not None and key not in self.data:
            return list(default)
        values = self._raw(key, "a list of strings")
        if not isinstance(values, list):
            raise InputError(f"{self.where(key)}: is {_kind(values)}, expected a list of strings")
        for index, value in enumerate(values):
            if not isinstance(value, str) or not value.strip():
                raise InputError(
                    f"{self.where(f'{key}[{index}]')}: is {_kind(value)}, expected a string with words in it"
                )
            if value in values[:index] and not repeated:
                raise InputError(f"{self.where(key)}: names {value!r} twice")
            if allowed is not None:
                self._allowed(f"{key}[{index}]", value, allowed)
        return values

    def tables(self, key: str, known: Iterable[str], *, required: bool = False) -> list[Table]:
        """The tables of ``[[key]]``, none when it is absent and not ``required``."""
        values = self._raw(key, f"one or more [[{key}]] tables") if required else self.data.get(key, [])
        if not isinstance(values, list) or (required and not values):
            raise InputError(f"{self.where(key)}: is {_kind(values)}, expected one or more [[{key}]] tables")
        allowed = tuple(known)
        return [self._table(f"{key}[{index}]", value, allowed) for index, value in enumerate(values)]

    def table(self, key: str, known: Iterable[str]) -> Table:
        """The table under ``key``."""
        return self._table(key, self._raw(key, "a table"), tuple(known))

    def _table(self, key: str, value: Any, known: tuple[str, ...]) -> Table:
        if not isinstance(value, dict):
            raise InputError(f"{self.where(key)}: is {_kind(value)}, expected a table")
        return Table(value, known, self.file, ".".join(part for part in (self.position, key) if part))

    def _allowed(self, key: str, value: str, allowed: Sequence[str]) -> str:
        if value not in allowed:
            near = closest(value, allowed)
            hint = f"did you mean {near!r}? " if near else ""
            raise InputError(f"{self.where(key)}: {value!r} is not known", f"{hint}known: {', '.join(allowed)}")
        return value
