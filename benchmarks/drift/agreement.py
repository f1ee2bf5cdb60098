"""The figures of drift beside llama-perplexity's and beside a direct computation, on the same tokens and kernels.

Rounds MODEL to Q4_0, writes that and MODEL itself in F16 as GGUF, and measures Q4_0

1. with llama-perplexity (perplexity.py), --kl-divergence-base on the F16 GGUF, then --kl-divergence;
2. with phi4edge's figures on the logits of the F16 GGUF, so on the same reference as in 1;
3. as `phi4edge drift` does it: against the checkpoint in float32, streamed and stored;
4. directly in float64 (direct.py), on both references.

So 1 and 2 differ by the way a reference is stored and by which tokens count, 2 and 3 by the reference. Each also
measures its reference as an artifact: what is found there is its noise floor.

    python benchmarks/drift/agreement.py MODEL --text FILE [--chunks 8] [--threads 1] [--work FOLDER]
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from perplexity import build_perplexity, parse, run_perplexity

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from record import record, update_readme  # noqa: E402

from phi4edge.cli.main import main as phi4edge  # noqa: E402
from phi4edge.core.atomic import write_json  # noqa: E402
from phi4edge.measurement.drift import PositionFigures, compare_chunk, summarize  # noqa: E402
from phi4edge.measurement.drift_run import measure_drift  # noqa: E402
from phi4edge.measurement.encoding import encode  # noqa: E402
from phi4edge.measurement.reference import ReferenceStore  # noqa: E402
from phi4edge.measurement.references import resolve_reference  # noqa: E402
from phi4edge.runtimes import llama_cpp  # noqa: E402
from phi4edge.runtimes._api import Settings  # noqa: E402
from phi4edge.stages.export import export  # noqa: E402
from phi4edge.writers._api import WriteOptions  # noqa: E402

CONTEXT = 512
Figures = dict[str, tuple[float | None, float | None]]
PEER, SAME, OURS = "llama-perplexity", "phi4edge, same base", "phi4edge drift"


def artifacts(model: Path, work: Path) -> tuple[Path, Path]:
    """MODEL in F16 and in Q4_0, made where they are not there."""
    f16, q4 = work / "f16.gguf", work / "q4_0.gguf"
    if not f16.is_file():
        export(model, "gguf", f16, WriteOptions(head="f16", embedding="f16"))
    if not q4.is_file():
        command = ["quantize", str(model), "--out", str(work / "run"), "--method", "rtn", "--scheme", "q4_0", "-q"]
        if phi4edge(command):
            sys.exit("phi4edge quantize failed")
        export(work / "run", "gguf", q4, WriteOptions())
    return f16, q4


def by_llama_perplexity(f16: Path, q4: Path, text: str, base: Path, chunks: int, threads: int) -> dict[str, Figures]:
    """What llama-perplexity says of Q4_0 and of the F16 base itself."""
    program = build_perplexity()
    size = str(CONTEXT)
    how = ["-c", size, "-b", size, "-ub", size, "-t", str(threads), "--chunks", str(chunks)]
    if not base.is_file():
        run_perplexity(program, "-m", f16, "-f", text, *how, "--kl-divergence-base", base)
    said = {
        name: run_perplexity(program, "-m", path, *how, "--kl-divergence", "--kl-divergence-base", base)
        for name, path in (("Q4_0", q4), ("itself", f16))
    }
    return {name: parse(output) for name, output in said.items()}


def on_the_same_base(f16: Path, q4: Path, store: ReferenceStore, settings: Settings) -> dict[str, Figures]:
    """phi4edge's figures with the F16 GGUF's logits in place of the checkpoint's, encoded as the store has them."""
    found: dict[str, list[PositionFigures]] = {"Q4_0": [], "itself": []}
    with (
        llama_cpp.open(f16, store.context, settings) as base,
        llama_cpp.open(q4, store.context, settings) as artifact,
    ):
        pairs = zip(
            store.tokens,
            base.logits(store.tokens, first=store.first),
            artifact.logits(store.tokens, first=store.first),
            strict=True,
        )
        for row, theirs, ours in pairs:
            following = torch.from_numpy(row[store.first + 1 :])
            reference = torch.from_numpy(theirs[:-1])
            stored = encode(reference, following)
            found["itself"].append(compare_chunk(reference, stored, following))
            found["Q4_0"].append(compare_chunk(torch.from_numpy(ours[:-1]), stored, following))
    return {
        name: {
            key: (m.value, m.se) for key, m in summarize(PositionFigures.stack(parts)).items() if m.value is not None
        }
        for name, parts in found.items()
    }


def by_drift(artifact: Path, store: ReferenceStore, settings: Settings, runtime: str | None = None) -> Figures:
    """What `phi4edge drift` says."""
    metrics = measure_drift(artifact, store, settings=settings, runtime=runtime)["metrics"]
    return {name: (metric["value"], metric["se"]) for name, metric in metrics.items()}


def directly(model: Path, f16: Path, q4: Path, store: ReferenceStore, base: Path, threads: int, work: Path) -> Any:
    """What direct.py says."""
    tokens, out = work / "tokens.npy", work / "direct.out.json"
    np.save(tokens, store.tokens)
    subprocess.run([sys.executable, HERE / "direct.py", model, f16, q4, tokens, base, str(threads), out], check=True)
    return json.loads(out.read_text())


def measure(model: Path, text: str, chunks: int, threads: int, work: Path) -> dict[str, Any]:
    """All of it; each part is kept in ``work`` when it is done, and not made again."""
    f16, q4 = artifacts(model, work)
    base, settings = work / "base.bin", Settings(threads=threads)
    store = resolve_reference(str(model), text=text, context=CONTEXT, chunks=chunks, store=work / "store")
    as_reference = Settings(threads=threads, kv_type="f32")

    def kept(name: str, make: Callable[[], Any]) -> Any:
        path = work / f"{name}.json"
        if not path.is_file():
            write_json(path, make())
        return json.loads(path.read_text())

    return {
        "positions": store.chunks * store.positions,
        "noise_floor_kld": store.header["noise_floor_kld"],
        PEER: kept("peer", lambda: by_llama_perplexity(f16, q4, text, base, chunks, threads)),
        SAME: kept("same", lambda: on_the_same_base(f16, q4, store, settings)),
        OURS: {
            "Q4_0": kept("ours", lambda: by_drift(q4, store, settings)),
            "F16": kept("ours-f16", lambda: by_drift(f16, store, settings)),
            "itself": kept("ours-itself", lambda: by_drift(model, store, as_reference, "torch_ref")),
        },
        "direct": kept("direct", lambda: directly(model, f16, q4, store, base, threads, work)),
    }


def table(document: dict[str, Any]) -> str:
    """The README's tables."""
    found = document["results"]["found"]
    peer, same, ours = (found[name]["Q4_0"] for name in (PEER, SAME, OURS))
    direct = found["direct"]
    head = ("", PEER, SAME, "apart, in SE", "direct, same base", OURS, "direct, float32", "apart, in SE")
    lines = [_line(head), _line(["---"] * len(head))]
    for name, (value, _) in peer.items():
        mine, se = same[name]
        drift, drift_se = ours[name]
        b, t = (direct[pair].get(name) for pair in ("base → artifact", "transformers → artifact"))
        apart = f"{abs(mine - value) / se:.4f}" if se and value is not None else "–"
        apart_float = f"{abs(drift - t) / drift_se:.4f}" if drift_se and t is not None else "–"
        cells = (name, _figure(value), _figure(mine, se), apart, _figure(b), _figure(drift, drift_se), _figure(t))
        lines.append(_line((*cells, apart_float)))
    floors = [
        ("", "mean KLD", "max KLD", "same top-1"),
        ["---"] * 4,
        *(
            (title, *(f"{figures[key][0]:.2e}" for key in ("kld", "kld_max")), f"{figures['same_top_p'][0]:.4f}")
            for title, figures in (
                (f"{PEER}: F16 against its own base", found[PEER]["itself"]),
                ("phi4edge: F16 against its own logits, stored", found[SAME]["itself"]),
                ("phi4edge: the checkpoint against its own store", found[OURS]["itself"]),
                ("phi4edge: F16 in llama.cpp against the checkpoint", found[OURS]["F16"]),
            )
        ),
    ]
    stored = direct["base.bin → artifact"]
    results = document["results"]
    said = (
        f"{results['chunks']} chunks of {CONTEXT} tokens, {found['positions']:,} positions; KLD in nat, shares and Δp "
        f"as fractions. From llama-perplexity's own base file NumPy makes a mean KLD of {stored['kld']:.6f}."
    )
    return "\n".join([*lines, "", said, "", *map(_line, floors)])


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _figure(value: float | None, se: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:.6f}" + (f" ± {se:.6f}" if se else "")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="Keep what is made here: of one model, text and number of chunks.")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    with tempfile.TemporaryDirectory() as scratch:
        work = a.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        found = measure(a.model, a.text, a.chunks, a.threads, work)
    command = f"python benchmarks/drift/agreement.py MODEL --text FILE --chunks {a.chunks}"
    results = {"model": a.model.name, "text": Path(a.text).name, "chunks": a.chunks, "found": found}
    document = record(HERE / "results" / "agreement.json", command, results, ("benchmarks/drift",))
    update_readme(HERE / "README.md", "agreement", table(document))
    print(table(document))


if __name__ == "__main__":
    main()
