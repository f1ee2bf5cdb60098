"""One sampler for every platform: when to ask, what to keep, and that nothing of it stops a measurement."""

from __future__ import annotations

__all__ = ["IDLE_S", "DeviceSampler", "not_sampled"]

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from phi4edge.core.errors import Phi4EdgeError
from phi4edge.measurement.power._api import Decoded, Platform, Sample, State
from phi4edge.measurement.power._energy import clock_fell, decode_part, idle_part
from phi4edge.measurement.power._watch import Watch
from phi4edge.transports._api import Device

IDLE_S = 4.0  # the device is watched at rest before it works


class DeviceSampler:
    """See :class:`phi4edge.measurement.power._api.Sampler`."""

    def __init__(self, device: Device, platform: Platform, idle_s: float = IDLE_S) -> None:
        self._device, self._platform, self._idle_s = device, platform, idle_s
        self._missing: dict[str, str] = {}
        self._states: dict[str, State | None] = {"before": None, "after": None}
        self._idle: list[Sample] = []
        self._watch: Watch | None = None
        self._decode: dict[str, Any] | None = None
        self._fell: str | None = None

    def before(self) -> None:
        """See :class:`phi4edge.measurement.power._api.Sampler`."""
        self._ask("before")
        if self._platform.has_power():
            self._open("idle.samples")
            if self._watch is not None:
                time.sleep(self._idle_s)
            self._idle = self._close("idle.samples")

    def start(self) -> None:
        """See :class:`phi4edge.measurement.power._api.Sampler`."""
        self._open("decode.samples")

    def stop(self, decoded: Decoded | None = None) -> dict[str, Any]:
        """See :class:`phi4edge.measurement.power._api.Sampler`."""
        samples = self._close("decode.samples")
        with self._kept("decode"):
            whole = self._platform.whole(samples)
            idle = idle_part(self._idle, whole)
            self._decode, inside = decode_part(samples, idle, decoded, whole)
            self._fell = clock_fell(inside)
        return self._decode or {}

    def after(self) -> dict[str, Any]:
        """See :class:`phi4edge.measurement.power._api.Sampler`."""
        self._ask("after")
        before, after = self._states["before"], self._states["after"]
        causes = self._throttled(before, after)
        document: dict[str, Any] = {
            "source": self._platform.source,
            "note": self._platform.note,
            "mode": before.mode if before else None,
            "before": _facts(before),
            "after": _facts(after),
            "temperature_c": _temperatures(before, after),
            "decode": self._decode,
            "throttled": None if causes is None else bool(causes),
            "throttled_by": causes or [],
        }
        return document | {"not_measured": self._why()}

    def _throttled(self, before: State | None, after: State | None) -> list[str] | None:
        causes: list[str] | None = None
        with self._kept("throttled"):
            if before is not None and after is not None:
                causes = self._platform.throttled(before, after)
        if self._fell is not None:
            causes = [*(causes or []), self._fell]
        if causes is None:
            self._missing.setdefault("throttled", "the device does not say")
        return causes

    def _why(self) -> dict[str, str]:
        """Every field without a value, and its reason."""
        why: dict[str, str] = {}
        for when, state in self._states.items():
            why |= {f"{when}.{name}": reason for name, reason in (state.missing if state else {}).items()}
        for name in ("idle_power_w", "power_w", "energy_j_per_token"):
            metric = (self._decode or {}).get(name)
            if metric is not None and metric["value"] is None:
                why[f"decode.{name}"] = metric["reason"]
        return why | self._missing

    def _ask(self, when: str) -> None:
        with self._kept(when):
            self._states[when] = self._platform.state()

    def _open(self, field: str) -> None:
        with self._kept(field):
            command = self._platform.command()
            if isinstance(command, str):
                self._missing[field] = command
            else:
                self._watch = Watch(self._device, command)

    def _close(self, field: str) -> list[Sample]:
        watch, self._watch = self._watch, None
        samples: list[Sample] = []
        with self._kept(field):
            if watch is not None:
                lines, last = watch.close()
                samples = self._platform.samples(lines)
                if last is not None:
                    self._missing[field] = f"{self._platform.source} ended by itself: {last}"
                elif not samples:
                    said = f"; it said {lines[-1].text[:80]!r}" if lines else ""
                    self._missing[field] = f"{self._platform.source}: none of {len(lines)} lines could be read{said}"
        return samples

    @contextmanager
    def _kept(self, field: str) -> Iterator[None]:
        """Whatever goes wrong with the watching becomes a reason: the speed that is being measured is worth more."""
        try:
            yield
        except Phi4EdgeError as error:
            self._missing[field] = error.message
        except Exception as error:  # noqa: BLE001  said above
            self._missing[field] = f"{type(error).__name__}: {error}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close("decode.samples")


def not_sampled(reason: str) -> dict[str, Any]:
    """The document of a device that cannot be asked at all (a browser)."""
    return {
        "source": "none",
        "note": None,
        "mode": None,
        "before": None,
        "after": None,
        "temperature_c": _temperatures(None, None),
        "decode": None,
        "throttled": None,
        "throttled_by": [],
        "not_measured": dict.fromkeys(("before", "decode", "after", "throttled"), reason),
    }


def _facts(state: State | None) -> dict[str, Any] | None:
    return None if state is None else dict(state.facts)


def _temperatures(before: State | None, after: State | None) -> dict[str, Any]:
    return {
        "sensor": before.sensor if before else None,
        "before": before.temperature_c if before else None,
        "after": after.temperature_c if after else None,
    }
