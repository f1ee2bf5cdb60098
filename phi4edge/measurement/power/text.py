"""What a reader of a bench or a report sees of a sampler's document, in one line."""

from __future__ import annotations

__all__ = ["power_text"]

from collections.abc import Mapping
from typing import Any


def power_text(document: Mapping[str, Any]) -> str:
    """``"12.4 ± 0.3 J/100 tokens (VDD_IN less idle, 57 samples), 25W, 48 → 55 °C"``; what is unknown is said to be."""
    before = document.get("before") or {}
    parts = [_energy(document), document.get("mode"), _heat(document.get("temperature_c") or {})]
    if before.get("clocks_pinned"):
        parts.append("clocks pinned")
    if before.get("supply"):
        parts.append(f"on {before['supply']}")
    if before.get("load_average_1min") is not None:
        parts.append(f"load {before['load_average_1min']:.2f} before")
    if document.get("throttled"):
        parts.append(f"THROTTLED: {'; '.join(document['throttled_by'])}")
    return ", ".join(part for part in parts if part)


def _energy(document: Mapping[str, Any]) -> str:
    decode = document.get("decode") or {}
    energy = decode.get("energy_j_per_token")
    if not energy or energy["value"] is None:
        why = document.get("not_measured") or {}
        names = ("decode", "decode.samples", "decode.power_w", "idle.samples", "decode.energy_j_per_token")
        reason = next((why[name] for name in names if name in why), "the device was not asked")
        return f"energy not measured ({reason})"
    value, error = energy["value"] * 100, energy["se"]
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    spread = "" if error is None else f" ± {error * 100:.{digits}f}"
    return f"{value:.{digits}f}{spread} J/100 tokens ({decode['rail']} less idle, {energy['n']} samples)"


def _heat(temperature: Mapping[str, Any]) -> str:
    before, after = temperature.get("before"), temperature.get("after")
    if before is None and after is None:
        return ""
    ends = " → ".join("?" if value is None else f"{value:.0f}" for value in (before, after))
    return f"{ends} °C{' (battery)' if temperature.get('sensor') == 'battery' else ''}"
