"""How fast a target may decode and take in a prompt, estimated from its figures; never a measurement.

Decoding reads every weight and the KV cache once a token. With the bytes of each type of weights apart,

    seconds a token = Σ bytes of a type / (efficiency of the type · bandwidth)  +  layers · layer_us

The efficiency is the share of the bandwidth that a runtime reaches: published for it, or measured on the device
(``targets show local --measure``, ``bench --calibrate-target``). A type without an efficiency of its own has that of
the linears' type, which published runs give for whole files. ``layer_us`` counts where it is known. The range runs
from the lowest efficiency and bandwidth with a full context to the highest with an empty one; a figure that comes
without a range is taken ± ``SPREAD``, since one published run on another model says no more than that.

A prompt is bound by arithmetic: tokens a second = rate / (2 · weights of the linears), the head being computed for the
last token alone. Attention comes on top and is left out: a few percent of a prompt of 512.

**Roofline**: bandwidth / bytes read a token. A measured speed above it is not plausible.
"""

from __future__ import annotations

__all__ = ["SPREAD", "SpeedEstimate", "Traffic", "decode_estimate", "estimate_decode", "estimate_prefill", "traffic_of"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.quant.scheme import Scheme
from phi4edge.targets.fit import Request, block_type, decode_bytes, weight_lines
from phi4edge.targets.profile import Compute, Efficiency, Profile, RuntimeOption

SPREAD = 0.25
_BITS = {"f32": 16, "bf16": 16, "f16": 16, "q8_0": 8, "q6_k": 8, "q5_k": 4, "q5_0": 4, "q5_1": 4}  # nearest known


@dataclass(frozen=True)
class Traffic:
    """What one token moves and computes."""

    scheme: str  # type of the linears, by its name in a target's file
    bits: int
    weights: Mapping[str, int]  # type → bytes read a token; of an embedding that is not the head nothing
    kv_bytes: int  # of a full context
    layers: int
    linears: Mapping[str, int]  # type → weights of the linears

    @property
    def empty(self) -> int:
        """Bytes read for the first token."""
        return sum(self.weights.values())

    @property
    def full(self) -> int:
        """Bytes read for the last token that the context holds."""
        return self.empty + self.kv_bytes


@dataclass(frozen=True)
class SpeedEstimate:
    """Estimated tokens a second; all three None, with a reason, where nothing is known."""

    low: float | None
    typical: float | None  # of decoding, with half of the context filled
    high: float | None
    basis: str  # what it was computed from, or why it was not

    def text(self) -> str:
        """``"9.1–16.4 tok/s, estimated"`` or ``"not estimated: …"``."""
        if self.low is None or self.high is None:
            return f"not estimated: {self.basis}"
        return f"{self.low:.1f}–{self.high:.1f} tok/s, estimated"

    def as_dict(self) -> dict[str, Any] | None:
        """The value of ``decode_tps_estimated`` or ``prefill_tps_estimated`` in JSON."""
        if self.low is None or self.typical is None or self.high is None:
            return None
        rounded = {"low": self.low, "typical": self.typical, "high": self.high}
        return {key: round(value, 2) for key, value in rounded.items()} | {"basis": self.basis}


def traffic_of(config: ModelConfig, request: Request) -> Traffic:
    """What a token of a model moves that is yet to be made."""
    scheme = request.scheme
    kind = _kind(scheme, request.format)
    weights: dict[str, int] = {}
    for line in weight_lines(config, request):
        if line.label == "embedding":
            continue
        named = {"linears": kind, "norms": "f32"}.get(line.label, request.head)
        weights[named] = weights.get(named, 0) + line.nbytes
    empty, full = decode_bytes(config, request)
    assert empty == sum(weights.values())
    linears = {kind: config.linear_parameters}
    return Traffic(kind, scheme.bits, weights, full - empty, config.num_layers, linears)


def _kind(scheme: Scheme, layout: str) -> str:
    """The name under which a target's file would have the efficiency of ``scheme``."""
    return (block_type(scheme) if layout == "gguf" else None) or scheme.name


def decode_estimate(profile: Profile, option: RuntimeOption, config: ModelConfig, request: Request) -> SpeedEstimate:
    """The decode speed that a runtime of the target may reach with ``request``."""
    return estimate_decode(profile, option, traffic_of(config, request))


def estimate_decode(profile: Profile, option: RuntimeOption, traffic: Traffic) -> SpeedEstimate:
    """The decode speed that a runtime of the target may reach with what ``traffic`` tells of."""
    main = profile.efficiency_of(option, traffic.scheme, traffic.bits)
    bandwidth = profile.bandwidth_gb_s
    limits = bandwidth.bounds()
    if limits is None or bandwidth.value is None:
        return SpeedEstimate(None, None, None, f"bandwidth is {bandwidth.text()}")
    if main is None or main.figure.value is None:
        return SpeedEstimate(None, None, None, f"no efficiency of {option.name} is known on this target")

    peaks = (limits[0], bandwidth.value, limits[1])

    def own(kind: str) -> Efficiency:
        entry = profile.efficiency_of(option, kind, _BITS.get(kind, 4))
        return entry if entry is not None and entry.scheme == kind else main

    def seconds(end: int, context: float) -> float:
        """Of a token; ``end`` 0 takes each efficiency's lower end, 1 its value, 2 its upper end."""
        total = traffic.layers * (option.layer_us.value or 0.0) * 1e-6 if option.layer_us else 0.0
        moved = [(own(kind), nbytes) for kind, nbytes in traffic.weights.items()]
        moved.append((main, int(traffic.kv_bytes * context)))
        for entry, nbytes in moved:
            low, high = entry.figure.bounds(SPREAD) or (0.0, 0.0)
            share = (low, entry.figure.value or 0.0, min(high, 1.0))[end]
            # An efficiency that was measured on the device is a share of this very figure: only one of them varies.
            peak = (peaks[1],) * 3 if entry.scheme is not None else peaks
            total += nbytes / (share * peak[end] * 1e9)
        return total

    basis = f"{main.figure.value:g} of {bandwidth.text('GB/s')}, {traffic.empty / 1e9:.2f}–{traffic.full / 1e9:.2f} GB"
    basis += " read a token" + _known_for(main, traffic)
    if option.layer_us is not None and option.layer_us.value:
        basis += f"; {option.layer_us.value:g} µs a layer"
    return SpeedEstimate(low=1 / seconds(0, 1.0), typical=1 / seconds(1, 0.5), high=1 / seconds(2, 0.0), basis=basis)


def _known_for(entry: Efficiency | Compute, traffic: Traffic) -> str:
    """What an entry was made for, where that is not what is asked."""
    what = "efficiency" if isinstance(entry, Efficiency) else "rate"
    if entry.scheme is not None and entry.scheme != traffic.scheme:
        return f"; {what} known for {entry.scheme} only"
    return f"; {what} known at {entry.bits} bits only" if entry.bits != traffic.bits else ""


def estimate_prefill(profile: Profile, option: RuntimeOption, traffic: Traffic) -> SpeedEstimate:
    """How many tokens of a prompt a second a runtime of the target may take in."""
    entries = {kind: profile.compute_of(option, kind, _BITS.get(kind, traffic.bits)) for kind in traffic.linears}
    main = entries.get(traffic.scheme)
    if main is None or any(entry is None for entry in entries.values()):
        reason = f"no compute rate of {option.name} is known on this target"
        return SpeedEstimate(None, None, None, reason)

    def seconds(end: int) -> float:
        total = 0.0
        for kind, weights in traffic.linears.items():
            entry = entries[kind]
            assert entry is not None
            low, high = entry.figure.bounds(SPREAD) or (0.0, 0.0)
            total += 2 * weights / ((low, entry.figure.value or 0.0, high)[end] * 1e9)
        return total

    gigaflop = 2 * sum(traffic.linears.values()) / 1e9
    basis = f"{main.figure.text('GFLOP/s')}, {gigaflop:.3g} GFLOP a token{_known_for(main, traffic)}"
    return SpeedEstimate(1 / seconds(0), 1 / seconds(1), 1 / seconds(2), basis)
