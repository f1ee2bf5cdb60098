"""Output curvature: F is what a small error costs, rows answer for each other by it, and a killed run ends the same."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from killing import killed_at
from support import tiny_config
from test_quantize import CORPUS, TEXT, digests
from test_solvers import SCHEMES, problem
from torch import Tensor

from phi4edge.calibration.budget import plan_memory
from phi4edge.checkpoint.config import parse_config
from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import TargetError, UsageError
from phi4edge.core.events import SILENT
from phi4edge.core.recipe import CorpusRecipe, Recipe
from phi4edge.distillation.fisher import OutputMoments
from phi4edge.model.forward import stream_logits
from phi4edge.model.source import Overlay
from phi4edge.quant.grid import grid_for
from phi4edge.solvers import _coupled, gptq
from phi4edge.solvers._api import Problem, SolverOptions
from phi4edge.solvers._coupled import solve_coupled
from phi4edge.solvers._refine import refine
from phi4edge.stages.curvature import CURVATURE, measure_curvature
from phi4edge.stages.job import Job, prepare
from phi4edge.stages.quantize import quantize

OPTIONS = SolverOptions(refit=True, sweeps=2)
RECIPE = Recipe(corpus=CORPUS, output_curvature=0.75, refit=True, sweeps=1)


def curvature(rows: int, seed: int = 0) -> Tensor:
    """A positive definite F of correlated rows."""
    gradients = torch.randn(4 * rows, rows // 3, generator=torch.Generator().manual_seed(seed))
    mixing = torch.randn(rows // 3, rows, generator=torch.Generator().manual_seed(seed + 1))
    G = gradients @ mixing + 0.5 * torch.randn(4 * rows, rows, generator=torch.Generator().manual_seed(seed + 2))
    return G.T @ G / G.shape[0]


def objective(p: Problem, Q: Tensor, curvature: Tensor) -> float:
    """tr(F E H Eᵀ)."""
    assert p.hessian is not None
    E = p.weight - Q
    return float(((curvature @ E) * (E @ p.hessian)).sum())


# --- F ------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_the_gradients() -> None:
    gradient = torch.randn(3, 40, 600, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 600)
    moments = OutputMoments(600)
    for sample in gradient:
        moments.add(sample)
    flat = gradient.reshape(-1, 600)
    found, exact = moments.result(), flat.T @ flat / flat.shape[0]
    scale = exact.diagonal().sqrt()
    assert torch.equal(found, found.T)
    assert bool(((found - exact).abs() <= 1e-5 * scale[:, None] * scale).all())


@pytest.fixture(scope="module")
def job(phi4_checkpoint: Path) -> Job:
    recipe = replace(RECIPE, corpus=CorpusRecipe(samples=24, sequence_length=64))
    return prepare(open_checkpoint(phi4_checkpoint), recipe, None, "cpu")


def test_curvature_tells_what_errors_of_several_rows_cost_together(job: Job, tmp_path: Path) -> None:
    """An error that is alike in rows that act alike costs more than diag F says, one that cancels less."""
    found, cost = measure_curvature(job, tmp_path, "key", SILENT)
    assert cost["seconds"] > 0
    assert job.corpus is not None
    tokens = job.corpus.tokens[: job.recipe.kept]
    exact = torch.stack([F.log_softmax(x.double(), 1) for x in stream_logits(Overlay(job.checkpoint, {}), tokens)])
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.1.self_attn.o_proj"
    weight = job.checkpoint.tensor(f"{name}.weight")
    coupled = found.of(name)
    assert coupled is not None
    assert found.of("model.layers.1.mlp.gate_up_proj") is None, "it does not write into the residual stream"
    values, vectors = torch.linalg.eigh(coupled)
    ratios = {}
    for kind, direction in (("felt", vectors[:, -1]), ("unfelt", vectors[:, 0])):
        error = 0.02 * weight.std() * torch.outer(direction, torch.randn(weight.shape[1], generator=generator))
        error *= weight.shape[0] ** 0.5
        changed = stream_logits(Overlay(job.checkpoint, {f"{name}.weight": weight + error}), tokens)
        changed = torch.stack([F.log_softmax(x.double(), 1) for x in changed])
        ratios[kind] = float((exact.exp() * (exact - changed)).sum(-1).mean()) / float(error.square().sum())
    assert float(values[-1] / values[0]) > 3
    assert ratios["felt"] > 2 * ratios["unfelt"]


def test_a_measurement_that_was_killed_goes_on_to_the_same_values(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phi4edge.stages import curvature as stage

    def bytes_of(run: Path) -> dict[str, str]:
        files = sorted((run / CURVATURE).glob("0*.safetensors"))
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    measure_curvature(job, tmp_path / "whole", "key", SILENT)
    inner = stage._CurvaturePass._back

    def killed(self: object, layer: int, *rest: object) -> object:
        if layer == 0:
            raise KeyboardInterrupt
        return inner(self, layer, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(stage._CurvaturePass, "_back", killed)
        with pytest.raises(KeyboardInterrupt):
            measure_curvature(job, tmp_path / "part", "key", SILENT)
    measure_curvature(job, tmp_path / "part", "key", SILENT)
    assert len(bytes_of(tmp_path / "whole")) == job.checkpoint.config.num_layers + 1
    assert bytes_of(tmp_path / "part") == bytes_of(tmp_path / "whole")


# --- rows that answer for each other ------------------------------------------------------------------------


def test_a_row_is_shifted_to_what_is_best_given_the_errors_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rows behind it free, that is −S_rs/S_rr eₛ for S the Schur complement of F on the rows so far."""
    p = problem("w4g32", rows=12)
    coupled = curvature(12)
    monkeypatch.setattr(_coupled, "STEPS", 12)  # a row a step, in order
    found = solve_coupled(p, coupled, SolverOptions()).linear
    inner = coupled.double()
    E = torch.zeros_like(p.weight)
    for r in range(12):
        so_far, behind = slice(0, r + 1), slice(r + 1, 12)
        S = inner[so_far, so_far]
        if r < 11:
            S = S - inner[so_far, behind] @ torch.linalg.inv(inner[behind, behind]) @ inner[behind, so_far]
        best = -(S[r, :r] / S[r, r]) @ E[:r].double()  # the error that row r would like to have
        target = p.weight[r : r + 1] - best.float()
        alone = gptq.solve(replace(p, weight=target), SolverOptions()).linear
        same = (alone.codes[0] == found.codes[r]).float().mean()
        assert float(same) > 0.97, f"row {r}"  # float32 may turn a tie
        E[r] = p.weight[r] - found.dequantize()[r]


@pytest.mark.parametrize("name", SCHEMES)
def test_coupled_rows_lower_the_objective_and_stay_on_the_grid(name: str) -> None:
    p = problem(name, rows=96)
    coupled = curvature(96)
    alone = refine(p, gptq.solve(p, OPTIONS), OPTIONS)
    together = solve_coupled(p, coupled, OPTIONS)
    before, after = (objective(p, s.linear.dequantize(), coupled) for s in (alone, together))
    assert after < 0.9 * before
    grid = grid_for(p.scheme)
    assert int(together.linear.codes.min()) >= grid.low
    assert int(together.linear.codes.max()) <= grid.high
    assert set(together.linear.params) == set(grid.fields)
    assert together.loss >= 0.99 * alone.loss, "what is gained is gained at the price of single rows"


def test_rows_without_anything_in_common_are_solved_as_ever() -> None:
    p = problem("w4g32", rows=40)
    alone = refine(p, gptq.solve(p, OPTIONS), OPTIONS).linear
    together = solve_coupled(p, torch.diag(torch.linspace(0.1, 9, 40)), OPTIONS).linear
    assert torch.equal(alone.codes, together.codes)
    assert torch.equal(alone.params["scales"], together.params["scales"])


def test_fewer_rows_than_steps_are_borne() -> None:
    p = problem("w4g32", rows=3)
    assert solve_coupled(p, curvature(3), OPTIONS).linear.codes.shape == p.weight.shape


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(phi4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("curved") / "whole"
    quantize(phi4_checkpoint, RECIPE, run)
    return run


def test_a_run_changes_codes_and_leaves_no_curvature_behind(
    undisturbed: Path, phi4_checkpoint: Path, tmp_path: Path
) -> None:
    assert not (undisturbed / CURVATURE).exists()
    quantize(phi4_checkpoint, replace(RECIPE, output_curvature=0.0), tmp_path / "without")
    assert digests(tmp_path / "without") != digests(undisturbed)


KILLER = """
os.fsync = dying(os.fsync)
Path.replace = dying(Path.replace)
Path.unlink = dying(Path.unlink)
from phi4edge.core.recipe import CorpusRecipe, Recipe
from phi4edge.stages.quantize import quantize
corpus = CorpusRecipe(sys.argv[4], 8, 48)
quantize(sys.argv[2], Recipe(corpus=corpus, output_curvature=0.75, refit=True, sweeps=1), Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_killed_and_resumed_a_run_gives_the_same_bytes(
    undisturbed: Path, phi4_checkpoint: Path, tmp_path: Path
) -> None:
    run, kills = tmp_path / "run", 0
    for stop in (6, 9, 12, 17, 14, 8):
        if not killed_at(stop, KILLER, phi4_checkpoint, run, TEXT, threads=1):
            break
        kills += 1
    assert kills >= 4
    quantize(phi4_checkpoint, RECIPE, run)
    assert digests(run) == digests(undisturbed)


@pytest.mark.parametrize(
    "bad",
    [
        {"output_curvature": 1.5},
        {"output_curvature": 0.5, "corpus": None},
        {"output_curvature": 0.5, "method": "rtn"},
        {"curvature_samples": 0},
    ],
)
def test_what_cannot_be_done_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Recipe(**bad)  # type: ignore[arg-type]


def test_curvature_is_in_the_memory_plan() -> None:
    config = parse_config(tiny_config(vocab_size=200_064))
    alone = plan_memory(config, replace(RECIPE, output_curvature=0.0), None).least
    coupled = plan_memory(config, RECIPE, None).least
    assert coupled > alone + config.vocab_size * config.hidden_size * 2, "the head is in RAM while gradients go back"
    with pytest.raises(TargetError, match="RAM budget"):
        plan_memory(config, RECIPE, alone)
