"""Bit allocation: the file keeps to its budget, the mix reaches it exactly as solved, and can be given back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from drifting import mean_kld
from support import tiny_config

from phi4edge.calibration.budget import plan_memory
from phi4edge.checkpoint.config import parse_config
from phi4edge.cli.solving_options import read_types
from phi4edge.core.errors import InputError, TargetError, UsageError
from phi4edge.core.recipe import CorpusRecipe, MixRecipe, Recipe, RoundingRecipe, TuningRecipe
from phi4edge.model.source import WeightSource
from phi4edge.stages.export import export
from phi4edge.stages.quantize import quantize
from phi4edge.stages.run_reader import open_run
from phi4edge.stages.verify import verify
from phi4edge.writers._api import WriteOptions

CORPUS = CorpusRecipe(samples=24, sequence_length=64)
CANDIDATES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k")


def mixed(bpw: float, **changes: object) -> Recipe:
    return Recipe(corpus=CORPUS, mix=MixRecipe(CANDIDATES, target_bpw=bpw), **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(phi4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mix") / "run"
    quantize(phi4_checkpoint, mixed(7.4), out)
    return out


def manifest(run: Path) -> dict[str, object]:
    return dict(json.loads((run / "manifest.json").read_text())["data"])


def kld(folder: Path, source: WeightSource) -> float:
    return mean_kld(folder, source, __file__, samples=6, length=64)


def test_mix_fills_its_budget_and_uses_several_types(run: Path) -> None:
    allocation = manifest(run)["allocation"]
    assert isinstance(allocation, dict)
    assert 0.95 * allocation["budget_bytes"] < allocation["nbytes"] <= allocation["budget_bytes"]
    assert len(set(allocation["types"].values())) > 1
    assert set(allocation["tables"]) == {"head", "embedding"}
    assert allocation["unused_by_rounding"] == 0


def test_gguf_of_a_mix_is_exact_and_of_the_planned_size(run: Path, tmp_path: Path) -> None:
    artifact = export(run, "gguf", tmp_path / "m.gguf", WriteOptions())
    assert verify(artifact.path, run).linears == 8
    allocation = manifest(run)["allocation"]
    assert isinstance(allocation, dict)
    header = artifact.path.stat().st_size - allocation["nbytes"]
    assert 0 < header < 60_000  # vocabulary, keys, alignment
    with pytest.raises(InputError, match="gptq cannot hold this run"):
        export(run, "gptq", tmp_path / "folder", WriteOptions())


def test_a_larger_budget_drifts_less_than_a_smaller_and_than_one_type(
    run: Path, phi4_checkpoint: Path, tmp_path: Path
) -> None:
    quantize(phi4_checkpoint, mixed(6.6), tmp_path / "small")
    quantize(phi4_checkpoint, Recipe(scheme="q4_0", corpus=CORPUS), tmp_path / "uniform")
    found = [kld(phi4_checkpoint, open_run(folder)) for folder in (run, tmp_path / "small", tmp_path / "uniform")]
    assert found[0] < found[1] < found[2]


def test_a_mix_given_back_gives_the_same_codes(run: Path, phi4_checkpoint: Path, tmp_path: Path) -> None:
    types, tables = read_types(run / "manifest.json")
    again = tmp_path / "again"
    quantize(phi4_checkpoint, Recipe(scheme="q4_0", corpus=CORPUS, types=types, tables=tables), again)
    for layer in range(2):
        name = f"blocks/{layer:05d}.safetensors"
        assert (again / name).read_bytes() == (run / name).read_bytes()
    assert manifest(again)["tables"] == manifest(run)["tables"]
    assert open_run(again).tables == open_run(run).tables


def test_a_mix_is_rounded_and_tuned_like_anything_else(phi4_checkpoint: Path, tmp_path: Path) -> None:
    learned = {"rounding": RoundingRecipe(1, batch=8), "tuning": TuningRecipe(1, 1e-3, 8)}
    quantize(phi4_checkpoint, mixed(7.4, full_precision_targets=0.5, **learned), tmp_path / "run")
    assert len(manifest(tmp_path / "run")["rounding"]) == 2  # type: ignore[arg-type]
    model = open_run(tmp_path / "run")
    assert len({model.scheme_of(name).name for name in model.linears}) > 1
    assert all(torch.isfinite(model.load(name).dequantize()).all() for name in model.linears)
    artifact = export(tmp_path / "run", "gguf", tmp_path / "m.gguf", WriteOptions())
    assert verify(artifact.path, tmp_path / "run").linears == 8


def test_budgets_that_cannot_be_kept_are_refused(phi4_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="smallest mix") as error:
        quantize(phi4_checkpoint, mixed(3.0), tmp_path / "run")
    least = float(re.search(r"--target-bpw ([\d.]+)", str(error.value.hint))[1])  # type: ignore[index]
    assert not (tmp_path / "run").exists(), "refused from the shapes, before anything is done"
    quantize(phi4_checkpoint, mixed(least), tmp_path / "least")
    assert set(open_run(tmp_path / "least").tables.values()) == {"q8_0"}
    with pytest.raises(UsageError, match="budget"):
        MixRecipe(CANDIDATES)
    with pytest.raises(UsageError, match="not a linear"):
        quantize(phi4_checkpoint, Recipe(corpus=CORPUS, types=(("lm_head", "q8_0"),)), tmp_path / "other")


def test_the_backward_pass_of_a_mix_is_in_the_memory_plan() -> None:
    config = parse_config(tiny_config(vocab_size=200_064))
    alone = plan_memory(config, Recipe(method="rtn", corpus=CORPUS), None).least
    chosen = plan_memory(config, mixed(8.0, method="rtn"), None).least
    assert chosen > alone + config.vocab_size * config.hidden_size * 2, "the head is in RAM while KLD goes back"
    with pytest.raises(TargetError, match="RAM budget"):
        plan_memory(config, mixed(8.0, method="rtn"), alone)
