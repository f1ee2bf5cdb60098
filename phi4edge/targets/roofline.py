"""How fast a target may decode, estimated from what its memory can deliver; never a measurement.

Decoding reads every weight and the KV cache once a token, so tok/s = efficiency × bandwidth ÷ bytes read a token.
The efficiency is the share of the bandwidth that published runs of the same runtime reached (the target's file has
them with their sources). The range runs from the lowest efficiency and bandwidth with a full context to the highest
with an empty one; a figure that comes without a range of its own is taken ± ``SPREAD``, since one published run on
another model says no more than that.
"""

from __future__ import annotations

__all__ = ["DecodeEstimate", "decode_estimate"]

from dataclasses import dataclass
from typing import Any

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.targets.fit import Request, decode_bytes
from phi4edge.targets.profile import Profile, RuntimeOption

SPREAD = 0.25


@dataclass(frozen=True)
class DecodeEstimate:
    """Estimated decode speed in tokens a second; all three None, with a reason, where nothing is known."""

    low: float | None
    typical: float | None  # with half of the context filled
    high: float | None
    basis: str  # what it was computed from, or why it was not

    def text(self) -> str:
        """``"9.1–16.4 tok/s, estimated"`` or ``"not estimated: …"``."""
        if self.low is None or self.high is None:
            return f"not estimated: {self.basis}"
        return f"{self.low:.1f}–{self.high:.1f} tok/s, estimated"

    def as_dict(self) -> dict[str, Any] | None:
        """The value of ``decode_tps_estimated`` in JSON."""
        if self.low is None or self.typical is None or self.high is None:
            return None
        rounded = {"low": self.low, "typical": self.typical, "high": self.high}
        return {key: round(value, 2) for key, value in rounded.items()} | {"basis": self.basis}


def decode_estimate(profile: Profile, option: RuntimeOption, config: ModelConfig, request: Request) -> DecodeEstimate:
    """The decode speed that a runtime of the target may reach with ``request``."""
    efficiency = profile.efficiency_of(option, request.scheme.bits)
    bandwidth, share = profile.bandwidth_gb_s, efficiency.figure if efficiency else None
    limits = bandwidth.bounds()
    if limits is None or bandwidth.value is None:
        return DecodeEstimate(None, None, None, f"bandwidth is {bandwidth.text()}")
    if share is None or share.value is None:
        return DecodeEstimate(None, None, None, f"no efficiency of {option.name} is known on this target")
    shares = share.bounds(SPREAD)
    assert efficiency is not None
    assert shares is not None
    empty, full = decode_bytes(config, request)
    basis = f"{share.value:g} of {bandwidth.text('GB/s')}, {empty / 1e9:.2f}–{full / 1e9:.2f} GB read a token"
    if efficiency.bits != request.scheme.bits:
        basis += f"; efficiency known at {efficiency.bits} bits only"
    return DecodeEstimate(
        low=shares[0] * limits[0] * 1e9 / full,
        typical=share.value * bandwidth.value * 1e9 / ((empty + full) / 2),
        high=min(shares[1], 1.0) * limits[1] * 1e9 / empty,
        basis=basis,
    )
