"""One run over a Ray cluster of two one-core workers: the bytes, the seconds, and what the loss of a worker costs.

The cluster is on this machine: a head without a CPU and two nodes of one core, each with an object store of its own, so
that everything goes through stores and sockets as between machines. The same recipe is solved by one process on one
core; by the cluster; by the cluster while a worker process that computes is killed (SIGKILL) after the first block;
and while a whole node is. A run's files and its GGUF are compared by their hashes. Seconds are those of solving, as the
run counts them; connecting and starting workers come on top.

    python benchmarks/scale/ray_workers.py [--blocks 3] [--samples 40]
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from memory import cut

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from record import record, update_readme  # noqa: E402

STORE_BYTES = 4 * 2**30  # of each node's object store: room for the samples, which Ray would write to disk else
HEAD = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
COSTS = (
    "performance.json",
    "lock",
    "journal.jsonl",
)  # of a run: what differs from one to the next, and nothing hangs on


def contents(run: Path) -> str:
    """One hash of a run's files, its costs left out."""
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name not in COSTS)
    listed = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(run)}" for path in files]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()


def solve(
    model: Path, run: Path, samples: int, address: str | None, disturb: Callable[[], str] | None = None
) -> dict[str, Any]:
    """Quantize and export in child processes; ``disturb`` is called once the first block is committed."""
    command = [sys.executable, "-m", "phi4edge", "quantize", str(model), "--out", str(run), "--samples", str(samples)]
    command += ["--json", "--quiet"]
    command += ["--executor", "ray", "--ray-address", address] if address is not None else []
    done: list[str] = []
    over = threading.Event()

    def watch() -> None:
        journal = run / "journal.jsonl"
        while not over.wait(0.05):
            if journal.is_file() and journal.read_bytes().count(b"\n") >= 1:
                assert disturb is not None
                done.append(disturb())
                return

    watcher = threading.Thread(target=watch)
    if disturb is not None:
        watcher.start()
    started = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    over.set()
    if disturb is not None:
        watcher.join()
    assert result.returncode == 0, result.stderr
    cost = json.loads((run / "performance.json").read_text())
    gguf = run.with_suffix(".gguf")
    export = [sys.executable, "-m", "phi4edge", "export", str(run), "--format", "gguf", "--out", str(gguf), "--quiet"]
    subprocess.run(export, capture_output=True, check=True)
    return {
        "solving_seconds": cost["solving_seconds"],
        "block_seconds": cost["block_seconds"],
        "command_seconds": seconds,
        "run_sha256": contents(run),
        "gguf_sha256": hashlib.sha256(gguf.read_bytes()).hexdigest(),
        "disturbed": done[0] if done else None,
    }


def kill_a_worker() -> str:
    """Kill a worker process that computes."""
    while True:
        busy = [p for p in psutil.Process().children(recursive=True) if "ray::_computed" in p.cmdline()]
        if busy:
            os.kill(busy[0].pid, signal.SIGKILL)
            return "a worker process was killed in block 1"
        time.sleep(0.01)


def table(document: dict[str, Any]) -> str:
    """The README's table."""
    results = document["results"]
    lines = [
        "| executor | what happened | solving, s | times the local one's | files and GGUF |",
        "|---|---|---|---|---|",
    ]
    alone = results["runs"][0]
    for row in results["runs"]:
        same = all(row[key] == alone[key] for key in ("run_sha256", "gguf_sha256"))
        lines.append(
            f"| {row['executor']} | {row['disturbed'] or '–'} | {row['solving_seconds']:.0f} | "
            f"{row['solving_seconds'] / alone['solving_seconds']:.2f} | "
            f"{'–' if row is alone else 'the same bytes' if same else '**other bytes**'} |"
        )
    cpu = document["machine"]["cpu"]
    return "\n".join(
        [
            *lines,
            "",
            f"{results['blocks']} blocks of the demo's model, {results['samples']} samples of 512 tokens, w4g32 by "
            f"GPTQ with targets and refinement; {cpu['model']}, {cpu['usable_cores']} cores; Ray {results['ray']}.",
        ]
    )


def main() -> None:
    """The command line."""
    import ray
    from ray.cluster_utils import Cluster

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "demo" / "model")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--samples", type=int, default=40)
    a = parser.parse_args()
    if not (a.model / "config.json").is_file():
        subprocess.run([sys.executable, ROOT / "benchmarks" / "demo" / "make_model.py", a.model], check=True)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}  # one core for every process that computes
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = cut(a.model, scratch / "model", a.blocks)

        def measure(name: str, executor: str, address: str | None, disturb: Callable[[], str] | None = None) -> None:
            runs.append({"executor": executor, **solve(model, scratch / name, a.samples, address, disturb)})
            print(json.dumps(runs[-1]), flush=True)

        measure("local", "local, one core", None)
        cluster = Cluster(initialize_head=True, head_node_args=HEAD)
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES) for _ in range(2)]

        def kill_a_node() -> str:
            cluster.remove_node(nodes[1], allow_graceful=False)
            return "a node was killed in block 1, with the objects in its store"

        try:
            for name, disturb in (("ray", None), ("ray-worker", kill_a_worker), ("ray-node", kill_a_node)):
                measure(name, "ray, two one-core nodes", cluster.address, disturb)
        finally:
            cluster.shutdown()
    command = f"python benchmarks/scale/ray_workers.py --blocks {a.blocks} --samples {a.samples}"
    results = {"blocks": a.blocks, "samples": a.samples, "ray": ray.__version__, "runs": runs}
    document = record(HERE / "results" / "ray_workers.json", command, results, ("benchmarks/scale/ray_workers.py",))
    update_readme(HERE / "README.md", "ray", table(document))


if __name__ == "__main__":
    main()
