"""Seconds that a sample's share of a Hessian takes: in float32, by torch's bfloat16 switch alone, and by tiles.

All three add the same 512 tokens to the same sums, in turns in one process, and each counts by its best turn. Speed is
that of the work which half of a symmetric matrix asks for, width² multiplications and additions a token; beside it
stands one product on the bfloat16 units with a weight of that width, bfloat16 all through.

    python benchmarks/kernels/moments.py [--widths 3072,5120,8192,17920]
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi4edge.calibration.statistics import InputMoments
from phi4edge.model import crossed
from phi4edge.model.compute import BFLOAT16, FLOAT32, computing, product
from phi4edge.model.tiles import tiles

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from record import machine_name, record, update_readme  # noqa: E402

TOKENS, TURNS = 512, 5
KINDS = {"float32": FLOAT32, "switch": BFLOAT16, "tiles": BFLOAT16}


@contextmanager
def without_tiles() -> Iterator[None]:
    """Inside, torch is taken to have none."""
    found = crossed.tiles
    crossed.tiles = lambda: None  # type: ignore[assignment]
    try:
        yield
    finally:
        crossed.tiles = found


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(width: int) -> dict[str, Any]:
    """Best seconds of each kind and errors of H, relative to that of float64 products on some of its rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TOKENS, width, generator=generator)
    weight = torch.randn(width, width, generator=generator).bfloat16()
    best: dict[str, float] = dict.fromkeys((*KINDS, "product"), float("inf"))
    errors: dict[str, float] = {}
    for _ in range(TURNS):
        for kind, unit in KINDS.items():
            moments = InputMoments(width, full=True)
            with computing(unit), without_tiles() if kind == "switch" else nullcontext():
                moments.add(x)
                best[kind] = min(best[kind], seconds(partial(moments.add, x)))
            errors[kind] = error(moments, x)
        with computing(BFLOAT16):
            best["product"] = min(best["product"], seconds(lambda: product(x, weight)))
    return {"width": width, "seconds": best, "errors": errors}


def error(moments: InputMoments, x: Tensor) -> float:
    """Of the first rows of what was summed twice, without the first position."""
    found = moments._sums[0][:64].double()
    rows = x[0, 1:].double()
    exact = 2 * rows[:, :64].T @ rows
    return float((found - exact).norm() / exact.norm())


def table(results: dict[str, Any]) -> str:
    """The README's table."""
    lines = [
        "| width | float32, ms | the switch alone, ms | tiles, ms | tiles, times as fast as float32 "
        "| GFLOP/s: float32, switch, tiles | of one bfloat16 product | error: float32, tiles |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        width, best, errors = row["width"], row["seconds"], row["errors"]
        work = (TOKENS - 1) * width**2 / 1e9
        speeds = ", ".join(f"{work / best[kind]:.0f}" for kind in KINDS)
        lines.append(
            f"| {width:,} | {best['float32'] * 1e3:.1f} | {best['switch'] * 1e3:.1f} | {best['tiles'] * 1e3:.1f} "
            f"| {best['float32'] / best['tiles']:.1f} | {speeds} | {2 * TOKENS * width**2 / best['product'] / 1e9:.0f} "
            f"| {errors['float32']:.0e}, {errors['tiles']:.0e} |"
        )
    return "\n".join([*lines, "", f"A sample of {TOKENS} tokens, {results['threads']} threads"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="3072,5120,8192,17920")
    a = parser.parse_args()
    if tiles() is None:
        raise SystemExit("this CPU, or this build of torch, has no tiles on bfloat16 units")
    with torch.inference_mode():
        rows = [measure(int(width)) for width in a.widths.split(",")]
    results = {"threads": torch.get_num_threads(), "rows": rows}
    command = f"python benchmarks/kernels/moments.py --widths {a.widths}"
    document = record(HERE / "results" / "moments.json", command, results, ("benchmarks/kernels/moments.py",))
    said = f"{table(results)}, {machine_name(document['machine'])}."
    print(said)
    update_readme(HERE / "README.md", "moments", said)


if __name__ == "__main__":
    main()
