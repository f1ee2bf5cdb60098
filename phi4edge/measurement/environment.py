"""The machine and the software that a measurement was made with; no name of host or user."""

from __future__ import annotations

__all__ = ["FLAGS", "environment"]

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import psutil

from phi4edge import __version__
from phi4edge.runtimes._threads import physical_cores

# Instruction sets that decide which kernels run, as Linux spells them (x86, then ARM).
FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8",
    "neon", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme",
)  # fmt: skip
_PACKAGES = {"torch": "torch", "llama_cpp": "llama-cpp-python", "numpy": "numpy", "gguf": "gguf"}
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "KMP_AFFINITY", "MKL_NUM_THREADS", "GGML_")


def environment() -> dict[str, Any]:
    """A fingerprint that says whether two measurements can be compared."""
    model, generation, flags = _cpu()
    return {
        "cpu": {
            "model": model,
            "generation": generation,
            "architecture": platform.machine(),
            "flags": flags,
            "logical_cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "physical_cores": physical_cores(),
            "governor": _read(_GOVERNOR),
        },
        "ram_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "distribution": _distribution(),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "versions": {"phi4edge": __version__, "python": platform.python_version(), **_versions()},
        "variables": {key: value for key, value in sorted(os.environ.items()) if key.startswith(_VARIABLES)},
    }


def _cpu() -> tuple[str, str | None, list[str]]:
    """What it is called, which one it is where a virtual machine hides that from its name, and its instructions."""
    text = _read(Path("/proc/cpuinfo")) or ""
    found = {
        flag for line in re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE) for flag in line.split()
    }
    name = re.search(r"^(?:model name|Hardware|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    which = dict(re.findall(r"^(cpu family|model|stepping)\s*:\s*(\d+)$", text, re.MULTILINE))
    generation = "/".join(which[key] for key in ("cpu family", "model", "stepping")) if len(which) == 3 else None
    called = name[1] if name else platform.processor() or "unknown"
    return called, generation, [flag for flag in FLAGS if flag in found]


def _distribution() -> str | None:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        return platform.mac_ver()[0] or None


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name, package in _PACKAGES.items():
        try:
            versions[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
