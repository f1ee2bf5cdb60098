"""A source tree of llama.cpp's outline that compiles in a second, and `phi4edge runner` as a process on it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from phi4edge.runtimes._runner_recipe import PROGRAMS

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MISSING = [tool for tool in ("cmake", "ninja", "g++", "gcc") if shutil.which(tool) is None]
needs_a_compiler = pytest.mark.skipif(
    bool(MISSING) or (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason=f"builds for x86-64 Linux on it, with cmake, ninja, gcc and g++; missing: {MISSING or 'the machine'}",
)

# `gate` stops a program's compilation until a file appears: the place where a test kills.
_TOP = """
cmake_minimum_required(VERSION 3.21)
project(outline CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
foreach(name llama-bench llama-completion llama-perplexity)
  add_executable(${name} tools/main.cpp)
  target_compile_definitions(${name} PRIVATE NAME="${name}" COMMIT="${LLAMA_BUILD_COMMIT}")
endforeach()
if(NOT "$ENV{GATE}" STREQUAL "")
  add_custom_command(OUTPUT passed VERBATIM COMMAND sh -c
    "touch '$ENV{GATE}.reached'; until [ -e '$ENV{GATE}' ]; do sleep .05; done; touch passed")
  add_custom_target(gate DEPENDS passed)
  add_dependencies(gate llama-bench)
  add_dependencies(llama-perplexity gate)
endif()
"""
_MAIN = """
#include <cstdio>
int main() { std::puts(NAME " " COMMIT); }
"""


def write_sources(folder: Path, *, main: str = _MAIN, commit: str | None = COMMIT) -> Path:
    """llama.cpp's outline in ``folder``, which has a git folder that names ``commit``."""
    files = {
        "LICENSE": "MIT, in the test's words",
        "CMakeLists.txt": _TOP,
        "licenses/LICENSE-jsonhpp": "MIT, of json.hpp",
        "vendor/cpp-httplib/LICENSE": "MIT, of httplib",
        "tools/main.cpp": main,
        **({".git/HEAD": f"{commit}\n"} if commit else {}),
    }
    for part in ("common", "ggml", "src", "tools/llama-bench", "tools/completion", "tools/perplexity"):
        files[f"{part}/CMakeLists.txt"] = ""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def write_sdist(path: Path, sources: Path) -> Path:
    """An archive in which ``sources`` lie where llama-cpp-python's sdist has llama.cpp; the git folder is elsewhere."""
    root = "llama_cpp_python-0.0.0"
    inside = f"{root}/vendor/llama.cpp"
    pointer = path.parent / "pointer"
    pointer.write_text("gitdir: ../../.git/modules/vendor/llama.cpp\n")
    with tarfile.open(path, "w:gz") as file:
        for each in sorted(p for p in sources.rglob("*") if p.is_file() and ".git" not in p.parts):
            file.add(each, f"{inside}/{each.relative_to(sources)}")
        file.add(pointer, f"{inside}/.git")
        file.add(sources / ".git" / "HEAD", f"{root}/.git/modules/vendor/llama.cpp/HEAD")
        file.add(sources / "LICENSE", f"{root}/CMakeLists.txt")  # the sdist has a CMakeLists.txt of its own
    return path


class Commands:
    """`phi4edge runner …` with a cache of its own."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.runners = cache / "phi4edge" / "runners" / "x86_64"

    def start(self, *arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
        environment = os.environ | {"XDG_CACHE_HOME": str(self.cache)} | variables
        words = [sys.executable, "-m", "phi4edge", "runner", *map(str, arguments), "--json"]
        return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, *arguments: str | Path, code: int = 0, **variables: str) -> dict[str, Any]:
        """The document's data, or its error; it must have ended with ``code``."""
        return self.end(self.start(*arguments, **variables), code)

    def end(self, process: subprocess.Popen[str], code: int = 0) -> dict[str, Any]:
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, out + err
        document = json.loads(out)
        assert document["ok"] is (code == 0)
        return dict(document["data"] if code == 0 else document["error"])

    def build(self, sources: Path, *arguments: str | Path, code: int = 0, **variables: str) -> dict[str, Any]:
        words = ("build", "--arch", "x86_64", "--compiler", "gcc", "--sources", sources, *arguments)
        return self.run(*words, code=code, **variables)

    def folders(self) -> list[str]:
        """Names of what lies in the cache, but for locks."""
        return sorted(path.name for path in self.runners.glob("*") if path.suffix != ".lock")


def programs_of(folder: Path) -> dict[str, str]:
    """What each program says."""
    return {
        name: subprocess.run([folder / name], capture_output=True, text=True, check=True).stdout for name in PROGRAMS
    }
