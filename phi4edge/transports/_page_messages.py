"""What the page in a browser says, read and checked: nothing that comes from there is believed as it is.

    POST /say/KIND       one JSON object of the kinds below, at most 256 KiB
    POST /row/C/P        the probabilities of position P of chunk C, float32 little-endian, one a token

A page that is loaded anew says ``hello`` again, and everything starts over.
"""

from __future__ import annotations

__all__ = [
    "ROW",
    "Decoded",
    "Done",
    "Failed",
    "Gone",
    "Hello",
    "Loaded",
    "Message",
    "NonsenseError",
    "Prefilled",
    "Row",
    "Status",
    "read_message",
]

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROW = re.compile(r"/row/(\d{1,6})/(\d{1,7})")
_TEXT = 2000  # characters of one text
_LONGEST_S = 24 * 3600.0


class NonsenseError(ValueError):
    """Not a message of this protocol; the text says why."""


@dataclass(frozen=True)
class Hello:
    """A page was opened; ``facts`` are what its browser tells of the device."""

    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Status:
    """What the page is doing, in words; ``done`` of ``total`` (0: it cannot say)."""

    text: str
    done: int
    total: int


@dataclass(frozen=True)
class Loaded:
    """The model is in WebAssembly's memory and has a context."""

    transfer_s: float  # from the first request for the file to its last byte
    load_s: float  # model and context, from there on
    transferred: int  # bytes of the file that arrived
    threads: int
    info: Mapping[str, Any]  # sizes and settings, as wllama tells them
    log: tuple[str, ...]  # what llama.cpp said


@dataclass(frozen=True)
class Prefilled:
    """One repetition of the prompt, seconds."""

    prefill_s: float
    ttft_s: float


@dataclass(frozen=True)
class Decoded:
    """One repetition of the generation, seconds a token."""

    token_s: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """The model's distribution behind position ``position`` of chunk ``chunk``."""

    chunk: int
    position: int
    probabilities: bytes  # [vocab] float32, little-endian


@dataclass(frozen=True)
class Failed:
    """The page gave up."""

    message: str


@dataclass(frozen=True)
class Gone:
    """The page was closed."""


@dataclass(frozen=True)
class Done:
    """Everything was measured; ``hidden`` times it was not on the screen meanwhile."""

    hidden: int


Message = Hello | Status | Loaded | Prefilled | Decoded | Row | Failed | Gone | Done


def read_message(kind: str, body: bytes) -> Message:
    """The message of ``kind`` in ``body``.

    Raises:
        NonsenseError: it is none.
    """
    try:
        said = json.loads(body or b"{}")
    except ValueError as error:  # not UTF-8, or not JSON
        raise NonsenseError("the body is not JSON") from error
    except RecursionError as error:
        raise NonsenseError("the body is too deep") from error
    if not isinstance(said, dict):
        raise NonsenseError("the body is not a JSON object")
    match kind:
        case "hello":
            return Hello(_flat(said))
        case "status":
            return Status(_text(said, "text"), _count(said, "done"), _count(said, "total"))
        case "loaded":
            log = said.get("log", [])
            if not isinstance(log, list) or not all(isinstance(line, str) for line in log):
                raise NonsenseError("log is not a list of lines")
            info = said.get("info")
            if not isinstance(info, dict):
                raise NonsenseError("info is not an object")
            return Loaded(
                _seconds(said.get("transfer_s"), "transfer_s"),
                _seconds(said.get("load_s"), "load_s"),
                _count(said, "transferred"),
                max(_count(said, "threads"), 1),
                _flat(info),
                tuple(line[:_TEXT] for line in log),
            )
        case "prefill":
            return Prefilled(
                _seconds(said.get("prefill_s"), "prefill_s"),
                _seconds(said.get("ttft_s"), "ttft_s"),
            )
        case "decode":
            times = said.get("token_s")
            if not isinstance(times, list) or not times:
                raise NonsenseError("token_s is not a list of times")
            return Decoded(tuple(_seconds(value, "token_s", zero=True) for value in times))
        case "error":
            return Failed(_text(said, "message"))
        case "gone":
            return Gone()
        case "done":
            return Done(_count(said, "hidden"))
        case _:
            raise NonsenseError(f"there is no message {kind[:40]!r}")


def _text(said: Mapping[str, Any], name: str) -> str:
    value = said.get(name)
    if not isinstance(value, str):
        raise NonsenseError(f"{name} is not a text")
    return "".join(c if c.isprintable() else " " for c in value[:_TEXT])  # no escape sequence reaches a terminal


def _count(said: Mapping[str, Any], name: str) -> int:
    value = said.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise NonsenseError(f"{name} is not a count")
    return value


def _seconds(value: object, name: str, *, zero: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NonsenseError(f"{name} is not a number")
    if not math.isfinite(value) or value < 0 or value > _LONGEST_S or (value == 0 and not zero):
        raise NonsenseError(f"{name} is {value} s")
    return float(value)


def _flat(said: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as scalars, or short lists of them; whatever else a browser says is left out."""
    found: dict[str, Any] = {}
    for key, value in list(said.items())[:64]:
        if isinstance(value, str):
            found[key[:64]] = _text(said, key)[:400]
        elif value is None or isinstance(value, bool) or (isinstance(value, int | float) and math.isfinite(value)):
            found[key[:64]] = value
        elif isinstance(value, list) and len(value) <= 16 and all(isinstance(item, str) for item in value):
            found[key[:64]] = [item[:100] for item in value]
    return found
