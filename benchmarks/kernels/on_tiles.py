"""GPTQ and its refinement with errors handed on in float32 and on tiles of the bfloat16 units, one after the other.

Both solve the same weights with the same H, scales searched, three sweeps and a refit behind it, and both losses are
computed in float32 afterwards. Each counts by its best turn.

    python benchmarks/kernels/on_tiles.py [--shapes mini|phi-4] [--scheme w4g128]
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from gptq_kernel import SHAPES, layer  # noqa: E402
from record import machine_name, record, update_readme  # noqa: E402

from phi4edge.model.tiles import tiles  # noqa: E402
from phi4edge.quant.scheme import parse_scheme  # noqa: E402
from phi4edge.solvers import gptq  # noqa: E402
from phi4edge.solvers._api import Problem, SolverOptions  # noqa: E402
from phi4edge.solvers._loss import layer_loss  # noqa: E402
from phi4edge.solvers._refine import refine  # noqa: E402

TURNS = 2
PARTS = ("factor", "solve", "refine")
KINDS = {"float32": SolverOptions(refit=True, sweeps=3), "tiles": SolverOptions(refit=True, sweeps=3, on_units=True)}


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and what it returned."""
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def measure(name: str, rows: int, n: int, scheme: str) -> dict[str, Any]:
    """Best seconds of each kind's parts, and what both found."""
    W, H = layer(rows, n)
    problem = Problem("layer", W, H, parse_scheme(scheme))
    best = {kind: dict.fromkeys(PARTS, float("inf")) for kind in KINDS}
    found: dict[str, Any] = {}
    for _ in range(TURNS):
        for kind, options in KINDS.items():
            spent, made = timed(partial(gptq.factor, problem, options))
            best[kind]["factor"] = min(best[kind]["factor"], spent)
            factored = replace(problem, factor=made)
            spent, solution = timed(partial(gptq.solve, factored, options))
            best[kind]["solve"] = min(best[kind]["solve"], spent)
            spent, refined = timed(partial(refine, factored, solution, options))
            best[kind]["refine"] = min(best[kind]["refine"], spent)
            found[kind] = solution.linear.codes, layer_loss(problem, solution.linear), refined.loss
    (codes, loss, refined_loss), (other, other_loss, other_refined) = found["float32"], found["tiles"]
    return {
        "linear": name,
        "rows": rows,
        "n": n,
        "seconds": best,
        "equal_codes": float((codes == other).double().mean()),
        "loss_ratio": other_loss / loss,
        "refined_loss_ratio": other_refined / refined_loss,
    }


def table(results: dict[str, Any]) -> str:
    """The README's table."""
    lines = [
        "| linear | rows × n | factor, s | GPTQ, s | times as fast | three sweeps with refit, s | times as fast "
        "| equal codes behind GPTQ | loss ÷ float32's: GPTQ, refined |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        plain, ours = row["seconds"]["float32"], row["seconds"]["tiles"]
        cells = [f"{plain[part]:.2f}; {ours[part]:.2f}" for part in PARTS]
        gains = [f"{plain[part] / ours[part]:.1f}" for part in PARTS]
        lines.append(
            f"| {row['linear']} | {row['rows']:,} × {row['n']:,} | {cells[0]} | {cells[1]} | {gains[1]} "
            f"| {cells[2]} | {gains[2]} | {row['equal_codes'] * 100:.1f} % "
            f"| {row['loss_ratio']:.5f}, {row['refined_loss_ratio']:.5f} |"
        )
    return "\n".join([*lines, "", f"Float32; tiles. {results['scheme']}, {results['threads']} threads"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=sorted(SHAPES), default="mini")
    parser.add_argument("--scheme", default="w4g128")
    a = parser.parse_args()
    if tiles() is None:
        raise SystemExit("this CPU, or this build of torch, has no tiles on bfloat16 units")
    with torch.inference_mode():
        rows = [measure(*shape, a.scheme) for shape in SHAPES[a.shapes]]
    results = {"scheme": a.scheme, "threads": torch.get_num_threads(), "rows": rows}
    command = f"python benchmarks/kernels/on_tiles.py --shapes {a.shapes} --scheme {a.scheme}"
    document = record(HERE / "results" / "on-tiles.json", command, results, ("benchmarks/kernels/on_tiles.py",))
    said = f"{table(results)}, {machine_name(document['machine'])}."
    print(said)
    update_readme(HERE / "README.md", "on-tiles", said)


if __name__ == "__main__":
    main()
