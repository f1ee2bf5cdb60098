"""How fast `phi4edge export` writes, beside the two things that bound it: this disk, and one core's packing.

    python benchmarks/formats/export_speed.py

A model of random weights (four blocks 2048 wide, 0.25 G parameters) is rounded to W4 in groups of 32 once; its run is
kept under build/export-speed. Then, again and again in turn, so that a busy machine meets all of them alike:

- export: `phi4edge export` of the run to a GGUF (Q4_0, tables Q8_0) and to a GPTQ folder, each in a process of its own
  on one core, from the call to the last fsync; interpreter and imports are not counted, reading the codes is;
- packing alone: what the run holds (4-bit codes two to a byte) and the tables, packed into the same bytes, all in RAM,
  one core;
- disk alone: as many bytes as the artifact has, written from RAM in pieces of 4 MiB and fsynced, on the same disk.

All are MB/s of the artifact's size (10^6 bytes), the median of the rounds; the ratios are those of the medians. Where
others compute on the same machine the clock counts their time too; so export and packing are also given by CPU time.
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "export_speed.json"
FORMATS = ("gguf", "gptq")
PIECE = 4 << 20
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 16384,
}
AIM = 0.5  # of the smaller of both bounds


def make_run(folder: Path) -> Path:
    """The run directory, made if it is not there."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support import write_checkpoint

    from phi4edge.core.recipe import Recipe
    from phi4edge.stages.quantize import quantize

    run = folder / "run"
    if not (run / "manifest.json").is_file():
        print("making the run (a minute)", file=sys.stderr)
        model = write_checkpoint(folder / "model", "phi4", **SHAPE)
        quantize(model, Recipe(method="rtn", scheme="w4g32", corpus=None), run)
    return run


def export_once(run: Path, layout: str, out: Path) -> dict[str, Any]:
    """One export, in this process; seconds, bytes and peak RSS."""
    import torch

    from phi4edge.core.memory import peak_rss_bytes
    from phi4edge.core.registry import load, names
    from phi4edge.stages.export import export
    from phi4edge.writers._api import WriteOptions

    torch.set_num_threads(1)
    for name in names("phi4edge.writers"):
        load("phi4edge.writers", name)
    idle = peak_rss_bytes()
    began, worked = time.perf_counter(), time.process_time()
    artifact = export(run, layout, out, WriteOptions(force=True))
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "bytes": artifact.nbytes,
        "peak_rss_bytes": peak_rss_bytes(),
        "idle_rss_bytes": idle,
    }


def in_a_process(run: Path, layout: str, out: Path) -> dict[str, Any]:
    """:func:`export_once` in a process of its own; what it wrote is on the disk until the next one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).resolve()), "--once", layout, str(run), str(out)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"export to {layout} failed: {ran.stderr[-2000:]}")
    return dict(json.loads(ran.stdout))


def packers(run: Path) -> dict[str, Callable[[], tuple[float, float]]]:
    """For each format: pack what is in RAM already, one tensor at a time; seconds by the clock and of CPU."""
    import torch

    from phi4edge.quant.ggml import pack_linear as pack_blocks
    from phi4edge.quant.ggml_rounding import quantize_q8_0
    from phi4edge.quant.gptq_packing import pack_linear as pack_gptq
    from phi4edge.stages.run_reader import open_run

    torch.set_num_threads(1)
    model = open_run(run)
    linears = [model.load(name) for name in model.linears]
    tables = [model.checkpoint.tensor(name) for name in ("model.embed_tokens.weight", "lm_head.weight")]
    step = 1 << 22  # weights packed at a time, as the writer does

    def gguf() -> tuple[float, float]:
        began, worked = time.perf_counter(), time.process_time()
        for linear in linears:
            for start in range(0, linear.out_features, max(1, step // linear.in_features)):
                pack_blocks(linear.rows(start, start + step // linear.in_features))
        for table in tables:
            for start in range(0, table.shape[0], step // table.shape[1]):
                quantize_q8_0(table[start : start + step // table.shape[1]])
        return time.perf_counter() - began, time.process_time() - worked

    def gptq() -> tuple[float, float]:
        began, worked = time.perf_counter(), time.process_time()
        for linear in linears:
            pack_gptq(linear, 1)
        for table in tables:
            table.to(torch.bfloat16)
        return time.perf_counter() - began, time.process_time() - worked

    return {"gguf": gguf, "gptq": gptq}


def write_once(path: Path, nbytes: int) -> float:
    """Seconds to write ``nbytes`` in order and to have them on the disk, as `dd conv=fsync` does."""
    piece = os.urandom(PIECE)
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for start in range(0, nbytes, PIECE):
            file.write(memoryview(piece)[: nbytes - start])
        os.fsync(file.fileno())
    return time.perf_counter() - began


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """All formats; see the module's docstring."""
    run = make_run(folder)
    packing = packers(run)
    rows: dict[str, Any] = {}
    for layout in FORMATS:
        out = folder / f"artifact-{layout}"
        exports, packed, written = [], [], []
        for i in range(-1, rounds):
            shutil.rmtree(out, ignore_errors=True)
            out.unlink(missing_ok=True)
            exported = in_a_process(run, layout, out)
            seconds = packing[layout](), write_once(folder / "plain", exported["bytes"])
            if i >= 0:  # the first round warms the page cache, for all of them
                exports.append(exported)
                packed.append(seconds[0])
                written.append(seconds[1])
        shutil.rmtree(out, ignore_errors=True)
        for path in (out, folder / "plain"):
            path.unlink(missing_ok=True)
        rows[layout] = _row(exports, packed, written)
    largest = SHAPE["intermediate_size"] * 2 * SHAPE["hidden_size"]
    return {
        "shape": SHAPE,
        "rounds": rounds,
        "largest_tensor_float32_bytes": largest * 4,
        "largest_tensor_codes_bytes": largest,
        "formats": rows,
    }


def _row(exports: list[dict[str, Any]], packed: list[tuple[float, float]], written: list[float]) -> dict[str, Any]:
    nbytes = exports[0]["bytes"]
    speeds = {
        "export_mb_per_s": [nbytes / 1e6 / each["seconds"] for each in exports],
        "packing_mb_per_s": [nbytes / 1e6 / each[0] for each in packed],
        "disk_mb_per_s": [nbytes / 1e6 / each for each in written],
    }
    export, packing, disk = (median(values) for values in speeds.values())
    speeds["export_mb_per_cpu_s"] = [nbytes / 1e6 / each["cpu_seconds"] for each in exports]
    speeds["packing_mb_per_cpu_s"] = [nbytes / 1e6 / each[1] for each in packed]
    return {
        "bytes": nbytes,
        **{name: {"median": median(values), "samples": values} for name, values in speeds.items()},
        "export_to_packing": export / packing,
        "export_to_disk": export / disk,
        "export_to_bound": export / min(packing, disk),
        "export_to_packing_cpu": median(speeds["export_mb_per_cpu_s"]) / median(speeds["packing_mb_per_cpu_s"]),
        "peak_rss_bytes": max(each["peak_rss_bytes"] for each in exports),
        "idle_rss_bytes": min(each["idle_rss_bytes"] for each in exports),
    }


def table(document: Mapping[str, Any]) -> str:
    """The README's table of a result file."""
    results = document["results"]
    lines = [
        "| format | MB | export, MB/s | packing alone, MB/s | disk alone, MB/s | of the smaller | export, MB a CPU "
        "second | packing alone, MB a CPU second | peak RSS above imports, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for layout, row in results["formats"].items():
        speeds = " | ".join(f"{row[f'{name}_mb_per_s']['median']:.0f}" for name in ("export", "packing", "disk"))
        above = (row["peak_rss_bytes"] - row["idle_rss_bytes"]) / 1e6
        cpu = " | ".join(f"{row[f'{name}_mb_per_cpu_s']['median']:.0f}" for name in ("export", "packing"))
        share = f"{100 * row['export_to_bound']:.0f} %"
        lines.append(f"| {layout} | {row['bytes'] / 1e6:.0f} | {speeds} | {share} | {cpu} | {above:.0f} |")
    processor = document["machine"]["cpu"]
    processor = processor["model"] if isinstance(processor, dict) else processor
    largest = results["largest_tensor_float32_bytes"] / 1e6
    return "\n".join(
        [
            *lines,
            "",
            f"Medians of {results['rounds']} rounds on one core; the largest linear has {largest:.0f} MB in float32, "
            f"{largest / 4:.0f} MB as codes; {processor}.",
        ]
    )


def main() -> int:
    """Run everything; exit 6 when a format falls short of the aim."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "export-speed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--once", nargs=3, metavar=("FORMAT", "RUN", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        layout, run, out = arguments.once
        print(json.dumps(export_once(Path(run), layout, Path(out))))
        return 0
    arguments.folder.mkdir(parents=True, exist_ok=True)
    results = measure(arguments.folder, arguments.rounds)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from record import record, update_readme

    sources = ("tests/support.py", "benchmarks/formats/export_speed.py")
    document = record(RESULT, "python benchmarks/formats/export_speed.py", results, sources)
    update_readme(HERE / "README.md", "export_speed", table(document))
    print(table(document))
    return 0 if all(row["export_to_bound"] >= AIM for row in results["formats"].values()) else 6


if __name__ == "__main__":
    sys.exit(main())
