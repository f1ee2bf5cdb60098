"""llama.cpp on GGUF files, through llama-cpp-python's low-level API, in a child process.

Nothing of llama.cpp is loaded into this process: a damaged file or a library built for another CPU ends the child,
and that becomes a :class:`TargetError` with the signal and llama.cpp's last words.
"""

from __future__ import annotations

__all__ = ["INSTALL", "NAME", "available", "open", "speed", "version"]

import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

import phi4edge
from phi4edge.core.errors import InputError, MissingToolError, Phi4EdgeError, TargetError, UsageError
from phi4edge.core.events import SILENT, Progress
from phi4edge.runtimes._api import Logits, Settings, SpeedRequest, SpeedSamples
from phi4edge.runtimes._sampling import SampleRequest, Written
from phi4edge.runtimes._threads import physical_cores

NAME = "llama_cpp"
PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
# Built for the machine at hand (its default), this version crashes on CPUs with AMX; AVX2 runs on all of ten years.
_X86 = 'CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON" '
INSTALL = (
    f"{_X86 if platform.machine().lower() in ('x86_64', 'amd64') else ''}"
    f"pip install --no-binary {PACKAGE} {PACKAGE}=={VERSION}"
)
_SIGNALS = {
    signal.SIGILL: f"the library was built for another CPU; build it here: {INSTALL}",
    signal.SIGSEGV: f"if this file is sound, build the library without CPU-specific code: {INSTALL}",
    signal.SIGBUS: "the file became shorter while it was read, or its disk fails",
    signal.SIGKILL: "most likely out of memory; take a smaller artifact or a shorter context",
}


def available() -> str | None:
    """Why llama.cpp cannot be used here, or None when it can (its native library is not loaded to find out)."""
    return None if importlib.util.find_spec("llama_cpp") else f"the Python package {PACKAGE} is not installed"


def version() -> str:
    """Version of llama-cpp-python, which pins llama.cpp's."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def open(artifact: Path, context: int, settings: Settings, sequences: int = 1) -> LlamaSession:
    """Load GGUF file ``artifact`` into a child process, for sequences of up to ``context`` tokens.

    ``sequences`` of them can be computed side by side, which :meth:`LlamaSession.sample` does.

    Raises:
        InputError: not GGUF, or damaged.
        UsageError: llama.cpp refuses these settings.
        MissingToolError: llama-cpp-python is not installed, or does not load.
        TargetError: the child died.
    """
    reason = available()
    if reason:
        raise MissingToolError(reason, INSTALL)
    if settings.activations != "none":
        raise UsageError(
            f"llama_cpp rounds activations as it does; {settings.activations} are simulated",
            "--runtime torch_ref simulates them",
        )
    if artifact.is_dir():
        raise InputError(f"{artifact}: is a folder; llama_cpp reads GGUF files", "give the .gguf file in it")
    from phi4edge.writers._gguf_file import read_gguf  # not at the top: it brings torch

    read_gguf(artifact)  # a header that lies is refused before llama.cpp believes it
    return LlamaSession(artifact, context, settings, sequences)


def speed(artifact: Path, request: SpeedRequest, settings: Settings) -> SpeedSamples:
    """Time ``artifact`` as llama-bench does, in a child of its own; raises as :func:`open`."""
    with open(artifact, request.prompt_tokens + request.gen_tokens, settings) as session:
        answer = session.call({"op": "speed", "request": asdict(request)})
        return SpeedSamples(
            prefill_s=tuple(answer["prefill_s"]),
            ttft_s=tuple(answer["ttft_s"]),
            token_s=tuple(tuple(repetition) for repetition in answer["token_s"]),
            load_s=session.load_s,
            peak_rss_bytes=answer["peak_rss_bytes"],
            idle_rss_bytes=answer["idle_rss_bytes"],
            details=session.details,
        )


class LlamaSession:
    """A GGUF file loaded in a child process; use as a context manager."""

    def __init__(self, artifact: Path, context: int, settings: Settings, sequences: int = 1) -> None:
        self.artifact = artifact
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  the child's stderr, read when it dies
        self._child = subprocess.Popen(
            [sys.executable, "-m", "phi4edge.runtimes._llama_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            env=_environment(),
        )
        resolved = replace(settings, threads=settings.threads or physical_cores())
        try:
            load = {"op": "load", "path": str(artifact), "context": context, "sequences": sequences}
            answer = self.call({**load, "settings": asdict(resolved)})
        except BaseException:
            self.close()
            raise
        self.load_s: float = answer["load_s"]  # model and context, seconds
        self._vocab_size: int = answer["vocab_size"]
        self._details: dict[str, Any] = answer["details"]

    @property
    def vocab_size(self) -> int:
        """Logits a position."""
        return self._vocab_size

    @property
    def details(self) -> Mapping[str, Any]:
        """What the settings came to, as llama.cpp tells it."""
        return self._details

    def logits(self, tokens: NDArray[np.int64], *, first: int = 0, progress: Progress = SILENT) -> Iterator[Logits]:
        """See :class:`phi4edge.runtimes._api.Session`; the KV cache is cleared before every row."""
        progress.start("llama.cpp", tokens.shape[0], "chunk")
        for row in tokens:
            self._send({"op": "logits", "tokens": row.tolist(), "first": first})
            out = np.empty((len(row) - first, self._vocab_size), dtype="<f4")
            view, done = out.reshape(-1).view(np.uint8).data, 0
            while done < len(view):
                nbytes = self._receive()["nbytes"]
                self._fill(view[done : done + nbytes])
                done += nbytes
            yield out
            progress.advance()
        progress.finish()

    def sample(self, request: SampleRequest) -> list[list[Written]]:
        """What the model writes in every stream of ``request``; the same on the same machine and threads.

        Raises:
            TargetError: llama.cpp fails, or a logit is not finite.
        """
        answer = self.call({"op": "sample", "request": asdict(request)})
        return [[Written(**text) for text in texts] for texts in answer["written"]]

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        self._send(request)
        return self._receive()

    def _send(self, request: dict[str, Any]) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError as error:
            raise self._death() from error

    def _receive(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._death()
        answer: dict[str, Any] = json.loads(line)
        if not answer.pop("ok"):
            raise self._refusal(answer["kind"], answer["message"])
        return answer

    def _fill(self, view: memoryview) -> None:
        stream = self._child.stdout
        assert isinstance(stream, io.BufferedReader)
        done = 0
        while done < len(view):
            count = stream.readinto(view[done:])
            if not count:
                raise self._death()
            done += count

    def _refusal(self, kind: str, message: str) -> Phi4EdgeError:
        if kind == "missing":
            return MissingToolError(f"{PACKAGE} {version()} does not load: {message}", INSTALL)
        if kind == "settings":
            return UsageError(f"{self.artifact}: llama.cpp refuses these settings: {message}", "see --help for others")
        if kind == "input":
            return InputError(f"{self.artifact}: llama.cpp cannot load it: {message}", "write or download it again")
        return TargetError(f"{self.artifact}: {message}", "a shorter --context, or another artifact")

    def _death(self) -> Phi4EdgeError:
        """What to raise when the child is gone."""
        code = self._child.wait()
        self._words.seek(0)
        lines = self._words.read().decode("utf-8", errors="replace").splitlines()
        # Before it aborts, ggml prints where; what follows is a stack of addresses.
        said = next((line for line in lines if "GGML_ASSERT" in line or "Error" in line), lines[-1] if lines else "")
        end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = _SIGNALS.get(signal.Signals(-code)) if code < 0 else None
        return TargetError(f"{self.artifact}: llama.cpp's process {end}{f': {said.strip()}' if said else ''}", hint)

    def close(self) -> None:
        """End the child; it holds nothing that must be kept."""
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._words):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:  # a request that the child never read
                    continue

    def __enter__(self) -> LlamaSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _environment() -> dict[str, str]:
    """The child finds this very phi4edge, installed or not."""
    root = str(Path(phi4edge.__file__).parent.parent)
    path = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
