"""What `make setup` builds: one portable llama.cpp for each version and set of flags, made once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import ROOT, load_script

build_llama = load_script("benchmarks/setup/build_llama.py")


def ask(cache: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run the script with ``cache`` for its cache, and a pip that refuses to work."""
    broken = cache / "broken" / "pip"
    broken.mkdir(parents=True, exist_ok=True)
    (broken / "__init__.py").touch()
    said = 'import os, sys; raise SystemExit(f\'building {" ".join(sys.argv[1:])}; {os.environ["CMAKE_ARGS"]}\')'
    (broken / "__main__.py").write_text(said)
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(broken.parent)} | changes
    script = ROOT / "benchmarks" / "setup" / "build_llama.py"
    return subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("machine", ["x86_64", "AMD64", "aarch64", "arm64", "riscv64"])
def test_no_wheel_is_tuned_to_the_machine_that_builds_it(machine: str) -> None:
    assert "-DGGML_NATIVE=OFF" in build_llama.portable_flags(machine)


def test_wheel_that_was_built_before_is_taken_and_one_of_other_flags_is_not(tmp_path: Path) -> None:
    version = build_llama.pinned_version((ROOT / "constraints.txt").read_text())
    flags = build_llama.portable_flags(os.uname().machine)
    folder = build_llama.wheel_folder(version, flags, {"XDG_CACHE_HOME": str(tmp_path)})
    folder.mkdir(parents=True)
    wheel = folder / f"llama_cpp_python-{version}-py3-none-any.whl"
    wheel.touch()
    found = ask(tmp_path, CMAKE_ARGS="")
    assert (found.returncode, found.stdout.strip()) == (0, str(wheel))
    other = ask(tmp_path, CMAKE_ARGS="-DGGML_CUDA=ON")
    assert other.returncode == 1
    assert "building llama-cpp-python" in other.stderr
    (said,) = (line for line in other.stderr.splitlines() if line.startswith("building wheel"))
    flags = said.split("; ")[1].split()
    assert flags.index("-DLLAVA_BUILD=OFF") < flags.index("-DGGML_CUDA=ON")  # a later flag has the last word
    (included,) = (flag.split("=")[1] for flag in flags if flag.startswith("-DCMAKE_PROJECT_llama.cpp_INCLUDE="))
    assert "set(LLAMA_BUILD_COMMON OFF)" in Path(included).read_text()


def test_build_uses_no_wheel_of_pips_and_a_failed_one_leaves_nothing(tmp_path: Path) -> None:
    failed = ask(tmp_path, CMAKE_ARGS="")
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert "building wheel --no-deps --no-cache-dir --no-binary llama-cpp-python" in failed.stderr
    assert "it needs a C++17 compiler" in failed.stderr
    assert not list((tmp_path / "phi4edge").rglob("*.whl"))
    assert not list((tmp_path / "phi4edge").rglob("building-*"))
