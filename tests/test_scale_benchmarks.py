"""The scripts of benchmarks/scale on a tiny model: what they count is what there is."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from scripts import load_script

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.cli.commands.quantize import command
from phi4edge.stages.quantize import quantize
from phi4edge.stages.run_reader import read_manifest


def chunks(path: Path, samples: int, length: int) -> Path:
    tokens = torch.randint(0, 300, (samples, length), generator=torch.Generator().manual_seed(1))
    save_file({"tokens": tokens}, path)
    return path


def test_distillation_is_split_into_parts_that_make_up_its_steps(phi4_checkpoint: Path, tmp_path: Path) -> None:
    script = load_script("benchmarks/scale/distil.py")
    recipe = script.recipe_of(chunks(tmp_path / "c.safetensors", 8, 32), 8, 32, 4, 2, "w4g32")
    summary = quantize(phi4_checkpoint, recipe, tmp_path / "run")
    words = [str(phi4_checkpoint), "--out", str(tmp_path / "asked"), *script.words_of(recipe), "--quiet"]
    assert CliRunner().invoke(command, words).exit_code == 0
    digests = [read_manifest(tmp_path / run)["data"]["files"] for run in ("run", "asked")]
    assert digests[0] == digests[1], "the flags ask for the same recipe"
    found = script.account(tmp_path / "run", recipe)
    assert found["steps"] == 4 == len(found["losses"])
    assert set(found["step_seconds"]) == set(script.STEP)
    assert all(found["step_seconds"][part] > 0 for part in ("read", "forward", "head", "backward", "update"))
    spent = sum(found["step_seconds"].values()) * 4 + found["teacher_seconds_a_sample"] * 8
    assert 0.3 * summary.performance["tuning_seconds"] < spent <= 1.2 * summary.performance["tuning_seconds"]
    # 16 times the length; 56 steps for 4; four evaluations of 8 samples.
    assert found["whole_seconds_estimated"] > 16 * 14 * 4 * sum(found["step_seconds"].values())


def test_kld_of_peers_is_zero_for_the_model_itself_and_not_for_another(phi4_checkpoint: Path, tmp_path: Path) -> None:
    script = load_script("benchmarks/scale/peers.py")
    from support import write_checkpoint

    other = open_checkpoint(write_checkpoint(tmp_path / "other", "phi4", seed=3))
    model, tokens = open_checkpoint(phi4_checkpoint), torch.arange(96).reshape(3, 32)
    assert script.divergences(model, model, tokens) == [0.0, 0.0, 0.0]
    found = script.divergences(model, other, tokens)
    assert len(found) == 3
    assert min(found) > 0.1


def test_exponents_are_found_again(tmp_path: Path) -> None:
    script = load_script("benchmarks/scale/growth.py")

    def run(axis: str, size: int) -> dict[str, object]:
        parts = {part: 0.01 * size ** script.THEORY[axis][part] for part in script.PARTS}
        return {axis: size, "parts": parts, "all": sum(parts.values())}

    measured = {axis: [run(axis, size) for size in sizes] for axis, sizes in script.GRID.items()}
    for axis, found in script.fits(measured).items():
        for part in script.PARTS:
            assert found[part] == pytest.approx(script.THEORY[axis][part])
    assert script.plot(measured).count("<circle") == 4 * sum(map(len, script.GRID.values()))


def test_rtn_reads_and_writes_what_it_says(tmp_path: Path) -> None:
    script = load_script("benchmarks/scale/rtn.py")
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    for direct in (False, True):
        read, written = (
            script.read_rate([path, path], direct=direct),
            script.write_rate(tmp_path, 3 << 20, direct=direct),
        )
        assert read.nbytes == 2 * path.stat().st_size
        assert min(read.rate, written.rate) > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_what_a_command_costs_is_its_own(tmp_path: Path) -> None:
    """The peak of whoever starts a command is not counted as the command's, and how it ended is handed on."""
    script = load_script("benchmarks/launch.py")
    held = bytearray(b"x") * (300 << 20)
    with (tmp_path / "log.txt").open("w+") as log:
        ran = script.launch([sys.executable, "-c", "print('here')"], env=dict(os.environ), cwd=tmp_path, output=log)
        assert (ran.code, 0 < ran.cpu_seconds < 5) == (0, True)
        assert ran.peak_rss_bytes < len(held) / 3
        held = bytearray()
        words = [sys.executable, "-c", "import os; b = bytes(200 << 20); os.kill(os.getpid(), 9)"]
        ran = script.launch(words, env=dict(os.environ), cwd=tmp_path, output=log)
        assert ran.code == 128 + 9
        ran = script.launch(
            [sys.executable, "-c", "b = b'x' * (200 << 20)"], env=dict(os.environ), cwd=None, output=log
        )
        assert ran.peak_rss_bytes > 200 << 20
        assert script.launch([str(tmp_path / "none")], env=dict(os.environ), cwd=None, output=log).code == 127
        log.seek(0)
        assert log.readline() == "here\n"
        assert "none" in log.read()
