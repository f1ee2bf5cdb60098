"""From a checkpoint to a Q4_0 GGUF without data: seconds, peak RSS and MB/s, beside what the disk alone does.

In this order, each command in a process of its own:

- read as ``dd`` does: the checkpoint's files from their start to their end, through the system's cache, which is told
  to forget them before, and around it (``iflag=direct``);
- written as ``dd`` does: as many bytes as the artifact has, on the same disk, fsynced; through the cache and around it;
- `phi4edge quantize --method rtn --scheme q4_0`: reads the checkpoint, rounds and hashes it, and writes the run; the
  cache is told to forget the checkpoint before;
- `phi4edge export --format gguf`;
- llama.cpp (llama-cpp-python) maps the file and generates a few tokens.

MB/s are 10⁶ bytes of the checkpoint a second, but for writing, where they are those that were written.

    python benchmarks/scale/make_checkpoint.py build/scale/phi-4 --model phi-4
    python benchmarks/scale/rtn.py build/scale/phi-4 build/scale/out --name phi-4
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "benchmarks"), str(ROOT)]
from around_cache import forget, read_rate, write_rate  # noqa: E402
from children import child, phi4edge  # noqa: E402
from record import machine_name, record, update_readme  # noqa: E402

RESULTS = HERE / "results"
WAYS = (("cached", False), ("direct", True))


def said(rates: dict[str, float]) -> str:
    """Rates through the cache and around it, MB/s."""
    return " / ".join(f"{rate / 1e6:.0f}" for rate in rates.values())


def generate(path: str, count: int) -> None:
    """Load a GGUF through a memory map and generate ``count`` tokens greedily; prints what happened as JSON."""
    import llama_cpp

    began = time.perf_counter()
    model = llama_cpp.Llama(path, n_ctx=256, use_mmap=True, verbose=False, n_threads=os.cpu_count())
    loaded, tokens = time.perf_counter() - began, []
    began = time.perf_counter()
    for token in model.generate(model.tokenize(b"def f(x):"), temp=0.0):
        tokens.append(token)
        if len(tokens) == count:
            break
    print(json.dumps({"load_seconds": loaded, "generate_seconds": time.perf_counter() - began, "tokens": tokens}))


def table(documents: Sequence[dict[str, Any]]) -> str:
    """The README's table over all result files."""
    lines = [
        "| model | checkpoint, GB | dd reads, cached / direct, MB/s | dd writes "
        "| quantize: s, MB/s, peak RSS GiB "
        "| export: s, MB/s written, peak RSS GiB | GGUF, GB | start to finish, s | dd would take, s |",
        "|---" * 9 + "|",
    ]
    for document in documents:
        r = document["results"]
        reading, writing, read = r["read_bytes_per_s"], r["write_bytes_per_s"], r["checkpoint_bytes"]
        q, e, written = r["quantize"], r["export"], r["artifact_bytes"]
        lines.append(
            f"| {r['model']} | {read / 1e9:.1f} | {said(reading)} | {said(writing)} "
            f"| {q['seconds']:.0f}, {read / q['seconds'] / 1e6:.0f}, {q['peak_rss_bytes'] / 2**30:.2f} "
            f"| {e['seconds']:.0f}, {written / e['seconds'] / 1e6:.0f}, {e['peak_rss_bytes'] / 2**30:.2f} "
            f"| {written / 1e9:.2f} | {q['seconds'] + e['seconds']:.0f} "
            f"| {' / '.join(f'{seconds:.0f}' for seconds in r['disk_seconds'].values())} |"
        )
    machine = documents[0]["machine"]
    generated = [
        f"{d['results']['model']}: loaded in {g['load_seconds']:.1f} s, {len(g['tokens'])} tokens in "
        f"{g['generate_seconds']:.1f} s"
        for d in documents
        if (g := d["results"]["generation"]) is not None
    ]
    return "\n".join([*lines, "", f"{machine['cpu']['logical_cores']} cores; {machine_name(machine)}.", *generated])


def measure(model: Path, out: Path, tokens: int) -> dict[str, Any]:
    """Everything of one checkpoint."""
    shards = sorted(model.glob("model*.safetensors"))
    nbytes = sum(path.stat().st_size for path in shards)
    run, artifact = out / "run", out / "model.gguf"
    shutil.rmtree(run, ignore_errors=True)  # it would know the checkpoint's hashes
    reading = {way: read_rate(shards, direct=direct).rate for way, direct in WAYS}
    print(f"reading {said(reading)}", flush=True)
    forget(shards)
    words = ("quantize", model, "--out", run, "--method", "rtn", "--scheme", "q4_0", "--restart", "--quiet")
    quantized = child(phi4edge(*words))
    print(f"quantize {quantized.seconds:.0f} s, peak {quantized.peak_rss_bytes / 2**30:.2f} GiB", flush=True)
    exported = child(phi4edge("export", run, "--format", "gguf", "--out", artifact, "--force", "--quiet"))
    print(f"export {exported.seconds:.0f} s, peak {exported.peak_rss_bytes / 2**30:.2f} GiB", flush=True)
    written = artifact.stat().st_size
    stored = sum(path.stat().st_size for path in (run / "blocks").iterdir())
    writing = {way: write_rate(out, written, direct=direct).rate for way, direct in WAYS}
    print(f"writing {said(writing)}", flush=True)
    generation = None
    if tokens:
        ran = child([sys.executable, str(Path(__file__).resolve()), "--generate", str(artifact), str(tokens)])
        generation = json.loads(ran.output.strip().splitlines()[-1]) | {"peak_rss_bytes": ran.peak_rss_bytes}
    return {
        "model": model.name,
        "checkpoint_bytes": nbytes,
        "run_bytes": stored,
        "artifact_bytes": written,
        "read_bytes_per_s": reading,  # through the cache, and around it
        "write_bytes_per_s": writing,
        "quantize": {k: v for k, v in asdict(quantized).items() if k != "output"},
        "performance": json.loads((run / "performance.json").read_text()),
        "export": {k: v for k, v in asdict(exported).items() if k != "output"},
        # The checkpoint and the run are read, the run and the artifact written.
        "disk_seconds": {way: (nbytes + stored) / reading[way] + (stored + written) / writing[way] for way in reading},
        "generation": generation,
    }


def main() -> None:
    """The command line."""
    if sys.argv[1:2] == ["--generate"]:
        generate(sys.argv[2], int(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, help="folder for the run and the artifact, on the disk to be measured")
    parser.add_argument("--name", help="write results/rtn-NAME.json and the README's table")
    parser.add_argument("--tokens", type=int, default=8, help="generated by llama.cpp; 0: none; %(default)s")
    parser.add_argument("--keep", action="store_true", help="leave run and artifact")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    results = measure(a.model, a.out, a.tokens)
    print(json.dumps(results, indent=1))
    if a.name:
        command = f"python benchmarks/scale/rtn.py {a.model} {a.out} --name {a.name} --tokens {a.tokens}"
        record(RESULTS / f"rtn-{a.name}.json", command, results, ("benchmarks/scale/rtn.py",))
        documents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("rtn-*.json"))]
        update_readme(HERE / "README.md", "rtn", table(documents))
    if not a.keep:
        shutil.rmtree(a.out / "run")
        for path in a.out.glob("model.gguf*"):
            path.unlink()


if __name__ == "__main__":
    main()
