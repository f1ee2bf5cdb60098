"""Sensitivity: predicted KLD is the KLD that a small error really costs, matrix by matrix; a killed pass goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.events import SILENT
from phi4edge.core.recipe import CorpusRecipe, Recipe
from phi4edge.model.forward import stream_logits
from phi4edge.model.source import Overlay
from phi4edge.stages.job import Job, prepare
from phi4edge.stages.sensitivity import _BackwardPass, measure_sensitivity, predicted_kld

RECIPE = Recipe(corpus=CorpusRecipe(samples=24, sequence_length=64))


@pytest.fixture(scope="module")
def job(phi4_checkpoint: Path) -> Job:
    return prepare(open_checkpoint(phi4_checkpoint), RECIPE, None, "cpu")


def log_probabilities(source: Overlay, tokens: Tensor) -> Tensor:
    return torch.stack([F.log_softmax(x.double(), 1) for x in stream_logits(source, tokens)])


def test_predicted_kld_is_what_a_small_error_costs(job: Job, tmp_path: Path) -> None:
    found = measure_sensitivity(job, tmp_path, "key", 24, SILENT)
    assert job.corpus is not None
    tokens = job.corpus.tokens[:24]
    exact = log_probabilities(Overlay(job.checkpoint, {}), tokens)
    generator = torch.Generator().manual_seed(0)
    ratios = {}
    for name in sorted({key.rsplit(".", 1)[0] for key in found}):
        weight = job.checkpoint.tensor(f"{name}.weight")
        error = 0.01 * weight.std() * torch.randn(weight.shape, generator=generator)
        changed = log_probabilities(Overlay(job.checkpoint, {f"{name}.weight": weight + error}), tokens)
        actual = float((exact.exp() * (exact - changed)).sum(-1).mean())
        ratios[name] = predicted_kld(error, found[f"{name}.rows"], found[f"{name}.columns"]) / actual
    assert len(ratios) == 10
    # Positions and channels are correlated in truth; a factor of two is what such an estimate is good for.
    assert all(0.5 < ratio < 2 for ratio in ratios.values()), ratios


def test_a_pass_that_was_killed_goes_on_to_the_same_values(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure_sensitivity(job, tmp_path / "whole", "key", 6, SILENT)

    def killed(self: object, slope: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_BackwardPass, "_embedding", killed)
        with pytest.raises(KeyboardInterrupt):
            measure_sensitivity(job, tmp_path / "part", "key", 6, SILENT)
    blocks = []
    inner = _BackwardPass._back
    monkeypatch.setattr(_BackwardPass, "_back", lambda self, layer, *a: blocks.append(layer) or inner(self, layer, *a))
    part = measure_sensitivity(job, tmp_path / "part", "key", 6, SILENT)
    assert blocks == [0]
    assert whole.keys() == part.keys()
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    assert not list((tmp_path / "part").rglob("slope*"))
