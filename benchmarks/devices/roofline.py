"""Is the roofline's prediction right? This machine's decode speed, predicted and then measured, by types of weights.

1. The machine is measured as `phi4edge targets show local --measure` does it: bandwidth, and llama.cpp's rates on probe
   models of shapes of their own. No artifact of step 3 has a part in it.
2. From these figures and the bytes in each artifact's header, decode and prefill are predicted.
3. Each artifact is measured as `phi4edge bench` does it.
4. The machine is measured again, which shows how far it moved meanwhile; nothing is predicted from that.

Artifacts in F16, Q8_0, Q4_1 and Q4_0: the demo's model of 135 M weights (benchmarks/demo/make_model.py, made where it
is not there), rounded by RTN and exported; and one of 1.0 · 10⁹ random weights in Phi-4-mini's shapes, 4 of its 32
layers, written directly.

    python benchmarks/devices/roofline.py [--wait 1800]
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from phi4edge.checkpoint.published import PUBLISHED
from phi4edge.measurement.plausible import artifact_traffic
from phi4edge.measurement.speed import measure_speed
from phi4edge.runtimes._api import SpeedRequest
from phi4edge.runtimes._threads import physical_cores
from phi4edge.targets.local import detect_local, local_fingerprint
from phi4edge.targets.measured import MachineSpeed, measure_machine, store
from phi4edge.targets.probe_llama import write_probe_model
from phi4edge.targets.roofline import estimate_decode, estimate_prefill

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from record import record, update_readme  # noqa: E402

KINDS = ("f16", "q8_0", "q4_1", "q4_0")
REQUEST = SpeedRequest(prompt_tokens=128, gen_tokens=64, repetitions=5)
WIDE = replace(PUBLISHED["phi-4-mini"], num_layers=4, context_length=4096)


def run(*arguments: object) -> None:
    """The command line of phi4edge."""
    command = [sys.executable, "-m", "phi4edge", *map(str, arguments), "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def small(model: Path, kind: str, folder: Path) -> Path:
    """The demo's model as a GGUF."""
    path = folder / f"smollm2-135m-{kind}.gguf"
    source = model
    if kind != "f16":
        source = folder / f"run-{kind}"
        run("quantize", model, "--out", source, "--method", "rtn", "--scheme", kind)
    run("export", source, "--format", "gguf", "--out", path)
    return path


def wide(kind: str, folder: Path) -> Path:
    """Random weights in Phi-4-mini's shapes; the head, which is the embedding, in Q8_0 (F16: in F16)."""
    path = folder / f"phi-4-mini-4-layers-{kind}.gguf"
    write_probe_model(path, WIDE, kind, "f16" if kind == "f16" else "q8_0", repeat=True)
    return path


def wait(most: float, seconds: float) -> None:
    """Until the load is at most ``most``, or ``seconds`` are over."""
    end = time.monotonic() + seconds
    while os.getloadavg()[0] > most and time.monotonic() < end:
        time.sleep(5)


def figures(speed: MachineSpeed) -> dict[str, Any]:
    """What a measurement of the machine said, without its single rounds' order."""
    return asdict(speed) | {"read_gb_s": speed.read_gb_s, "triad_gb_s": speed.triad_gb_s}


def compare(path: Path) -> dict[str, Any]:
    """Predict an artifact's speeds, then measure them."""
    profile = detect_local()
    option, traffic = profile.runtimes[0], artifact_traffic(path, REQUEST.gen_tokens)
    decode, prefill = (estimate(profile, option, traffic) for estimate in (estimate_decode, estimate_prefill))
    load = os.getloadavg()[0]
    data = measure_speed(path, request=REQUEST)
    metrics = data["metrics"]
    row: dict[str, Any] = {
        "artifact": path.name,
        "scheme": traffic.scheme,
        "file_bytes": path.stat().st_size,
        "bytes_per_token": traffic.empty,
        "layers": traffic.layers,
        "roofline_tps": profile.bandwidth_gb_s.value * 1e9 / traffic.empty if profile.bandwidth_gb_s.value else None,
        "load": load,
        "load_after": os.getloadavg()[0],
    }
    for name, estimate in (("decode", decode), ("prefill", prefill)):
        measured = metrics[f"{name}_tps"]
        assert estimate.typical is not None, estimate.basis
        row[f"{name}_tps_estimated"] = estimate.as_dict()
        row[f"{name}_tps"] = {key: measured[key] for key in ("value", "se", "median", "samples")}
        row[f"{name}_ratio"] = measured["median"] / estimate.typical
    row["token_s_median"] = metrics["tpot_s"]["median"]
    print(json.dumps({k: row[k] for k in ("artifact", "load", "decode_ratio", "prefill_ratio")}), flush=True)
    return row


def _span(estimate: dict[str, Any]) -> str:
    return f"{estimate['typical']:.3g} ({estimate['low']:.3g}–{estimate['high']:.3g})"


def table(document: dict[str, Any]) -> str:
    """The README's table."""
    results = document["results"]
    before, after = results["before"], results["after"]
    lines = [
        "| artifact | MB read a token | roofline, tok/s | decode, tok/s, estimated | decode, measured | ÷ estimate"
        " | prefill, tok/s, estimated | prefill, measured | ÷ estimate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        cells = [
            row["artifact"].removesuffix(".gguf"),
            f"{row['bytes_per_token'] / 1e6:.0f}",
            f"{row['roofline_tps']:.1f}",
            _span(row["decode_tps_estimated"]),
            f"{row['decode_tps']['median']:.3g}",
            f"{row['decode_ratio']:.2f}",
            _span(row["prefill_tps_estimated"]),
            f"{row['prefill_tps']['median']:.3g}",
            f"{row['prefill_ratio']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    off = [max(row["decode_ratio"], 1 / row["decode_ratio"]) - 1 for row in results["rows"]]
    loads = [row["load"] for row in results["rows"]] + [row["load_after"] for row in results["rows"]]
    cpu, threads = document["machine"]["cpu"]["model"], before["memory"]["threads"]
    return "\n".join(
        [
            *lines,
            "",
            f"{cpu}, {threads} threads, {before['date'][:10]}. Read {before['read_gb_s']:.1f} GB/s (again at the end:"
            f" {after['read_gb_s']:.1f}), triad {before['triad_gb_s']:.1f} ({after['triad_gb_s']:.1f}). Measured:"
            f" medians of {REQUEST.repetitions} repetitions, prompts of {REQUEST.prompt_tokens} tokens,"
            f" {REQUEST.gen_tokens} generated. The largest error of a decode estimate is {100 * max(off):.0f} %. Load"
            f" of the machine while measuring: {min(loads):.1f} to {max(loads):.1f} (our {threads} threads are in it).",
        ]
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "demo" / "model")
    parser.add_argument(
        "--wait", type=float, default=0, metavar="S", help="wait so long for a quiet machine, each time"
    )
    parser.add_argument("--quiet-load", type=float, default=0.4, help="what counts as quiet; default: %(default)s")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "roofline.json")
    a = parser.parse_args()
    if not (a.model / "config.json").is_file():
        subprocess.run([sys.executable, ROOT / "benchmarks" / "demo" / "make_model.py", a.model], check=True)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["PHI4EDGE_CACHE"] = scratch  # the figures of this run, and not those of the user's cache
        folder = Path(scratch)
        paths = [small(a.model, kind, folder) for kind in KINDS]
        wait(a.quiet_load, a.wait)
        before = measure_machine(local_fingerprint(), physical_cores())
        store(before)
        rows = [compare(path) for path in paths]
        for kind in KINDS:
            path = wide(kind, folder)
            rows.append(compare(path))
            path.unlink()
        after = measure_machine(local_fingerprint(), physical_cores())
    command = "python benchmarks/devices/roofline.py" + (f" --wait {a.wait:g}" if a.wait else "")
    results = {"before": figures(before), "after": figures(after), "rows": rows}
    document = record(a.out, command, results, ("benchmarks/devices/roofline.py",))
    if a.out.parent == HERE / "results":
        update_readme(HERE / "README.md", "roofline", table(document))


if __name__ == "__main__":
    main()
