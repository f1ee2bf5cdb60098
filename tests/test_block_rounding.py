"""Learned rounding of blocks: it follows the gradient, stays on the grid, is never worse on what was kept aside."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from killing import killed_at
from rounded import rounded
from support import tiny_config, write_checkpoint
from test_quantize import TEXT, digests
from test_solvers import problem
from torch import Tensor

from phi4edge.calibration.budget import plan_memory
from phi4edge.checkpoint.config import ModelConfig, parse_config
from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import TargetError, UsageError
from phi4edge.core.recipe import CorpusRecipe, Recipe, RoundingRecipe, TuningRecipe, solving_recipe
from phi4edge.core.workdir import JOURNAL
from phi4edge.distillation import rounding
from phi4edge.distillation.block import run_block
from phi4edge.distillation.parameters import QuantizedBlock
from phi4edge.distillation.rounding import BlockSamples, learn_rounding, resting_places
from phi4edge.model.block import LINEARS, load_block
from phi4edge.model.rope import Rotary, rotary_table
from phi4edge.quant.grid import grid_for
from phi4edge.quant.scheme import parse_scheme
from phi4edge.solvers import gptq
from phi4edge.solvers._api import SolverOptions
from phi4edge.solvers._refine import refine
from phi4edge.stages import job
from phi4edge.stages.export import export
from phi4edge.stages.quantize import quantize
from phi4edge.stages.verify import verify
from phi4edge.writers._api import WriteOptions

LEARN = RoundingRecipe(passes=4, code_rate=0.01, batch=4)
RECIPE = Recipe(
    corpus=CorpusRecipe(TEXT, samples=16, sequence_length=48),
    full_precision_targets=0.5,
    refit=True,
    sweeps=2,
    rounding=LEARN,
)


class Example:
    """Block 0 of a small model, rounded to nearest, with random inputs and what full precision makes of them."""

    def __init__(self, checkpoint: Path, scheme: str) -> None:
        source = open_checkpoint(checkpoint)
        block = load_block(source, 0)
        self.config: ModelConfig = source.config
        self.rotary: Rotary = rotary_table(self.config.rope, 32)
        weights = (block.qkv, block.o, block.gate_up, block.down)
        names = [f"model.layers.0.{name}" for name in LINEARS]
        linears = tuple(rounded(n, w, parse_scheme(scheme)) for n, w in zip(names, weights, strict=True))
        gains = {"input_norm.weight": block.input_norm, "post_norm.weight": block.post_norm}
        self.block = QuantizedBlock(linears, gains, torch.bfloat16)
        self.inputs = torch.randn(96, 32, self.config.hidden_size, generator=torch.Generator().manual_seed(0))
        self.aims = run_block(self.inputs, weights, list(gains.values()), self.rotary, self.config)

    @property
    def places(self) -> dict[str, Tensor]:
        return {n.name: torch.zeros(n.codes.shape, dtype=torch.float16) for n in self.block.linears}

    def learn(self, recipe: RoundingRecipe = LEARN, aims: Tensor | None = None) -> rounding.Rounded:
        outputs = self.aims if aims is None else aims
        samples = BlockSamples(lambda i: self.inputs[i], lambda i: outputs[i], 80, 96)
        return learn_rounding(self.block, self.places, samples, self.rotary, self.config, recipe)

    def error(self, block: QuantizedBlock, samples: slice) -> float:
        weights = [n.dequantize() for n in block.linears]
        out = run_block(self.inputs[samples], weights, list(block.gains.values()), self.rotary, self.config)
        aim = self.aims[samples]
        return float(((out - aim).square().sum(-1) / aim.square().sum(-1)).mean())


@pytest.mark.parametrize("scheme", ["w4g32", "q4_0", "q4_1", "w4g32-asym", "q5_0", "q8_0", "q4_k"])
def test_it_lowers_the_error_of_the_block_and_stays_on_the_grid(
    phi4_checkpoint: Path, tmp_path: Path, scheme: str
) -> None:
    at_most = 0.9
    if parse_scheme(scheme).nested:  # a wider block, which 80 samples of noise teach less
        at_most = 0.98
        phi4_checkpoint = write_checkpoint(tmp_path, "phi4", hidden_size=256, intermediate_size=256)
    example = Example(phi4_checkpoint, scheme)
    found = example.learn(replace(LEARN, passes=8))
    before, after = (example.error(block, slice(80, 96)) for block in (example.block, found.block))
    assert after < at_most * before
    assert found.record["heldout"][0]["error"] == pytest.approx(before, rel=1e-4)
    assert min(h["error"] for h in found.record["heldout"]) == pytest.approx(after, rel=1e-4)
    assert 0 < found.record["codes_moved"] < 0.5
    for old, new in zip(example.block.linears, found.block.linears, strict=True):
        grid = grid_for(new.scheme)
        assert int(new.codes.min()) >= grid.low
        assert int(new.codes.max()) <= grid.high
        assert {k: v.dtype for k, v in new.params.items()} == {k: v.dtype for k, v in old.params.items()}
        if "zeros" in old.params:
            assert torch.equal(new.params["zeros"], old.params["zeros"])
    assert all(torch.equal(found.block.gains[name], gain) for name, gain in example.block.gains.items())


def test_the_loss_moves_codes_as_finite_differences_say(phi4_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of every code against its slope, taken on unrounded positions, lowers the loss by what it predicts."""
    example = Example(phi4_checkpoint, "w4g32")
    seen: dict[str, Tensor] = {}

    class Spy(rounding.Latent):
        def __init__(self, linear, places):  # type: ignore[no-untyped-def]
            super().__init__(linear, places)
            self.name = linear.name

        def move(self, steps, dW, step, rate):  # type: ignore[no-untyped-def]
            seen[self.name] = dW.clone()

    monkeypatch.setattr(rounding, "Latent", Spy)
    samples = BlockSamples(lambda i: example.inputs[i], lambda i: example.aims[i], 80, 96)
    learner = rounding._Learner(example.block, example.places, samples, example.rotary, example.config)
    batch = [3, 7]
    learner.step(0, batch, 0.01, 1e-3)
    generator = torch.Generator().manual_seed(1)
    aim = example.aims[batch].double()
    gains = [g.double() for g in example.block.gains.values()]
    rotary = Rotary(example.rotary.cos.double(), example.rotary.sin.double())

    def loss(weights: list[Tensor]) -> float:
        out = run_block(example.inputs[batch].double(), weights, gains, rotary, example.config)
        return float(((out - aim).square().sum(-1) / aim.square().sum(-1)).mean())

    for index, linear in enumerate(example.block.linears):
        direction = torch.randn(linear.codes.shape, generator=generator).double()
        values = []
        for sign in (1, -1):
            weights = [n.dequantize().double() for n in example.block.linears]
            weights[index] = weights[index] + sign * 1e-4 * direction
            values.append(loss(weights))
        slope = float((seen[linear.name].double() * direction).sum())
        assert (values[0] - values[1]) / 2e-4 == pytest.approx(slope, rel=0.02), linear.name


def test_what_does_not_help_on_samples_kept_aside_is_not_kept(phi4_checkpoint: Path) -> None:
    """Aims as far off on the other side of what is put out: learning them can only do harm on the rest."""
    example = Example(phi4_checkpoint, "w4g32")
    aims, weights = example.aims.clone(), [n.dequantize() for n in example.block.linears]
    out = run_block(example.inputs, weights, list(example.block.gains.values()), example.rotary, example.config)
    aims[:80] = 2 * out[:80] - aims[:80]
    found = example.learn(replace(LEARN, code_rate=0.05), aims)
    assert found.record["kept_step"] == 0
    assert found.block is example.block
    assert found.record["codes_moved"] == 0


def test_two_times_the_same_gives_the_same(phi4_checkpoint: Path) -> None:
    example = Example(phi4_checkpoint, "q4_0")
    first, second = example.learn(), example.learn()
    assert first.record == second.record
    for a, b in zip(first.block.linears, second.block.linears, strict=True):
        assert torch.equal(a.codes, b.codes)


@pytest.mark.parametrize("name", ["w4g32", "q4_1", "q4_k", "w8row"])
def test_a_code_rests_where_its_own_objective_is_least(name: str) -> None:
    """Along one code the objective is a parabola: three values give its minimum."""
    p = problem(name)
    assert p.hessian is not None
    options = SolverOptions(refit=True, sweeps=8)
    linear = refine(p, gptq.solve(p, options), options).linear
    places = resting_places(p.weight, p.hessian, linear).float()
    assert float((places.abs() >= 0.489).float().mean()) < 0.1, "sweeps had settled"
    a, _ = grid_for(p.scheme).steps(linear.params)
    size = linear.in_features // a.shape[1]
    E = (p.weight - linear.dequantize()).double()
    H = p.hessian.double()
    for row, column in ((0, 0), (3, 17), (23, 100)):
        values = []
        for move in (-1.0, 0.0, 1.0):
            changed = E[row].clone()
            changed[column] -= move * float(a[row, column // size])
            values.append(float(changed @ H @ changed))
        low, middle, high = values
        least = 0.5 * (low - high) / (low - 2 * middle + high)
        assert float(places[row, column]) == pytest.approx(max(-0.49, min(0.49, least)), abs=2e-3)


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(phi4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("learned") / "whole"
    quantize(phi4_checkpoint, RECIPE, run)
    return run


def test_a_run_says_what_learning_did_and_its_artifact_is_exact(undisturbed: Path, tmp_path: Path) -> None:
    data = json.loads((undisturbed / "manifest.json").read_text())["data"]
    assert len(data["rounding"]) == 2
    for record in data["rounding"]:
        errors = {h["step"]: h["error"] for h in record["heldout"]}
        assert errors[record["kept_step"]] == min(errors.values()) <= errors[0]
        assert len(record["losses"]) == record["steps"]
    assert data["recipe"]["rounding"] == {
        "passes": 4,
        "code_rate": 0.01,
        "learning_rate": 1e-3,
        "batch": 4,
        "seed": 0,
    }
    export(undisturbed, "gptq", tmp_path / "artifact", WriteOptions())
    verify(tmp_path / "artifact", undisturbed)


def test_the_next_block_is_fed_by_what_was_learned(undisturbed: Path, phi4_checkpoint: Path, tmp_path: Path) -> None:
    """A residual stream that was lost is recomputed through the learned codes, to the same bytes."""
    run = tmp_path / "run"
    quantize(phi4_checkpoint, RECIPE, run)
    journal = run / JOURNAL
    journal.write_bytes(journal.read_bytes().split(b"\n")[0] + b"\n")
    (run / "manifest.json").unlink()
    quantize(phi4_checkpoint, RECIPE, run)
    assert digests(run) == digests(undisturbed)


KILLER = """
os.fsync = dying(os.fsync)
Path.replace = dying(Path.replace)
from phi4edge.core.recipe import CorpusRecipe, Recipe, RoundingRecipe
from phi4edge.stages.quantize import quantize
recipe = Recipe(corpus=CorpusRecipe(sys.argv[4], 16, 48), full_precision_targets=0.5, refit=True, sweeps=2,
                rounding=RoundingRecipe(passes=4, code_rate=0.01, batch=4))
quantize(sys.argv[2], recipe, Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_killed_and_resumed_it_gives_the_same_bytes(undisturbed: Path, phi4_checkpoint: Path, tmp_path: Path) -> None:
    run, kills = tmp_path / "run", 0
    for stop in (5, 8, 9, 10):
        if not killed_at(stop, KILLER, phi4_checkpoint, run, TEXT):
            break
        kills += 1
    assert kills >= 3
    quantize(phi4_checkpoint, RECIPE, run)
    assert digests(run) == digests(undisturbed)


def test_tuning_goes_on_from_what_was_learned(phi4_checkpoint: Path, tmp_path: Path) -> None:
    corpus = CorpusRecipe(TEXT, samples=32, sequence_length=48)
    recipe = replace(RECIPE, corpus=corpus, tuning=TuningRecipe(passes=1, batch=8))
    data = quantize(phi4_checkpoint, recipe, tmp_path / "run").manifest["data"]
    assert data["tuning"]["steps"] > 0
    assert len(data["rounding"]) == 2


def test_activations_on_disk_give_the_same_bytes_as_in_ram(
    undisturbed: Path, phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = job.plan_memory
    monkeypatch.setattr(job, "plan_memory", lambda *a: replace(plan(*a), spill=True))
    quantize(phi4_checkpoint, RECIPE, tmp_path / "run")
    assert digests(tmp_path / "run") == digests(undisturbed)


@pytest.mark.parametrize(
    "given",
    [
        {"full_precision_targets": 0.0, "round_passes": 2.0},
        {"round_passes": 2.0, "guard": False},
        {"round_passes": 2.0, "awq": True},
        {"round_rate": 0.01},
        {"round_passes": -1.0, "round_rate": 0.01},
    ],
)
def test_what_cannot_be_done_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        solving_recipe(given, CorpusRecipe(samples=64))


def test_an_effort_learns_where_it_can_and_where_nothing_else_is_said() -> None:
    corpus = CorpusRecipe(samples=64)
    assert solving_recipe({"effort": "high"}, corpus).rounding == RoundingRecipe()
    assert solving_recipe({"effort": "high", "round_rate": 0.01}, corpus).rounding == RoundingRecipe(code_rate=0.01)
    for cannot in ({"awq": True}, {"guard": False}, {"full_precision_targets": 0.0}, {"method": "rtn"}):
        assert solving_recipe({"effort": "high", **cannot}, corpus).rounding is None
    assert solving_recipe({"effort": "high"}, CorpusRecipe(samples=8)).rounding is None
    assert solving_recipe({"effort": "high", "round_passes": 0.0}, corpus).rounding is None
    assert solving_recipe({}, corpus).rounding is None
    assert solving_recipe({"round_passes": 3.0}, corpus).rounding == RoundingRecipe(passes=3.0)


def test_learning_is_in_the_memory_plan() -> None:
    config = parse_config(tiny_config(intermediate_size=8192, hidden_size=4096))
    alone = plan_memory(config, replace(RECIPE, rounding=None), None).least
    learned = plan_memory(config, RECIPE, None).least
    assert learned > alone
    with pytest.raises(TargetError, match="RAM budget") as refused:
        plan_memory(config, RECIPE, alone)
    assert "--round-passes 0" in str(refused.value.hint)
    with pytest.raises(TargetError) as refused:
        plan_memory(config, replace(RECIPE, rounding=None), 1)
    assert "--round-passes" not in str(refused.value.hint)
