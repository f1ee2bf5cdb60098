"""Sensitivity: what an error in each matrix would cost in KLD, from one backward pass through the unrounded model.

Some calibration samples go forward, what goes into each block is kept, and the gradient of −ln P(y), y drawn from the
model's own distribution, comes back block by block. Every matrix is then described by two vectors of means,

    KLD ≈ ½ Σ_rc rows_r · columns_c · E_rc²

for a linear: rows the energy of the gradient at its outputs, columns that of its inputs; for the head likewise, with
P(1 − P) at its outputs; for the embedding: rows how often each token occurs, columns the gradient's energy behind it.
It takes positions, rows and columns of an error to be uncorrelated, which rounding errors nearly are.

    RUN/sensitivity/     a run directory of its own, a step a block, from the last to the first
"""

from __future__ import annotations

__all__ = ["SENSITIVITY", "measure_sensitivity", "predicted_kld", "sensitivity_costs"]

import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from phi4edge.calibration.budget import TUNING_LOGIT_BYTES, TUNING_PIECE_TOKENS
from phi4edge.calibration.store import ActivationStore
from phi4edge.core.atomic import write_bytes
from phi4edge.core.events import Progress
from phi4edge.core.memory import peak_rss_bytes, release_memory
from phi4edge.core.workdir import JOURNAL, Workdir
from phi4edge.distillation.fisher import backward_block
from phi4edge.distillation.loss import Head
from phi4edge.model.block import LINEARS, forward_block, load_block, rms_norm
from phi4edge.model.forward import embed
from phi4edge.model.rope import rotary_table
from phi4edge.stages.job import Job

SENSITIVITY = "sensitivity"


def predicted_kld(error: Tensor, rows: Tensor, columns: Tensor) -> float:
    """½ Σ rows · E² · columns of an error [out, in], nat a position."""
    return 0.5 * float(torch.dot(error.square() @ columns, rows))


def measure_sensitivity(job: Job, run: Path, key: str, samples: int, progress: Progress) -> dict[str, Tensor]:
    """``<matrix>.rows`` and ``<matrix>.columns``, float32, for every linear, ``lm_head`` and ``model.embed_tokens``.

    Raises:
        ResumeError: another process works here.
    """
    assert job.corpus is not None
    inputs = {"kind": "sensitivity", "run": key, "samples": samples}
    with Workdir.open(run / SENSITIVITY, inputs) as work:
        pass_ = _BackwardPass(job, work, job.corpus.tokens[:samples], progress)
        if not work.records or work.records[-1]["layer"] > 0:
            pass_.run()
        return {name: values for record in work.records for name, values in pass_.load(record).items()}


def sensitivity_costs(run: Path) -> list[dict[str, float]]:
    """What each step of a finished measurement in ``run`` cost."""
    journal = (run / SENSITIVITY / JOURNAL).read_text(encoding="utf-8")
    return [json.loads(line)["record"]["performance"] for line in journal.splitlines()]


class _BackwardPass:
    def __init__(self, job: Job, work: Workdir, tokens: Tensor, progress: Progress) -> None:
        self._job, self._config, self._work = job, job.checkpoint.config, work
        self._tokens, self._progress = tokens, progress
        self._rotary = rotary_table(self._config.rope, tokens.shape[1])
        step = max(1, TUNING_PIECE_TOKENS // tokens.shape[1])
        self._pieces = [slice(i, min(i + step, len(tokens))) for i in range(0, len(tokens), step)]

    def load(self, record: dict[str, object]) -> dict[str, Tensor]:
        """What a finished step found."""
        return load_file(self._work.path / f"{record['layer']:05d}.safetensors")

    def run(self) -> None:
        """Forward, then back from the last finished block."""
        layers = self._config.num_layers
        self._progress.start(SENSITIVITY, 2 * layers, "block")
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
        name = self._job.checkpoint.head_name
        head = Head(self._job.source, name, self._job.checkpoint.stored_dtype(name), TUNING_LOGIT_BYTES)
        gain = self._job.source.tensor("model.norm.weight")
        generator = torch.Generator().manual_seed(0)
        rows, columns = torch.zeros(self._config.vocab_size), torch.zeros(width)
        for piece in self._pieces:
            with torch.enable_grad():
                leaf = outputs.read(piece.start, piece.stop).clone().requires_grad_()
                normed = rms_norm(leaf, gain, self._config.rms_norm_eps)
            hidden = normed.detach().reshape(-1, width)
            gradient, spread = head.sampled_slope(hidden, generator)
            rows += spread
            columns += hidden.square().sum(0)
            normed.backward(gradient.reshape(normed.shape))  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            slope.write(piece.start, leaf.grad)
        count = self._tokens.numel()
        self._commit(
            self._config.num_layers, {"lm_head.rows": rows / count, "lm_head.columns": columns / count}, slope, started
        )

    def _back(self, layer: int, inputs: ActivationStore, slope: ActivationStore) -> dict[str, Tensor]:
        block = load_block(self._job.source, layer)
        names = [f"model.layers.{layer}.{name}" for name in LINEARS]
        found: dict[str, Tensor] = {}
        for piece in self._pieces:
            arriving = slope.read(piece.start, piece.stop)
            x = inputs.read(piece.start, piece.stop)
            gradient, energies = backward_block(block, x, arriving, self._rotary, self._config)
            slope.write(piece.start, gradient)
            for name, energy in zip(names, energies, strict=True):
                for side, values in (("rows", energy.outputs), ("columns", energy.inputs)):
                    key = f"{name}.{side}"
                    found[key] = found.get(key, torch.zeros(())) + values / self._tokens.numel()
        return found

    def _embedding(self, slope: ActivationStore) -> dict[str, Tensor]:
        count = self._tokens.numel()
        columns = torch.zeros(self._config.hidden_size)
        for piece in self._pieces:
            columns += slope.read(piece.start, piece.stop).square().sum((0, 1)) / count
        rows = torch.bincount(self._tokens.reshape(-1), minlength=self._config.vocab_size).float() / count
        return {"model.embed_tokens.rows": rows, "model.embed_tokens.columns": columns}

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
