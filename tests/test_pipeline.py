"""The whole command line on a small model: what each command promises a script that calls it."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import write_checkpoint

from phi4edge.core.resources import data_folder

TEXT = str(Path(__file__).with_name("support.py"))
OTHER_TEXT = str(Path(__file__))


def phi4edge(*arguments: str | Path, expect: int = 0, **environment: str) -> dict[str, Any]:
    """Run a command with --json; its document, after the exit code was checked."""
    command = [sys.executable, "-m", "phi4edge", *map(str, arguments), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert result.returncode == expect, result.stdout + result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    assert document["ok"] == (expect == 0)
    assert document["schema"] == f"phi4edge/{arguments[0]}/1"
    if expect:
        assert document["error"]["code"] == expect
        assert "Traceback" not in result.stderr
    return document


def quantize(model: Path, run: Path, *more: str, expect: int = 0) -> dict[str, Any]:
    arguments = ("quantize", model, "--out", run, "--corpus", TEXT, "--samples", "8", "--sequence-length", "48")
    return phi4edge(*arguments, *more, expect=expect)


@pytest.fixture(scope="module")
def run(phi4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    data = quantize(phi4_checkpoint, folder, "--scheme", "q4_0")["data"]
    assert data["method"] == "gptq"
    assert data["performance"]["peak_rss_bytes"] > 0
    return folder


def test_a_run_becomes_two_formats_that_verify_bit_for_bit(run: Path, tmp_path: Path) -> None:
    for form, out in (("gguf", tmp_path / "model.gguf"), ("gptq", tmp_path / "model-gptq")):
        exported = phi4edge("export", run, "--format", form, "--out", out)["data"]
        assert exported["bytes"] > 0
        verified = phi4edge("verify", out, "--against", run)["data"]
        assert verified["linears_compared"] == 8
    phi4edge("export", run, "--format", "gguf", "--out", tmp_path / "model.gguf", expect=3)
    phi4edge("export", run, "--format", "gguf", "--out", tmp_path / "model.gguf", "--force")


def test_verify_names_what_a_flipped_bit_changed(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    phi4edge("export", run, "--format", "gguf", "--out", out)
    from gguf import GGUFReader

    tensor = next(t for t in GGUFReader(out).tensors if t.name == "blk.1.ffn_down.weight")
    data = bytearray(out.read_bytes())
    data[tensor.data_offset + 5 * 18 + 2] ^= 0x10  # a code of the sixth block
    out.write_bytes(data)
    error = phi4edge("verify", out, "--against", run, expect=8)["error"]
    assert "model.layers.1.mlp.down_proj: code at row 1, column 48" in error["message"]


def test_a_scheme_that_a_format_cannot_hold_is_refused_before_anything_is_written(
    phi4_checkpoint: Path, tmp_path: Path
) -> None:
    quantize(phi4_checkpoint, tmp_path / "run", "--bits", "4", "--group-size", "32", "--asymmetric")
    error = phi4edge("export", tmp_path / "run", "--format", "gguf", "--out", tmp_path / "a.gguf", expect=3)["error"]
    assert "gguf cannot hold this run" in error["message"]
    assert "gptq" in error["hint"]
    assert not (tmp_path / "a.gguf").exists()


def test_an_artifact_that_does_not_fit_its_target_is_refused(run: Path, tmp_path: Path) -> None:
    profile = (data_folder("targets") / "phone-pixel-6a-6gb.toml").read_text()
    lines = [
        line
        if not line.startswith("usable_ram_gb")
        else "usable_ram_gb = { value = 0.001, estimated = true, reason = 'a test' }"
        for line in profile.splitlines()
    ]
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "watch.toml").write_text("\n".join(lines))
    out = tmp_path / "a.gguf"
    arguments = ("export", run, "--format", "gguf", "--out", out, "--target", "watch")
    error = phi4edge(*arguments, expect=4, PHI4EDGE_TARGET_PATH=str(tmp_path / "targets"))["error"]
    assert "watch" in error["message"]
    assert not out.exists()
    assert "phone-pixel-6a-6gb" in phi4edge(*arguments[:-1], "phone-pixel-6a-6g", expect=2)["error"]["hint"]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--scheme", "w5g32"), 2, "bits 5 is not supported"),
        (("--scheme", "q4_k_x"), 2, "unknown scheme"),
        (("--scheme", "q4_0", "--bits", "8"), 2, "--scheme q4_0 has bits 4"),
        (("--group-size", "48"), 3, "in_features 64 is not divisible by group_size 48"),
        (("--ram-budget", "lots"), 2, "'lots' is not a size"),
        (("--ram-budget", "10MiB"), 4, "is too small"),
        (("--samples", "100000"), 3, "tokens in whole samples"),
        (("--corpus", "nothing.txt"), 3, "no such file"),
        (("--damp-percent", "2"), 2, "not between 0 and 1"),
        (("--no-such-flag",), 2, "No such option"),
    ],
)
def test_bad_requests_end_with_their_code_and_leave_nothing(
    phi4_checkpoint: Path, tmp_path: Path, flags: tuple[str, ...], code: int, message: str
) -> None:
    error = quantize(phi4_checkpoint, tmp_path / "run", *flags, expect=code)["error"]
    assert message in error["message"]
    assert not (tmp_path / "run").exists()


def test_a_dry_run_plans_and_writes_nothing(phi4_checkpoint: Path, tmp_path: Path) -> None:
    data = quantize(phi4_checkpoint, tmp_path / "run", "--dry-run")["data"]
    assert data["linears"] == 8
    assert data["memory"]["expected"] >= data["memory"]["least"]
    assert data["time"]["seconds_estimated"] > 0
    assert not (tmp_path / "run").exists()


def test_dry_runs_of_the_other_commands_write_nothing_either(run: Path, phi4_checkpoint: Path, tmp_path: Path) -> None:
    calibrate = ("calibrate", phi4_checkpoint, "--corpus", TEXT, "--samples", "4", "--sequence-length", "32")
    assert phi4edge(*calibrate, "--out", tmp_path / "run", "--dry-run")["data"]["tokens"] == 128
    planned = phi4edge("export", run, "--format", "gguf", "--out", tmp_path / "a.gguf", "--dry-run")["data"]
    assert planned["scheme"] == "q4_0"
    rows = phi4edge("run", recipe(tmp_path, phi4_checkpoint), "--out", tmp_path / "out", "--dry-run")["data"]["targets"]
    assert rows == [{"target": "local", "scheme": "q4_0", "format": "gguf"}]
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


def test_resume_with_another_recipe_is_exit_7(run: Path, phi4_checkpoint: Path) -> None:
    error = quantize(phi4_checkpoint, run, "--scheme", "q4_1", expect=7)["error"]
    assert "recipe.scheme was" in error["message"]


def test_a_second_process_on_a_run_is_exit_7(run: Path, phi4_checkpoint: Path) -> None:
    with (run / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        error = quantize(phi4_checkpoint, run, "--scheme", "q4_0", expect=7)["error"]
    assert "another process is working" in error["message"]


def test_an_unfinished_run_is_not_exported(run: Path, phi4_checkpoint: Path, tmp_path: Path) -> None:
    quantize(phi4_checkpoint, tmp_path / "run", "--scheme", "q4_0")
    (tmp_path / "run" / "manifest.json").unlink()
    error = phi4edge("export", tmp_path / "run", "--format", "gguf", "--out", tmp_path / "a.gguf", expect=3)["error"]
    assert "not finished" in error["message"]


def test_a_checkpoint_that_moved_is_found_with_model(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "first", "phi4")
    quantize(first, tmp_path / "run", "--scheme", "q4_0")
    first.rename(tmp_path / "second")
    arguments = ("export", tmp_path / "run", "--format", "gguf", "--out", tmp_path / "a.gguf")
    assert "--model" in phi4edge(*arguments, expect=3)["error"]["hint"]
    phi4edge(*arguments, "--model", tmp_path / "second")
    other = write_checkpoint(tmp_path / "other", "phi4", seed=5)
    assert "is not the checkpoint" in phi4edge(*arguments, "--force", "--model", other, expect=7)["error"]["message"]


RECIPE = """
model = "{model}"
[quantize]
scheme = "q4_0"
[calibration]
corpus = "{text}"
samples = 8
sequence_length = 48
[drift]
text = "{other}"
context = 64
chunks = 3
{gate}
[bench]
prompt_tokens = 16
gen_tokens = 4
repetitions = 2
"""


def recipe(folder: Path, model: Path, gate: str = "") -> Path:
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(model=model, text=TEXT, other=OTHER_TEXT, gate=gate))
    return path


@pytest.mark.slow
def test_run_goes_from_a_checkpoint_to_a_report(phi4_checkpoint: Path, tmp_path: Path) -> None:
    targets = ("--target", "local", "--target", "jetson-agx-orin-64gb")
    data = phi4edge("run", recipe(tmp_path, phi4_checkpoint), "--out", tmp_path / "out", *targets)["data"]
    speeds = {row["target"]: row["speed"] for row in data["targets"]}
    assert speeds["local"]["metrics"]["decode_tps"]["value"] > 0
    assert "--address jetson-agx-orin-64gb=PLACE" in speeds["jetson-agx-orin-64gb"]["reason"]
    page = (tmp_path / "out" / "report" / "report.html").read_text()
    assert "<svg" in page
    document = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert document["ok"]
    drift = json.loads(next((tmp_path / "out" / "results").glob("*.gguf.drift.json")).read_text())["data"]
    assert drift["metrics"]["kld"]["value"] > 0
    assert drift["runtime"]["name"] == "llama_cpp"


@pytest.mark.slow
def test_a_failed_gate_is_exit_6_with_all_results_written(phi4_checkpoint: Path, tmp_path: Path) -> None:
    document = phi4edge("run", recipe(tmp_path, phi4_checkpoint, "max_kld = 1e-9"), "--out", tmp_path / "out", expect=6)
    assert "kld" in document["error"]["message"]
    assert (tmp_path / "out" / "report" / "report.html").exists()
    assert list((tmp_path / "out" / "results").glob("*.bench.json"))


def test_a_misspelt_recipe_key_names_the_closest(phi4_checkpoint: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, phi4_checkpoint, "max_kdl = 0.1")
    error = phi4edge("run", path, "--out", tmp_path / "out", expect=3)["error"]
    assert "max_kdl" in error["message"]
    assert "max_kld" in error["hint"]
    assert not (tmp_path / "out").exists()


def test_a_recipe_value_of_the_wrong_type_is_named(phi4_checkpoint: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, phi4_checkpoint)
    path.write_text('targets = "local"\n' + path.read_text())
    error = phi4edge("run", path, "--out", tmp_path / "out", "--dry-run", expect=3)["error"]
    assert "targets: is a string" in error["message"]
