"""All calibration samples on their way through one block, stopped before each of its linears.

Only two arrays live between stops: the residual stream, and the input of o_proj or down_proj. What the norms make
of the residual stream is cheap enough to be computed again.

    stage 0 qkv_proj     input norm(hidden)          then attention → scratch
    stage 1 o_proj       input scratch               then hidden += …
    stage 2 gate_up_proj input norm(hidden)          then silu(gate)·up → scratch
    stage 3 down_proj    input scratch               then hidden += …
"""

from __future__ import annotations

__all__ = ["COMPUTED_TOKENS", "EMBEDDED_VALUES", "BlockPass", "Stores", "put_embeddings", "samples_together"]

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from phi4edge.calibration.statistics import SHARD
from phi4edge.calibration.store import ActivationStore
from phi4edge.checkpoint.config import ModelConfig
from phi4edge.model.block import down_input, o_input, rms_norm
from phi4edge.model.compute import prepared, product
from phi4edge.model.forward import embed
from phi4edge.model.rope import Rotary
from phi4edge.model.source import WeightSource

COMPUTED_TOKENS = 512  # sent through a linear at a time, or one sample where samples are longer
EMBEDDED_VALUES = 1 << 26  # values embedded at a time


def samples_together(length: int, tokens: int) -> int:
    """How many samples of ``length`` make at most ``tokens``; one at least. It divides a shard."""
    count = SHARD
    while count > 1 and count * length > tokens:
        count //= 2
    return count


@dataclass(frozen=True)
class Stores:
    """The arrays of a calibration, kept from block to block."""

    hidden: ActivationStore  # [samples, length, hidden]
    attention: ActivationStore  # [samples, length, q]
    activation: ActivationStore  # [samples, length, intermediate]

    @classmethod
    def create(cls, config: ModelConfig, samples: int, length: int, scratch: Path | None) -> Stores:
        """Empty arrays, in RAM or (``scratch`` names a folder) in files."""
        widths = {"hidden": config.hidden_size, "attention": config.q_size, "activation": config.intermediate_size}
        return cls(
            **{
                name: ActivationStore(samples, length, width, scratch / f"{name}.scratch" if scratch else None)
                for name, width in widths.items()
            }
        )

    def fill(self, source: WeightSource, tokens: Tensor) -> None:
        """Begin with the embeddings of ``tokens`` [samples, length], a bounded number of samples at a time."""
        put_embeddings(self.hidden, source, tokens)


def put_embeddings(store: ActivationStore, source: WeightSource, tokens: Tensor) -> None:
    """Embeddings of ``tokens`` [samples, length] into ``store``, many samples at a time: each time reads the table."""
    group = max(1, EMBEDDED_VALUES // (tokens.shape[1] * source.config.hidden_size))
    for i in range(0, tokens.shape[0], group):
        store.write(i, embed(source, tokens[i : i + group]))


@dataclass(frozen=True)
class BlockPass:
    """One block's pass.

    What is computed together depends on the samples' length alone, and not on the RAM at hand or on where a shard is
    computed: so many samples of a shard, and none before sample ``kept`` with one after it.
    """

    input_norm: Tensor
    post_norm: Tensor
    config: ModelConfig
    rotary: Rotary
    stores: Stores
    device: str = "cpu"
    kept: int = 0

    def inputs(
        self, stage: int, start: int = 0, stop: int | None = None, *, tokens: int = COMPUTED_TOKENS
    ) -> Iterator[tuple[int, Tensor]]:
        """Inputs of the stage's linear: (first sample, [count, length, in_features] on the device)."""
        samples, length = self.stores.hidden.shape[:2]
        stop, count = samples if stop is None else stop, samples_together(length, tokens)
        while start < stop:
            end = min(start + count, stop if start >= self.kept else min(stop, self.kept))
            yield start, self._input(stage, start, end)
            start = end

    def _input(self, stage: int, start: int, stop: int) -> Tensor:
        if stage in (1, 3):
            store = self.stores.attention if stage == 1 else self.stores.activation
            return store.read(start, stop).to(self.device)
        hidden = self.stores.hidden.read(start, stop).to(self.device)
        gain = self.input_norm if stage == 0 else self.post_norm
        return rms_norm(hidden, gain.to(self.device), self.config.rms_norm_eps)

    def advance(self, stage: int, weight: Tensor) -> None:
        """Send everything through the stage's linear with ``weight``; after stage 3 the block is done."""
        weight = prepared(weight.to(self.device))
        for i, x in self.inputs(stage):
            out = product(x, weight)
            if stage == 0:
                self.stores.attention.write(i, o_input(out, self.rotary, self.config))
            elif stage == 2:
                self.stores.activation.write(i, down_input(out))
            else:
                self.stores.hidden.write(i, self.stores.hidden.read(i, i + out.shape[0]).to(self.device) + out)
