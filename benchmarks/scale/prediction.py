"""How long a quantization takes, as predicted before its start and after two blocks, beside how long it took.

Each model is quantized in a process of its own, its first blocks only where --blocks says so. Two clocks: the wall's,
which is what a user is told, and this process's CPU seconds, which other work on a shared machine does not stretch.
Predictions by the second are made just as by the first: the same micro-benchmark, the same arithmetic.

    python benchmarks/scale/prediction.py MODEL… [--blocks 6] [--samples 32] [--sequence-length 512] [--effort default]
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "benchmarks")]
from memory import cut  # noqa: E402
from record import machine_name, record, update_readme  # noqa: E402

from phi4edge.core.events import Progress  # noqa: E402

AFTER = 2  # blocks


class Recorder(Progress):
    """Clocks at every estimate of what is left."""

    estimates = True

    def __init__(self) -> None:
        self.linears = 0
        self.blocks: list[dict[str, float]] = []  # at the end of each block

    def advance(self, count: int = 1) -> None:
        """See :class:`Progress`."""
        self.linears += count

    def remaining(self, seconds: float) -> None:
        """See :class:`Progress`; the first word after a block's last linear is that of its end."""
        from phi4edge.model.block import LINEARS

        if self.linears == (len(self.blocks) + 1) * len(LINEARS):
            self.blocks.append({"wall": time.monotonic(), "cpu": time.process_time(), "left": seconds})


def measure(model: Path, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Predict, quantize and compare, in this process."""
    from phi4edge.checkpoint.reader import open_checkpoint
    from phi4edge.core.recipe import CorpusRecipe, solving_recipe
    from phi4edge.stages.job import prepare
    from phi4edge.stages.pace import Pace
    from phi4edge.stages.quantize import quantize
    from phi4edge.stages.rates import estimate

    corpus = CorpusRecipe(arguments.corpus, arguments.samples, arguments.sequence_length)
    settings = {"scheme": arguments.scheme, "effort": arguments.effort, "tune_passes": arguments.tune_passes}
    recipe = solving_recipe(settings, corpus)
    prepare(open_checkpoint(model), recipe, None, "cpu")  # the run below finds in this process what this reads
    predicted = {}
    for name, clock in (("wall", time.perf_counter), ("cpu", time.process_time)):
        began = clock()
        job = prepare(open_checkpoint(model), recipe, None, "cpu")
        predicted[name] = estimate(job, out, clock() - began, clock)
    recorder = Recorder()
    start = {"wall": time.monotonic(), "cpu": time.process_time()}
    summary = quantize(model, recipe, out, progress=recorder)
    ended = {"wall": time.monotonic(), "cpu": time.process_time()}
    marks = [start, *recorder.blocks]
    after = recorder.blocks[AFTER - 1]
    # What the display would have said by the CPU's clock. A first block ends after the start-up; it is left out.
    spent = [marks[i]["cpu"] - marks[i - 1]["cpu"] for i in range(2, AFTER + 1)]
    blocks = len(recorder.blocks)
    paced = Pace(blocks, [spent[-1]] * AFTER, predicted["cpu"], clock=lambda: 0.0)
    left = {"wall": after["left"], "cpu": paced.remaining()}
    clocks = {
        clock: {
            "before_seconds_estimated": predicted[clock].seconds,
            "seconds": ended[clock] - start[clock],
            "after_two_blocks_seconds_estimated": left[clock],
            "seconds_left_then": ended[clock] - after[clock],
            "parts_seconds_estimated": predicted[clock].as_dict()["parts_seconds_estimated"],
        }
        for clock in ("wall", "cpu")
    }
    return {
        "model": model.name,
        "blocks": blocks,
        "effort": arguments.effort,
        "tuned": recipe.tuning is not None,
        "tokens": corpus.tokens,
        "clocks": clocks,
        "parts_seconds": _parts(out),
        "performance": summary.performance,
    }


def _parts(run: Path) -> dict[str, float]:
    """What the journal says of each part, over all blocks."""
    from phi4edge.core.workdir import JOURNAL

    total: dict[str, float] = {}
    for line in (run / JOURNAL).read_text().splitlines():
        for part, seconds in json.loads(line)["record"]["performance"].get("parts", {}).items():
            total[part] = total.get(part, 0.0) + seconds
    return total


def table(rows: Sequence[dict[str, Any]], cpu: str) -> str:
    """The README's table."""
    lines = [
        "| model | blocks | tokens | effort | clock | predicted before, s | took, s | off by | "
        "predicted left after two blocks, s | was left, s | off by |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for clock, c in row["clocks"].items():
            before, took = c["before_seconds_estimated"], c["seconds"]
            left, truth = c["after_two_blocks_seconds_estimated"], c["seconds_left_then"]
            effort = row["effort"] + (", tuned" if row["tuned"] else "")
            lines.append(
                f"| {row['model']} | {row['blocks']} | {row['tokens']:,} | {effort} | {clock} | {before:.1f} | "
                f"{took:.1f} | {100 * (before / took - 1):+.0f} % | {left:.1f} | {truth:.1f} | "
                f"{100 * (left / truth - 1):+.0f} % |"
            )
    return "\n".join([*lines, "", f"{cpu}. Predictions are estimates; the rest is measured."])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--blocks", type=int, help="quantize the first blocks only")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--corpus", default="builtin")
    parser.add_argument("--scheme", default="w4g32")
    parser.add_argument("--effort", default="default")
    parser.add_argument("--tune-passes", type=float)
    parser.add_argument("--name", default="prediction", help="of the result file")
    parser.add_argument("--in-process", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.in_process is not None:
        print(json.dumps(measure(a.models[0], a.in_process, a)))
        return
    words = sys.argv[1:]
    rows = []
    for model in a.models:
        options = [word for word in words if Path(word) not in a.models]
        with tempfile.TemporaryDirectory() as scratch:
            used = cut(model, Path(scratch) / model.name, a.blocks) if a.blocks else model
            child = [sys.executable, __file__, str(used), *options, "--in-process", str(Path(scratch) / "run")]
            done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    command = f"python benchmarks/scale/prediction.py {' '.join(words)}"
    sources = ("benchmarks/scale/prediction.py", "benchmarks/scale/memory.py")
    document = record(HERE / "results" / f"{a.name}.json", command, {"runs": rows}, sources)
    text = table(rows, machine_name(document["machine"]))
    if a.name == "prediction":
        update_readme(HERE / "README.md", "prediction", text)
    print(text)


if __name__ == "__main__":
    main()
