"""Learned rounding: it starts from the solver's codes, moves what the gradient asks for, and stays exact in a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rounded import rounded
from safetensors.torch import load_file

from phi4edge.core.errors import UsageError
from phi4edge.core.recipe import CorpusRecipe, Recipe, TuningRecipe
from phi4edge.distillation.codes import code_step, codes_of, latent_state
from phi4edge.quant.grid import grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.scheme import parse_scheme
from phi4edge.stages import job
from phi4edge.stages.export import export
from phi4edge.stages.quantize import quantize
from phi4edge.stages.run_reader import block_file, open_run, tuned_file
from phi4edge.stages.verify import verify
from phi4edge.writers._api import WriteOptions

RECIPE = Recipe(
    scheme="q4_0",
    corpus=CorpusRecipe(samples=96, sequence_length=64),
    tuning=TuningRecipe(passes=2, learning_rate=3e-3, batch=8, code_rate=0.01),
)


def example(scheme: str) -> tuple[torch.Tensor, QuantizedLinear]:
    weight = torch.randn(12, 256, generator=torch.Generator().manual_seed(0))
    return weight, rounded("layer", weight, parse_scheme(scheme))


@pytest.mark.parametrize("scheme", ["q4_0", "q4_1", "w4g32-asym", "q8_0"])
def test_it_starts_from_the_solvers_codes_and_the_weights_place_between_them(scheme: str) -> None:
    weight, linear = example(scheme)
    state = latent_state(linear, weight)
    assert torch.equal(codes_of(linear, state[0]), linear.codes)
    a, b = grid_for(linear.scheme).steps(linear.params)
    groups = a.shape[1]
    position = (linear.codes + state[0].float()).reshape(12, groups, -1)
    inside = (weight.reshape(12, groups, -1) - linear.dequantize().reshape(12, groups, -1)).abs() < 0.48 * a[
        :, :, None
    ].abs()
    found = (position * a[:, :, None] + b[:, :, None])[inside]
    assert inside.float().mean() > 0.9
    assert torch.allclose(found, weight.reshape(12, groups, -1)[inside], atol=2e-3)


@pytest.mark.parametrize("scheme", ["q4_0", "w4g32-asym"])
def test_steps_lower_a_loss_that_rounding_to_nearest_does_not_see(scheme: str) -> None:
    """Correlated inputs: the best codes are not the nearest ones. Gradient of tr(E H Eᵀ), from the rounded weight."""
    weight, linear = example(scheme)
    inputs = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    H = inputs.T @ inputs / 64 + 0.01 * torch.eye(256)

    def loss(codes: torch.Tensor) -> float:
        E = replace(linear, codes=codes).dequantize() - weight
        return float(((E @ H) * E).sum())

    state = latent_state(linear, weight)
    best = loss(linear.codes)
    for step in range(60):
        current = replace(linear, codes=codes_of(linear, state[0]))
        gradient = 2 * (current.dequantize() - weight) @ H
        state = code_step(current, state, gradient, 0.02 * (1 - step / 60))
        best = min(best, loss(codes_of(linear, state[0])))
    assert best < 0.7 * loss(linear.codes)


def test_codes_stay_on_the_grid() -> None:
    _, linear = example("q8_0")
    state = torch.full((2, 12, 256), 300.0).half()
    assert int(codes_of(linear, state[0]).max()) == 255
    assert int(codes_of(linear, -state[0]).min()) == 1


def test_a_run_whose_codes_moved_is_exact_in_a_file_and_better_on_held_out_text(
    phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    quantize(phi4_checkpoint, RECIPE, run)
    name = "model.layers.1.mlp.down_proj.codes"
    solved, tuned = load_file(run / block_file(1))[name], load_file(run / tuned_file(1))[name]
    moved = float((solved != tuned).float().mean())
    assert 0 < moved < 0.5
    assert torch.equal(open_run(run).load("model.layers.1.mlp.down_proj").to_tensors()[name], tuned)
    artifact = export(run, "gguf", tmp_path / "m.gguf", WriteOptions())
    assert verify(artifact.path, run).linears == 8
    evaluated = json.loads((run / "manifest.json").read_text())["data"]["tuning"]["heldout"]
    first, last = evaluated[0]["domains"], evaluated[-1]["domains"]
    assert sum(d["kld"] for d in last.values()) < sum(d["kld"] for d in first.values())

    plan = job.plan_memory
    monkeypatch.setattr(job, "plan_memory", lambda *a: replace(plan(*a), keep_graphs=False, spill_tuning=True))
    quantize(phi4_checkpoint, RECIPE, tmp_path / "spilled")
    for layer in range(2):
        assert (tmp_path / "spilled" / tuned_file(layer)).read_bytes() == (run / tuned_file(layer)).read_bytes()


def test_awq_and_moving_codes_are_refused_together() -> None:
    with pytest.raises(UsageError, match="awq scales"):
        replace(RECIPE, awq=True)
