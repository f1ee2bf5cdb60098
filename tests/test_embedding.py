"""Embeddings: what tokens ask for is read, and little else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.checkpoint.reader import CheckpointReader, open_checkpoint
from phi4edge.model import forward
from phi4edge.model.forward import embed


class Watched:
    """A checkpoint that remembers which rows were read of it."""

    def __init__(self, model: CheckpointReader) -> None:
        self._model = model
        self.read: list[tuple[int, int]] = []

    @property
    def config(self) -> ModelConfig:
        return self._model.config

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        assert rows is not None
        self.read.append((rows.start, rows.stop))
        return self._model.tensor(name, rows)


@pytest.fixture
def model(phi4_checkpoint: Path) -> Watched:
    return Watched(open_checkpoint(phi4_checkpoint))


def test_embeddings_are_the_tables_rows_in_the_tokens_order(model: Watched) -> None:
    table = model.tensor("model.embed_tokens.weight", slice(0, model.config.vocab_size))
    tokens = torch.randint(0, model.config.vocab_size, (3, 50), generator=torch.Generator().manual_seed(0))
    assert torch.equal(embed(model, tokens), table[tokens])
    assert embed(model, tokens[:0]).shape == (0, 50, model.config.hidden_size)


def test_rows_near_each_other_are_read_together_and_others_not_at_all(model: Watched) -> None:
    far = 20 + forward._GAP + 1
    embed(model, torch.tensor([[20, far, 3, 5, 3]]))
    assert model.read == [(3, 6), (20, 21), (far, far + 1)]


def test_no_more_rows_are_read_together_than_are_planned_for(model: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "EMBEDDED_ROWS", 10)
    tokens = torch.arange(35)[None]
    table = model.tensor("model.embed_tokens.weight", slice(0, 35))
    model.read.clear()
    assert torch.equal(embed(model, tokens)[0], table)
    assert model.read == [(0, 10), (10, 20), (20, 30), (30, 35)]
