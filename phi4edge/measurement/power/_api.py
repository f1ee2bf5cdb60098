"""The shape of a sampler, and what it is made of: a platform that knows what to ask and how to read the answers.

A figure of speed means little without the power mode, the governor and the heat that it was reached with. A sampler
asks the device for them. It never makes the measurement fail: what it cannot learn is None in the document, and
``not_measured`` says why, field by field. Nothing here needs root.

    with sampler_for(device, profile) as sampler:
        sampler.before()                                  # the state, and the power at rest
        sampler.start()
        ...                                               # the device decodes
        sampler.stop(Decoded(tokens, seconds, time.monotonic()))
        document = sampler.after()                        # the state again; all of it together
"""

from __future__ import annotations

__all__ = ["Decoded", "Line", "Platform", "Sample", "Sampler", "State", "Whole"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self


@dataclass(frozen=True)
class Decoded:
    """The decoding that a sampler watched: the last ``seconds`` before ``ended_s``."""

    tokens: int  # generated in that time, of all repetitions
    seconds: float  # spent on them
    ended_s: float  # when the last token was there, as time.monotonic() counts


@dataclass(frozen=True)
class Line:
    """A line that the program on the device wrote."""

    at_s: float  # when it arrived, as time.monotonic() counts
    text: str


@dataclass(frozen=True)
class Sample:
    """The device at one moment. What it did not say is missing or None."""

    at_s: float
    rails_mw: Mapping[str, float] = field(default_factory=dict)  # power by the name of the rail
    temperatures_c: Mapping[str, float] = field(default_factory=dict)
    clock_mhz: float | None = None  # of the GPU on a Jetson, else of the fastest core
    load_percent: float | None = None  # of what that clock drives
    cpu_percent: float | None = None  # mean over the cores that are on
    emc_percent: float | None = None  # the memory controller's
    ram_mb: float | None = None  # in use, as the device counts megabytes
    seconds: float = 1.0  # that the rails are a mean over; 1 where they are a reading


@dataclass(frozen=True)
class State:
    """What the device says of itself before or after the work."""

    facts: Mapping[str, Any]  # JSON; units in the names
    missing: Mapping[str, str]  # the fact → why it is not there
    mode: str | None = None  # in a word: the power mode, the governor
    sensor: str | None = None  # what is taken for the device's temperature
    temperature_c: float | None = None


@dataclass(frozen=True)
class Whole:
    """The rails that make up what is drawn; where none are known to, ``rails`` is empty and ``reason`` says so."""

    rails: tuple[str, ...] = ()
    name: str = ""  # as a reader meets it: "VDD_IN"
    scope: str = ""  # what it feeds: "the module", "the whole board"
    reason: str = ""


class Platform(Protocol):
    """What one kind of device is asked, and how its answers are read. Methods may raise; the sampler keeps it."""

    @property
    def source(self) -> str:
        """Where power comes from: "tegrastats", "rapl", …"""
        ...

    @property
    def note(self) -> str | None:
        """What a reader must know of all of it."""
        ...

    def state(self) -> State:
        """Ask for the state; takes seconds at most."""
        ...

    def has_power(self) -> bool:
        """Whether the device, as the last :meth:`state` found it, gives power: then it is watched at rest as well."""
        ...

    def command(self) -> Sequence[str] | str:
        """What to run on the device while it works, one line a sample; or the reason why nothing can be sampled."""
        ...

    def samples(self, lines: Sequence[Line]) -> list[Sample]:
        """Read what the command wrote; lines that say nothing are left out."""
        ...

    def whole(self, samples: Sequence[Sample]) -> Whole:
        """Which of the rails add up to what the device draws."""
        ...

    def throttled(self, before: State, after: State) -> list[str] | None:
        """Why the device was slowed down, one sentence a cause; empty: it was not; None: it does not say."""
        ...


class Sampler(Protocol):
    """See the module. Use as a context manager: leaving it ends what still runs on the device."""

    def before(self) -> None:
        """Learn the state and the power at rest; a few seconds where power can be sampled."""
        ...

    def start(self) -> None:
        """Sample from here on."""
        ...

    def stop(self, decoded: Decoded | None = None) -> dict[str, Any]:
        """Sample no longer; the part of the document about the decoding. ``None``: no energy is computed."""
        ...

    def after(self) -> dict[str, Any]:
        """Learn the state again; the whole document."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
