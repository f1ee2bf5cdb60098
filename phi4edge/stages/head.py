"""The full-precision head for a backward pass: once through the recipe's transforms, then kept in RAM or on disk."""

from __future__ import annotations

__all__ = ["open_head"]

from pathlib import Path

from torch import Tensor

from phi4edge.calibration.budget import head_rows
from phi4edge.calibration.store import ActivationStore
from phi4edge.distillation.loss import Head
from phi4edge.stages.job import Job

_ROWS = 4096  # read at a time


def open_head(job: Job, path: Path | None) -> Head:
    """The head in the checkpoint's precision, in RAM, or in a scratch file at ``path``."""
    name, config = job.checkpoint.head_name, job.checkpoint.config
    store = ActivationStore(config.vocab_size, 1, config.hidden_size, path, job.checkpoint.stored_dtype(name))
    for start in range(0, config.vocab_size, _ROWS):
        rows = job.source.tensor(name, slice(start, min(start + _ROWS, config.vocab_size)))
        store.write(start, rows[:, None])

    def read(start: int, stop: int) -> Tensor:
        return store.read(start, stop)[:, 0]

    return Head(read, config.vocab_size, head_rows(config))
