"""Seconds a layer of our GPTQ beside the form in which the paper's authors wrote it, on Phi-4's real shapes.

Both get the same W, the same H, the same damping, the same column order (falling diag H) and the same scales (static
groups, absmax), so that the codes can be held against each other. The reference form: Cholesky, inverse,
Cholesky of the inverse, and a column loop with lazy blocks of 128 that changes W in place (arXiv 2210.17323,
Algorithm 1, with the Cholesky reformulation of its section 3.3), in torch, on all cores that it cares to use.

Factorisation depends on n alone, the loop on the rows as well. Where a layer would take the reference more than
minutes the loop is timed on ``--rows`` rows and a whole layer's seconds are that time × rows / timed rows: estimated,
and called so. Peak RSS is each side's own process's.

    python benchmarks/kernels/gptq_kernel.py [--shapes small|mini|phi-4] [--rows N]
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi4edge.core.memory import peak_rss_bytes
from phi4edge.quant.grid import Params, grid_for
from phi4edge.quant.parallel import row_pieces, run_parallel
from phi4edge.quant.scheme import parse_scheme
from phi4edge.solvers import gptq
from phi4edge.solvers._api import SolverOptions
from phi4edge.solvers._factor import Factor, factor_matrix

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from record import machine_name, record, update_readme  # noqa: E402

SHAPES: dict[str, list[tuple[str, int, int]]] = {  # linear, rows, n
    "small": [("qkv_proj", 1536, 1024), ("down_proj", 1024, 2048)],
    "mini": [
        ("qkv_proj", 5120, 3072),
        ("o_proj", 3072, 3072),
        ("gate_up_proj", 16384, 3072),
        ("down_proj", 3072, 8192),
    ],
    "phi-4": [
        ("qkv_proj", 7680, 5120),
        ("o_proj", 5120, 5120),
        ("gate_up_proj", 35840, 5120),
        ("down_proj", 5120, 17920),
    ],
}
SCHEME = parse_scheme("w4g128")
DAMP = 0.01
SIDES, CLOCKS = ("ours", "reference"), ("wall_s", "cpu_s")
OPTIONS = SolverOptions(damp_percent=DAMP, act_order=True)


def layer(rows: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W [rows, n] and H [n, n] of inputs that hang together and differ in size, as a trained model's do.

    Inputs are c·(m z + u) with z of n/8 entries and u of n, both standard normal; H is what it tends to with tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n // 8, n, generator=generator) / (n // 8) ** 0.5
    channel = torch.exp(0.5 * torch.randn(n, generator=generator))
    mixing *= channel
    H = mixing.T @ mixing
    H.diagonal().add_(channel**2)
    return torch.randn(rows, n, generator=generator) / n**0.5, H


def scales(W: Tensor) -> Params:
    """Absmax parameters of static groups, which both sides are given."""
    grid = grid_for(SCHEME)
    a = W.reshape(W.shape[0], SCHEME.groups(W.shape[1]), -1).abs().amax(-1) / (grid.high - grid.middle)
    return grid.store(a, -a * grid.middle)


def reference_factor(H: Tensor, order: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped H, columns in ``order``."""
    damped = H[order][:, order]
    damped.diagonal().add_(DAMP * H.diagonal().mean())
    lower = torch.linalg.cholesky(damped)
    inverse = torch.cholesky_inverse(lower)
    return torch.linalg.cholesky(inverse, upper=True)


def reference_loop(W: Tensor, U: Tensor, order: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Codes [rows, n]: the column loop with lazy blocks, on a copy of W that it changes."""
    grid, n = grid_for(SCHEME), W.shape[1]
    W = W[:, order].clone()
    codes = torch.empty(W.shape, dtype=torch.uint8)
    places = (order // (n // a.shape[1])).tolist()
    for start in range(0, n, 128):
        stop = min(start + 128, n)
        block = W[:, start:stop].clone()
        errors = torch.zeros_like(block)
        square = U[start:stop, start:stop]
        for i in range(stop - start):
            w, g = block[:, i], places[start + i]
            q = grid.encode(w, a[:, g], b[:, g])
            codes[:, start + i] = q.to(torch.uint8)
            error = (w - (a[:, g] * q + b[:, g])) / square[i, i]
            block[:, i:] -= error[:, None] @ square[i, i:][None, :]
            errors[:, i] = error
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return codes[:, order.argsort()]


def our_factor(H: Tensor, order: Tensor) -> Factor:
    """As the solver makes it."""
    return factor_matrix(H, order, DAMP, "layer")


def our_loop(W: Tensor, made: Factor, params: Params) -> Tensor:
    """Codes [rows, n] by the solver's own loop, in float32."""
    grid, n, groups = grid_for(SCHEME), W.shape[1], SCHEME.groups(W.shape[1])
    pieces = [
        partial(gptq._loop, grid, W[piece], groups, n, made, {field: of[piece] for field, of in params.items()})
        for piece in row_pieces(*W.shape)
    ]
    return torch.cat([codes for codes, _, _ in run_parallel(pieces)])


def loss(W: Tensor, H: Tensor, codes: Tensor, a: Tensor, b: Tensor) -> float:
    """tr(E H Eᵀ) / rows with the undamped H."""
    size = W.shape[1] // a.shape[1]
    E = W - (codes.float() * a.repeat_interleave(size, 1) + b.repeat_interleave(size, 1))
    return float(((E @ H) * E).sum(dtype=torch.float64)) / W.shape[0]


@torch.inference_mode()
def compare(rows: int, n: int) -> dict[str, Any]:
    """Both sides in this process, on the same numbers."""
    W, H = layer(rows, n)
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    params = scales(W)
    a, b = grid_for(SCHEME).steps(params)

    def timed(function: Any, *arguments: Any) -> tuple[Any, dict[str, float]]:
        wall, cpu = time.perf_counter(), time.process_time()
        result = function(*arguments)
        return result, {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}

    small, square = layer(64, 256)
    our_loop(small, our_factor(square, order[order < 256]), scales(small))  # compiles it
    made, our_factoring = timed(our_factor, H, order)
    ours, our_looping = timed(our_loop, W, made, params)
    del made
    U, reference_factoring = timed(reference_factor, H, order)
    theirs, reference_looping = timed(reference_loop, W, U, order, a, b)
    del U
    return {
        "ours": {"factor": our_factoring, "loop": our_looping},
        "reference": {"factor": reference_factoring, "loop": reference_looping},
        "equal_codes": float((ours == theirs).double().mean()),
        "loss": loss(W, H, ours, a, b),
        "reference_loss": loss(W, H, theirs, a, b),
    }


@torch.inference_mode()
def peak(side: str, rows: int, n: int) -> dict[str, int]:
    """Peak RSS of one side alone, above what the process had with W and H made."""
    W, H = layer(rows, n)
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    params = scales(W)
    a, b = grid_for(SCHEME).steps(params)
    with open("/proc/self/clear_refs", "w") as file:  # so that the peak is the solver's, not the making of H
        file.write("5")
    before = peak_rss_bytes()
    if side == "ours":
        our_loop(W, our_factor(H, order), params)
    else:
        reference_loop(W, reference_factor(H, order), order, a, b)
    return {"before_bytes": before, "peak_rss_bytes": peak_rss_bytes()}


def child(*arguments: object) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {result.returncode}\n{result.stderr}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def measure(model: str, name: str, rows: int, n: int, limit: int) -> dict[str, Any]:
    """One layer: times of ``min(rows, limit)`` rows, peaks of each side."""
    timed = min(rows, limit)
    found = child("compare", timed, n)
    layer = {
        side: {clock: found[side]["factor"][clock] + found[side]["loop"][clock] * rows / timed for clock in CLOCKS}
        for side in SIDES
    }
    suffix = "" if timed == rows else "_estimated"
    peaks = {side: child(side, timed, n) for side in SIDES}
    return {
        "model": model,
        "linear": name,
        "rows": rows,
        "n": n,
        "timed_rows": timed,
        **found,
        f"layer{suffix}": layer,
        f"times_as_fast{suffix}": {clock: layer["reference"][clock] / layer["ours"][clock] for clock in CLOCKS},
        "peak": peaks,
    }


def table(document: dict[str, Any]) -> str:
    """The README's table."""
    head = ["linear", "rows × n", "timed rows", "factor, s", "loop, s / 1,000 rows", "layer, s", "layer, processor s"]
    head += ["times as fast", "in processor s", "equal codes", "loss ÷ reference", "peak above W and H, MiB"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in document["results"]["layers"]:
        suffix = "" if "layer" in row else "_estimated"
        mark = " (estimated)" if suffix else ""
        layer, fast = row[f"layer{suffix}"], row[f"times_as_fast{suffix}"]
        cells = [row["linear"], f"{row['rows']:,} × {row['n']:,}", f"{row['timed_rows']:,}"]
        cells.append("; ".join(f"{row[side]['factor']['wall_s']:.2f}" for side in SIDES))
        cells.append("; ".join(f"{row[side]['loop']['wall_s'] * 1000 / row['timed_rows']:.2f}" for side in SIDES))
        cells += ["; ".join(f"{layer[side][clock]:.1f}" for side in SIDES) + mark for clock in CLOCKS]
        cells += [f"{fast[clock]:.1f}{mark}" for clock in CLOCKS]
        cells += [f"{100 * row['equal_codes']:.3f} %", f"{row['loss'] / row['reference_loss']:.6f}"]
        above = [(row["peak"][side]["peak_rss_bytes"] - row["peak"][side]["before_bytes"]) / 2**20 for side in SIDES]
        cells.append("; ".join(f"{value:.0f}" for value in above))
        lines.append(f"| {' | '.join(cells)} |")
    machine, results = document["machine"], document["results"]
    load = f"load average {results['load_before']:.1f} at the start"
    note = f"Ours; reference. {SCHEME.name}, {results['threads']} threads, {machine_name(machine)}, {load}."
    return "\n".join([*lines, "", note])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=list(SHAPES), default="small")
    parser.add_argument("--rows", type=int, default=16384, help="Most rows that a loop is timed on.")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        side, rows, n = a.child[0], int(a.child[1]), int(a.child[2])
        print(json.dumps(compare(rows, n) if side == "compare" else peak(side, rows, n)))
        return
    load = os.getloadavg()[0]
    layers = []
    for name, rows, n in SHAPES[a.shapes]:
        layers.append(measure(a.shapes, name, rows, n, a.rows))
        print(json.dumps(layers[-1]), flush=True)
    command = f"python benchmarks/kernels/gptq_kernel.py --shapes {a.shapes} --rows {a.rows}"
    results = {"scheme": SCHEME.name, "threads": torch.get_num_threads(), "load_before": load, "layers": layers}
    document = record(
        HERE / "results" / f"gptq_{a.shapes}.json", command, results, ("benchmarks/kernels/gptq_kernel.py",)
    )
    update_readme(HERE / "README.md", a.shapes, table(document))


if __name__ == "__main__":
    main()
