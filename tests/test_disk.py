"""Room on disk: asked for before the start, said plainly when it ends in the middle, and the run goes on after it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from cli_support import call_json

from phi4edge.calibration.budget import plan_memory
from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.atomic import atomic_directory, atomic_file
from phi4edge.core.disk import free_bytes, require_space
from phi4edge.core.errors import TargetError
from phi4edge.core.events import Progress
from phi4edge.core.recipe import CorpusRecipe, Recipe
from phi4edge.quant.scheme import parse_scheme
from phi4edge.stages.quantize import quantize
from phi4edge.stages.room import run_bytes

CORPUS = CorpusRecipe("builtin", samples=8, sequence_length=64)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two mebibytes."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_need_and_room_are_both_named(tmp_path: Path) -> None:
    free = free_bytes(tmp_path / "not" / "there")
    require_space(tmp_path, free // 2, "it")
    with pytest.raises(TargetError, match=r"it needs .* GiB, but .*iB are free") as refused:
        require_space(tmp_path, free + 2**40, "it")
    assert refused.value.exit_code == 4


def test_a_full_disk_leaves_no_half_written_file(small_disk: Path) -> None:
    with pytest.raises(TargetError, match="no room left"), atomic_file(small_disk / "file") as file:
        file.write(bytes(3 << 20))
    with pytest.raises(TargetError, match="no room left"), atomic_directory(small_disk / "folder") as folder:
        (folder / "part").write_bytes(bytes(3 << 20))
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize("scheme", ["q4_0", "w4g32-asym", "q5_1", "q8_0"])
@pytest.mark.parametrize("corpus", [None, CORPUS])
def test_a_run_takes_what_was_counted(
    phi4_checkpoint: Path, tmp_path: Path, scheme: str, corpus: CorpusRecipe | None
) -> None:
    recipe = Recipe(method="rtn" if corpus is None else "gptq", scheme=scheme, corpus=corpus)
    quantize(phi4_checkpoint, recipe, tmp_path / "run")
    config = open_checkpoint(phi4_checkpoint).config
    counted = run_bytes(config, recipe, plan_memory(config, recipe, None), lambda _: parse_scheme(scheme)) - (1 << 20)
    files = [p for p in (tmp_path / "run").rglob("*.safetensors") if p.is_file()]
    headers = 8192 * len(files)
    stored = sum(path.stat().st_size for path in files)
    hidden = 0 if corpus is None else 3 * corpus.tokens * config.hidden_size * 4  # gone when the run is whole
    assert stored - headers <= counted - hidden <= stored


def test_a_run_without_room_is_refused_before_it_begins(
    phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(TargetError, match=r"this run needs .* MiB, but 97.66 KiB are free"):
        quantize(phi4_checkpoint, Recipe(method="rtn", scheme="q4_0", corpus=None), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_disk_that_fills_up_ends_the_run_and_it_goes_on(
    phi4_checkpoint: Path, small_disk: Path, tmp_path: Path
) -> None:
    """Another program takes the room after the check, whatever the run is writing meanwhile."""
    out = small_disk / "run"
    recipe = Recipe(method="rtn", scheme="q4_0", corpus=None)
    whole = quantize(phi4_checkpoint, recipe, tmp_path / "whole")
    room = free_bytes(small_disk)

    class Taker(Progress):
        """Fills the disk while the second block is solved."""

        def status(self, text: str) -> None:
            if "block 1" in text and not (small_disk / "other").exists():
                with (small_disk / "other").open("wb", buffering=0) as other, suppress(OSError):
                    while other.write(bytes(4096)):
                        pass

    with pytest.raises(TargetError, match="no room left") as ended:
        quantize(phi4_checkpoint, recipe, out, progress=Taker())
    assert "finished work is kept" in str(ended.value.hint)
    assert not list(out.rglob("*.partial"))
    (small_disk / "other").unlink()
    assert free_bytes(small_disk) > room // 2
    again = quantize(phi4_checkpoint, recipe, out)
    assert again.manifest == whole.manifest
    journal = [json.loads(line)["record"]["block"] for line in (out / "journal.jsonl").read_text().splitlines()]
    assert journal == [0, 1]


def test_the_command_says_so_and_ends_with_4(
    phi4_checkpoint: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (small_disk / "other").write_bytes(bytes(free_bytes(small_disk) - 100_000))
    run = small_disk / "run"
    code, document = call_json(
        capfd, "quantize", phi4_checkpoint, "--out", run, "--method", "rtn", "--scheme", "q4_0", "--restart"
    )
    assert code == 4
    assert "are free" in document["error"]["message"]
    assert not run.exists()
