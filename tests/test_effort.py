"""Efforts fill in what nobody said, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from phi4edge.cli.main import main
from phi4edge.core.errors import UsageError
from phi4edge.core.recipe import EFFORTS, CorpusRecipe, Recipe, TuningRecipe, solving_recipe

CORPUS = CorpusRecipe(samples=64)


def test_low_effort_is_the_solver_alone() -> None:
    assert solving_recipe({"effort": "low"}, CORPUS) == Recipe(corpus=CORPUS)


def test_default_refines_and_aims_at_full_precision_and_high_tunes_too() -> None:
    low, default, high = (solving_recipe({"effort": effort}, CORPUS) for effort in EFFORTS)
    assert list(EFFORTS) == ["low", "default", "high"]
    assert low.full_precision_targets == 0 < default.full_precision_targets == high.full_precision_targets
    assert not low.refined
    assert (default.refit, default.sweeps) == (high.refit, high.sweeps) == (True, 3)
    assert low.tuning is default.tuning is low.rounding is default.rounding is None
    assert high.rounding is not None
    assert high.tuning is not None
    assert high.tuning.code_rate == 0
    assert (low.rotation, default.rotation, high.rotation) == ("none", "auto", "auto")
    assert solving_recipe({}, CORPUS) == default


def test_what_was_said_is_stronger_than_the_effort() -> None:
    recipe = solving_recipe({"effort": "high", "tune_codes": 0.001, "full_precision_targets": 0.25}, CORPUS)
    assert recipe.tuning is not None
    assert recipe.tuning == TuningRecipe(passes=EFFORTS["high"]["tune_passes"], code_rate=0.001)
    assert recipe.full_precision_targets == 0.25
    assert solving_recipe({"effort": "high", "tune_passes": 0.0}, CORPUS).tuning is None
    low = solving_recipe({"effort": "low", "tune_passes": 2.0, "tune_batch": 4}, CORPUS)
    assert low == replace(Recipe(corpus=CORPUS), tuning=TuningRecipe(passes=2.0, batch=4))


@pytest.mark.parametrize("asked", [{"awq": True}, {"method": "awq"}])
def test_scaled_channels_are_not_rotated_as_well_unless_both_are_asked_for(asked: dict[str, object]) -> None:
    assert solving_recipe(asked, CORPUS).rotation == "none"
    assert solving_recipe({**asked, "rotation": "auto"}, CORPUS).rotation == "auto"
    assert solving_recipe({"awq": False}, CORPUS).rotation == "auto"


def test_without_text_kept_aside_no_effort_tunes() -> None:
    few = CorpusRecipe(samples=8)
    assert solving_recipe({"effort": "high"}, few).tuning is None
    assert solving_recipe({"effort": "high", "guard": False}, CORPUS).tuning is None
    assert solving_recipe({"effort": "high", "method": "rtn"}, None) == Recipe(method="rtn", corpus=None)
    with pytest.raises(UsageError, match="kept aside"):
        solving_recipe({"tune_passes": 1.0, "guard": False}, CORPUS)


def test_rounding_to_nearest_stays_what_it_is() -> None:
    recipe = solving_recipe({"method": "rtn"}, CORPUS)
    assert (recipe.full_precision_targets, recipe.refined) == (0, False)
    assert not solving_recipe({"refit": False, "sweeps": 0}, CORPUS).refined


def test_settings_without_tuning_are_refused() -> None:
    with pytest.raises(UsageError, match="not asked for"):
        solving_recipe({"effort": "low", "tune_batch": 4}, CORPUS)
    with pytest.raises(UsageError, match="unknown effort"):
        solving_recipe({"effort": "hihg"}, CORPUS)


def test_command_line_and_recipe_file_make_the_same_plan(
    phi4_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["quantize", str(phi4_checkpoint), "--out", str(tmp_path / "run"), "--dry-run", "--effort", "high"]
    assert main([*arguments, "--samples", "32", "--sequence-length", "32", "--scheme", "q4_0"]) == 0
    assert "tuned 2 × over the samples" in capsys.readouterr().out
    assert main([*arguments, "--samples", "8", "--sequence-length", "32", "--scheme", "q4_0"]) == 0
    assert "tuned" not in capsys.readouterr().out
