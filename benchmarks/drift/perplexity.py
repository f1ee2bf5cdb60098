"""llama-perplexity of the pinned llama-cpp-python: built once from its sdist, run, and its output read.

The program is linked with the installed package's own libraries (peer/CMakeLists.txt), so it computes logits with the
kernels that phi4edge measures in. Kept in ``$XDG_CACHE_HOME/phi4edge/tools/`` by version and a hash of those libraries.
Compiling takes three minutes of one processor; needs cmake, ninja, a C++17 compiler and the package index.
"""

from __future__ import annotations

__all__ = ["build_perplexity", "parse", "perplexity_path", "run_perplexity"]

import hashlib
import importlib.metadata
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from phi4edge.core.archives import extract_all
from phi4edge.runtimes._runner_sources import CHANGE, flush_at_the_end

HERE = Path(__file__).resolve().parent
PACKAGE = "llama-cpp-python"

# Figure of phi4edge's documents: the words before it in llama-perplexity's output, and how much of its unit 1 is.
FIGURES = {
    "ppl": (r"Mean PPL\(Q\)", 1.0),
    "ppl_reference": (r"Mean PPL\(base\)", 1.0),
    "ln_ppl_ratio": (r"Mean ln\(PPL\(Q\)/PPL\(base\)\)", 1.0),
    "ppl_ratio": (r"Mean PPL\(Q\)/PPL\(base\)", 1.0),
    "ln_ppl_correlation": (r"Cor\(ln\(PPL\(Q\)\), ln\(PPL\(base\)\)\)", 0.01),
    "kld": r"Mean\s+KLD",
    "kld_max": r"Maximum KLD",
    "kld_p999": r"99\.9%\s+KLD",
    "kld_p99": r"99\.0%\s+KLD",
    "kld_p95": r"95\.0%\s+KLD",
    "kld_p90": r"90\.0%\s+KLD",
    "kld_median": r"Median\s+KLD",
    "kld_p10": r"10\.0%\s+KLD",
    "mean_delta_p": (r"Mean\s+Δp", 0.01),
    "delta_p_p99": (r"99\.0%\s+Δp", 0.01),
    "delta_p_median": (r"Median\s+Δp", 0.01),
    "delta_p_p01": (r" 1\.0%\s+Δp", 0.01),
    "rms_delta_p": (r"RMS Δp", 0.01),
    "same_top_p": (r"Same top p", 0.01),
}


def libraries() -> Path:
    """The installed package's libraries."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        sys.exit(f"{PACKAGE} is not installed")
    return Path(spec.origin).parent / "lib"


def perplexity_path() -> Path:
    """Where the program is kept, built or not."""
    version = importlib.metadata.version(PACKAGE)
    digest = hashlib.sha256((HERE / "peer" / "CMakeLists.txt").read_bytes() + CHANGE.encode())
    for library in sorted(libraries().glob("lib*")):
        digest.update(library.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phi4edge" / "tools"
    return cache / f"llama-perplexity-{version}-{digest.hexdigest()[:12]}"


def build_perplexity() -> Path:
    """The program, compiled first where there is none; its main() waits for its log."""
    version, program = importlib.metadata.version(PACKAGE), perplexity_path()
    if program.is_file():
        return program
    cache = program.parent
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as scratch:
        place = Path(scratch)
        print(f"building llama-perplexity of {PACKAGE} {version} (minutes, once)", file=sys.stderr)
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE, "--dest", scratch]
        _run([*download, f"{PACKAGE}=={version}"])
        with tarfile.open(next(place.glob("*.tar.gz"))) as sdist:
            extract_all(sdist, place)
        sources = next(place.glob("*/vendor/llama.cpp"))
        flush_at_the_end(sources / "tools" / "perplexity" / "main.cpp")  # or its figures are lost on a busy machine
        defined = [f"-DSOURCES={sources}", f"-DLIBRARIES={libraries()}", "-DBUILD_SHARED_LIBS=OFF"]
        optimized = ["-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"]  # the kernels are not in it
        _run(["cmake", "-G", "Ninja", "-S", HERE / "peer", "-B", place / "build", *defined, *optimized])
        _run(["ninja", "-C", place / "build", "-j2", "llama-perplexity"])
        shutil.move(place / "build" / "perplexity" / "llama-perplexity", program)
    return program


def _run(command: list[str | Path]) -> None:
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}")


def run_perplexity(program: Path, *arguments: str | Path) -> str:
    """What ``program`` prints; its libraries are those of the installed package."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(libraries()), "DYLD_LIBRARY_PATH": str(libraries())}
    done = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"llama-perplexity failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def parse(output: str) -> dict[str, tuple[float | None, float | None]]:
    """Every figure of FIGURES in ``output`` and its standard error, in phi4edge's units; None where it says NaN."""

    def number(words: str | None, scale: float) -> float | None:
        value = float(words) * scale if words else math.nan
        return None if math.isnan(value) else value

    found = {}
    for name, given in FIGURES.items():
        words, scale = given if isinstance(given, tuple) else (given, 1.0)
        match = re.search(rf"^{words}\s*:\s*(\S+?)%?\s*(?:±\s*(\S+))?(?:\s*%)?\s*$", output, re.MULTILINE)
        if match is None:
            sys.exit(f"llama-perplexity printed no {name}:\n{output[-3000:]}")
        found[name] = (number(match[1], scale), number(match[2], scale))
    return found
