"""The same artifact on two kinds of processor: how far apart are its logits, and how far on one kind alone?

Builds llama-perplexity for aarch64 and for x86-64 with `phi4edge runner build` (same sources, same flags but for the
processor), writes MODEL as F16, Q8_0 and Q4_0 GGUF, and has llama-perplexity compare each artifact with itself:

1. on x86-64, --kl-divergence-base writes its logits;
2. on x86-64 again, unchanged and with one thing changed at a time: the noise floor of one kind of machine;
3. the aarch64 program compares under qemu's user mode: another instruction set, other kernels.

qemu computes what the processor would, 20 to 64 times slower: it says nothing of a device's speed, and none is kept.
Hence few positions. `--cpu max` with `--march armv8.2-a+dotprod+fp16+i8mm` takes the kernels of phones with i8mm.

    python benchmarks/devices/instruction_sets.py MODEL --text FILE [--chunks 4] [--context 128] [--work FOLDER]

Needs qemu-aarch64 (qemu-user-static) and what `phi4edge runner build` needs, both compilers.
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "drift")]
from perplexity import parse  # noqa: E402
from record import record, update_readme  # noqa: E402

from phi4edge.cli.main import main as phi4edge  # noqa: E402
from phi4edge.cli.progress import progress_for  # noqa: E402
from phi4edge.core.atomic import write_json  # noqa: E402
from phi4edge.runtimes._runner_build import build, plan  # noqa: E402
from phi4edge.runtimes._runner_cache import Runner  # noqa: E402
from phi4edge.stages.export import export  # noqa: E402
from phi4edge.writers._api import WriteOptions  # noqa: E402

FORMATS = ("F16", "Q8_0", "Q4_0")
DOTPROD, I8MM = "armv8.2-a+dotprod+fp16", "armv8.2-a+dotprod+fp16+i8mm"
BASE = "x86-64-v3"


@dataclass(frozen=True)
class Run:
    """One row: a program and its settings, against the logits that x86-64-v3 wrote with two threads."""

    name: str
    arch: str = "x86_64"
    march: str = BASE
    threads: int = 2
    extra: tuple[str, ...] = ()
    cpu: str | None = None  # qemu's


RUNS = (
    Run("x86-64-v3, as it was"),
    Run("x86-64-v3, one thread for two", threads=1),
    Run("x86-64-v3, weights not repacked", extra=("--no-repack",)),
    Run("x86-64-v3, flash attention off", extra=("-fa", "off")),
    Run("x86-64-v2: SSE4.2 for AVX2 and FMA", march="x86-64-v2"),
    Run("aarch64 dotprod, Cortex-A76 in qemu", "aarch64", DOTPROD, cpu="cortex-a76"),
    Run("aarch64 dotprod, weights not repacked", "aarch64", DOTPROD, extra=("--no-repack",), cpu="cortex-a76"),
    Run("aarch64 dotprod and i8mm, qemu's max", "aarch64", I8MM, cpu="max"),
)


def artifacts(model: Path, work: Path, formats: list[str]) -> dict[str, Path]:
    """MODEL in each of ``formats``, and in F16 for comparison, made where it is not there."""
    found = {"F16": work / "f16.gguf"}
    if not found["F16"].is_file():
        export(model, "gguf", found["F16"], WriteOptions(head="f16", embedding="f16"))
    for name in formats:
        if name == "F16":
            continue
        scheme = name.lower()
        found[name] = work / f"{scheme}.gguf"
        if not found[name].is_file():
            run = work / f"run-{scheme}"
            if phi4edge(["quantize", str(model), "--out", str(run), "--method", "rtn", "--scheme", scheme, "-q"]):
                sys.exit("phi4edge quantize failed")
            export(run, "gguf", found[name], WriteOptions())
    return found


def runners(jobs: int | None, runs: tuple[Run, ...]) -> dict[str, Runner]:
    """A runner for each instruction set of ``runs``, built where there is none."""
    wanted = {run.march: run.arch for run in runs} | {BASE: "x86_64"}
    return {
        march: build(plan(arch, march=march), jobs=jobs, progress=progress_for(False))[0]
        for march, arch in wanted.items()
    }


def perplexity(runner: Runner, run: Run, model: Path, context: int, *words: str | Path) -> str:
    """What llama-perplexity prints, under qemu where it is for another processor."""
    emulator = [_qemu(), "-cpu", run.cpu] if run.cpu else []
    size = str(context)
    how = ["-c", size, "-b", size, "-ub", size, "-t", str(run.threads), "-tb", str(run.threads), *run.extra]
    command = [*emulator, runner.folder / "llama-perplexity", "-m", model, *how, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"llama-perplexity failed for {run.name}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def _qemu() -> str:
    path = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    return path or sys.exit("qemu-aarch64 is not installed (apt install qemu-user-static)")


def measure(model: Path, text: Path, a: argparse.Namespace, work: Path, runs: tuple[Run, ...]) -> dict[str, Any]:
    """Figures of every run and format; each is kept in ``work`` when it is done, and not made again."""
    made, files = runners(a.jobs, runs), artifacts(model, work, a.formats)
    count = ("--chunks", str(a.chunks))
    found: dict[str, Any] = {}
    first = Run("the base")
    for name, path in files.items():
        base = work / f"base-{name}.bin"
        if not base.is_file():
            scratch = base.with_suffix(".writing")
            perplexity(made[BASE], first, path, a.context, *count, "-f", text, "--kl-divergence-base", scratch)
            scratch.replace(base)
    rounded = [Run(f"for comparison: rounding, {BASE}, against F16")]
    for run in (*runs, *rounded):
        for name, path in ((name, files[name]) for name in a.formats):
            base = work / f"base-{'F16' if run in rounded else name}.bin"
            kept = work / f"{run.name}-{name}.json".replace(" ", "_").replace(":", "")
            if not kept.is_file():
                print(f"{run.name}: {name}", file=sys.stderr)
                said = perplexity(
                    made[run.march], run, path, a.context, *count, "--kl-divergence", "--kl-divergence-base", base
                )
                write_json(kept, parse(said))
            found.setdefault(run.name, {})[name] = json.loads(kept.read_text())
    programs = {
        march: {key: runner.manifest[key] for key in ("arch", "key", "compiler", "source", "llama_cpp_commit")}
        for march, runner in made.items()
    }
    return {"found": found, "runners": programs}


def table(document: dict[str, Any]) -> str:
    """The README's table."""
    results = document["results"]
    formats = results["formats"]
    head = ["", *(f"{name}: mean KLD" for name in formats), *(f"{name}: max, same top-1" for name in formats)]
    lines = [head, ["---"] * len(head)]
    for name, by_format in results["found"].items():
        kld = [_figure(*by_format[each]["kld"]) for each in formats]
        rest = [f"{by_format[each]['kld_max'][0]:.1e}, {by_format[each]['same_top_p'][0]:.4f}" for each in formats]
        lines.append([name, *kld, *rest])
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    scored = results["chunks"] * (results["context"] - 1 - results["context"] // 2)
    said = (
        f"{results['model']}, {results['chunks']} chunks of {results['context']} tokens, {scored:,} positions; KLD in "
        f"nat, ± its standard error as llama-perplexity prints it; {results['qemu']}."
    )
    return "\n".join([*rows, "", said])


def _figure(value: float | None, se: float | None) -> str:
    return "–" if value is None else f"{value:.1e} ± {se:.1e}" if se is not None else f"{value:.1e}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="F16 takes qemu ten times as long as Q4_0."
    )
    parser.add_argument("--jobs", type=int, help="Compilers at a time.")
    parser.add_argument(
        "--without", action="append", default=[], metavar="WORDS",
        help="Leave out rows with these words in their names; may be repeated. i8mm takes five times as long.",
    )  # fmt: skip
    parser.add_argument("--work", type=Path, help="Keep what is made here: of one model, text and size.")
    a = parser.parse_args()
    if a.chunks * (a.context - 1 - a.context // 2) < 100:
        parser.error("llama-perplexity gives no figures for fewer than 100 positions")
    if platform.machine() != "x86_64":
        sys.exit("the machine that writes the logits has to be x86-64")
    qemu = subprocess.run([_qemu(), "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    runs = tuple(run for run in RUNS if not any(words in run.name for words in a.without))
    with tempfile.TemporaryDirectory() as scratch:
        work = a.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        found = measure(a.model, a.text, a, work, runs)
    results = {
        "model": a.model.name,
        "text": a.text.name,
        "chunks": a.chunks,
        "context": a.context,
        "qemu": qemu,
        "formats": a.formats,
        **found,
    }
    command = (
        f"python benchmarks/devices/instruction_sets.py MODEL --text FILE --chunks {a.chunks} --context {a.context}"
    )
    command += f" --formats {' '.join(a.formats)}" if a.formats != list(FORMATS) else ""
    command += "".join(f" --without '{words}'" for words in a.without)
    document = record(HERE / "results" / "instruction_sets.json", command, results, ("benchmarks/devices",))
    update_readme(HERE / "README.md", "instruction_sets", table(document))
    print(table(document))


if __name__ == "__main__":
    main()
