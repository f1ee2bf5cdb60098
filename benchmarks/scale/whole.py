"""All blocks of a full-size checkpoint with error compensation, killed on the way, to a GGUF that llama.cpp runs.

``phi4edge quantize`` begins on the checkpoint and is killed with SIGKILL once it has committed so many blocks and
worked on the next for a while that is drawn from a seed; the same command is given again until it ends by itself. Then
``phi4edge export`` writes the GGUF, and llama.cpp (llama-cpp-python) maps it and generates. Every life's seconds,
blocks and peak RSS go into a file beside the run: given SIGTERM, this script kills its child too, and given again it
goes on.

    python benchmarks/scale/make_checkpoint.py build/scale/phi-4 --model phi-4 --chunks 80 --length 512
    python benchmarks/scale/whole.py build/scale/phi-4 build/scale/whole --name phi-4-low --effort low --ram-budget 6GiB
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "benchmarks"), str(ROOT)]
from children import child, phi4edge  # noqa: E402
from record import machine_name, record, update_readme  # noqa: E402

from phi4edge.core.hashing import sha256_file, sha256_json  # noqa: E402
from phi4edge.core.memory import parse_bytes  # noqa: E402
from phi4edge.core.workdir import JOURNAL  # noqa: E402

RESULTS = HERE / "results"
POLL = 0.2  # seconds


def journal(run: Path) -> list[dict[str, Any]]:
    """Records of the blocks that are committed."""
    path = run / JOURNAL
    if not path.is_file():
        return []
    return [json.loads(line)["record"] for line in path.read_bytes().split(b"\n")[:-1]]


def live(words: Sequence[str | Path], run: Path, kill_after: int | None, wait: float, log: Path) -> dict[str, Any]:
    """One process: to its end, or killed ``wait`` seconds after block number ``kill_after`` was committed."""
    began, before = time.perf_counter(), len(journal(run))
    started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    variables = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    first_commit = last_commit = None
    seen, due = before, None
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    with log.open("ab") as output:
        process = subprocess.Popen(phi4edge(*words), env=variables, stdout=output, stderr=output)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            now = time.perf_counter()
            if pid:
                break
            if (done := len(journal(run))) > seen:
                seen, last_commit = done, now
                first_commit = first_commit or now
                if kill_after is not None and done >= kill_after:
                    due = due or now + wait
            if asked or (due is not None and now >= due):
                process.send_signal(signal.SIGKILL)
                due = float("inf")
            time.sleep(POLL)
    process.returncode = os.waitstatus_to_exitcode(status)
    ended = time.perf_counter()
    return {
        "started_at": started_at,
        "seconds": ended - began,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "exit_code": process.returncode,
        "asked_to_end": bool(asked),
        "blocks_before": before,
        "blocks_after": len(journal(run)),
        "seconds_to_first_commit": None if first_commit is None else first_commit - began,
        "seconds_lost": None if process.returncode == 0 else ended - (last_commit or began),
    }


def quantize(
    words: Sequence[str | Path], run: Path, kills: Sequence[int], seed: int, log: Path
) -> list[dict[str, Any]]:
    """All lives of a run, those of an earlier start of this script among them."""
    kept = run.with_name("lives.jsonl")
    lives = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    draw = random.Random(seed)
    shares = [draw.random() for _ in kills]
    while not lives or lives[-1]["exit_code"] != 0:
        done = journal(run)
        left = [(block, share) for block, share in zip(kills, shares, strict=True) if block > len(done)]
        block, share = left[0] if left else (None, 0.0)
        seconds = median([r["performance"]["seconds"] for r in done]) if done else 60.0
        life = live(words, run, block, share * seconds, log)
        print(json.dumps(life), flush=True)
        lives.append(life)
        with kept.open("a") as file:
            file.write(json.dumps(life) + "\n")
        if life["exit_code"] not in (0, -signal.SIGKILL):
            raise SystemExit(f"quantize ended with {life['exit_code']}; see {log}")
        if life["asked_to_end"]:
            raise SystemExit("asked to end; the same command goes on")
    return lives


def table(documents: Sequence[dict[str, Any]]) -> str:
    """The README's table over all result files."""
    lines = [
        "| model, machine | effort, products | tokens | budget, GiB | peak RSS, GiB | blocks | quantize, all lives "
        "| s a block: median, most | killed after blocks | lost by each kill, s | export, s | GGUF, GB "
        "| llama.cpp: loaded, s; tokens, s |",
        "|---" * 13 + "|",
    ]
    for document in documents:
        r = document["results"]
        lives, blocks, g = r["lives"], r["block_seconds"], r["generation"]
        killed = [life for life in lives if life["exit_code"] != 0]
        lines.append(
            f"| {r['model']}, {machine_name(document['machine'])} | {r['effort']}, {r['compute']} | {r['tokens']:,} "
            f"| {r['budget_bytes'] / 2**30:.1f} | {max(life['peak_rss_bytes'] for life in lives) / 2**30:.2f} "
            f"| {len(blocks)} | {sum(life['seconds'] for life in lives) / 3600:.2f} h "
            f"| {median(blocks):.0f}, {max(blocks):.0f} | {', '.join(str(life['blocks_after']) for life in killed)} "
            f"| {', '.join(format(life['seconds_lost'], '.0f') for life in killed)} | {r['export']['seconds']:.0f} "
            f"| {r['artifact_bytes'] / 1e9:.2f} "
            f"| {g['load_seconds']:.1f}; {len(g['tokens'])}, {g['generate_seconds']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, help="folder for the run and the artifact")
    parser.add_argument("--name", required=True, help="of the result file")
    parser.add_argument("--effort", choices=["low", "default"], default="low")
    parser.add_argument("--scheme", default="w4g32")
    parser.add_argument("--samples", type=int, default=80)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--ram-budget", default="6GiB")
    parser.add_argument("--kill-after", default="9,23", help="blocks, with commas; %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments within a block; %(default)s")
    parser.add_argument("--tokens", type=int, default=16, help="generated by llama.cpp; %(default)s")
    parser.add_argument("--keep", action="store_true", help="leave run and artifact")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    run, artifact, log = a.out / "run", a.out / "model.gguf", a.out / "quantize.log"
    chunks = a.model.with_name(f"{a.model.name}-{a.samples}x{a.length}.safetensors")
    words: list[str | Path] = ["quantize", a.model, "--out", run, "--method", "gptq", "--effort", a.effort]
    words += ["--scheme", a.scheme, "--corpus", chunks, "--samples", str(a.samples)]
    words += ["--sequence-length", str(a.length), "--ram-budget", a.ram_budget]
    lives = quantize(words, run, [int(block) for block in a.kill_after.split(",") if block], a.seed, log)
    exported = child(phi4edge("export", run, "--format", "gguf", "--out", artifact, "--force", "--quiet"))
    generation = child([sys.executable, str(HERE / "rtn.py"), "--generate", str(artifact), str(a.tokens)])
    records = journal(run)
    results = {
        "model": a.model.name,
        "effort": a.effort,
        "scheme": a.scheme,
        "tokens": a.samples * a.length,
        "budget_bytes": parse_bytes(a.ram_budget),
        "compute": json.loads((run / "run.json").read_text())["inputs"]["recipe"]["compute"],
        "lives": lives,
        "block_seconds": [r["performance"]["seconds"] for r in records],
        "blocks": [r["performance"] for r in records],
        "run_bytes": sum(path.stat().st_size for path in (run / "blocks").iterdir()),
        "blocks_sha256": sha256_json([r["files"] for r in records]),
        "artifact_bytes": artifact.stat().st_size,
        "artifact_sha256": sha256_file(artifact),
        "export": {k: v for k, v in asdict(exported).items() if k != "output"},
        "generation": json.loads(generation.output.strip().splitlines()[-1])
        | {"peak_rss_bytes": generation.peak_rss_bytes},
    }
    command = f"python benchmarks/scale/whole.py {a.model} {a.out} --name {a.name} --effort {a.effort}"
    command += f" --scheme {a.scheme} --samples {a.samples} --length {a.length} --ram-budget {a.ram_budget}"
    command += f" --kill-after {a.kill_after} --seed {a.seed} --tokens {a.tokens}"
    record(RESULTS / f"whole-{a.name}.json", command, results, ("benchmarks/scale/whole.py",))
    documents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("whole-*.json"))]
    update_readme(HERE / "README.md", "whole", table(documents))
    print(table(documents))
    if not a.keep:
        shutil.rmtree(a.out)


if __name__ == "__main__":
    main()
