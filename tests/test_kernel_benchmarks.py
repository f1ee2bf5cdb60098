"""The scripts of benchmarks/kernels on small shapes: both sides do the same, and what is said of it holds."""

from __future__ import annotations

import pytest
import torch
from scripts import load_script

from phi4edge.model.tiles import tiles

needs_tiles = pytest.mark.skipif(tiles() is None, reason="no bfloat16 units here, or no tiles on them")


def test_our_loop_gives_the_codes_of_the_reference_form() -> None:
    found = load_script("benchmarks/kernels/gptq_kernel.py").compare(96, 512)
    assert found["equal_codes"] > 0.999
    assert found["loss"] == pytest.approx(found["reference_loss"], rel=1e-4)
    assert all(found[side][part]["wall_s"] > 0 for side in ("ours", "reference") for part in ("factor", "loop"))


@needs_tiles
def test_solving_on_tiles_is_held_against_float32() -> None:
    script = load_script("benchmarks/kernels/on_tiles.py")
    with torch.inference_mode():
        row = script.measure("layer", 96, 512, "w4g64")
    assert 0.9 < row["equal_codes"] < 1
    assert row["loss_ratio"] == pytest.approx(1, abs=0.01)
    assert row["refined_loss_ratio"] == pytest.approx(1, abs=0.01)
    said = script.table({"rows": [row], "scheme": "w4g64", "threads": 2})
    assert "| layer | 96 × 512 |" in said


@needs_tiles
def test_the_head_on_units_is_held_against_float32() -> None:
    script = load_script("benchmarks/kernels/head.py")
    row = script.measure("small", 128, 701, tokens=64)
    assert 0 < row["kld_error"] < 0.02
    assert 0 < row["slope_error"] < 0.05
    assert "| small | 701 × 128 |" in script.table({"rows": [row], "threads": 2})


@needs_tiles
def test_moments_on_tiles_have_the_error_of_inputs_rounded_to_bfloat16() -> None:
    found = load_script("benchmarks/kernels/moments.py").measure(512)
    assert found["errors"]["float32"] < 1e-5
    assert 1e-4 < found["errors"]["tiles"] < 1e-2
