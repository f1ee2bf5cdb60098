"""Which units compute products: chosen by measurement, kept by a run, and never taken for what is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_quantize import CORPUS

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import MissingToolError, UsageError
from phi4edge.core.recipe import Recipe
from phi4edge.model import compute
from phi4edge.model.compute import (
    BFLOAT16,
    FLOAT32,
    Speeds,
    choose_compute,
    computing,
    has_bfloat16_units,
    prepared,
    product,
)
from phi4edge.stages.job import prepare
from phi4edge.stages.quantize import quantize

measure_for_real = compute.measure_compute  # tests do not let it choose: see conftest.py


def test_the_setting_holds_inside_and_is_put_back() -> None:
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision

    def fail() -> None:
        with computing(BFLOAT16):
            assert settings.fp32_precision == "bf16"
            with computing(FLOAT32):
                assert settings.fp32_precision == "ieee"
            assert settings.fp32_precision == "bf16"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert settings.fp32_precision == before


def test_what_is_measured_is_a_speed_and_an_error_that_rounding_explains() -> None:
    speeds = measure_for_real()
    assert speeds.float32 > 0.01
    assert speeds.bfloat16 > 0.01
    if has_bfloat16_units():
        assert 0 < speeds.error < 2.0**-7
    else:
        assert 0 < speeds.error < 2.0**-7  # rounded all the same, and no faster


@pytest.mark.parametrize("stalled", [FLOAT32, BFLOAT16])
def test_a_moments_stall_does_not_choose(stalled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = {FLOAT32: [140.0, 130.0, 150.0, 145.0], BFLOAT16: [380.0, 350.0, 370.0, 360.0]}
    turns[stalled][1:3] = [3.0, 60.0]

    def timed(unit: str, x: torch.Tensor, w: torch.Tensor) -> tuple[float, torch.Tensor]:
        return turns[unit].pop(0), torch.ones(2) * (1.001 if unit == BFLOAT16 else 1)

    monkeypatch.setattr(compute, "_timed", timed)
    speeds = measure_for_real()
    assert speeds.float32 == (150.0 if stalled == BFLOAT16 else 145.0)
    assert speeds.bfloat16 == 380.0
    assert speeds.error == pytest.approx(0.001, rel=1e-3)


def test_a_prepared_weight_gives_the_product_as_near_as_the_units_can() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, 64, generator=generator), torch.randn(5, 64, generator=generator)
    exact = x.double() @ weight.double().T
    for unit, kept, allowed in ((FLOAT32, torch.float32, 1e-6), (BFLOAT16, torch.bfloat16, 2.0**-7)):
        with computing(unit):
            made = prepared(weight)
            found = product(x, made)
        assert made.dtype == kept
        assert found.dtype == torch.float32
        assert float((found - exact).norm() / exact.norm()) < allowed


@pytest.mark.parametrize(
    ("speeds", "chosen"),
    [
        (Speeds(85, 450, 0.0028), BFLOAT16),
        (Speeds(85, 90, 0.0028), FLOAT32),  # not worth it
        (Speeds(85, 450, 0.05), FLOAT32),  # not what bfloat16 gives
    ],
)
def test_auto_takes_the_units_that_are_faster_and_right(
    monkeypatch: pytest.MonkeyPatch, speeds: Speeds, chosen: str
) -> None:
    monkeypatch.setattr(compute, "has_bfloat16_units", lambda: True)
    monkeypatch.setattr(compute, "measure_compute", lambda: speeds)
    assert choose_compute("auto") == chosen
    assert choose_compute(FLOAT32) == FLOAT32
    assert choose_compute(BFLOAT16) == BFLOAT16
    assert choose_compute("auto", "cuda") == FLOAT32


def test_units_that_are_not_there_are_refused_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "has_bfloat16_units", lambda: False)
    assert choose_compute("auto") == FLOAT32
    with pytest.raises(MissingToolError, match="no bfloat16 units"):
        choose_compute(BFLOAT16)
    with pytest.raises(UsageError, match="unknown compute"):
        Recipe(compute="float16")


def test_a_run_goes_on_as_it_began(phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(phi4_checkpoint, Recipe(corpus=CORPUS), tmp_path / "run")
    begun = json.loads((tmp_path / "run" / "run.json").read_text())["inputs"]
    assert begun["recipe"]["compute"] == FLOAT32
    monkeypatch.setattr(compute, "has_bfloat16_units", lambda: True)
    monkeypatch.setattr(compute, "measure_compute", lambda: Speeds(85, 450, 0.0028))
    checkpoint = open_checkpoint(phi4_checkpoint)
    assert prepare(checkpoint, Recipe(corpus=CORPUS), None, "cpu").recipe.compute == BFLOAT16
    assert prepare(checkpoint, Recipe(corpus=CORPUS), None, "cpu", tmp_path / "run").recipe.compute == FLOAT32


@pytest.mark.skipif(not has_bfloat16_units(), reason="this CPU has no bfloat16 units")
def test_codes_solved_with_bfloat16_products_are_nearly_those_of_float32(phi4_checkpoint: Path, tmp_path: Path) -> None:
    losses = []
    for unit in (FLOAT32, BFLOAT16):
        summary = quantize(phi4_checkpoint, Recipe(corpus=CORPUS, compute=unit), tmp_path / unit)
        losses.append(sum(linear["loss"] for linear in summary.manifest["data"]["linears"]))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
