"""What is lost where a group's spans that clip much are not tried: groups that come out otherwise, error, seconds.

Where all values of a group count alike, ``phi4edge.quant.search`` leaves out the widest spans. Here the same groups are
searched with them and without, in turns in one process; each counts by its best turn. Drawn values: normal, and
Student's t with four degrees of freedom, which has the extremes that clipping would be for.

    python benchmarks/kernels/spans.py [--weights 4194304]
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

from phi4edge.quant import search as module
from phi4edge.quant.grid import Grid, Params, grid_for
from phi4edge.quant.rounding import round_to
from phi4edge.quant.scheme import parse_scheme

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from record import machine_name, record, update_readme  # noqa: E402

SCHEMES = ("q4_0", "w4g64", "w4g128", "q4_1", "w4g128-asym", "q6_k")
TURNS = 3
ALL, FEWER = (), module._ALIKE


def draw(kind: str, count: int, size: int) -> Tensor:
    """Groups [count, 1, size]."""
    torch.manual_seed(0)
    values = torch.randn(count, size)
    if kind == "t4":
        values = torch.distributions.StudentT(4.0).sample((count, size))
    return values[:, None].contiguous()


def searched(grid: Grid, values: Tensor, left_out: Any) -> tuple[Params, float]:
    """Parameters, and seconds on one core."""
    module._ALIKE = left_out
    began = time.perf_counter()
    found = module.search(grid, values)
    return found, time.perf_counter() - began


def measure(scheme: str, kind: str, weights: int) -> dict[str, Any]:
    """One row of the table."""
    grid = grid_for(parse_scheme(scheme))
    size = grid.scheme.unit if grid.scheme.nested else grid.scheme.group_size
    values = draw(kind, weights // size, size).reshape(weights // size, -1, grid.scheme.group_size)
    best, found = dict.fromkeys(("all", "fewer"), float("inf")), dict[str, Params]()
    for _ in range(TURNS + 1):  # the first one compiles
        for name, left_out in (("all", ALL), ("fewer", FEWER)):
            found[name], seconds = searched(grid, values, left_out)
            best[name] = min(best[name], seconds)
    losses = {name: round_to(grid, values, params)[1] for name, params in found.items()}
    same = torch.stack([(found["all"][field] == found["fewer"][field]).flatten(1).all(1) for field in grid.fields])
    return {
        "scheme": scheme,
        "values": kind,
        "groups": len(values),
        "other": int((~same.all(0)).sum()),
        "loss": losses["fewer"] / losses["all"] - 1,
        "seconds": best,
    }


def table(rows: list[dict[str, Any]], weights: int, cpu: str) -> str:
    """The README's table."""
    lines = [
        "| scheme | values | groups | that come out otherwise | squared error | ns a weight: all spans; fewer |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        spent = "; ".join(f"{seconds / weights * 1e9:.1f}" for seconds in row["seconds"].values())
        lines.append(
            f"| {row['scheme']} | {row['values']} | {row['groups']:,} | {row['other']} | "
            f"{100 * row['loss']:+.5f} % | {spent} |"
        )
    return "\n".join([*lines, "", f"One thread; {cpu}. A super-block of q6_k counts as one group."])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=2**22, help="of each kind")
    a = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(scheme, kind, a.weights) for scheme in SCHEMES for kind in ("normal", "t4")]
    command = f"python benchmarks/kernels/spans.py --weights {a.weights}"
    results = {"rows": rows, "weights": a.weights, "turns": TURNS}
    document = record(HERE / "results" / "spans.json", command, results, ("benchmarks/kernels/spans.py",))
    text = table(rows, a.weights, machine_name(document["machine"]))
    update_readme(HERE / "README.md", "spans", text)
    print(text)


if __name__ == "__main__":
    main()
