"""ONNX Runtime GenAI on its folders, on the CPU, in a child process.

Any folder that GenAI loads can be measured, ours or one that its own builder made. Graphs here have float32 activations
and a float32 KV cache; where MatMulNBits has accuracy level 4, its kernels round activations to int8 by themselves
(``torch_ref`` simulates that: ``--activations int8-b32`` for blocks of 32). A setting that GenAI has no equivalent of
is refused.
"""

from __future__ import annotations

__all__ = ["INSTALL", "KV_TYPE", "NAME", "WORKER", "available", "open", "speed", "version"]

import importlib.metadata
import importlib.util
import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from phi4edge.checkpoint.config import parse_config
from phi4edge.core.errors import InputError, MissingToolError, UsageError
from phi4edge.runtimes._api import Settings, SpeedRequest, SpeedSamples
from phi4edge.runtimes._child import Child, ChildSession
from phi4edge.runtimes._worker import Place
from phi4edge.writers._onnx_names import CONFIG, GENAI_CONFIG

if TYPE_CHECKING:
    from phi4edge.writers._onnx_file import OnnxFile

NAME = "onnxruntime_genai"
WORKER = "phi4edge.runtimes._onnx_worker"
KV_TYPE = "f32"
PACKAGE = "onnxruntime-genai"
INSTALL = 'pip install "phi4edge[onnx]"'
_SIGNALS = {
    signal.SIGILL: f"the library was built for another CPU; build {PACKAGE} from source here",
    signal.SIGBUS: "a file became shorter while it was read, or its disk fails",
    signal.SIGKILL: "most likely out of memory; take a smaller artifact or a shorter context",
}

_ACTIVATIONS = {0: "float32", 1: "float32", 2: "float16", 3: "bfloat16", 4: "int8"}  # by MatMulNBits' accuracy_level


def available() -> str | None:
    """Why ONNX Runtime GenAI cannot be used here, or None when it can (its library is not loaded to find out)."""
    return None if importlib.util.find_spec(NAME) else f"the Python package {PACKAGE} is not installed"


def version() -> str:
    """Version of onnxruntime-genai."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def open(artifact: Path, context: int, settings: Settings, place: Place | None = None) -> ChildSession:
    """Load folder ``artifact`` into a process of its own, for sequences of up to ``context`` tokens.

    ``place``: on a device, where the folder lies already.

    Raises:
        InputError: not such a folder, a damaged one, or a context beyond the model's.
        UsageError: a setting that GenAI cannot honour.
        MissingToolError: onnxruntime-genai or onnx is not installed, or does not load.
        TargetError: the child died.
    """
    reason = available()
    if place is None and reason:
        raise MissingToolError(reason, INSTALL)
    _check_settings(settings)
    if not (artifact / GENAI_CONFIG).is_file():
        raise InputError(
            f"{artifact}: has no {GENAI_CONFIG}; {NAME} reads folders that have one",
            "phi4edge export RUN --format onnx makes one",
        )
    from phi4edge.writers._onnx_file import read_onnx  # not at the top: it brings torch

    file = read_onnx(artifact)  # a graph that points beyond its data is refused before it is mapped
    limit = file.settings["model"].get("context_length")
    if isinstance(limit, int) and context > limit:
        raise InputError(f"a context of {context} exceeds the model's {limit}", f"give --context {limit} or less")
    package, install = f"{PACKAGE} {place.version if place else version()}", place.install if place else INSTALL
    child = Child(WORKER, "ONNX Runtime", package, install, _SIGNALS)
    session = ChildSession(child, artifact, settings, {"context": context, "whole_beyond": _whole_beyond(file)}, place)
    levels = sorted({int(node.get("accuracy_level", 0)) for node in file.attributes.values()})
    activations = " and ".join(dict.fromkeys(_ACTIVATIONS.get(level, f"level {level}") for level in levels or (0,)))
    session.add_details({"kv_type": KV_TYPE, "accuracy_levels": levels, "activations": activations})
    return session


def _check_settings(settings: Settings) -> None:
    """Raises UsageError for the first setting that is not GenAI's to honour."""
    refused = {
        "kv_type": (settings.kv_type != KV_TYPE, f"the KV cache is {KV_TYPE}, as the graph has it", f"--kv {KV_TYPE}"),
        "flash_attention": (settings.flash_attention != "auto", "GroupQueryAttention has no such switch", "auto"),
        "gpu_layers": (settings.gpu_layers != 0, "this runtime measures the CPU", "0"),
        "ubatch": (
            settings.ubatch != settings.batch, "tokens are computed as they are submitted", "the batch"
        ),
        "activations": (
            settings.activations != "none", "it rounds activations as the graph's accuracy_level says",
            "--runtime torch_ref, which simulates them",
        ),
    }  # fmt: skip
    for name, (wrong, reason, instead) in refused.items():
        if wrong:
            raise UsageError(f"{NAME} cannot honour {name} {getattr(settings, name)}: {reason}", f"use {instead}")


def _whole_beyond(file: OnnxFile) -> int | None:
    """The length beyond which the graph takes other factors of rotation; 0 where it switches and does not say when."""
    if CONFIG in file.metadata:
        rope = parse_config(json.loads(file.metadata[CONFIG])).rope
        return rope.original_context if rope.is_longrope else None
    return 0 if file.switches else None


def speed(artifact: Path, request: SpeedRequest, settings: Settings, place: Place | None = None) -> SpeedSamples:
    """Time ``artifact`` in a process of its own; ``place`` and errors as :func:`open`."""
    with open(artifact, max(request.prompt_tokens, request.gen_tokens), settings, place) as session:
        return session.speed(request)
