"""The shape of a writer: one module a format, with the names below, and its reader beside it.

    FORMAT, SCHEMES                                                             its name; schemes that fit, for a hint
    def refusal(model: QuantizedModel, options: WriteOptions) -> str | None     why the format cannot hold it
    def write(model: QuantizedModel, out: Path, options: WriteOptions) -> Artifact
    def matches(path: Path) -> bool                                             is this path such an artifact?
    def read(path: Path) -> ArtifactReader                                      the reader, a WeightSource

``read(write(m)).quantized(name)`` gives the codes and parameters of ``m.load(name)`` bit for bit.
"""

from __future__ import annotations

__all__ = ["Artifact", "ArtifactReader", "WriteOptions", "check_held"]

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.core.errors import InputError
from phi4edge.core.events import SILENT, Progress
from phi4edge.model.source import QuantizedModel
from phi4edge.quant.linear import QuantizedLinear

_TABLE = "q8_0"


def check_held(format_name: str, reason: str | None, schemes: str) -> None:
    """Go on if ``reason``, what a writer's ``refusal`` says, is None.

    Raises:
        InputError: it is not; ``schemes`` that would do are the hint.
    """
    if reason is not None:
        raise InputError(f"{format_name} cannot hold this run: {reason}", f"schemes that fit: {schemes}")


@dataclass(frozen=True)
class WriteOptions:
    """What the caller may choose about an artifact."""

    head: str | None = None  # type of lm_head where the format quantizes it: q8_0, q6_k, f16; None: as the run says
    embedding: str | None = None  # the same of the embedding
    accuracy_level: int = 4  # of ONNX's MatMulNBits: 4 rounds activations to int8, 1 leaves them in float32
    context: int | None = None  # tokens that ONNX's KV cache and Ollama's Modelfile are for; None: 4096, their default
    force: bool = False  # replace an existing artifact
    split_bytes: int | None = None  # most bytes of a file of a GGUF, which then becomes several; None: one file
    modelfile: bool = False  # write Ollama's Modelfile beside a GGUF
    progress: Progress = field(default=SILENT, compare=False)

    def tables(self, model: QuantizedModel) -> dict[str, str]:
        """Types of "head" and "embedding": what was asked for, or what the run's mix gives them, or q8_0."""
        asked = {"head": self.head, "embedding": self.embedding}
        return {role: kind or model.tables.get(role, _TABLE) for role, kind in asked.items()}


@dataclass(frozen=True)
class Artifact:
    """A finished artifact on disk."""

    path: Path  # the file, or the folder
    format: str
    scheme: str
    files: Mapping[str, str]  # file name → sha256
    nbytes: int  # of all files
    quantized_fraction: float  # share of the parameters that are stored as integer codes


@runtime_checkable
class ArtifactReader(Protocol):
    """An artifact as a source of weights, and of the codes they were stored as."""

    @property
    def config(self) -> ModelConfig:
        """The model's shapes."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the file says of itself."""
        ...

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """Tensor by checkpoint name, float32, dequantized."""
        ...

    def quantized(self, name: str) -> QuantizedLinear | None:
        """Codes of linear ``name`` (no ".weight"), or None where it is stored in floating point."""
        ...

    def stored_type(self, name: str) -> str:
        """Type in which tensor ``name`` is stored: f32, f16 or bf16, or the name of a scheme."""
        ...

    def holds_integers(self, name: str) -> bool:
        """Whether matrix ``name`` (no ".weight") is stored as integers of any kind."""
        ...
