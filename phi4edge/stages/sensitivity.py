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
from pathlib import Path

import torch
from torch import Tensor

from phi4edge.calibration.store import ActivationStore
from phi4edge.core.events import Progress
from phi4edge.core.workdir import JOURNAL, Workdir
from phi4edge.distillation.block import Observer
from phi4edge.model.block import LINEARS
from phi4edge.stages.backward import BackwardPass
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
        if not pass_.finished:
            pass_.run()
        return {name: values for record in work.records for name, values in pass_.load(record).items()}


def sensitivity_costs(run: Path) -> list[dict[str, float]]:
    """What each step of a finished measurement in ``run`` cost."""
    journal = (run / SENSITIVITY / JOURNAL).read_text(encoding="utf-8")
    return [json.loads(line)["record"]["performance"] for line in journal.splitlines()]


class _BackwardPass(BackwardPass):
    kind = SENSITIVITY

    def __init__(self, job: Job, work: Workdir, tokens: Tensor, progress: Progress) -> None:
        super().__init__(job, work, tokens, progress)
        self._rows = torch.zeros(self._config.vocab_size)
        self._columns = torch.zeros(self._config.hidden_size)

    def _at_head(self, normed: Tensor, spread: Tensor) -> None:
        self._rows += spread
        self._columns += normed.square().sum(0)

    def _of_head(self) -> dict[str, Tensor]:
        count = self._tokens.numel()
        return {"lm_head.rows": self._rows / count, "lm_head.columns": self._columns / count}

    def _observer(self, layer: int, found: dict[str, Tensor]) -> Observer:
        count = self._tokens.numel()

        def observe(index: int, inputs: Tensor, gradient: Tensor) -> None:
            for side, values in (("rows", gradient), ("columns", inputs)):
                key = f"model.layers.{layer}.{LINEARS[index]}.{side}"
                found[key] = found.get(key, torch.zeros(())) + values.square().sum((0, 1)) / count

        return observe

    def _embedding(self, slope: ActivationStore) -> dict[str, Tensor]:
        count = self._tokens.numel()
        columns = torch.zeros(self._config.hidden_size)
        for piece in self._pieces:
            columns += slope.read(piece.start, piece.stop).square().sum((0, 1)) / count
        rows = torch.bincount(self._tokens.reshape(-1), minlength=self._config.vocab_size).float() / count
        return {"model.embed_tokens.rows": rows, "model.embed_tokens.columns": columns}
