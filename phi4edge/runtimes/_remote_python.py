"""Our worker in a Python on a device: the modules that it imports, sent as one archive, and its pipes over a stream.

The archive holds the worker and what it imports of phi4edge, a few files without torch. It is the same bytes for the
same sources, so a second run finds it there.
"""

from __future__ import annotations

__all__ = ["PlacedRuntime", "StreamWorker", "archive", "placed_runtime", "start_worker", "worker_modules"]

import ast
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol, cast

import phi4edge
from phi4edge.core.errors import TargetError, UsageError
from phi4edge.runtimes._api import Runtime, Session, Settings, SpeedRequest, SpeedSamples, load_runtime
from phi4edge.runtimes._worker import Place
from phi4edge.transports._api import Device, Stream

_ROOT = Path(phi4edge.__file__).parent.parent
_ENDING_S = 20.0  # for a worker whose stdout has ended to end itself
_DATE = (1980, 1, 1, 0, 0, 0)  # the first that a zip can say


class PlacedRuntime(Protocol):
    """A runtime module whose worker can run elsewhere."""

    NAME: str  # what the worker imports, too
    WORKER: str  # the worker's module

    def open(self, artifact: Path, context: int, settings: Settings, *, place: Place | None = None) -> Session:
        """See :meth:`phi4edge.runtimes._api.Runtime.open`."""
        ...

    def speed(
        self, artifact: Path, request: SpeedRequest, settings: Settings, place: Place | None = None
    ) -> SpeedSamples:
        """See :meth:`phi4edge.runtimes._api.Runtime.speed`."""
        ...


def placed_runtime(name: str) -> PlacedRuntime:
    """The runtime of that name, if its worker can run on a device.

    Raises:
        UsageError: it cannot; it computes in this process.
    """
    module: Runtime = load_runtime(name)
    if not hasattr(module, "WORKER"):
        raise UsageError(
            f"runtime {name} computes on this machine only", "on a device, measure a GGUF file or an ONNX folder"
        )
    return cast(PlacedRuntime, module)


class StreamWorker:
    """See :class:`phi4edge.runtimes._worker.Worker`: one that runs on a device."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    @property
    def stdin(self) -> BinaryIO:
        """Requests."""
        return self._stream.stdin

    @property
    def stdout(self) -> BinaryIO:
        """Answers."""
        return self._stream.stdout

    def ending(self, marks: Sequence[str]) -> tuple[int, str]:
        """See :class:`phi4edge.runtimes._worker.Worker`; raises TargetError where the device is gone."""
        code = self._stream.wait(_ENDING_S)
        return code, self._stream.last_words()

    def close(self) -> None:
        """End it, on the device too."""
        self._stream.close()


def start_worker(device: Device, interpreter: str, module: str, sent: PurePosixPath, timeout_s: float) -> StreamWorker:
    """Run ``module`` of the archive that lies at ``sent``, with the device's ``interpreter``.

    Raises:
        TargetError: it does not start.
    """
    environment = {"PYTHONPATH": str(sent), "PYTHONUNBUFFERED": "1"}
    return StreamWorker(device.start([interpreter, "-m", module], timeout_s=timeout_s, environment=environment))


def worker_modules(*workers: str) -> list[str]:
    """The modules of phi4edge that ``workers`` import when they are, themselves and their packages among them."""
    found: dict[str, None] = {}

    def take(module: str) -> None:
        if module in found:
            return
        found[module] = None
        if "." in module:
            take(module.rpartition(".")[0])
        for node in ast.parse(_source(module).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "phi4edge":
                assert node.module is not None
                take(node.module)
                for name in node.names:
                    if _source(f"{node.module}.{name.name}").is_file():
                        take(f"{node.module}.{name.name}")

    for worker in workers:
        take(worker)
    return sorted(found)


def _source(module: str) -> Path:
    place = _ROOT.joinpath(*module.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def archive(*workers: str) -> bytes:
    """A zip of :func:`worker_modules`, for PYTHONPATH; the same bytes for the same sources."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as out:
        for module in worker_modules(*workers):
            path = _source(module)
            try:
                data = path.read_bytes()
            except OSError as error:
                raise TargetError(f"{path}: cannot be read to be sent: {error.strerror}") from error
            out.writestr(zipfile.ZipInfo(path.relative_to(_ROOT).as_posix(), _DATE), data, zipfile.ZIP_DEFLATED)
    return held.getvalue()
