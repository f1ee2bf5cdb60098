"""One backward pass of −ln P(y) through the unrounded model, y drawn from its own distribution, block by block.

Some calibration samples go forward, what goes into each block is kept in files, and the gradient comes back. What is
looked at on the way is for subclasses to say; a block is committed with the gradient of what goes into it, so a pass
that was killed goes on from there to the same values.

    RUN/<kind>/     a run directory of its own, a step a block, from the last to the first
"""

from __future__ import annotations

__all__ = ["BackwardPass"]

import time
from abc import ABC, abstractmethod

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from phi4edge.calibration.budget import TUNING_PIECE_TOKENS
from phi4edge.calibration.store import ActivationStore
from phi4edge.core.atomic import write_bytes
from phi4edge.core.events import Progress
from phi4edge.core.memory import peak_rss_bytes, release_memory
from phi4edge.core.workdir import Workdir
from phi4edge.distillation.block import Observer
from phi4edge.distillation.fisher import backward_block
from phi4edge.model.block import forward_block, load_block, rms_norm
from phi4edge.model.forward import embed
from phi4edge.model.rope import rotary_table
from phi4edge.stages.head import open_head
from phi4edge.stages.job import Job


class BackwardPass(ABC):
    """The pass; ``kind`` names it for whoever watches."""

    kind = "backward"

    def __init__(self, job: Job, work: Workdir, tokens: Tensor, progress: Progress) -> None:
        self._job, self._config, self._work = job, job.checkpoint.config, work
        self._tokens, self._progress = tokens, progress
        self._rotary = rotary_table(self._config.rope, tokens.shape[1])
        step = max(1, TUNING_PIECE_TOKENS // tokens.shape[1])
        self._pieces = [slice(i, min(i + step, len(tokens))) for i in range(0, len(tokens), step)]

    @property
    def finished(self) -> bool:
        """Whether every block was committed."""
        return bool(self._work.records) and self._work.records[-1]["layer"] == 0

    def load(self, record: dict[str, object]) -> dict[str, Tensor]:
        """What a finished step found."""
        return load_file(self._work.path / f"{record['layer']:05d}.safetensors")

    def run(self) -> None:
        """Forward, then back from the last finished block."""
        layers = self._config.num_layers
        self._progress.start(self.kind, 2 * layers, "block")
        inputs = self._forward()
        slope = self._store("slope")
        done = self._work.records[-1] if self._work.records else None
        kept = _slope_file(done["layer"]) if done is not None else ""
        if done is None or not slope.load(self._work.path / kept, done["files"][kept]):
            self._work.drop_after(0, "begun anew")
            self._head(inputs[layers], slope)
        for layer in reversed(range(int(self._work.records[-1]["layer"]))):
            started = time.monotonic()
            found = self._back(layer, inputs[layer], slope)
            if layer == 0:
                found |= self._embedding(slope)
            self._commit(layer, found, slope, started)
            self._progress.advance()
        (self._work.path / _slope_file(0)).unlink(missing_ok=True)
        self._progress.finish()
        release_memory()

    # --- what subclasses look at -----------------------------------------------------------------------------

    def _at_head(self, normed: Tensor, spread: Tensor) -> None:  # noqa: B027  nothing need be looked at there
        """A piece's final hidden states [positions, hidden], and Σ P(1 − P) over its positions, [vocab]."""

    def _of_head(self) -> dict[str, Tensor]:
        """What was found at the head."""
        return {}

    @abstractmethod
    def _observer(self, layer: int, found: dict[str, Tensor]) -> Observer:
        """Called for each linear of a block and each piece."""

    def _end_block(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is stored of a block, once all pieces went through it."""
        return found

    def _embedding(self, slope: ActivationStore) -> dict[str, Tensor]:
        """What is stored of the embedding, whose outputs' gradient is ``slope``."""
        return {}

    # --- the pass --------------------------------------------------------------------------------------------

    def _store(self, name: str) -> ActivationStore:
        samples, length = self._tokens.shape
        return ActivationStore(samples, length, self._config.hidden_size, self._work.path / f"{name}.scratch")

    def _forward(self) -> list[ActivationStore]:
        """What goes into each block, and what comes out of the last."""
        stores = [self._store(f"inputs-{layer}") for layer in range(self._config.num_layers + 1)]
        for piece in self._pieces:
            stores[0].write(piece.start, embed(self._job.source, self._tokens[piece]))
        for layer in range(self._config.num_layers):
            block = load_block(self._job.source, layer)
            for piece in self._pieces:
                x = stores[layer].read(piece.start, piece.stop)
                stores[layer + 1].write(piece.start, forward_block(block, x, self._rotary, self._config))
            self._progress.advance()
        return stores

    def _head(self, outputs: ActivationStore, slope: ActivationStore) -> None:
        started, width = time.monotonic(), self._config.hidden_size
        head = open_head(self._job, self._work.path / "head.scratch")
        gain = self._job.source.tensor("model.norm.weight")
        generator = torch.Generator().manual_seed(0)
        for piece in self._pieces:
            with torch.enable_grad():
                leaf = outputs.read(piece.start, piece.stop).clone().requires_grad_()
                normed = rms_norm(leaf, gain, self._config.rms_norm_eps)
            hidden = normed.detach().reshape(-1, width)
            gradient, spread = head.sampled_slope(hidden, generator)
            self._at_head(hidden, spread)
            normed.backward(gradient.reshape(normed.shape))  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            slope.write(piece.start, leaf.grad)
        self._commit(self._config.num_layers, self._of_head(), slope, started)

    def _back(self, layer: int, inputs: ActivationStore, slope: ActivationStore) -> dict[str, Tensor]:
        block = load_block(self._job.source, layer)
        found: dict[str, Tensor] = {}
        observe = self._observer(layer, found)
        for piece in self._pieces:
            arriving = slope.read(piece.start, piece.stop)
            x = inputs.read(piece.start, piece.stop)
            slope.write(piece.start, backward_block(block, x, arriving, self._rotary, self._config, observe))
        return self._end_block(found)

    def _commit(self, layer: int, found: dict[str, Tensor], slope: ActivationStore, started: float) -> None:
        name = f"{layer:05d}.safetensors"
        write_bytes(self._work.path / name, save({key: values.contiguous() for key, values in found.items()}))
        slope.save(self._work.path / _slope_file(layer))
        cost = {"seconds": time.monotonic() - started, "peak_rss_bytes": peak_rss_bytes()}
        self._work.commit({"layer": layer, "performance": cost}, [name, _slope_file(layer)])
        (self._work.path / _slope_file(layer + 1)).unlink(missing_ok=True)


def _slope_file(layer: int) -> str:
    """The gradient of what goes into block ``layer``."""
    return f"slope-{layer:05d}.bin"
