"""`make demo`: the main job on a real language model, and an honest table of it.

Makes a full-precision Phi-3-architecture checkpoint (see make_model.py), quantizes it with GPTQ onto the
Q4_0 grid, and measures the GGUF in llama.cpp beside full precision, llama.cpp's own Q4_0 with and without an imatrix,
rounding to nearest on the same grid, and Q8_0: drift on text that calibration never saw, speed on this machine. Every
step is a `phi4edge` command, printed before it runs, so that each can be run again by hand.

    python benchmarks/demo/run.py [--out build/demo] [--samples 40] [--chunks 16] [--restart]
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
NAME = "smollm2-135m"
ARTIFACTS = {
    "f16": f"{NAME}-f16.gguf",
    "gptq": f"{NAME}-q4_0-gptq.gguf",
    "llamacpp-imatrix": f"{NAME}-q4_0-llamacpp-imatrix.gguf",
    "llamacpp": f"{NAME}-q4_0-llamacpp.gguf",
    "rtn": f"{NAME}-q4_0-rtn.gguf",
    "q8_0": f"{NAME}-q8_0-rtn.gguf",
}


class Demo:
    """The steps, each a command."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._began = time.monotonic()

    def step(self, title: str) -> None:
        """Announce what follows, with the time since the start."""
        print(f"\n── {title}  [{time.monotonic() - self._began:.0f} s]", flush=True)

    def command(
        self, *arguments: str | Path, program: tuple[str, ...] = ("-m", "phi4edge"), shown: str = "phi4edge"
    ) -> None:
        """Run one command; end with its exit code if it fails."""
        words = [str(a) for a in arguments]
        print(f"$ {shown} {shlex.join(words)}", flush=True)
        result = subprocess.run([sys.executable, *program, *words], cwd=ROOT, check=False)
        if result.returncode:
            sys.exit(result.returncode)

    def script(self, path: Path, *arguments: str | Path) -> None:
        """Run one of the benchmarks' own scripts."""
        self.command(*arguments, program=(str(path),), shown=f"python {path.relative_to(ROOT)}")

    def artifact(self, kind: str) -> Path:
        """Where the artifact of ``kind`` lies."""
        return self.out / "artifacts" / ARTIFACTS[kind]


def make_artifacts(demo: Demo, samples: int, restart: bool) -> None:
    """The checkpoint, three runs of ours and two of llama.cpp's, and their GGUFs."""
    out, model, run = demo.out, demo.out / "model", demo.out / "run"
    again = ("--restart",) if restart else ()
    demo.step("a full-precision checkpoint of the Phi-3 architecture (SmolLM2-135M-Instruct, see benchmarks/demo)")
    if not (model / "config.json").exists():
        demo.script(HERE / "make_model.py", model)
    demo.command("inspect", model)
    demo.command("plan", model, "--target", "local")

    demo.step("the inputs of every linear, measured on the full-precision model (imatrix)")
    demo.command("calibrate", model, "--out", run, "--samples", str(samples), "--sequence-length", "512", *again)
    demo.step("GPTQ on the Q4_0 grid, on the same text; and rounding to nearest without any data")
    demo.command("quantize", model, "--out", run, "--method", "gptq", "--scheme", "q4_0", *again)
    for scheme in ("q4_0", "q8_0"):
        folder = out / f"run-{scheme}-rtn"
        demo.command("quantize", model, "--out", folder, "--method", "rtn", "--scheme", scheme, "--quiet", *again)

    demo.step("artifacts: the same codes as GGUF and as a GPTQ checkpoint, read back and compared bit for bit")
    demo.command("export", model, "--format", "gguf", "--out", demo.artifact("f16"), "--force", "--quiet")
    demo.command("export", run, "--format", "gguf", "--out", demo.artifact("gptq"), "--force", "--quiet")
    demo.command("verify", demo.artifact("gptq"), "--against", run, "--quiet")
    checkpoint = out / "artifacts" / f"{NAME}-q4_0-gptq-safetensors"
    demo.command("export", run, "--format", "gptq", "--out", checkpoint, "--force", "--quiet")
    demo.command("verify", checkpoint, "--against", run, "--quiet")
    for kind, scheme in (("rtn", "q4_0"), ("q8_0", "q8_0")):
        folder = out / f"run-{scheme}-rtn"
        demo.command("export", folder, "--format", "gguf", "--out", demo.artifact(kind), "--force", "--quiet")

    demo.step("llama.cpp's own Q4_0, plain and with our imatrix; embedding and head Q8_0, as ours")
    peer = ROOT / "benchmarks" / "peers" / "llama_quantize.py"
    demo.script(peer, demo.artifact("f16"), demo.artifact("llamacpp"), "--type", "q4_0")
    imatrix = run / "calibration" / "imatrix.safetensors"
    demo.script(peer, demo.artifact("f16"), demo.artifact("llamacpp-imatrix"), "--type", "q4_0", "--imatrix", imatrix)


def measure(demo: Demo, chunks: int) -> None:
    """Drift and speed of every artifact in llama.cpp."""
    results, model = demo.out / "results", demo.out / "model"
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    demo.step(
        f"drift in llama.cpp on {chunks} × 512 tokens of the half of Python's own texts that calibration never saw"
    )
    for kind in ARTIFACTS:
        demo.command(
            "drift", demo.artifact(kind), "--reference", model, "--text", "builtin:eval", "--chunks", str(chunks),
            "--store", demo.out / "reference", "--out", results / f"{kind}.drift.json", "--quiet",
        )  # fmt: skip
    demo.step("speed in llama.cpp on this machine, five repetitions after a warm-up")
    for kind in ARTIFACTS:
        demo.command(
            "bench", demo.artifact(kind), "--target", "local", "--out", results / f"{kind}.bench.json", "--quiet",
            "--prompt-tokens", "256", "--gen-tokens", "64",
        )  # fmt: skip


def report(demo: Demo) -> None:
    """The page, and where everything lies."""
    demo.step("report")
    folder, out = demo.out / "report", demo.out
    demo.command(
        "report", out / "results", out / "run", "--out", folder, "--baseline", ARTIFACTS["llamacpp"],
        "--title", "phi4edge demo: SmolLM2-135M-Instruct as Phi3ForCausalLM",
    )  # fmt: skip
    for name in ("report.html", "report.json", "report.md"):
        shutil.copyfile(folder / name, out / name)
    demo.step("done")
    print(f"checkpoint  {out / 'model'}\nrun         {out / 'run'}\nartifacts   {out / 'artifacts'}")
    print(f"report      {out / 'report.html'}\n            {out / 'report.json'}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--samples", type=int, default=40, help="calibration samples of 512 tokens; %(default)s")
    parser.add_argument("--chunks", type=int, default=16, help="evaluation chunks of 512 tokens; %(default)s")
    parser.add_argument("--restart", action="store_true", help="solve again what an earlier demo solved")
    a = parser.parse_args()
    demo = Demo(a.out)
    make_artifacts(demo, a.samples, a.restart)
    measure(demo, a.chunks)
    report(demo)


if __name__ == "__main__":
    main()
