"""Who can supply weights: a checkpoint, or any artifact through its reader."""

from __future__ import annotations

__all__ = ["QuantizedModel", "WeightSource"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.checkpoint.reader import CheckpointReader
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.scheme import Scheme


class WeightSource(Protocol):
    """Weights by the checkpoint's tensor names, whatever file they come from."""

    @property
    def config(self) -> ModelConfig:
        """The model's shapes."""
        ...

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """Tensor ``name`` (or rows of it), float32; quantized ones dequantized."""
        ...


@dataclass(frozen=True)
class QuantizedModel:
    """What a writer takes: a finished run's codes and the checkpoint that holds everything else."""

    checkpoint: CheckpointReader  # embedding, norms, head, tokenizer files
    scheme: Scheme
    linears: tuple[str, ...]  # names of the quantized tensors without ".weight", in model order
    load: Callable[[str], QuantizedLinear]  # reads one of them from the run directory
    provenance: Mapping[str, str]  # recipe hash, base model, corpus …: plain strings for metadata

    @property
    def config(self) -> ModelConfig:
        """The model's shapes."""
        return self.checkpoint.config

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A :class:`WeightSource` over the run: codes dequantized, the rest from the checkpoint."""
        if name.removesuffix(".weight") in self.linears:
            weight = self.load(name.removesuffix(".weight")).dequantize()
            return weight if rows is None else weight[rows]
        return self.checkpoint.tensor(name, rows)
