"""A Ray cluster to compute on: one that runs already, or one of this machine's cores for as long as the process lives.

Ray hands tasks to worker processes, keeps what they return in an object store (shared memory on each machine, spilled
to its disk when full), and does a task again when its worker or machine is lost. So everything given to a worker is a
pure function of its arguments, and nothing here tries again by itself.

Every machine must have this phi4edge, this torch and this Python, or it is refused: the codes of a run hang on all
three. Machines whose instruction sets differ may round the last bit of a sum differently; that is an event of the run.
Workers compute with as many threads as this process does: the last bits of a factorisation hang on their number, and so
do those of an exponential where a thread's share of a row ends. On machines with fewer CPUs these take turns.

Ray is imported here, and only when a cluster is asked for.
"""

from __future__ import annotations

__all__ = ["Cluster", "connect"]

import logging
import os
import platform
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

import phi4edge
from phi4edge.core.errors import InputError, MissingToolError, Phi4EdgeError, UsageError
from phi4edge.core.events import Event
from phi4edge.core.hashing import sha256_file, sha256_json
from phi4edge.core.recipe import BFLOAT16
from phi4edge.measurement.environment import environment
from phi4edge.model.compute import has_bfloat16_units

INSTALL = 'pip install "phi4edge[ray]"'
RETRIES = 5  # of a task whose worker or machine is lost; its own errors are never tried again
_SHARED_VARIABLES = ("PHI4EDGE_", "HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "OMP_WAIT_POLICY")
_ANSWER_S = 60.0  # that a machine gets to start Python and import torch
_REACH_S = 5.0  # that a cluster's port gets to answer
_AT_HOME = threading.Event()  # set in the process that hands out the work
_LOOKING = threading.local()  # its attribute ``only`` is there in a thread that takes values as they lie in the store


@dataclass(frozen=True)
class Machine:
    """What the codes of a run hang on, beside its inputs."""

    versions: Mapping[str, str]  # that have to be the same everywhere
    instructions: str  # that need not
    bfloat16: bool  # whether it computes bfloat16 products


@contextmanager
def connect(address: str | None = None) -> Iterator[Cluster]:
    """The cluster at ``address`` (host:port, or "auto" for one that runs here), or else one of this machine's cores.

    Without an address the variable RAY_ADDRESS counts.

    Raises:
        MissingToolError: Ray is not installed, no cluster answers, or a machine in it has other software.
        UsageError: the address is of a kind that does not work.
    """
    ray = _import_ray()
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if "://" in address:
        raise UsageError(
            f"--ray-address {address}: Ray's client protocol is not supported",
            "start phi4edge on a machine of the cluster, with --ray-address HOST:PORT or auto",
        )
    _check_reachable(ray, address)
    shared = {name: value for name, value in os.environ.items() if name.startswith(_SHARED_VARIABLES)}
    options: dict[str, Any] = {"runtime_env": {"env_vars": shared}, "log_to_driver": False}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options |= {"num_cpus": _usable_cores(), "include_dashboard": False}
    try:
        ray.init(address=address, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise MissingToolError(f"no Ray cluster at {address}: {reason}", "see ray status") from error
    try:
        yield _examined(ray, address)
    finally:
        ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise MissingToolError("--executor ray needs the package ray", INSTALL) from error
    return ray


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_reachable(ray: Any, address: str) -> None:
    """Ray itself would try for five minutes, and then end the process."""
    if address == "local":
        return
    if address == "auto":
        from ray._private.services import find_gcs_addresses

        if not find_gcs_addresses():
            raise MissingToolError(
                "no Ray cluster runs on this machine", "ray start --head, or --ray-address HOST:PORT"
            )
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--ray-address {address}: is not HOST:PORT", "for example 10.0.0.5:6379, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_S).close()
    except OSError as error:
        raise MissingToolError(
            f"no Ray cluster answers at {address} ({error.strerror or error})", "ray start --head on that machine"
        ) from error


@cache
def code_sha256() -> str:
    """One hash of all of this package's code."""
    folder = Path(phi4edge.__file__).parent
    return sha256_json({str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*.py"))})


def describe() -> Machine:
    """The machine and the software of this process."""
    cpu = environment()["cpu"]
    versions = {
        "phi4edge": f"{phi4edge.__version__} ({code_sha256()[:12]})",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    maker = str(cpu["model"]).split(" ")[0]
    words = (cpu["architecture"], maker, torch.backends.cpu.get_cpu_capability(), *cpu["flags"])
    return Machine(versions, " ".join(words), has_bfloat16_units())


def _examined(ray: Any, address: str) -> Cluster:
    """The cluster, after every machine of it was held against this one."""
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1}
    if not nodes:
        raise MissingToolError(f"the Ray cluster at {address} has no CPU to offer", "see ray status")
    cluster = Cluster(ray, {name: int(node["Resources"]["CPU"]) for name, node in nodes.items()})
    cluster.store_bytes = sum(int(node["Resources"].get("object_store_memory", 0)) for node in nodes.values())
    ours = describe()
    kinds = {ours.instructions}
    for name, theirs in cluster.on_every_machine(describe).items():
        where = f"{nodes[name]['NodeManagerAddress']} (node {name[:8]})"
        for part, version in ours.versions.items():
            if theirs.versions[part] != version:
                raise MissingToolError(
                    f"Ray worker {where} has {part} {theirs.versions[part]}, this process has {version}",
                    "install the same versions on every machine of the cluster; codes hang on them",
                )
        kinds.add(theirs.instructions)
        if not theirs.bfloat16:
            cluster.without_bfloat16.append(where)
    if len(kinds) > 1:
        detail = f"{len(kinds)} kinds of processor take part; sums may differ in the last bit from those of one kind"
        cluster.events = (
            Event("mixed_instruction_sets", "cluster", detail, {f"kind_{i}": k for i, k in enumerate(sorted(kinds))}),
        )
    return cluster


class Cluster:
    """A cluster that this process is connected to."""

    def __init__(self, ray: Any, nodes: Mapping[str, int]) -> None:
        self._ray = ray
        self._nodes = dict(nodes)  # id → CPUs
        self._computed = ray.remote(_computed)
        self._pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        self.events: tuple[Event, ...] = ()
        self.without_bfloat16: list[str] = []  # machines, in words
        self.store_bytes = 0  # of the workers' object stores together
        _AT_HOME.set()
        _register(ray)

    def at_a_time(self, threads: int) -> dict[str, int]:
        """How many tasks with so many threads each machine does at a time, by node id."""
        return {name: cpus // min(threads, *self._nodes.values()) for name, cpus in self._nodes.items()}

    def check_job(self, device: str, compute: str) -> None:
        """Make sure that every machine can compute as a run was asked to.

        Raises:
            UsageError: on something else than CPUs.
            MissingToolError: with bfloat16 units, which one does not have.
        """
        if device != "cpu":
            raise UsageError(f"--executor ray computes on CPUs, not with --device {device}", "leave out one of both")
        if compute == BFLOAT16 and self.without_bfloat16:
            raise MissingToolError(
                f"Ray worker {self.without_bfloat16[0]} has no bfloat16 units, which this run computes with",
                "use --compute float32, or machines of one kind",
            )

    def put(self, value: Any) -> Any:
        """A reference to ``value``, from which every worker can have it. Tensors are not copied on one machine."""
        return self._ray.put(value)

    def start(self, function: Callable[..., Any], *arguments: Any, threads: int | None = None, place: int = 0) -> Any:
        """A reference to what ``function(*arguments)`` will return, computed by a worker with as many threads as here.

        ``function`` is found by its name there. A reference in ``arguments`` stands for its value, which is read-only.
        Tasks of one ``place`` are given to one machine while it lives, so that what one made the next finds there.
        Errors are raised where the reference is asked for its value.
        """
        threads = threads if threads is not None else torch.get_num_threads()
        slots = self.at_a_time(threads)
        places = [name for turn in range(max(slots.values())) for name, count in slots.items() if turn < count]
        remote = self._computed.options(
            num_cpus=min(threads, *self._nodes.values()),
            max_retries=RETRIES,
            scheduling_strategy=self._pinned(places[place % len(places)], soft=True),
        )
        return remote.remote(function, threads, torch.is_inference_mode_enabled(), *arguments)

    def get(self, reference: Any, timeout: float | None = None) -> Any:
        """The value behind a reference, or the values behind several.

        Raises:
            Phi4EdgeError: the task raised it, or its workers were lost more than RETRIES times.
            MissingToolError: nothing came within ``timeout`` seconds, or a worker has no such function.
        """
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference, timeout=timeout)
        except errors.RayTaskError as error:
            if isinstance(error.cause, errors.RaySystemError):  # the worker could not load what it was given
                reason = str(error.cause).strip().splitlines()[0].removeprefix("System error: ")
                raise MissingToolError(
                    f"a Ray worker has another phi4edge, or none ({reason})",
                    "install the same version on every machine of the cluster",
                ) from error
            raise error.cause from error
        except errors.GetTimeoutError as error:
            raise MissingToolError(f"Ray's workers did not answer within {timeout:.0f} s", "see ray status") from error
        except errors.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise Phi4EdgeError(
                f"Ray lost a task: {reason}", "finished work is kept; the same command goes on"
            ) from error

    def look(self, reference: Any) -> Any:
        """The same value without a copy of its tensors, which therefore must not be written into.

        Raises:
            Phi4EdgeError: as :meth:`get`.
        """
        _LOOKING.only = True
        try:
            return self.get(reference)
        finally:
            del _LOOKING.only

    def finished(self, references: Sequence[Any], timeout: float) -> list[Any]:
        """Those of ``references`` that have their value, or failed, after at most ``timeout`` seconds."""
        ready, _ = self._ray.wait(list(references), num_returns=len(references), timeout=timeout, fetch_local=False)
        return list(ready)

    def on_every_machine(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """What ``function`` gives on each machine, by node id; without waiting for a CPU to be free.

        Raises:
            MissingToolError: a machine does not answer, or has no such function.
            Phi4EdgeError: the function raised it.
        """
        asked = {
            name: self._computed.options(
                num_cpus=0, max_retries=0, scheduling_strategy=self._pinned(name, soft=False)
            ).remote(function, 1, False, *arguments)
            for name in self._nodes
        }
        return {name: self.get(reference, _ANSWER_S) for name, reference in asked.items()}

    def check_shared(self, folder: Path, model: Path) -> None:
        """Make sure that every machine sees what this one writes into ``folder``, and the same files in ``model``.

        Raises:
            InputError: one does not.
        """
        token = uuid4().hex
        marker = folder.resolve() / f".seen-by-workers-{token}"
        marker.write_text(token, encoding="utf-8")
        try:
            ours = _sizes(model.resolve())
            for name, (seen, sizes) in self.on_every_machine(_sees, marker, model.resolve()).items():
                if seen != token:
                    raise InputError(
                        f"{folder}: Ray worker on node {name[:8]} does not see what is written here",
                        "give an --out on a file system that all machines of the cluster share, at the same path",
                    )
                if sizes != ours:
                    raise InputError(
                        f"{model}: Ray worker on node {name[:8]} does not have the same files there",
                        "put the checkpoint where all machines of the cluster see it at the same path",
                    )
        finally:
            marker.unlink(missing_ok=True)

    def run_rows(self, pieces: Sequence[partial[Any]]) -> list[Any]:
        """Results of ``pieces``, in order: :func:`phi4edge.quant.parallel.run_parallel` with the cluster's CPUs.

        A tensor that several pieces have among their arguments goes into the object store once.
        """
        counted: dict[int, int] = {}
        for piece in pieces:
            for value in piece.args:
                counted[id(value)] = counted.get(id(value), 0) + 1
        stored: dict[int, Any] = {}

        def reference(value: Any) -> Any:
            if not isinstance(value, Tensor) or counted[id(value)] < 2:
                return value
            if id(value) not in stored:
                stored[id(value)] = self.put(value)
            return stored[id(value)]

        started = [
            self.start(piece.func, *map(reference, piece.args), threads=1, place=i) for i, piece in enumerate(pieces)
        ]
        return [self.get(each) for each in started]


def _computed(function: Callable[..., Any], threads: int, inference: bool, *arguments: Any) -> Any:
    """``function(*arguments)`` in a worker."""
    _register(sys.modules["ray"])
    torch.set_num_threads(threads)
    with torch.inference_mode(inference):
        return function(*arguments)


def _sees(marker: Path, model: Path) -> tuple[str | None, dict[str, int]]:
    try:
        seen = marker.read_text(encoding="utf-8")
    except OSError:
        seen = None
    return seen, _sizes(model)


def _sizes(folder: Path) -> dict[str, int]:
    """Files of a checkpoint and their sizes, bytes."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*")) if path.is_file()}


def _register(ray: Any) -> None:
    """Have Ray take tensors as arrays, which it maps into a worker's memory, not as pickles, which it copies."""
    ray.util.register_serializer(torch.Tensor, serializer=_to_array, deserializer=_to_tensor)


def _to_array(tensor: Tensor) -> tuple[Any, str]:
    kind = str(tensor.dtype).removeprefix("torch.")
    plain = tensor.detach().cpu().contiguous()
    return (plain.view(torch.int16) if tensor.dtype == torch.bfloat16 else plain).numpy(), kind


def _to_tensor(stored: tuple[Any, str]) -> Tensor:
    array, kind = stored
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the array is read-only: nobody here writes into an argument
        tensor = torch.from_numpy(array)
    # What arrives here is to be written into; and matrix products may round by alignment, torch's own memory having 64.
    written = _AT_HOME.is_set() and not hasattr(_LOOKING, "only")
    tensor = tensor.clone() if written or tensor.data_ptr() % 64 else tensor
    return tensor.view(torch.bfloat16) if kind == "bfloat16" else tensor
