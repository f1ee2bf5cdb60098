"""Peak RSS of `phi4edge quantize` does not grow with depth: 4, 8 and 16 blocks of one shape.

Cuts the demo's model (benchmarks/demo/make_model.py; made when it is not there) to its first blocks, quantizes each
in a process of its own, and holds the peak against an interpreter that has imported torch and done nothing.

    python benchmarks/scale/memory.py [--samples 64]
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from record import record, update_readme  # noqa: E402

BLOCKS = (4, 8, 16)
IDLE = "import torch; print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"


def cut(model: Path, out: Path, blocks: int) -> Path:
    """The first ``blocks`` blocks of ``model`` as a checkpoint of their own."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(model / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if ".layers." not in n or int(n.split(".")[2]) < blocks}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": blocks}))
    return out


def measure(model: Path, run: Path, samples: int) -> dict[str, Any]:
    """Quantize in a child; its own account of its peak RSS and time."""
    command = [sys.executable, "-m", "phi4edge", "quantize", str(model), "--out", str(run), "--scheme", "q4_0"]
    command += ["--effort", "low", "--samples", str(samples), "--json", "--quiet"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    cost = json.loads(result.stdout)["data"]["performance"]
    return {"peak_rss_bytes": cost["peak_rss_bytes"], "seconds": cost["seconds"]}


def table(document: dict[str, Any]) -> str:
    """The README's table."""
    results = document["results"]
    lines = ["| blocks | peak RSS, MiB | above an idle interpreter with torch, MiB | s |", "|---|---|---|---|"]
    for row in results["runs"]:
        above = (row["peak_rss_bytes"] - results["idle_rss_bytes"]) / 2**20
        lines.append(f"| {row['blocks']} | {row['peak_rss_bytes'] / 2**20:.0f} | {above:.0f} | {row['seconds']:.0f} |")
    cpu = document["machine"]["cpu"]["model"]
    return "\n".join([*lines, "", f"{results['samples']} samples of 512 tokens, Q4_0 by GPTQ; {cpu}."])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "demo" / "model")
    parser.add_argument("--samples", type=int, default=64)
    a = parser.parse_args()
    if not (a.model / "config.json").is_file():
        subprocess.run([sys.executable, ROOT / "benchmarks" / "demo" / "make_model.py", a.model], check=True)
    idle = int(subprocess.run([sys.executable, "-c", IDLE], capture_output=True, text=True, check=True).stdout) * 1024
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for blocks in BLOCKS:
            model = cut(a.model, Path(scratch) / f"model-{blocks}", blocks)
            runs.append({"blocks": blocks, **measure(model, Path(scratch) / f"run-{blocks}", a.samples)})
            print(json.dumps(runs[-1]), flush=True)
    command = f"python benchmarks/scale/memory.py --samples {a.samples}"
    results = {"samples": a.samples, "idle_rss_bytes": idle, "runs": runs}
    document = record(HERE / "results" / "memory.json", command, results, ("benchmarks/scale/memory.py",))
    update_readme(HERE / "README.md", "memory", table(document))


if __name__ == "__main__":
    main()
