"""phi4edge beside its peers on the first blocks of Phi-4-mini (1.0 B parameters): wall time, peak RSS, KLD.

Every tool gets the same chunks and rounds to the same grid, in a process of its own, one after the other; peers run in
their own environments through the scripts of benchmarks/quality. All results are measured by one forward pass on other
chunks of the same kind: mean KLD over all positions behind the first half of a chunk. AutoRound's default, 200
iterations, is estimated from some iterations on one block.

    python benchmarks/scale/peers.py build/scale/peers [--samples 64] [--only "phi4edge default"]

Whether a peak grows with the number of blocks shows on more of them: ``--layers 16 --no-record``.

The weights are drawn (synthetic_weights.py): KLD compares the tools on this model, and says nothing of Phi-4-mini.
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "benchmarks" / "quality"), str(ROOT / "benchmarks"), str(ROOT)]
from candidates import Candidate, Made, Work, build, child  # noqa: E402
from environments import environment  # noqa: E402
from make_checkpoint import is_there, make_checkpoint, make_chunks  # noqa: E402
from record import machine_name, record, update_readme  # noqa: E402

from phi4edge.checkpoint.reader import open_checkpoint  # noqa: E402
from phi4edge.core.atomic import write_json  # noqa: E402
from phi4edge.model.forward import stream_logits  # noqa: E402
from phi4edge.model.source import WeightSource  # noqa: E402
from phi4edge.stages.run_reader import open_run  # noqa: E402

RESULTS = HERE / "results"
MODEL, HELD_OUT_SEED = "phi-4-mini", 1
ITERATIONS = 200  # AutoRound's default
LITTLE = "1400MiB"  # about the least that our plan allows
TIMED = (10, 30)  # iterations over one block
ROWS = 64  # positions whose logits are turned into probabilities at a time


def rows(grid: str) -> list[Candidate]:
    """What is compared."""
    budget = ("--ram-budget", LITTLE)
    return [
        Candidate("phi4edge low", "phi4edge", grid, "run", ("--effort", "low")),
        Candidate("phi4edge low, --no-guard", "phi4edge", grid, "run", ("--effort", "low", "--no-guard")),
        Candidate(f"phi4edge low, --ram-budget {LITTLE}", "phi4edge", grid, "run", ("--effort", "low", *budget)),
        Candidate("phi4edge default", "phi4edge", grid, "run", ("--effort", "default")),
        Candidate("AutoRound iters 0", "autoround", grid, "checkpoint", ("--iters", "0")),
        Candidate("GPTQModel", "gptqmodel_gptq", grid, "checkpoint"),
        Candidate("llm-compressor GPTQ", "llm_compressor", grid, "checkpoint", ("--method", "gptq")),
    ]


def divergences(reference: WeightSource, other: WeightSource, tokens: Tensor) -> list[float]:
    """KLD(reference ‖ other) of each chunk, mean over the positions behind its first half, nats."""
    first = tokens.shape[1] // 2
    pairs = zip(stream_logits(reference, tokens, first=first), stream_logits(other, tokens, first=first), strict=True)
    return [sum(_divergence(p, q)) / len(p) for p, q in pairs]


def _divergence(reference: Tensor, other: Tensor) -> Iterator[float]:
    for start in range(0, len(reference), ROWS):
        p = reference[start : start + ROWS].double().log_softmax(-1)
        q = other[start : start + ROWS].double().log_softmax(-1)
        yield float((p.exp() * (p - q)).sum())


def drift(made: Made, form: str, work: Work, tokens: Tensor) -> dict[str, float]:
    """Mean KLD of an artifact and its standard error between chunks; computed once an artifact."""
    note = made.path.parent / "kld.json"
    known = json.loads(note.read_text()) if note.is_file() else {}
    if known.get("key") != [made.key, len(tokens)]:
        source = open_run(made.path) if form == "run" else open_checkpoint(made.path)
        values = divergences(open_checkpoint(work.model), source, tokens)
        write_json(note, {"key": [made.key, len(tokens)], "values": values})
        known = {"values": values}
    values, n = known["values"], len(known["values"])
    mean = sum(values) / n
    return {"kld": mean, "kld_se": math.sqrt(sum((v - mean) ** 2 for v in values) / (n * max(n - 1, 1)))}


def autoround_default(work: Work, grid: str, blocks: int) -> dict[str, Any]:
    """AutoRound with its 200 iterations, at least: an iteration of a block so many times, and the rest of a run once.

    Both from two runs over one block, of few iterations and of some more.
    """
    costs = []
    for iterations in TIMED:
        folder = work.folder / f"autoround-{iterations}"
        note = folder / "cost.json"
        if not note.is_file():
            script = ROOT / "benchmarks" / "quality" / "peers" / "autoround.py"
            command = [environment("autoround"), script, work.model, work.chunks, folder / "none", "--scheme", grid]
            write_json(note, child([*command, "--iters", str(iterations), "--blocks", "1"], folder / "log.txt"))
        costs.append(json.loads(note.read_text()))
    fewer, more = (cost["wall_seconds"] for cost in costs)
    iteration = (more - fewer) / (TIMED[1] - TIMED[0])
    return {
        "name": f"AutoRound iters {ITERATIONS}",
        "timed": dict(zip(map(str, TIMED), costs, strict=True)),
        "iteration_seconds": iteration,
        "estimated_wall_seconds_at_least": fewer - TIMED[0] * iteration + blocks * ITERATIONS * iteration,
        "kld": None,
    }


def table(results: dict[str, Any]) -> str:
    """The README's table."""
    lines = ["| tool | wall, s | CPU, s | peak RSS, GiB | mean KLD on other chunks |", "|---|---|---|---|---|"]
    for row in results["rows"]:
        if row["kld"] is None:
            seconds = row["estimated_wall_seconds_at_least"]
            lines.append(f"| {row['name']} | {seconds:.0f} or more, estimated | – | – | not measured |")
            continue
        cost = row["cost"]
        peak = cost["peak_rss_bytes"] / 2**30
        lines.append(
            f"| {row['name']} | {cost['wall_seconds']:.0f} | {cost['cpu_seconds']:.0f} | {peak:.2f} "
            f"| {row['kld']:.4f} ± {row['kld_se']:.4f} |"
        )
    said = f"{results['grid']}, {results['samples']} samples of {results['length']} tokens, {results['layers']} blocks"
    return "\n".join([*lines, "", f"{said}, {results['parameters'] / 1e9:.2f} G parameters."])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the model and everything made of it")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--grid", default="w4g128")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=8, help="to measure KLD on")
    parser.add_argument("--only", action="append", help="only the row of this name; may be repeated")
    parser.add_argument("--name", default="peers", help="of the result file: peers, or peers-SOMETHING")
    parser.add_argument("--no-record", action="store_true", help="print only")
    a = parser.parse_args()
    out = a.out.resolve()
    model = out / "model"
    if not is_there(model, MODEL, a.layers, 0):
        make_checkpoint(model, MODEL, a.layers)
    chunks, other = out / "chunks.safetensors", out / "held-out.safetensors"
    make_chunks(chunks, MODEL, a.samples, a.length, 0)
    make_chunks(other, MODEL, a.chunks, a.length, HELD_OUT_SEED)
    tokens, work = load_file(other)["tokens"], Work(model, chunks, a.samples, a.length, out)
    found = []
    for candidate in rows(a.grid):
        if a.only and candidate.name not in a.only:
            continue
        made = build(candidate, work)
        found.append(
            {"name": candidate.name, "cost": dict(made.cost), "facts": dict(made.facts)}
            | drift(made, candidate.format, work, tokens)
        )
        print(json.dumps(found[-1]), flush=True)
    if not a.only:
        found.append(autoround_default(work, a.grid, a.layers))
    config = open_checkpoint(model).config
    results = {
        "grid": a.grid,
        "samples": a.samples,
        "length": a.length,
        "layers": a.layers,
        "parameters": config.parameters,
        "held_out_chunks": a.chunks,
        "threads": torch.get_num_threads(),
        "rows": found,
    }
    if a.no_record:
        print(table(results))
    else:
        command = f"python benchmarks/scale/peers.py {a.out} --layers {a.layers} --grid {a.grid} --samples {a.samples}"
        command += f" --length {a.length} --chunks {a.chunks}"
        command += "".join(f' --only "{name}"' for name in a.only or [])
        sources = ("benchmarks/scale/peers.py", "benchmarks/quality")
        command += f" --name {a.name}"
        record(RESULTS / f"{a.name}.json", command, results, sources)
        documents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("peers*.json"))]
        tables = "\n\n".join(f"{table(d['results'])} {machine_name(d['machine'])}." for d in documents)
        print(tables)
        update_readme(HERE / "README.md", "peers", tables)


if __name__ == "__main__":
    main()
