"""llama.cpp on GGUF files, through llama-cpp-python's low-level API, in a child process.

Nothing of llama.cpp is loaded into this process: a damaged file or a library built for another CPU ends the child,
and that becomes a :class:`TargetError` with the signal and llama.cpp's last words.
"""

from __future__ import annotations

__all__ = ["INSTALL", "KV_TYPE", "NAME", "WORKER", "available", "open", "speed", "version"]

import importlib.metadata
import importlib.util
import platform
import signal
from dataclasses import asdict
from pathlib import Path

from phi4edge.core.errors import InputError, MissingToolError, UsageError
from phi4edge.runtimes._api import Settings, SpeedRequest, SpeedSamples
from phi4edge.runtimes._child import Child, ChildSession
from phi4edge.runtimes._sampling import SampleRequest, Written
from phi4edge.runtimes._worker import Place

NAME = "llama_cpp"
WORKER = "phi4edge.runtimes._llama_worker"
KV_TYPE = "f16"
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


def open(
    artifact: Path, context: int, settings: Settings, sequences: int = 1, place: Place | None = None
) -> LlamaSession:
    """Load GGUF file ``artifact`` into a process of its own, for sequences of up to ``context`` tokens.

    ``sequences`` of them can be computed side by side, which :meth:`LlamaSession.sample` does. ``place``: on a device,
    where the file lies already.

    Raises:
        InputError: not GGUF, or damaged.
        UsageError: llama.cpp refuses these settings.
        MissingToolError: llama-cpp-python is not installed, or does not load.
        TargetError: the child died.
    """
    reason = available()
    if place is None and reason:
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
    return LlamaSession(artifact, context, settings, sequences, place)


def speed(artifact: Path, request: SpeedRequest, settings: Settings, place: Place | None = None) -> SpeedSamples:
    """Time ``artifact`` as llama-bench does, in a process of its own; ``place`` and errors as :func:`open`."""
    with open(artifact, request.prompt_tokens + request.gen_tokens, settings, place=place) as session:
        return session.speed(request)


class LlamaSession(ChildSession):
    """A GGUF file loaded in another process; use as a context manager."""

    def __init__(
        self, artifact: Path, context: int, settings: Settings, sequences: int = 1, place: Place | None = None
    ) -> None:
        child = Child(
            module=WORKER,
            title="llama.cpp",
            package=f"{PACKAGE} {place.version if place else version()}",
            install=place.install if place else INSTALL,
            signals=_SIGNALS,
            last_words=("GGML_ASSERT",),  # before it aborts, ggml prints where; what follows is a stack of addresses
        )
        super().__init__(child, artifact, settings, {"context": context, "sequences": sequences}, place)

    def sample(self, request: SampleRequest) -> list[list[Written]]:
        """What the model writes in every stream of ``request``; the same on the same machine and threads.

        Raises:
            TargetError: llama.cpp fails, or a logit is not finite.
        """
        answer = self.call({"op": "sample", "request": asdict(request)})
        return [[Written(**text) for text in texts] for texts in answer["written"]]
