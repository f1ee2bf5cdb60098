"""A target as ``targets`` prints it: every figure with its source or the reason of the guess."""

from __future__ import annotations

__all__ = ["describe", "short"]

from dataclasses import asdict
from pathlib import Path

from phi4edge.targets.profile import Compute, Efficiency, Figure, Profile


def short(figure: Figure) -> str:
    """A figure as a list has it, ~ where it is estimated."""
    return "–" if figure.value is None else f"{'~' if figure.estimated else ''}{figure.value:.4g}"


def describe(profile: Profile, path: Path | None) -> str:
    """All that is known of a target, a line each."""
    rows = [
        ("target", f"{profile.id} ({path or 'detected'})"),
        ("device", f"{profile.name} ({profile.kind})"),
        ("notes", profile.notes),
        ("VRAM" if profile.memory == "vram" else "RAM", f"{profile.ram_gb:g} GB, {profile.memory}"),
        *_figure_rows("usable by a process", profile.usable_ram_gb, "GB"),
        *_figure_rows("bandwidth", profile.bandwidth_gb_s, "GB/s"),
        (
            "processor",
            " ".join(filter(None, (profile.arch, profile.cpu, f"({profile.cores} cores)" * bool(profile.cores)))),
        ),
        ("instruction sets", ", ".join(profile.isa)),
        *(("accelerator", f"{each.kind}: {each.name} ({each.api})") for each in profile.accelerators),
        ("reached by", ", ".join(profile.transports)),
        ("your device", ", ".join(f"{k} {v}" for k, v in asdict(profile.connection).items() if v)),
        ("power", profile.power_interface),
        ("default context", f"{profile.default_context:,} tokens"),
        ("decode to keep", f"{profile.min_decode_tps:g} tok/s" if profile.min_decode_tps else ""),
    ]
    rows += [("gate", f"{name} {limit:g}") for name, limit in profile.gates.given().items()]
    for number, option in enumerate(profile.runtimes, 1):
        formats, schemes, kv = (", ".join(v) for v in (option.formats, option.schemes, option.kv_types))
        rows.append(
            (f"runtime {number}", f"{option.name} on {option.backend}: {formats} with {schemes}; KV cache {kv}")
        )
        if option.overhead_gb is not None:
            rows += _figure_rows("  its process", option.overhead_gb, "GB")
        if option.layer_us is not None:
            rows += _figure_rows("  a layer's own cost", option.layer_us, "µs")
    for entry in profile.efficiency:
        rows += _figure_rows(_rate_label("efficiency", entry), entry.figure, f"({entry.runtime} on {entry.backend})")
    for rate in profile.compute:
        rows += _figure_rows(_rate_label("prompts", rate), rate.figure, f"GFLOP/s ({rate.runtime} on {rate.backend})")
    for anchor in profile.anchors:
        rows.append(
            ("published run", f"{anchor.decode_tps:g} tok/s, {anchor.model} {anchor.precision}, {anchor.runtime}")
        )
        rows.append(("", f"source: {anchor.source}"))
    rows += [("sources", source) for source in profile.sources]
    return "\n".join(f"{key:<20} {value}" for key, value in rows if value)


def _rate_label(what: str, entry: Efficiency | Compute) -> str:
    return f"{what}, {entry.scheme or f'{entry.bits} bit'}"


def _figure_rows(label: str, figure: Figure, unit: str) -> list[tuple[str, str]]:
    rows = [(label, figure.text(unit))]
    if figure.reason:
        rows.append(("", f"{'guess' if figure.estimated else 'because'}: {figure.reason}"))
    if figure.source:
        rows.append(("", f"source: {figure.source}"))
    return rows
