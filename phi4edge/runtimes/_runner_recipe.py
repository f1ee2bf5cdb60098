"""What a runner is made from: a processor, its instruction set, a compiler, sources; and the key that they give.

A runner is a folder of llama.cpp's programs without a library of their own: linked statically, so that the same files
run on every Linux or Android of that processor, whatever libraries it has. macOS and iOS run none of them.
"""

from __future__ import annotations

__all__ = ["ARCHITECTURES", "DEFAULT_MARCH", "PROGRAMS", "Recipe", "cmake_flags", "march_of", "zig_cpu"]

import re
from dataclasses import dataclass
from typing import Any

from phi4edge.core.errors import UsageError, closest
from phi4edge.core.hashing import sha256_json
from phi4edge.runtimes._runner_sources import CHANGE

PROGRAMS = ("llama-bench", "llama-completion", "llama-perplexity")

# What every Linux and Android target of targets/*.toml has: Cortex-A76 and later; x86 since 2013.
DEFAULT_MARCH = {"aarch64": "armv8.2-a+dotprod+fp16", "x86_64": "x86-64-v3"}
ARCHITECTURES = tuple(DEFAULT_MARCH)

# The psABI's levels, in the switches of ggml/CMakeLists.txt. VNNI and bf16 belong to none of them.
_X86 = {
    "x86-64-v2": ("SSE42",),
    "x86-64-v3": ("SSE42", "AVX", "AVX2", "FMA", "F16C", "BMI2"),
    "x86-64-v4": ("SSE42", "AVX", "AVX2", "FMA", "F16C", "BMI2", "AVX512"),
}
_ARM = re.compile(r"armv[89](?:\.\d)?-a(?:\+[a-z0-9]+)*")
# GCC's names of extensions that LLVM, and so zig, calls otherwise.
_LLVM = {"fp16": "fullfp16"}

# The programs' own; nothing is asked of the machine that compiles, and nothing of the network.
_FIXED = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_NATIVE": "OFF",
    "GGML_OPENMP": "OFF",  # its runtime is a library of the device's; ggml's own threads do as well
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "CMAKE_EXE_LINKER_FLAGS": "-static -s",
    "CMAKE_SYSTEM_NAME": "Linux",
}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a runner's programs are, byte for byte but for paths in their messages."""

    arch: str  # "aarch64" or "x86_64"
    march: str
    compiler: str  # "gcc" or "zig"
    compiler_version: str
    source: tuple[tuple[str, str], ...]  # what identifies the sources: package and version, or a sha256

    def as_dict(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {
            "arch": self.arch,
            "march": self.march,
            "compiler": {"kind": self.compiler, "version": self.compiler_version},
            "source": dict(self.source),
            "cmake": [*cmake_flags(self.arch, self.march, self.compiler)],
            "programs": [*PROGRAMS],
            "change": CHANGE,
        }

    @property
    def key(self) -> str:
        """Name of the folder in the cache."""
        return sha256_json(self.as_dict())[:16]


def march_of(arch: str, given: str | None) -> str:
    """The instruction set to build for.

    Raises:
        UsageError: ``given`` is none of ``arch``.
    """
    if given is None:
        return DEFAULT_MARCH[arch]
    if arch == "x86_64" and given not in _X86:
        near = closest(given, _X86)
        raise UsageError(
            f"--march {given}: no level of x86-64",
            f"{f'did you mean {near}? ' if near else ''}known: {', '.join(_X86)}",
        )
    if arch == "aarch64" and not _ARM.fullmatch(given):
        raise UsageError(
            f"--march {given}: not of the form armv8.2-a+dotprod+fp16",
            f"{DEFAULT_MARCH[arch]} runs on every aarch64 target, {DEFAULT_MARCH[arch]}+i8mm on phones since 2022",
        )
    return given


def cmake_flags(arch: str, march: str, compiler: str) -> tuple[str, ...]:
    """``-D`` flags for llama.cpp, without those that name the compiler."""
    flags = _FIXED | {"CMAKE_SYSTEM_PROCESSOR": arch}
    if arch == "x86_64":
        switches = dict.fromkeys(_X86["x86-64-v4"], "OFF") | dict.fromkeys(_X86[march], "ON")
        flags |= {f"GGML_{name}": state for name, state in switches.items()}
    elif compiler == "gcc":
        flags["GGML_CPU_ARM_ARCH"] = march  # zig takes no -march for this processor: see zig_cpu
    return tuple(f"-D{name}={value}" for name, value in flags.items())


def zig_cpu(march: str) -> str:
    """An ARM ``march`` as zig's ``-mcpu`` has it: ``generic+v8_2a+dotprod+fullfp16``."""
    version, *extensions = march.split("+")
    number = version.removeprefix("armv").removesuffix("-a").replace(".", "_")
    return "+".join(["generic", f"v{number}a", *(_LLVM.get(name, name) for name in extensions)])
