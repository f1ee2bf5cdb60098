"""Build llama-cpp-python so that its wheel runs on every machine of this kind, once for each version and flags.

Left alone, llama.cpp tunes itself to the CPU that compiles it: such a wheel dies of an illegal
instruction on an older machine, and crashes on quantized weights on some newer ones (AMX). pip keeps
built wheels without regard to the flags they were built with, so its wheel cache is not used; ours is
``$XDG_CACHE_HOME/phi4edge/wheels/<version, platform and a hash of the flags>/``, shared by all clones.

Only the libraries that llama_cpp loads for text are compiled, which takes half the time of all.

Prints the wheel's path on stdout, the build's log on stderr. ``CMAKE_ARGS`` in the environment replaces
the flags below, e.g. for a build with a GPU backend; it gets a cache entry of its own.

    wheel=$(.venv/bin/python benchmarks/setup/build_llama.py) && .venv/bin/pip install --no-deps "$wheel"
"""

from __future__ import annotations

__all__ = ["build", "cached_wheel", "portable_flags", "wheel_folder"]

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
PACKAGE = "llama-cpp-python"

# What the CPUs of the last ten years have; never what this one happens to have.
FLAGS = {
    "x86_64": "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON",
    "aarch64": "-DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH=armv8.2-a+dotprod",
    "arm64": "-DGGML_NATIVE=OFF",  # macOS: every Apple chip; Metal is llama.cpp's default there
}

# No images and sounds, and none of what only they and llama.cpp's programs need; flags that follow may say otherwise.
TEXT_ONLY = "-DLLAVA_BUILD=OFF"
LIBRARIES_ONLY = Path(__file__).with_name("libraries_only.cmake")


def portable_flags(machine: str) -> str:
    """The CMake flags for CPU architecture ``machine``, as ``platform.machine()`` names it."""
    return FLAGS.get("x86_64" if machine == "AMD64" else machine, "-DGGML_NATIVE=OFF")


def pinned_version(constraints: str) -> str:
    """The version of llama-cpp-python that ``constraints`` (the text of constraints.txt) asks for."""
    match = re.search(rf"^{PACKAGE}==(\S+)$", constraints, re.MULTILINE)
    if match is None:
        sys.exit(f"{CONSTRAINTS.name}: no line {PACKAGE}==VERSION")
    return match[1]


def wheel_folder(version: str, flags: str, environment: Mapping[str, str]) -> Path:
    """Where the wheel of ``version`` built with ``flags`` for this platform is kept."""
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    made_of = f"{flags}\n{TEXT_ONLY}\n{LIBRARIES_ONLY.read_text()}"  # not where this clone lies
    digest = hashlib.sha256(made_of.encode()).hexdigest()[:12]
    kind = f"{platform.system()}-{platform.machine()}".lower()
    return cache / "phi4edge" / "wheels" / f"{PACKAGE}-{version}-{kind}-{digest}"


def cached_wheel(folder: Path) -> Path | None:
    """The wheel in ``folder``, if it was built before."""
    return next(iter(sorted(folder.glob("*.whl"))), None)


def build(version: str, flags: str, folder: Path) -> Path:
    """Compile ``version`` with ``flags`` into ``folder``; the wheel appears there only when whole."""
    folder.mkdir(parents=True, exist_ok=True)
    included = f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={shlex.quote(str(LIBRARIES_ONLY))}"
    environment = os.environ | {"CMAKE_ARGS": f"{TEXT_ONLY} {included} {flags}"}
    environment.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as scratch:
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-cache-dir", "--no-binary", PACKAGE]
        command += ["--build-constraint", str(CONSTRAINTS), "--wheel-dir", scratch, f"{PACKAGE}=={version}"]
        print(f"building {PACKAGE} {version} with {flags} (minutes, once)", file=sys.stderr)
        if subprocess.run(command, env=environment, stdout=sys.stderr, check=False).returncode:
            sys.exit(f"{PACKAGE} {version} was not built; it needs a C++17 compiler (g++ or clang++) and the network")
        built = cached_wheel(Path(scratch))
        assert built is not None, "pip reported success"
        return Path(shutil.move(built, folder / built.name))


def main() -> None:
    """Print the path of the wheel, building it first where there is none."""
    version = pinned_version(CONSTRAINTS.read_text())
    flags = os.environ.get("CMAKE_ARGS") or portable_flags(platform.machine())
    folder = wheel_folder(version, flags, os.environ)
    print(cached_wheel(folder) or build(version, flags, folder))


if __name__ == "__main__":
    main()
