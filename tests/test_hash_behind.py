"""A checkpoint that is hashed while it is rounded: the same run in the end, whatever happens on the way."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killing import killed_at
from support import write_checkpoint

from phi4edge.checkpoint import fed_digest
from phi4edge.checkpoint.fed_digest import FedDigest
from phi4edge.checkpoint.index import open_index
from phi4edge.core.errors import InputError, ResumeError
from phi4edge.core.events import Progress
from phi4edge.core.hashing import sha256_file
from phi4edge.core.recipe import Recipe
from phi4edge.stages import inputs
from phi4edge.stages.hash_behind import is_unsettled
from phi4edge.stages.inputs import hash_checkpoint
from phi4edge.stages.quantize import quantize

RECIPE = Recipe(method="rtn", corpus=None, scheme="q4_0")
BLOCKS = 5


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of several files of which this process knows nothing."""
    monkeypatch.setattr(inputs, "_READ", {})
    return write_checkpoint(tmp_path / "model", "phi4", num_hidden_layers=BLOCKS, shards=4)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_READ", {})


def digests(run: Path) -> dict[str, str]:
    """Everything that must not differ from one process to the next."""
    told_apart = ("lock", "journal.jsonl", "performance.json", "location.json")
    files = (path for path in run.rglob("*") if path.is_file() and path.name not in told_apart)
    return {str(path.relative_to(run)): sha256_file(path) for path in files}


class Dies(Progress):
    """Ends the process's work in the middle of a block."""

    def __init__(self, linears: int) -> None:
        self.left = linears

    def advance(self, count: int = 1) -> None:
        self.left -= count
        if self.left == 0:
            raise KeyboardInterrupt


def threads() -> int:
    return sum(thread.name.startswith(("hash", "read", "ahead", "commit")) for thread in threading.enumerate())


def interrupted(model: Path, run: Path, linears: int = 9) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(model, RECIPE, run, progress=Dies(linears))
    assert threads() == 0
    assert is_unsettled(run)
    assert not (run / "manifest.json").exists()


@pytest.fixture
def hashed_first(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What a run leaves whose checkpoint was hashed before its first block."""
    with monkeypatch.context() as patch:
        patch.setattr("phi4edge.stages.quantize._hashed_behind", lambda *_, **__: False)
        quantize(model, RECIPE, tmp_path / "first")
    forget(monkeypatch)
    return digests(tmp_path / "first")


def test_hashed_behind_or_before_a_run_is_the_same(model: Path, hashed_first: dict[str, str], tmp_path: Path) -> None:
    quantize(model, RECIPE, tmp_path / "run")
    assert not is_unsettled(tmp_path / "run")
    assert digests(tmp_path / "run") == hashed_first
    found = json.loads((tmp_path / "run" / "run.json").read_text())["inputs"]["checkpoint"]
    assert found == {path.name: sha256_file(path) for path in model.iterdir() if path.name in found}
    assert len([name for name in found if name.endswith(".safetensors")]) > 2
    assert threads() == 0


def test_an_interrupted_run_goes_on_and_no_finished_block_is_redone(
    model: Path, hashed_first: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    interrupted(model, run)
    before = {path: path.stat().st_mtime_ns for path in (run / "blocks").iterdir()}
    assert len(before) >= 1
    forget(monkeypatch)
    quantize(model, RECIPE, run)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items())
    assert digests(run) == hashed_first


def test_killed_between_the_note_and_the_marker(
    model: Path, hashed_first: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("phi4edge.core.workdir.Workdir.settle", dies)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, RECIPE, run)
    assert is_unsettled(run)
    assert (run / "location.json").is_file()
    quantize(model, RECIPE, run)
    assert digests(run) == hashed_first


KILLER = """
os.fsync = dying(os.fsync)
Path.replace = dying(Path.replace)
Path.unlink = dying(Path.unlink)
from phi4edge.core.recipe import Recipe
from phi4edge.stages.quantize import quantize
quantize(sys.argv[2], Recipe(method="rtn", corpus=None, scheme="q4_0"), Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_killed_at_any_commit_point_a_run_goes_on_to_the_same_bytes(
    model: Path, hashed_first: dict[str, str], tmp_path: Path
) -> None:
    run, done, lives = tmp_path / "run", 0, 0
    for stop in (2, 3, 4, 3, 5, 4, 6, 3, 5, 6, 7, 9):
        if not killed_at(stop, KILLER, model, run):
            break
        lives += 1
        journal = run / "journal.jsonl"
        before, done = done, journal.read_bytes().count(b"\n") if journal.exists() else 0
        assert done >= before, "a finished block was lost"
        if (run / "manifest.json").exists():
            break
    assert lives >= 4
    quantize(model, RECIPE, run)
    assert digests(run) == hashed_first


def test_a_checkpoint_that_changed_before_it_was_hashed_is_refused_and_restarted(
    model: Path, hashed_first: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    interrupted(model, run)
    forget(monkeypatch)
    shard = sorted(model.glob("*.safetensors"))[1]
    os.utime(shard, ns=(1, 1))
    with pytest.raises(ResumeError, match=shard.name):
        quantize(model, RECIPE, run)
    quantize(model, RECIPE, run, restart=True)
    assert digests(run) == hashed_first


def test_another_model_with_the_same_sizes_and_times_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(model, tmp_path / "run")
    forget(monkeypatch)
    other = write_checkpoint(tmp_path / "other" / "model", "phi4", num_hidden_layers=BLOCKS, shards=4, seed=1)
    for path in model.iterdir():
        shutil.copystat(path, other / path.name)
        assert (other / path.name).stat().st_mtime_ns == path.stat().st_mtime_ns
    with pytest.raises(ResumeError, match="checkpoint_folder"):
        quantize(other, RECIPE, tmp_path / "run")


def test_a_settled_run_is_refused_where_a_weight_changed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(model, RECIPE, tmp_path / "run")
    forget(monkeypatch)
    shard = sorted(model.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ResumeError, match=shard.name):
        quantize(model, RECIPE, tmp_path / "run")


def test_another_recipe_is_refused_before_and_after(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    interrupted(model, run)
    with pytest.raises(ResumeError, match="scheme"):
        quantize(model, Recipe(method="rtn", corpus=None, scheme="q4_1"), run)


def test_what_no_block_reads_is_looked_at_too(model: Path, tmp_path: Path) -> None:
    """A NaN in the embedding: no block would have met it."""
    refs = open_index(model).tensors
    ref = refs["model.embed_tokens.weight"]
    with ref.path.open("r+b") as file:
        file.seek(ref.offset + 20)
        file.write(np.array([0x7FC0], np.uint16).tobytes())
    with pytest.raises(InputError, match=r"embed_tokens.* NaN or Inf"):
        quantize(model, RECIPE, tmp_path / "run")
    assert not (tmp_path / "run" / "manifest.json").exists()
    assert threads() == 0


def test_files_that_change_while_they_are_read_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, run = sorted(model.glob("*.safetensors"))[1], FedDigest.run

    def changing(self: FedDigest) -> Any:
        found = run(self)
        os.utime(shard, ns=(2, 2))
        return found

    monkeypatch.setattr(FedDigest, "run", changing)
    with pytest.raises(InputError, match=rf"{shard.name} changed while the checkpoint was read"):
        quantize(model, RECIPE, tmp_path / "run")
    assert is_unsettled(tmp_path / "run")
    with pytest.raises(ResumeError, match=shard.name):
        quantize(model, RECIPE, tmp_path / "run")


def test_nearly_all_is_read_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody rounds is read for the hashes alone, and what a file has in another order than blocks come."""
    linears = open_index(model).config.linear_parameters * 2
    read: list[int] = []
    piece_of = fed_digest.read_piece

    def noted(path: Path, start: int, stop: int, *rest: Any) -> Any:
        if path.suffix == ".safetensors":
            read.append(stop - start)
        return piece_of(path, start, stop, *rest)

    monkeypatch.setattr(fed_digest, "read_piece", noted)
    single = write_checkpoint(tmp_path / "single", "phi4", num_hidden_layers=BLOCKS)
    quantize(single, RECIPE, tmp_path / "run")
    rest = (single / "model.safetensors").stat().st_size - linears
    assert rest <= sum(read) <= rest + linears / 4


def test_known_hashes_are_not_read_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(model, RECIPE, tmp_path / "run")
    forget(monkeypatch)
    monkeypatch.setattr(inputs, "digest_file", lambda *_, **__: pytest.fail("read again"))
    index = open_index(model)
    assert len(hash_checkpoint(index, tmp_path / "run")) > 3
    shutil.rmtree(tmp_path / "run" / "blocks")
    quantize(model, RECIPE, tmp_path / "run")
