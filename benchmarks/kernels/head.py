"""Seconds of KLD and its gradient at the head: products in float32, and on bfloat16 units.

Both multiply the same slice of a head with the same hidden states, in turns in one process, and each counts by its best
turn. A slice is what tuning has in RAM at a time, of as many rows as for a model of that width; KLD and gradient are
held against each other.

    python benchmarks/kernels/head.py [--models phi-4-mini,phi-4]
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi4edge.calibration.budget import head_rows
from phi4edge.checkpoint.published import published_config
from phi4edge.distillation.loss import Head
from phi4edge.model.compute import BFLOAT16, FLOAT32, computing, has_bfloat16_units

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from record import machine_name, record, update_readme  # noqa: E402

TOKENS, TURNS = 1024, 4


def measure(name: str, width: int, rows: int, tokens: int = TOKENS) -> dict[str, Any]:
    """Best seconds in both ways; how far KLD and its gradient lie apart, by their norms."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(rows, width, generator=generator) * (3 / width**0.5)).bfloat16()
    hidden = torch.randn(tokens, width, generator=generator)
    reference = hidden + 0.1 * torch.randn(tokens, width, generator=generator)
    head = Head(lambda start, stop: weight[start:stop], rows, rows)
    best = dict.fromkeys((FLOAT32, BFLOAT16), float("inf"))
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for _ in range(TURNS):
        for unit in best:
            with computing(unit):
                began = time.perf_counter()
                values, slope = head.divergence(hidden, reference, gradient=True)
                best[unit] = min(best[unit], time.perf_counter() - began)
            assert slope is not None
            found[unit] = values, slope
    (exact, steep), (values, slope) = found[FLOAT32], found[BFLOAT16]
    return {
        "model": name,
        "width": width,
        "rows": rows,
        "tokens": tokens,
        "seconds": best,
        "kld_error": float((values - exact).norm() / exact.norm()),
        "slope_error": float((slope - steep).norm() / steep.norm()),
    }


def table(results: dict[str, Any]) -> str:
    """The README's table."""
    lines = [
        "| head of | rows × width | float32, s | bfloat16 units, s | times as fast | difference: KLD, its gradient |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        plain, units = row["seconds"][FLOAT32], row["seconds"][BFLOAT16]
        lines.append(
            f"| {row['model']} | {row['rows']:,} × {row['width']:,} | {plain:.2f} | {units:.2f} | {plain / units:.1f} "
            f"| {row['kld_error']:.1e}, {row['slope_error']:.1e} |"
        )
    tokens = results["rows"][0]["tokens"]
    return "\n".join([*lines, "", f"{tokens:,} tokens in both models, {results['threads']} threads"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="phi-4-mini,phi-4")
    a = parser.parse_args()
    if not has_bfloat16_units():
        raise SystemExit("this CPU has no bfloat16 units that torch can use")
    rows = []
    for name in a.models.split(","):
        found = published_config(name)
        if found is None:
            raise SystemExit(f"{name} is no published model")
        rows.append(measure(name, found[1].hidden_size, head_rows(found[1])))
    results = {"threads": torch.get_num_threads(), "rows": rows}
    command = f"python benchmarks/kernels/head.py --models {a.models}"
    document = record(HERE / "results" / "head.json", command, results, ("benchmarks/kernels/head.py",))
    said = f"{table(results)}, {machine_name(document['machine'])}."
    print(said)
    update_readme(HERE / "README.md", "head", said)


if __name__ == "__main__":
    main()
