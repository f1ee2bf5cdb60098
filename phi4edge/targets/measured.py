"""What was measured of this machine's speed: kept in the user's cache, under the machine's fingerprint, with its date.

Measuring takes half a minute and is done when asked for (``phi4edge targets show local --measure``); everything else
reads what is kept. :mod:`probe_memory` gives the bandwidth and, where llama.cpp is installed, :mod:`probe_decode` what
llama.cpp makes of it for each type of weights. The figures of the two say:

* **bandwidth**: the best round of the read, since that is the roofline; the range is that of all rounds.
* **efficiency** of a type: median bytes a second of llama.cpp's decode steps ÷ bandwidth, with the quartiles.
* **compute** of a type: the better of the prompts' 10⁹ operations a second.
* **layer_us**: the median.
"""

from __future__ import annotations

__all__ = ["MachineSpeed", "figures", "fingerprint", "load_stored", "measure_machine", "store", "store_path"]

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from phi4edge.core.atomic import write_json
from phi4edge.core.errors import TargetError
from phi4edge.core.hashing import sha256_json
from phi4edge.core.jsonfile import read_object
from phi4edge.targets.profile import Compute, Efficiency, Figure

SCHEMA = "phi4edge/machine/1"
BUSY = 0.5  # programs that wait for a processor, a thread: above it others took part of what was measured
MINUTES = 15  # a child that takes longer is stuck
_BITS = {"f16": 16, "q8_0": 8, "q6_k": 8}  # nearest of 4, 8 and 16; 4 for all others


@dataclass(frozen=True)
class MachineSpeed:
    """One measurement."""

    date: str  # ISO, UTC
    fingerprint: str
    memory: dict[str, Any]  # as probe_memory prints it
    decode: dict[str, Any]  # as probe_decode prints it; {"error": …} where llama.cpp could not be asked

    @property
    def read_gb_s(self) -> float:
        """The best round of the read, 10⁹ bytes a second."""
        return float(max(self.memory["read"]))

    @property
    def triad_gb_s(self) -> float:
        """The best round of the triad, 10⁹ bytes a second."""
        return float(max(self.memory["triad"]))

    @property
    def source(self) -> str:
        """What the figures rest on, in a line."""
        threads, load = self.memory["threads"], self.memory["load"]
        text = f"measured on {self.date[:10]} with {threads} thread{'s' if threads > 1 else ''}"
        return f"{text}, on a busy machine (load {load:.1f}): measure again when it is quiet" if self.busy else text

    @property
    def busy(self) -> bool:
        """Whether other programs were at work."""
        load = self.memory["load"]
        return load is not None and load > BUSY * self.memory["threads"]


def fingerprint(cpu: str, isa: Sequence[str], cores: int | None, ram_bytes: int) -> str:
    """What tells this machine from another that shares a home folder with it; no name of host or user in it."""
    return sha256_json({"cpu": cpu, "isa": list(isa), "cores": cores, "gib": round(ram_bytes / 2**30)})[:16]


def store_path(machine: str) -> Path:
    """Where the measurement of this machine goes: in $PHI4EDGE_CACHE, or in phi4edge in the user's cache folder."""
    given = os.environ.get("PHI4EDGE_CACHE")
    cache = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phi4edge"
    return cache / "machine" / f"{machine}.json"


def store(speed: MachineSpeed) -> Path:
    """Keep a measurement; it takes the place of an older one."""
    path = store_path(speed.fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"schema": SCHEMA, **asdict(speed)})
    return path


def load_stored(machine: str) -> MachineSpeed | None:
    """What was measured of the machine with this fingerprint; None: nothing yet.

    Raises:
        InputError: the file is damaged.
        TargetError: it was written by another version of phi4edge.
    """
    path = store_path(machine)
    if not path.is_file():
        return None
    again = "measure again: phi4edge targets show local --measure"
    document = read_object(path, again)
    if document.pop("schema", None) != SCHEMA or document.keys() != MachineSpeed.__dataclass_fields__.keys():
        raise TargetError(f"{path}: is not a measurement that this version of phi4edge reads", again)
    return MachineSpeed(**document)


def measure_machine(machine: str, threads: int) -> MachineSpeed:
    """Measure with ``threads`` threads, those that would compute. Takes about half a minute.

    Raises:
        TargetError: the memory could not be measured.
    """
    memory = _child("probe_memory", threads)
    if "error" in memory:
        raise TargetError(f"memory bandwidth: {memory['error']}", "close other programs and measure again")
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return MachineSpeed(date, machine, memory, _child("probe_decode", threads))


def _child(module: str, threads: int) -> dict[str, Any]:
    """The JSON object that a probe prints, or ``{"error": …}``."""
    # One thread of BLAS for each of ours, which are counted already.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"phi4edge.targets.{module}", str(threads)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60 * MINUTES, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {MINUTES} minutes"}
    lines = done.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        words = done.stderr.strip().splitlines()
        return {"error": words[-1] if words else f"exit status {done.returncode}"}
    assert isinstance(answer, dict)
    return answer


def figures(speed: MachineSpeed) -> tuple[Figure, tuple[Efficiency, ...], tuple[Compute, ...], Figure | None]:
    """Bandwidth, efficiencies, compute rates and the fixed cost of a layer, as a profile has them."""
    best, source = speed.read_gb_s, speed.source
    bandwidth = Figure(round(best, 2), round(min(speed.memory["read"]), 2), round(best, 2), source)
    if "error" in speed.decode:
        return bandwidth, (), (), None
    by = f"{source}; llama-cpp-python {speed.decode['version']}"
    efficiency, compute = [], []
    for kind, found in speed.decode["kinds"].items():
        bits = _BITS.get(kind, 4)
        low, middle, high = (min(rate / best, 1.0) for rate in statistics.quantiles(found["read_gb_s"], n=4))
        share = Figure(round(middle, 4), round(low, 4), round(high, 4), by)
        efficiency.append(Efficiency("llama_cpp", "cpu", bits, share, kind))
        rates = found["gflop_s"]
        rate = Figure(round(max(rates), 2), round(min(rates), 2), round(max(rates), 2), by)
        compute.append(Compute("llama_cpp", "cpu", bits, rate, kind))
    layer_us = Figure(round(statistics.median(speed.decode["layer_us"]), 2), source=by)
    return bandwidth, tuple(efficiency), tuple(compute), layer_us
