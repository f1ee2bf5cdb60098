"""The programs that a runner is built with: cmake, ninja and a compiler for the device's processor.

Debian's cross compilers (``aarch64-linux-gnu-g++``), the machine's own g++ where it is of that processor, or zig,
which PyPI carries as ``ziglang`` and which compiles for every Linux with a C library of its own (musl).
"""

from __future__ import annotations

__all__ = ["Compiler", "Tools", "find_tools", "toolchain_flags"]

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from phi4edge.core.errors import MissingToolError
from phi4edge.runtimes._runner_recipe import Recipe, zig_cpu

_DEBIAN = {"aarch64": "g++-aarch64-linux-gnu", "x86_64": "g++-x86-64-linux-gnu"}
_ZIG = 'pip install "phi4edge[zig]"'


@dataclass(frozen=True)
class Compiler:
    """A compiler that makes programs for the device."""

    kind: str  # "gcc" or "zig"
    version: str  # as it says itself
    cc: str  # path; zig: of zig itself
    cxx: str


@dataclass(frozen=True)
class Tools:
    """All that a build calls."""

    cmake: str
    ninja: str
    compiler: Compiler


def find_tools(arch: str, choice: str) -> Tools:
    """cmake, ninja, and the compiler of kind ``choice`` for ``arch``; ``auto`` takes gcc before zig.

    Raises:
        MissingToolError: names everything that is missing, and says how to get it.
    """
    cmake, ninja = _program("cmake"), _program("ninja")
    compiler = (_gcc(arch) if choice in ("auto", "gcc") else None) or (_zig() if choice in ("auto", "zig") else None)
    if cmake and ninja and compiler:
        return Tools(cmake, ninja, compiler)
    missing = [name for name, found in (("cmake", cmake), ("ninja", ninja)) if not found]
    ways = [f"pip install {' '.join(missing)}"] if missing else []
    if compiler is None:
        gcc = f"apt install {_DEBIAN[arch]}"
        missing.append(f"{'zig' if choice == 'zig' else 'a compiler'} for {arch}")
        ways.append({"gcc": gcc, "zig": _ZIG}.get(choice, f"{gcc}, or {_ZIG}"))
    raise MissingToolError(f"a runner cannot be built: {', '.join(missing)} not found", "; ".join(ways))


def toolchain_flags(compiler: Compiler, recipe: Recipe, folder: Path) -> list[str]:
    """cmake's flags that name ``compiler``; zig, one program for everything, gets scripts in ``folder``."""
    if compiler.kind == "gcc":
        return [f"-DCMAKE_C_COMPILER={compiler.cc}", f"-DCMAKE_CXX_COMPILER={compiler.cxx}"]
    folder.mkdir(parents=True, exist_ok=True)
    target = ["-target", f"{recipe.arch}-linux-musl"]
    if recipe.arch == "aarch64":
        target.append(f"-mcpu={zig_cpu(recipe.march)}")
    words = {"cc": ["cc", *target], "c++": ["c++", *target], "ar": ["ar"], "ranlib": ["ranlib"]}
    for name, arguments in words.items():
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec "{compiler.cc}" {" ".join(arguments)} "$@"\n')
        script.chmod(0o755)
    roles = {"C_COMPILER": "cc", "CXX_COMPILER": "c++", "AR": "ar", "RANLIB": "ranlib"}
    return [f"-DCMAKE_{role}={folder / name}" for role, name in roles.items()]


def _program(name: str) -> str | None:
    """``name`` of the PATH, or beside this Python: pip puts cmake and ninja there."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _gcc(arch: str) -> Compiler | None:
    """A g++ whose programs are ``arch``'s, for Linux."""
    for prefix in (f"{arch}-linux-gnu-", ""):
        cc, cxx = shutil.which(f"{prefix}gcc"), shutil.which(f"{prefix}g++")
        if cc and cxx and _is_for(arch, _said([cxx, "-dumpmachine"])):
            return Compiler("gcc", _said([cxx, "--version"]), cc, cxx)
    return None


def _is_for(arch: str, machine: str) -> bool:
    return machine.startswith(f"{arch}-") and "linux" in machine


def _zig() -> Compiler | None:
    spec = importlib.util.find_spec("ziglang")
    folder = os.pathsep.join(spec.submodule_search_locations or ()) if spec else None
    path = (shutil.which("zig", path=folder) if folder else None) or shutil.which("zig")
    return Compiler("zig", f"zig {_said([path, 'version'])}", path, path) if path else None


def _said(command: list[str]) -> str:
    """The first line of what ``command`` prints; "" where it fails, so that the compiler is not taken."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else ""
