"""What ``bench`` prints of the roofline: what memory allows, what was estimated, and what was written back."""

from __future__ import annotations

__all__ = ["calibration_line", "roofline_lines"]

from collections.abc import Mapping
from typing import Any


def roofline_lines(data: Mapping[str, Any]) -> list[str]:
    """The roofline and the estimates of a bench document; a measurement that is not plausible comes first."""
    found = data.get("roofline")
    if found is None:
        return []
    lines = []
    if found["implausible"]:
        lines.append(f"IMPLAUSIBLE: {found['reason']}")
    if found.get("decode_tps_limit") is None:
        lines.append(f"roofline not known: {found['reason']}")
    else:
        mark = ", estimated" if found["bandwidth_estimated"] else ""
        share = f"; decode reaches {100 * found['efficiency']:.0f} % of it" if found["efficiency"] else ""
        lines.append(
            f"roofline {found['decode_tps_limit']:.2f} tok/s: {found['bytes_per_token'] / 1e6:.0f} MB read a token,"
            f" bandwidth {found['bandwidth_gb_s']:g} GB/s{mark}{share}"
        )
    for name in ("decode", "prefill"):
        estimate = data.get(f"{name}_tps_estimated")
        if estimate is not None and estimate["value"] is not None:
            low, typical, high = (estimate[key] for key in ("low", "value", "high"))
            lines.append(f"{name} {low:.1f}–{high:.1f} tok/s, estimated before measuring (typically {typical:.1f})")
    return ["", *lines]


def calibration_line(data: Mapping[str, Any]) -> list[str]:
    """What was written into a target's file."""
    written = data.get("calibration")
    if written is None:
        return []
    parts = [f"{key} {written[key]['value']:g}" for key in ("efficiency", "compute") if key in written]
    scheme = next(written[key]["scheme"] for key in ("efficiency", "compute") if key in written)
    return ["", f"written into {written['file']}: {' and '.join(parts)} of {written['runtime']} with {scheme}"]
