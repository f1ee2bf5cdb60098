"""How the cost of quantizing grows with calibration tokens, width and depth: measured, fitted, beside theory.

Small models of random weights, one number varied at a time, GPTQ on w4g32; each run in a process of its own. What is
plotted are the seconds of a run's parts (forward, moments, solve, and all of them), summed over its blocks; a line is
the least-squares fit of log seconds on log size, its slope the exponent. Theory, for n tokens, width d (all widths in
proportion) and L blocks: forward n·d²·L (attention apart), moments n·d²·L, solve d³·L.

    OMP_NUM_THREADS=1 python benchmarks/scale/growth.py            # some minutes
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT)]
from children import child, phi4edge  # noqa: E402
from record import record, update_readme  # noqa: E402

PARTS = ("forward", "moments", "solve")
# tokens: (samples, length); width: hidden_size, the others in Phi-4's proportions; depth: blocks.
BASE = {"tokens": 8 * 512, "width": 1024, "depth": 2}
GRID = {"tokens": (4 * 512, 16 * 512, 64 * 512), "width": (512, 1024, 2048, 4096), "depth": (2, 4, 8)}
THEORY = {
    "tokens": {"forward": 1, "moments": 1, "solve": 0},
    "width": {"forward": 2, "moments": 2, "solve": 3},
    "depth": {"forward": 1, "moments": 1, "solve": 1},
}
LENGTH = 512
COLORS = {"forward": "#1f77b4", "moments": "#d62728", "solve": "#2ca02c", "all": "#333333"}


def measure(width: int, depth: int, tokens: int, folder: Path) -> dict[str, Any]:
    """Make a model, quantize it; seconds of each part over all blocks, and of the whole."""
    import torch
    from safetensors.torch import save_file
    from support import write_checkpoint

    shape = {
        "hidden_size": width,
        "intermediate_size": 7 * width // 2,
        "num_attention_heads": width // 128 or 1,
        "num_key_value_heads": max(1, width // 512),
        "num_hidden_layers": depth,
        "max_position_embeddings": LENGTH,
        "original_max_position_embeddings": LENGTH,
    }
    model = write_checkpoint(folder / "model", "phi4", **shape)
    samples = tokens // LENGTH
    drawn = torch.randint(0, 512, (samples, LENGTH), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": drawn}, folder / "chunks.safetensors")
    words: list[str | Path] = ["quantize", model, "--out", folder / "run", "--scheme", "w4g32", "--effort", "low"]
    words += ["--corpus", folder / "chunks.safetensors", "--samples", str(samples), "--sequence-length", str(LENGTH)]
    child(phi4edge(*words, "--quiet"))
    records = [json.loads(line)["record"] for line in (folder / "run" / "journal.jsonl").read_text().splitlines()]
    spent = [entry["performance"] for entry in records]
    parts = {part: sum(each["parts"].get(part, 0.0) for each in spent) for part in PARTS}
    return {"width": width, "depth": depth, "tokens": tokens, "parts": parts, "all": sum(s["seconds"] for s in spent)}


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept of the least-squares line of log seconds on log size."""
    x, y = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return slope, mean_y - slope * mean_x


def series(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Seconds of each part, and of all, run by run."""
    return {part: [run["parts"][part] for run in runs] for part in PARTS} | {"all": [run["all"] for run in runs]}


def fits(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Exponents by what was varied and part."""
    return {
        axis: {part: exponent([run[axis] for run in runs], values)[0] for part, values in series(runs).items()}
        for axis, runs in measured.items()
    }


def plot(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Three log-log panels as SVG: points, fitted lines (whole) and lines of the theoretical slope (dashed)."""
    width, height, gap, below = 300, 260, 50, 60
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {3 * (width + gap) + gap} {height + 2 * below}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    every = [s for runs in measured.values() for values in series(runs).values() for s in values]
    low, high = math.log10(min(every)) - 0.1, math.log10(max(every)) + 0.1
    for number, (axis, runs) in enumerate(measured.items()):
        left, top = gap + number * (width + gap), below / 2
        sizes = [run[axis] for run in runs]
        first, last = math.log10(min(sizes)) - 0.1, math.log10(max(sizes)) + 0.1

        def at(size: float, seconds: float) -> tuple[float, float]:
            x = left + (math.log10(size) - first) / (last - first) * width  # noqa: B023  called in this turn alone
            return x, top + (high - math.log10(max(seconds, 10**low))) / (high - low) * height  # noqa: B023

        out.append(f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>')
        under = f'y="{top + height + 16}" text-anchor="middle"'
        out += [f'<text x="{at(size, 1)[0]:.0f}" {under}>{size:,}</text>' for size in sizes]
        for power in range(math.ceil(low), math.floor(high) + 1):
            y = at(sizes[0], 10.0**power)[1]
            out.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>')
            out.append(f'<text x="{left - 4}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g} s</text>')
        out.append(f'<text x="{left + width / 2}" y="{top + height + 34}" text-anchor="middle">{axis}</text>')
        for turn, (part, values) in enumerate(series(runs).items()):
            slope, intercept = exponent(sizes, values)
            ends = [(size, math.exp(intercept + slope * math.log(size))) for size in (sizes[0], sizes[-1])]
            out.append(_line([at(*end) for end in ends], COLORS[part]))
            label = f"{part} {slope:.2f}"
            if part in PARTS:
                theory = THEORY[axis][part]
                middle = sizes[len(sizes) // 2]
                about = math.exp(intercept + slope * math.log(middle))
                ends = [(size, about * (size / middle) ** theory) for size in (sizes[0], sizes[-1])]
                out.append(_line([at(*end) for end in ends], COLORS[part], dashed=True))
                label += f" (theory {theory})"
            for size, seconds in zip(sizes, values, strict=True):
                x, y = at(size, seconds)
                out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{COLORS[part]}"/>')
            out.append(f'<text x="{left + 6}" y="{top + 14 + 14 * turn}" fill="{COLORS[part]}">{label}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def _line(ends: Sequence[tuple[float, float]], color: str, *, dashed: bool = False) -> str:
    (x1, y1), (x2, y2) = ends
    style = ' stroke-dasharray="4 3" opacity="0.6"' if dashed else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"{style}/>'


def table(results: Mapping[str, Any]) -> str:
    """The README's table."""
    lines = ["| exponent of | forward | moments | solve | all |", "|---|---|---|---|---|"]
    for axis, found in results["exponents"].items():
        cells = [f"{found[part]:.2f} (theory {THEORY[axis][part]})" for part in PARTS]
        lines.append(f"| {axis} | {' | '.join(cells)} | {found['all']:.2f} |")
    return "\n".join([*lines, "", "![seconds by tokens, width and depth](results/growth.svg)"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-record", action="store_true", help="print only")
    a = parser.parse_args()
    threads = os.environ.get("OMP_NUM_THREADS")
    measured: dict[str, list[dict[str, Any]]] = {}
    for axis, sizes in GRID.items():
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder:
                measured.setdefault(axis, []).append(measure(**{**BASE, axis: size}, folder=Path(folder)))
            print(json.dumps(measured[axis][-1]), flush=True)
    results = {"base": BASE, "length": LENGTH, "measured": measured, "exponents": fits(measured)}
    print(table(results))
    if not a.no_record:
        record(
            HERE / "results" / "growth.json",
            f"{f'OMP_NUM_THREADS={threads} ' if threads else ''}python benchmarks/scale/growth.py",
            results,
            ("benchmarks/scale/growth.py",),
        )
        (HERE / "results" / "growth.svg").write_text(plot(measured), encoding="utf-8")
        update_readme(HERE / "README.md", "growth", table(results))


if __name__ == "__main__":
    main()
