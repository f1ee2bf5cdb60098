"""``phi4edge doctor``: what is here, what is missing, and how to get it.

Required, and exit code 5 without them: Python, phi4edge's own packages, and llama.cpp, since without it neither drift
nor speed can be measured on this machine. With ``--target ID`` also the transport that reaches the target and its
programs. Everything else is optional: missing ones are shown with what they would add. Packages are imported in child
processes, so that a crash in one is a line of the table.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import click

from phi4edge import __version__
from phi4edge.cli.device_options import NO_SHELL, DeviceOptions, check_place, device_options, site_for, transport_for
from phi4edge.cli.options import common
from phi4edge.cli.progress import progress_for
from phi4edge.cli.render import emit, emit_failure, table
from phi4edge.cli.target_options import target_path_option
from phi4edge.core import registry
from phi4edge.core.errors import MissingToolError, Phi4EdgeError
from phi4edge.core.events import Progress
from phi4edge.targets.catalog import open_catalog
from phi4edge.targets.local import detect_local, local_fingerprint
from phi4edge.targets.measured import load_stored
from phi4edge.targets.profile import LOCAL, Profile
from phi4edge.transports._adb_client import find_adb
from phi4edge.transports._api import load_transport

LLAMA_BUILD = (
    'CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"'
    " pip install --no-cache-dir --force-reinstall --no-deps llama-cpp-python==0.3.36"
)
LLAMA_INSTALL = LLAMA_BUILD if platform.machine().lower() in ("x86_64", "amd64") else 'pip install "phi4edge[llama]"'
# package to import → (distribution, what it is for, how to get it)
REQUIRED = {
    "torch": ("torch", "solvers and the reference forward", "pip install torch"),
    "tokenizers": ("tokenizers", "calibration and evaluation text", "pip install tokenizers"),
    "safetensors": ("safetensors", "checkpoints", "pip install safetensors"),
    "gguf": ("gguf", "GGUF files", "pip install gguf"),
}
OPTIONAL = {
    "onnx": ("onnx", "writing and reading ONNX artifacts", 'pip install "phi4edge[onnx]"'),
    "onnxruntime_genai": ("onnxruntime-genai", "drift and speed of ONNX artifacts", 'pip install "phi4edge[onnx]"'),
    "lm_eval": ("lm_eval", "drift --tasks", 'pip install "phi4edge[tasks]"'),
    "ray": ("ray", "quantize and run --executor ray", 'pip install "phi4edge[ray]"'),
    "transformers": ("transformers", "reading our checkpoints by another implementation", 'pip install "phi4edge[hf]"'),
}
# program that a transport calls here → how to get it; adb says so itself
PROGRAMS = {"ssh": "install OpenSSH's client"}


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    status: str  # "ok", "missing", "broken", "info"
    detail: str
    required: bool = False
    hint: str | None = None  # how to get it


def _child(arguments: list[str], timeout: float = 120.0) -> tuple[int, str, str]:
    """Run this Python with ``arguments``; exit status (negative: signal), stdout and the last line of stderr."""
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    try:
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, timeout=timeout, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return 124, "", f"no answer within {timeout:.0f} s"
    lines = done.stderr.strip().splitlines()
    return done.returncode, done.stdout.strip(), lines[-1] if lines else ""


def _died(status: int) -> str:
    """What a child's negative exit status says."""
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"exit status {status}"


def _package(module: str, distribution: str, purpose: str, install: str, required: bool) -> Check:
    """Import ``module`` in a child and ask the version of its distribution."""
    if find_spec(module) is None:
        return Check(module, "missing", f"for {purpose}", required, install)
    code = f"import {module}, importlib.metadata as m; print(m.version({distribution!r}))"
    status, out, err = _child(["-c", code])
    if status == 0:
        return Check(module, "ok", out.splitlines()[-1], required)
    return Check(module, "broken", f"does not import: {_died(status) if status < 0 else err}", required, install)


def _llama(required: bool = True) -> Check:
    """Decode with a small Q4_0 model in a child: a wheel built for another CPU imports, and dies on weights."""
    if find_spec("llama_cpp") is None:
        return Check("llama_cpp", "missing", "for drift and speed on this machine", required, LLAMA_INSTALL)
    status, out, err = _child(["-m", "phi4edge.targets.probe_llama"])
    if status < 0:
        detail = f"{_died(status)} while decoding a Q4_0 model: it was built for another CPU"
        return Check("llama_cpp", "broken", detail, required, LLAMA_INSTALL)
    try:
        answer = json.loads(out.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return Check("llama_cpp", "broken", err or f"exit status {status}", required, LLAMA_INSTALL)
    if "error" in answer or answer["decode_status"] != 0 or not answer["finite"]:
        detail = answer.get("error", "decoding a Q4_0 model gave no finite logits")
        return Check("llama_cpp", "broken", detail, required, LLAMA_INSTALL)
    features = [part.split("=")[0].strip() for part in answer["features"].split(":", 1)[-1].split("|") if "= 1" in part]
    return Check("llama_cpp", "ok", f"{answer['version']}, decodes; built with {' '.join(features)}", required)


def _program(name: str, purpose: str, install: str, required: bool = False) -> Check:
    path = shutil.which(name)
    if path is None:
        return Check(name, "missing", f"for {purpose}", required, install)
    return Check(name, "ok", path, required)


def _transport_program(name: str, transport: str) -> Check:
    """A program that a transport calls here, from where the transport takes it."""
    purpose = f"transport {transport}"
    if name != "adb":
        return _program(name, purpose, PROGRAMS.get(name, f"install {name}"))
    try:
        return Check(name, "ok", str(find_adb()))
    except MissingToolError as error:
        return Check(name, "missing", f"for {purpose}", hint=error.hint)


def _compiler() -> Check:
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return _program(name, "", "")
    return Check("c++", "missing", "for building llama-cpp-python", hint="install a C++ compiler (g++ or clang)")


def _machine(local: Profile) -> list[Check]:
    disk = shutil.disk_usage(Path.cwd())
    usable, ram = local.usable_ram_gb, local.ram_gb
    return [
        Check("cpu", "info", f"{local.arch} {local.cpu}, {local.cores} cores: {', '.join(local.isa) or 'unknown'}"),
        Check("memory", "info", f"{ram:.1f} GB, {usable.value or 0:.1f} GB usable ({usable.source})"),
        Check("disk", "info", f"{disk.free / 1e9:.1f} GB free of {disk.total / 1e9:.1f} in {Path.cwd()}"),
        _bandwidth(local),
    ]


def _bandwidth(local: Profile) -> Check:
    """What was measured earlier; nothing is measured here."""
    figure = local.bandwidth_gb_s
    if figure.value is None:
        return Check("bandwidth", "info", f"{figure.text()} ({figure.reason})")
    kept = load_stored(local_fingerprint())
    triad = f" (triad {kept.triad_gb_s:.1f})" if kept else ""
    return Check("bandwidth", "info", f"{figure.value:.1f} GB/s read{triad}, {figure.source}")


def _target(profile: Profile, transport: str) -> list[Check]:
    """What this machine needs in order to reach a target by a transport."""
    known = registry.names("phi4edge.transports")
    if transport not in known:
        detail = f"{profile.id} is reached by it, and this version of phi4edge has {', '.join(known)} only"
        hint = "export the artifact, carry it there, and run it with the runtime of the device"
        checks = [Check(f"transport {transport}", "missing", detail, True, hint)]
    else:
        checks = [Check(f"transport {transport}", "ok", f"reaches {profile.id}", True)]
        tools = load_transport(transport).TOOLS
        checks += [_transport_program(name, transport) for name in tools]
    return checks


def _on_device(profile: Profile, transport: str, device: DeviceOptions, progress: Progress) -> list[Check]:
    """Connect, and say what is on the device and what is missing there; required is that something can measure."""
    from phi4edge.cli.device_checks import check_device

    try:
        with site_for(profile, transport, device, progress) as site:
            return [Check(*line) for line in check_device(site)]
    except Phi4EdgeError as error:
        return [Check(profile.id, "missing", error.message, True, error.hint)]


def examine() -> list[Check]:
    """All checks of this machine, the slow ones in parallel."""
    jobs: list[Callable[[], Check]] = [_llama]
    for names, required in ((REQUIRED, True), (OPTIONAL, False)):
        for module, (distribution, purpose, install) in names.items():
            jobs.append(partial(_package, module, distribution, purpose, install, required))
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        packages = list(pool.map(lambda job: job(), jobs))
    python = Check("python", "ok", f"{platform.python_version()} in {sys.prefix}", True)
    return [
        Check("phi4edge", "ok", __version__, True),
        python,
        *packages,
        _compiler(),
        _program("cmake", "building llama-cpp-python", "pip install cmake"),
        *_machine(detect_local()),
    ]


@click.command("doctor")
@click.option("--target", metavar="ID", help="Also reach the target ID, and say what can measure there.")
@target_path_option
@device_options
@common
def command(
    target: str | None,
    target_path: tuple[Path, ...],
    device: DeviceOptions,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Say which tools and runtimes are here, whether they work, and how to get the others.

    Exit code 5 when something required is missing or broken: phi4edge's own packages, llama.cpp (it is what drift
    and speed are measured in), and with --target the transport that reaches it, the device, and something there that
    can measure. What is optional never fails.
    """
    profile = open_catalog(target_path).profile(target or LOCAL)
    transport = transport_for(profile, device)
    reach = [] if profile.id == LOCAL and transport == LOCAL else _target(profile, transport)
    checks = examine() + reach
    known = all(check.status == "ok" for check in reach[:1])
    if known and transport not in NO_SHELL and (transport != LOCAL or device.given):
        check_place(profile.id, device, target_path)
        checks += _on_device(profile, transport, device, progress_for(quiet))
    data = {"checks": [asdict(check) for check in checks]}
    rows = [(c.name, c.status, c.detail + (" (required)" if c.required and c.status != "ok" else "")) for c in checks]
    lines = [table(("tool", "state", ""), rows)]
    lines += [f"{c.name}: {c.hint}" for c in checks if c.hint]
    text = "\n".join(lines)
    faults = [check for check in checks if check.required and check.status in ("missing", "broken")]
    if faults:
        message = "; ".join(f"{check.name} is {check.status} ({check.detail})" for check in faults)
        hint = "; ".join(dict.fromkeys(check.hint for check in faults if check.hint))
        emit_failure("doctor", data, text, MissingToolError(message, hint), as_json=as_json)
    emit("doctor", data, text, as_json=as_json)
