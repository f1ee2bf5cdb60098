"""Streamed distillation of scales and norms at full size: seconds a step by part, and the peak RSS under a budget.

The codes come from rounding to nearest, since a step costs the same whatever decided them; a few samples are enough,
since it costs the same whichever they are. `phi4edge` tunes for so many steps that every part is seen, in a process of
its own. What 64 samples of 512 tokens and two passes would take is estimated from these: so many steps, the
full-precision pass for every sample, and six evaluations on those kept aside: four, and one to three with what was
changed halved.

    python benchmarks/scale/make_checkpoint.py build/scale/phi-4-mini --model phi-4-mini --chunks 8 --length 512
    python benchmarks/scale/distil.py build/scale/phi-4-mini build/scale/out --ram-budget 3GiB --name phi-4-mini
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "benchmarks"), str(ROOT)]
from children import child, phi4edge  # noqa: E402
from record import machine_name, record, update_readme  # noqa: E402

from phi4edge.core.memory import parse_bytes  # noqa: E402
from phi4edge.core.recipe import CorpusRecipe, Recipe, TuningRecipe  # noqa: E402

RESULTS = HERE / "results"
STEP = ("read", "forward", "head", "backward", "update", "write")
WHOLE = {"samples": 64, "length": 512, "passes": 2.0, "evaluations": 6}


def recipe_of(chunks: Path, samples: int, length: int, steps: int, batch: int, scheme: str) -> Recipe:
    """Rounded to nearest, then tuned for ``steps`` steps of ``batch`` samples."""
    corpus = CorpusRecipe(str(chunks), samples=samples, sequence_length=length)
    kept = Recipe(method="rtn", scheme=scheme, corpus=corpus, tuning=TuningRecipe(batch=batch)).kept
    tuning = TuningRecipe(passes=steps * batch / kept, batch=batch)
    return Recipe(method="rtn", scheme=scheme, corpus=corpus, tuning=tuning)


def words_of(recipe: Recipe) -> list[str]:
    """The flags that ask for ``recipe``."""
    assert recipe.corpus is not None
    assert recipe.tuning is not None
    corpus, tuning = recipe.corpus, recipe.tuning
    return [
        *("--effort", "low", "--method", recipe.method, "--scheme", recipe.scheme, "--corpus", corpus.corpus),
        *("--samples", str(corpus.samples), "--sequence-length", str(corpus.sequence_length)),
        *("--tune-passes", repr(tuning.passes), "--tune-batch", str(tuning.batch)),
    ]


def account(run: Path, recipe: Recipe) -> dict[str, Any]:
    """What the journal of tuning says: seconds of the parts a step, a sample of the teacher's, and a held-out one."""
    assert recipe.corpus is not None
    assert recipe.tuning is not None
    records = [json.loads(line)["record"] for line in (run / "tuning" / "journal.jsonl").read_text().splitlines()]
    spent: Counter[str] = Counter()
    for entry in records:
        spent.update(entry["performance"].get("parts", {}))
    steps = sum(len(entry.get("losses", ())) for entry in records)
    evaluations = sum("heldout" in entry for entry in records)
    by_step = {part: spent[part] / steps for part in STEP}
    teacher = spent["teacher"] / recipe.corpus.samples
    held_out = spent["evaluate"] / (evaluations * recipe.held_out)
    scale = WHOLE["length"] / recipe.corpus.sequence_length
    aside = max(1, round(WHOLE["samples"] * recipe.held_out / recipe.corpus.samples))
    total_steps = WHOLE["passes"] * (WHOLE["samples"] - aside) / recipe.tuning.batch
    estimated = scale * (
        total_steps * sum(by_step.values()) + WHOLE["samples"] * teacher + WHOLE["evaluations"] * aside * held_out
    )
    return {
        "steps": steps,
        "tokens_a_step": recipe.tuning.batch * recipe.corpus.sequence_length,
        "step_seconds": by_step,
        "teacher_seconds_a_sample": teacher,
        "evaluation_seconds_a_sample": held_out,
        "losses": [loss for entry in records for loss in entry.get("losses", ())],
        "whole": WHOLE,
        "whole_seconds_estimated": estimated,
    }


def table(documents: Sequence[dict[str, Any]]) -> str:
    """The README's table over all result files."""
    head = "| model, machine | tokens a step | budget, GiB | peak RSS, GiB | s a step | " + " | ".join(STEP)
    lines = [f"{head} | 64 × 512 tokens, two passes, estimated |", "|---" * (len(STEP) + 6) + "|"]
    for document in documents:
        r, cpu = document["results"], machine_name(document["machine"])
        parts = " | ".join(f"{r['step_seconds'][part]:.1f}" for part in STEP)
        lines.append(
            f"| {r['model']}, {cpu} | {r['tokens_a_step']} | {r['budget_bytes'] / 2**30:.1f} "
            f"| {r['peak_rss_bytes'] / 2**30:.2f} | {sum(r['step_seconds'].values()):.1f} | {parts} "
            f"| {r['whole_seconds_estimated'] / 3600:.1f} h |"
        )
    return "\n".join([*lines, "", f"{documents[0]['results']['threads']} threads."])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, help="folder for the run")
    parser.add_argument("--name", help="write results/distil-NAME.json and the README's table")
    parser.add_argument("--chunks", type=Path, help="default: make_checkpoint.py's beside MODEL")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--scheme", default="w4g64")
    parser.add_argument("--ram-budget", default="3GiB")
    a = parser.parse_args()
    chunks = a.chunks or a.model.with_name(f"{a.model.name}-{a.samples}x{a.length}.safetensors")
    recipe = recipe_of(chunks, a.samples, a.length, a.steps, a.batch, a.scheme)
    run, budget = a.out / "distil", parse_bytes(a.ram_budget)
    cost = child(
        phi4edge(
            "quantize", a.model, "--out", run, *words_of(recipe), "--ram-budget", a.ram_budget, "--restart", "--quiet"
        )
    )
    found = {"peak_rss_bytes": cost.peak_rss_bytes, "seconds": cost.seconds, "threads": torch.get_num_threads()}
    results = {"model": a.model.name, "scheme": a.scheme, "budget_bytes": budget, **found, **account(run, recipe)}
    print(json.dumps(results, indent=1))
    if a.name:
        command = f"python benchmarks/scale/distil.py {a.model} {a.out} --name {a.name} --ram-budget {a.ram_budget}"
        command += f" --samples {a.samples} --length {a.length} --steps {a.steps} --batch {a.batch} --scheme {a.scheme}"
        record(RESULTS / f"distil-{a.name}.json", command, results, ("benchmarks/scale/distil.py",))
        documents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("distil-*.json"))]
        update_readme(HERE / "README.md", "distil", table(documents))
    shutil.rmtree(run)


if __name__ == "__main__":
    main()
