"""Speed of drift: beside a bare prefill of the same tokens in llama.cpp, and of the reference beside transformers.

(a) `phi4edge drift` once its reference is stored and its worker has started: prefill in the worker, logits to the
parent, figures there. Beside it llama_decode alone (bare_prefill.py) with the same tokens, context, batch and threads,
asked for no logits, for those of the scored positions, and for all. Asked for no logits, llama.cpp leaves the head out;
no measurement of drift can.
(b) The streamed float32 forward that makes the reference, alone and with storing, beside transformers' forward of the
same checkpoint, one chunk at a time, with its logits of all positions and of the scored ones only. Here each side reads
the weights once for all chunks: ours within the figure, transformers before it.

All are taken in turn, in the same processes, again and again; ratios are medians of the turns' own ratios. Processor
seconds are of all threads and processes that take part, so they are what a machine with other work to do can tell.

    python benchmarks/drift/speed.py NAME=MODEL … --text FILE [--chunks 2] [--turns 3] [--threads 1]
    python benchmarks/drift/speed.py --wide --text FILE     a random checkpoint with wider blocks

The demo's stand-in (163 M parameters, 28 M of them the head) is the worst case: the fewer multiplications a logit
costs, the more its handling weighs. ``--wide`` has eight blocks of hidden 1536, 198 M in them, as larger models have
more of their time there, and a vocabulary of 32,768.
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]
from record import record, update_readme  # noqa: E402

from phi4edge.checkpoint.reader import open_checkpoint  # noqa: E402
from phi4edge.cli.main import main as phi4edge  # noqa: E402
from phi4edge.measurement.host import compare_session  # noqa: E402
from phi4edge.measurement.reference import ReferenceStore, build_store  # noqa: E402
from phi4edge.measurement.references import resolve_reference  # noqa: E402
from phi4edge.measurement.texts import Chunks  # noqa: E402
from phi4edge.model.forward import stream_logits  # noqa: E402
from phi4edge.runtimes import llama_cpp  # noqa: E402
from phi4edge.runtimes._api import Settings  # noqa: E402
from phi4edge.stages.export import export  # noqa: E402
from phi4edge.writers._api import WriteOptions  # noqa: E402

CONTEXT = 512
Seconds = dict[str, float]


def children_cpu() -> float:
    """Processor seconds so far of this process' live children, whole clock ticks each."""
    total = 0.0
    for entry in Path("/proc/self/task").iterdir():
        for pid in (entry / "children").read_text().split():
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def timed(work: Callable[[], object]) -> Seconds:
    """Processor seconds of this process and its children, and wall seconds, of ``work``."""
    cpu, wall = time.process_time() + children_cpu(), time.perf_counter()
    work()
    return {
        "cpu_s": time.process_time() + children_cpu() - cpu,
        "wall_s": time.perf_counter() - wall,
    }


def in_turns(kinds: dict[str, Callable[[], Seconds]], turns: int) -> dict[str, list[Seconds]]:
    """Every kind once a turn; there is no warm-up, as medians leave a slow first turn out."""
    found: dict[str, list[Seconds]] = {name: [] for name in kinds}
    for turn in range(turns):
        for name, work in kinds.items():
            seconds = work()
            found[name].append(seconds)
            print(f"{turn} {name}: {seconds['cpu_s']:.2f} s CPU, {seconds['wall_s']:.2f} s", file=sys.stderr)
    return found


def drift_speed(artifact: Path, store: ReferenceStore, turns: int, threads: int, scratch: Path) -> dict[str, Any]:
    """Part (a) on the chunks of ``store``."""
    tokens = scratch / "tokens.npy"
    np.save(tokens, store.tokens)
    command: list[str | Path] = [sys.executable, HERE / "bare_prefill.py", artifact, tokens, str(threads)]
    bare = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert bare.stdin is not None
    assert bare.stdout is not None
    to, answers = bare.stdin, bare.stdout

    def prefill(first: int) -> Seconds:
        to.write(f"{first}\n")
        to.flush()
        seconds: Seconds = json.loads(answers.readline())
        return seconds

    with llama_cpp.open(artifact, store.context, Settings(threads=threads)) as session:
        kinds = {
            "drift": lambda: timed(lambda: compare_session(artifact, session, store, store.chunks)),
            "prefill": lambda: prefill(store.context),
            "prefill, scored logits": lambda: prefill(store.first),
            "prefill, all logits": lambda: prefill(0),
        }
        samples = in_turns(kinds, turns)
    to.close()
    bare.wait()
    return compared("drift", samples, store.chunks * store.context)


def reference_speed(folder: Path, store: ReferenceStore, turns: int, work: Path) -> dict[str, Any]:
    """Part (b) on the chunks of ``store``."""
    checkpoint = open_checkpoint(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    tokens = torch.from_numpy(store.tokens)
    text = Chunks("speed", store.header["text"]["sha256"], 0, store.tokens)
    count = iter(range(10**6))

    def forward() -> None:
        for _ in stream_logits(checkpoint, tokens, first=store.first):
            pass

    def theirs(keep: int) -> None:
        with torch.inference_mode():
            for row in tokens:
                model(row[None], use_cache=False, logits_to_keep=keep)

    kinds = {
        "streamed": lambda: timed(forward),
        "streamed and stored": lambda: timed(lambda: build_store(checkpoint, text, Path(scratch) / str(next(count)))),
        "transformers": lambda: timed(lambda: theirs(0)),
        "transformers, scored logits": lambda: timed(lambda: theirs(store.context - store.first)),
    }
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        samples = in_turns(kinds, turns)
    found = compared("streamed", samples, store.chunks * store.context)
    stored = compared("streamed and stored", samples, store.chunks * store.context)
    return found | {"speed_ratio_stored": stored["speed_ratio"]}


def compared(ours: str, samples: dict[str, list[Seconds]], tokens: int) -> dict[str, Any]:
    """Median seconds of each, and the speed of ``ours`` as a share of the others': median of the turns' ratios."""
    medians = {
        name: {key: statistics.median(one[key] for one in each) for key in ("cpu_s", "wall_s")}
        for name, each in samples.items()
    }
    ratios = {
        name: {
            key: statistics.median(b[key] / a[key] for a, b in zip(samples[ours], each, strict=True))
            for key in ("cpu_s", "wall_s")
        }
        for name, each in samples.items()
        if name != ours
    }
    return {"tokens": tokens, "median_s": medians, "speed_ratio": ratios, "samples": samples}


def wide_model(folder: Path) -> Path:
    """A random checkpoint with eight blocks of hidden 1536 and a vocabulary of 32,768."""
    from support import write_checkpoint

    if not (folder / "config.json").is_file():
        shape = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 12}
        write_checkpoint(folder, "phi4", num_key_value_heads=3, vocab_size=32768, **shape)
    return folder


def rounded(model: Path, work: Path) -> Path:
    """``model`` in Q4_0, rounded to nearest; made where it is not there."""
    run, artifact = work / "run", work / "model.gguf"
    if not artifact.is_file():
        if phi4edge(["quantize", str(model), "--out", str(run), "--method", "rtn", "--scheme", "q4_0", "--quiet"]):
            sys.exit("phi4edge quantize failed")
        export(run, "gguf", artifact, WriteOptions())
    return artifact


def measure(model: Path, a: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Both parts on one model, its weights rounded to Q4_0."""
    chosen = work / f"reference-{a.chunks}"
    store = resolve_reference(str(model), text=a.text, context=CONTEXT, chunks=a.chunks, store=chosen)
    artifact = rounded(model, work)
    return {
        "chunks": a.chunks,
        "turns": a.turns,
        "threads": a.threads,
        "drift": drift_speed(artifact, store, a.turns, a.threads, work),
        "reference": reference_speed(model, store, a.turns, work),
    }


def table(documents: dict[str, dict[str, Any]]) -> str:
    """The README's table, from the results of every model that was measured."""
    lines = ["| model | ours | beside | ratio of speeds, CPU | wall |", "|---|---|---|---|---|"]
    said = []
    for name, document in documents.items():
        found = document["results"]
        for part, ours in (("drift", "drift"), ("reference", "streamed")):
            beside = found[part]["speed_ratio"]
            for other, ratio in ((kind, one) for kind, one in beside.items() if kind != "streamed and stored"):
                lines.append(f"| {name} | {ours} | {other} | {ratio['cpu_s']:.2f} | {ratio['wall_s']:.2f} |")
        stored = found["reference"]["speed_ratio_stored"]["transformers"]
        lines.append(
            f"| {name} | streamed and stored | transformers | {stored['cpu_s']:.2f} | {stored['wall_s']:.2f} |"
        )
        load = (document["machine"]["load_average"] or [0.0])[0]
        said.append(
            f"{name}: {found['chunks']} chunks of {CONTEXT} tokens, {found['turns']} turn(s), {found['threads']} "
            f"thread(s), {document['machine']['cpu']['model']}, load {load:.1f}."
        )
    return "\n".join([*lines, "", *said, "Under a load above the number of cores wall seconds mean little."])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME=MODEL")
    parser.add_argument("--wide", action="store_true", help="Also the random model, made under --work.")
    parser.add_argument("--text", default="builtin:eval")
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "drift", help="What is made is kept here.")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    models = {name: Path(folder) for name, _, folder in (given.partition("=") for given in a.models)}
    if a.wide:
        models["wide"] = wide_model(a.work / "wide-model")
    results = HERE / "results"
    for name, model in models.items():
        (a.work / name).mkdir(parents=True, exist_ok=True)
        asked = "--wide" if name == "wide" else f"{name}=MODEL"
        command = f"python benchmarks/drift/speed.py {asked} --text FILE --chunks {a.chunks} --turns {a.turns}"
        found = measure(model, a, a.work / name)
        record(results / f"speed-{name}.json", command, found, ("benchmarks/drift",))
    files = sorted(results.glob("speed-*.json"))
    said = table({path.stem.removeprefix("speed-"): json.loads(path.read_text()) for path in files})
    update_readme(HERE / "README.md", "speed", said)
    print(said)


if __name__ == "__main__":
    main()
