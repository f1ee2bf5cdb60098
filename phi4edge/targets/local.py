"""This machine as a target, detected: RAM as the system and its cgroups give it, cores, instruction sets.

Nothing is assumed about speed: the memory bandwidth is "not measured" until it was; then the profile has what
:mod:`phi4edge.targets.measured` kept of that, with its date.
"""

from __future__ import annotations

__all__ = ["CgroupLimit", "cgroup_limit", "detect_local", "instruction_sets", "local_fingerprint"]

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from phi4edge.core.errors import Phi4EdgeError
from phi4edge.targets.measured import figures, fingerprint, load_stored
from phi4edge.targets.profile import LOCAL, Compute, Efficiency, Figure, Profile, RuntimeOption

MEASURE = "phi4edge targets show local --measure"
PROC, CGROUP, POWERCAP = Path("/proc"), Path("/sys/fs/cgroup"), Path("/sys/class/powercap")
UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2⁶³
# /proc/cpuinfo's flags (x86) and Features (ARM) → the words of target files.
_FLAGS = {
    "avx2": "avx2",
    "f16c": "f16c",
    "fma": "fma",
    "avx512f": "avx512",
    "avx_vnni": "vnni",
    "avx512_vnni": "vnni",
    "amx_int8": "amx",
    "asimdhp": "fp16",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sme": "sme",
}
_APPLE = {"FEAT_FP16": "fp16", "FEAT_DotProd": "dotprod", "FEAT_I8MM": "i8mm", "FEAT_BF16": "bf16", "FEAT_SME": "sme"}


@dataclass(frozen=True)
class CgroupLimit:
    """The tightest memory limit that this process is under."""

    limit: int  # bytes
    remaining: int  # bytes that can still be taken before it strikes, page cache counted as free
    path: Path


def detect_local(*, proc: Path = PROC, cgroup: Path = CGROUP) -> Profile:
    """Look at this machine. ``proc`` and ``cgroup`` are where the system shows itself (tests give their own)."""
    total, available = _memory(proc)
    usable, origin = available, "available now, as the system says"
    limit = cgroup_limit(proc, cgroup)
    if limit is not None and limit.remaining < usable:
        usable, origin = limit.remaining, f"left of the memory limit {limit.limit / 1e9:.2f} GB in {limit.path}"
    isa, cpu = instruction_sets(proc)
    machine = platform.machine().lower()
    battery = any(Path("/sys/class/power_supply").glob("BAT*"))
    cores = _cores()
    bandwidth, efficiency, compute, layer_us = _speed(fingerprint(cpu, isa, cores, total))
    return Profile(
        id=LOCAL,
        name=f"This machine ({platform.node() or 'no name'})",
        kind="laptop" if battery else "desktop",
        sources=("detected on this machine",),
        notes="Detected, not a file. Accelerators are not looked for.",
        ram_gb=round(total / 1e9, 2),
        memory="unified" if platform.system() == "Darwin" and machine == "arm64" else "system",
        usable_ram_gb=Figure(max(usable, 1) / 1e9, source=origin),
        bandwidth_gb_s=bandwidth,
        arch={"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine),
        cpu=cpu,
        cores=cores,
        isa=isa,
        accelerators=(),
        transports=("local",),
        power_interface=_power_interface(),
        default_context=4096,
        min_decode_tps=None,
        runtimes=(
            RuntimeOption(
                "llama_cpp", "cpu", ("gguf",), ("q8_0", "q4_1", "q4_0"), ("f16", "q8_0", "q4_0"), None, layer_us
            ),
            RuntimeOption("onnxruntime_genai", "cpu", ("onnx",), ("w8g32", "w4g32"), ("f32",), None),
        ),
        efficiency=efficiency,
        anchors=(),
        compute=compute,
    )


def local_fingerprint() -> str:
    """This machine's key among the measurements that are kept."""
    isa, cpu = instruction_sets()
    return fingerprint(cpu, isa, _cores(), _memory(PROC)[0])


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _speed(machine: str) -> tuple[Figure, tuple[Efficiency, ...], tuple[Compute, ...], Figure | None]:
    """What is kept of an earlier measurement, as the profile has it."""
    try:
        kept = load_stored(machine)
    except Phi4EdgeError as error:
        return Figure(None, reason=f"not measured, as what was kept is of no use: {error.message}"), (), (), None
    if kept is None:
        return Figure(None, reason=f"not measured yet on this machine: {MEASURE}"), (), (), None
    return figures(kept)


def _memory(proc: Path) -> tuple[int, int]:
    """Total RAM, and what a new process could take without swapping, in bytes."""
    try:
        text = (proc / "meminfo").read_text()
        kib = {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
        return kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    except (OSError, KeyError):
        memory = psutil.virtual_memory()
        return memory.total, memory.available


def cgroup_limit(proc: Path = PROC, cgroup: Path = CGROUP) -> CgroupLimit | None:
    """The tightest limit among this process's cgroups and their parents, v2 or v1; None where there is none."""
    found: list[CgroupLimit] = []
    for folder, limit_file, usage_file, cache_key in _cgroup_folders(proc, cgroup):
        limit, usage = _number(folder / limit_file), _number(folder / usage_file)
        if limit is None or limit >= UNLIMITED:
            continue
        try:
            cache = re.search(rf"^{cache_key} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
        except OSError:
            cache = None
        held = max((usage or 0) - (int(cache[1]) if cache else 0), 0)
        found.append(CgroupLimit(limit, max(limit - held, 0), folder))
    return min(found, key=lambda entry: entry.remaining, default=None)


def _cgroup_folders(proc: Path, cgroup: Path) -> Iterator[tuple[Path, str, str, str]]:
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0" and not controllers:
            root = cgroup / "unified" if (cgroup / "unified").is_dir() else cgroup
            files = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, files = cgroup / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be the host's and not exist here; the root of the mount is always looked at.
        folder = root / path.strip("/")
        for parent in (folder, *folder.parents):
            yield parent, *files
            if parent == root:
                break


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # ValueError: "max"
        return None


def instruction_sets(proc: Path = PROC) -> tuple[tuple[str, ...], str]:
    """The instruction sets that matter to a runtime, in the words of target files, and the CPU's name."""
    try:
        text = (proc / "cpuinfo").read_text()
    except OSError:
        return _apple()
    flags = {
        flag for line in re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE) for flag in line.split()
    }
    name = re.search(r"^(?:model name|Hardware|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    return tuple(dict.fromkeys(word for flag, word in _FLAGS.items() if flag in flags)), name[1] if name else ""


def _apple() -> tuple[tuple[str, ...], str]:
    def ask(key: str) -> str:
        try:
            result = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return result.stdout.strip()

    found = tuple(word for name, word in _APPLE.items() if ask(f"hw.optional.arm.{name}") == "1")
    return found, ask("machdep.cpu.brand_string")


def _power_interface() -> str:
    if platform.system() == "Darwin":
        return "powermetrics"
    return "rapl" if any(os.access(path, os.R_OK) for path in POWERCAP.glob("intel-rapl:*/energy_uj")) else "none"
