"""Whole blocks of a full-size checkpoint, quantized with error compensation: where the seconds go, and the peak RSS.

A child process begins ``quantize`` over the whole checkpoint and is interrupted when ``--blocks`` blocks are committed
(the run can be gone on with: that is what a run directory is for). Beside the seconds of each part stand the flops that
it takes, and beside these what one float32 product of that shape reaches in the same process, on the same cores.

    python benchmarks/scale/make_checkpoint.py build/scale/phi-4 --model phi-4 --chunks 80 --length 512
    python benchmarks/scale/gptq.py build/scale/phi-4 --name phi-4-low --effort low --ram-budget 6GiB
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from record import machine_name, record, update_readme  # noqa: E402

from phi4edge.checkpoint.config import ModelConfig  # noqa: E402
from phi4edge.checkpoint.reader import open_checkpoint  # noqa: E402
from phi4edge.core.events import Progress  # noqa: E402
from phi4edge.core.hugepages import restarted_environment, what_the_system_says  # noqa: E402
from phi4edge.core.memory import format_bytes, parse_bytes, peak_rss_bytes  # noqa: E402
from phi4edge.core.recipe import CorpusRecipe, Recipe, solving_recipe  # noqa: E402

RESULTS = HERE / "results"
SECONDS = 1.5  # for each product that is timed
PARTS = ("read", "forward", "moments", "solve", "check", "write")


class Until(Progress):
    """Says what is in work, and interrupts once so many blocks are in the journal."""

    def __init__(self, journal: Path, blocks: int) -> None:
        self._journal, self._blocks = journal, blocks

    def status(self, text: str) -> None:
        """See :class:`Progress`."""
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
        done = self._journal.read_bytes().count(b"\n") if self._journal.exists() else 0
        if done >= self._blocks:
            raise KeyboardInterrupt


def child(model: str, recipe: Recipe, out: Path, budget: int, blocks: int, pipe: Connection) -> None:
    """Quantize, then time products of the same shapes: all in one process."""
    import torch

    from phi4edge.stages.quantize import quantize

    with suppress(KeyboardInterrupt):
        quantize(model, recipe, out, ram_budget=budget, progress=Until(out / "journal.jsonl", blocks))
    peak = peak_rss_bytes()
    config = open_checkpoint(model).config
    length = recipe.corpus.sequence_length if recipe.corpus is not None else 512
    compute = json.loads((out / "run.json").read_text())["inputs"]["recipe"]["compute"]
    rates = {name: product_rates(length, m, n, compute) for name, (m, n) in config.linear_shapes.items()}
    pipe.send({"peak_rss_bytes": peak, "threads": torch.get_num_threads(), "compute": compute, "rates": rates})


def product_rates(length: int, m: int, n: int, compute: str) -> dict[str, float]:
    """FLOP/s of a forward product [tokens, n] · [n, m], and of [n, tokens] · [tokens, n] as moments need them."""
    import torch

    from phi4edge.calibration.blockpass import COMPUTED_TOKENS, samples_together

    dtype = torch.bfloat16 if compute == "bfloat16" else torch.float32

    def rate(tokens: int, width: int, product: Any) -> float:
        product()
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < SECONDS:
            product()
            done += 1
        return done * 2.0 * tokens * width * n / (time.perf_counter() - started)

    computed = samples_together(length, COMPUTED_TOKENS) * length
    x, w = torch.randn(computed, n, dtype=dtype), torch.randn(m, n, dtype=dtype)
    with torch.inference_mode():
        return {
            "forward": rate(computed, m, lambda: torch.nn.functional.linear(x, w)),
            "moments": rate(length, n, lambda: x[:length].T @ x[:length]),
        }


def flops(config: ModelConfig, recipe: Recipe) -> dict[str, dict[str, float]]:
    """What a block's parts take, by linear: a symmetric product counts half."""
    from phi4edge.calibration.statistics import takes_product

    assert recipe.corpus is not None
    kept, length = recipe.kept * recipe.corpus.sequence_length, recipe.corpus.tokens
    streams = 2 if recipe.full_precision_targets else 1
    forward, moments = {}, {}
    for name, (m, n) in config.linear_shapes.items():
        forward[name] = streams * 2.0 * length * m * n
        shift = 0.0 if streams == 1 else 4.0 * m * n if takes_product(m, n) else 2.0 * n * n
        moments[name] = kept * (float(n * n) + shift)
    return {"forward": forward, "moments": moments}


def shares(found: Mapping[str, Any], config: ModelConfig, recipe: Recipe, blocks: Sequence[dict[str, Any]]) -> Any:
    """Seconds that the products alone would take at the speed of one of them, over the seconds that the part took."""
    least = {
        part: sum(count / found["rates"][name][part] for name, count in by_linear.items())
        for part, by_linear in flops(config, recipe).items()
    }
    mean = {part: sum(b["parts"].get(part, 0.0) for b in blocks) / len(blocks) for part in PARTS}
    return {"mean_seconds": mean, "least_seconds": least, "share": {part: least[part] / mean[part] for part in least}}


def table(documents: Sequence[dict[str, Any]]) -> str:
    """The README's table over all result files."""
    head = (
        "| model, machine | effort, products | tokens | budget, GiB | peak RSS, GiB | s a block | read | forward "
        "| moments | solve | check | write | share of one product's speed: forward, moments | whole model, estimated |"
    )
    lines = [head, "|---" * 14 + "|"]
    for document in documents:
        r = document["results"]
        mean, share = r["mean_seconds"], r["share"]
        parts = " | ".join(f"{mean[part]:.0f}" for part in PARTS)
        total = sum(r["block_seconds"]) / len(r["block_seconds"])
        lines.append(
            f"| {r['model']}, {machine_name(document['machine'])} | {r['effort']}, {r['compute']} "
            f"| {r['tokens']:,} | {r['budget_bytes'] / 2**30:.1f} | "
            f"{r['peak_rss_bytes'] / 2**30:.2f} | {total:.0f} | {parts} | "
            f"{share['forward']:.2f}, {share['moments']:.2f} | {r['whole_seconds_estimated'] / 3600:.1f} h |"
        )
    return "\n".join(
        [*lines, "", f"Means over the blocks that were run, {documents[0]['results']['threads']} threads."]
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--chunks", type=Path, help="calibration chunks; make_checkpoint.py's beside MODEL by default")
    parser.add_argument("--name", required=True, help="of the result file")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--effort", choices=["low", "default"], default="default")
    parser.add_argument("--scheme", default="w4g32")
    parser.add_argument("--samples", type=int, default=80)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--ram-budget", default="6GiB")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "scale")
    parser.add_argument("--keep", action="store_true", help="leave the run directory, to be gone on with")
    a = parser.parse_args()
    chunks = a.chunks or a.model.with_name(f"{a.model.name}-{a.samples}x{a.length}.safetensors")
    corpus = CorpusRecipe(str(chunks), samples=a.samples, sequence_length=a.length)
    recipe = solving_recipe({"effort": a.effort, "scheme": a.scheme}, corpus)
    run, budget = a.out / f"run-{a.name}", parse_bytes(a.ram_budget)
    context = multiprocessing.get_context("spawn")
    os.environ.update(restarted_environment(os.environ, what_the_system_says()) or {})  # as the command itself does
    here, there = context.Pipe()
    process = context.Process(target=child, args=(str(a.model), recipe, run, budget, a.blocks, there))
    process.start()
    there.close()
    found = here.recv()
    process.join()
    records = [json.loads(line)["record"] for line in (run / "journal.jsonl").read_text().splitlines()]
    blocks = [r["performance"] for r in records[: a.blocks]]
    config = open_checkpoint(a.model).config
    seconds = [b["seconds"] for b in blocks]
    results = {
        "model": a.model.name,
        "effort": a.effort,
        "scheme": a.scheme,
        "tokens": a.samples * a.length,
        "budget_bytes": budget,
        "peak_rss_bytes": found["peak_rss_bytes"],
        "threads": found["threads"],
        "compute": found["compute"],
        "blocks": blocks,
        "block_seconds": seconds,
        "product_flops_per_second": found["rates"],
        "whole_seconds_estimated": config.num_layers * sum(seconds) / len(seconds),
        **shares(found, config, recipe, blocks),
    }
    command = f"python benchmarks/scale/gptq.py {a.model} --name {a.name} --blocks {a.blocks} --effort {a.effort}"
    command += f" --scheme {a.scheme} --samples {a.samples} --length {a.length} --ram-budget {a.ram_budget}"
    document = record(RESULTS / f"gptq-{a.name}.json", command, results, ("benchmarks/scale/gptq.py",))
    print(json.dumps(document["results"], indent=1))
    print(f"peak RSS {format_bytes(found['peak_rss_bytes'])} of {format_bytes(budget)}")
    documents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("gptq-*.json"))]
    update_readme(HERE / "README.md", "gptq", table(documents))
    if not a.keep:
        shutil.rmtree(run)


if __name__ == "__main__":
    main()
