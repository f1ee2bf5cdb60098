"""Who can supply weights: a checkpoint, or any artifact through its reader."""

from __future__ import annotations

__all__ = ["Overlay", "QuantizedModel", "Swapped", "WeightSource"]

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
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
class Overlay:
    """A source some of whose tensors are replaced: norm gains that a transform folded into, or that were tuned."""

    source: WeightSource
    replaced: Mapping[str, Tensor]  # by checkpoint name, float32

    @property
    def config(self) -> ModelConfig:
        """The model's shapes."""
        return self.source.config

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """The replaced tensor where there is one, otherwise the source's."""
        found = self.replaced.get(name)
        if found is None:
            return self.source.tensor(name, rows)
        return found if rows is None else found[rows]


@dataclass(frozen=True)
class Swapped:
    """A source some of whose tensors come from another, under a configuration that may be a third one's."""

    source: WeightSource
    other: WeightSource
    names: Set[str]  # checkpoint names of the tensors that ``other`` gives
    config: ModelConfig

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """The other's tensor where it is one of ``names``, otherwise the source's."""
        return (self.other if name in self.names else self.source).tensor(name, rows)


@dataclass(frozen=True)
class QuantizedModel:
    """What a writer takes: a finished run's codes, and what the model holds beside them."""

    checkpoint: CheckpointReader  # the base model: configuration, tokenizer files, and tensors that nothing changed
    scheme: Scheme  # of every linear that ``exceptions`` does not name
    linears: tuple[str, ...]  # names of the quantized tensors without ".weight", in model order
    load: Callable[[str], QuantizedLinear]  # reads one of them from the run directory
    provenance: Mapping[str, str]  # recipe hash, base model, corpus …: plain strings for metadata
    replaced: Mapping[str, Tensor] = field(default_factory=dict)  # float tensors that the run changed
    exceptions: Mapping[str, Scheme] = field(default_factory=dict)  # linears on another scheme
    tables: Mapping[str, str] = field(default_factory=dict)  # types of "head" and "embedding" that a GGUF is to have
    base: WeightSource | None = None  # what the codes were solved for, where that is not the checkpoint: rotated
    load_rows: Callable[[str, slice], QuantizedLinear] | None = None  # reads some rows of one, where that can be done

    @property
    def config(self) -> ModelConfig:
        """The model's shapes."""
        return self.checkpoint.config

    @property
    def rest(self) -> Overlay:
        """Source of everything that is not quantized."""
        return Overlay(self.base or self.checkpoint, self.replaced)

    def scheme_of(self, linear: str) -> Scheme:
        """The scheme of one linear."""
        return self.exceptions.get(linear, self.scheme)

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A :class:`WeightSource` over the run: codes dequantized, the rest as it is."""
        if name.removesuffix(".weight") in self.linears:
            weight = self.load(name.removesuffix(".weight")).dequantize()
            return weight if rows is None else weight[rows]
        return self.rest.tensor(name, rows)
