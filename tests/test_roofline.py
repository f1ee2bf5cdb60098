"""A measured speed against the roofline of the artifact's own bytes, and written back into a user's target file."""

from __future__ import annotations

import importlib.util
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.cli.main import main
from phi4edge.cli.roofline_text import roofline_lines
from phi4edge.core.errors import InputError, TargetError, UsageError
from phi4edge.core.resources import data_folder
from phi4edge.measurement.calibrate import calibrate_target, calibration_file
from phi4edge.measurement.connection import connection_of
from phi4edge.measurement.plausible import artifact_traffic, assess
from phi4edge.report.build import build_report, write_report
from phi4edge.targets.catalog import TARGET_PATH, open_catalog
from phi4edge.targets.profile import Profile
from phi4edge.targets.roofline import estimate_decode, estimate_prefill
from phi4edge.targets.schema import read_profile
from phi4edge.transports._api import Address
from phi4edge.writers._api import WriteOptions
from phi4edge.writers.gguf import write_f16

DEVICE = """\
# a device of mine
name = "Mine"
kind = "laptop"
sources = ["a test"]
ram_gb = 8
usable_ram_gb = 4
bandwidth_gb_s = 50        # the data sheet
arch = "x86_64"
transports = ["local"]

[[runtimes]]
name = "llama_cpp"
formats = ["gguf"]
schemes = ["q4_0", "q8_0"]

# what the web says
[[efficiency]]
runtime = "llama_cpp"
bits = 16
value = 0.5
estimated = true
reason = "a blog"
"""


@pytest.fixture(scope="module")
def untied(phi4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_f16(open_checkpoint(phi4_checkpoint), tmp_path_factory.mktemp("u") / "u.gguf", WriteOptions()).path


@pytest.fixture(scope="module")
def tied(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_f16(open_checkpoint(mini_checkpoint), tmp_path_factory.mktemp("t") / "t.gguf", WriteOptions()).path


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(TARGET_PATH, raising=False)
    path = tmp_path / "mine.toml"
    path.write_text(DEVICE)
    return path


def document(artifact: Path, decode: float | None, prefill: float | None = 1000.0) -> dict[str, Any]:
    """The data of a bench document with these speeds, ± 10 %."""

    def metric(value: float | None) -> dict[str, Any]:
        if value is None:
            return {"value": None, "unit": "token/s", "n": 0, "se": None, "reason": "not asked for"}
        return {"value": value, "unit": "token/s", "n": 2, "se": 0.1, "samples": [0.9 * value, 1.1 * value]}

    return {
        "artifact": {"name": artifact.name, "sha256": "ab" * 32, "format": "gguf", "bytes": artifact.stat().st_size},
        "target": "mine",
        "transport": "local",
        "runtime": {"name": "llama_cpp", "version": "0.3.36", "details": {}},
        "settings": {"gen_tokens": 128, "prompt_tokens": 512, "threads": 2, "kv_type": "f16", "gpu_layers": 0},
        "metrics": {"decode_tps": metric(decode), "prefill_tps": metric(prefill)},
        "environment": {"cpu": {"model": "a CPU"}},
    }


def bytes_of(path: Path, *, without: str = "") -> int:
    import gguf

    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors if tensor.name != without)


# --- bytes read a token


def test_a_token_reads_every_tensor_but_an_embedding_that_is_not_the_head(untied: Path, tied: Path) -> None:
    assert artifact_traffic(untied, 1).empty == bytes_of(untied, without="token_embd.weight")
    assert artifact_traffic(tied, 1).empty == bytes_of(tied)


def test_the_cache_adds_its_bytes_for_the_tokens_generated(untied: Path, phi4_checkpoint: Path) -> None:
    config = open_checkpoint(phi4_checkpoint).config
    assert artifact_traffic(untied, 100).kv_bytes == 100 * config.kv_bytes_per_token(2.0)
    assert artifact_traffic(untied, 100, "f32").kv_bytes == 200 * config.kv_bytes_per_token(2.0)
    assert sum(artifact_traffic(untied, 1).linears.values()) == config.linear_parameters


def test_a_folder_of_no_known_bytes_has_no_roofline(phi4_checkpoint: Path, untied: Path, mine: Path) -> None:
    with pytest.raises(InputError, match="not known"):
        artifact_traffic(phi4_checkpoint, 1)
    found = assess(document(untied, 10.0), read_profile(mine), phi4_checkpoint)
    assert found["roofline"]["implausible"] is None


# --- what is plausible


def test_a_speed_above_the_roofline_is_implausible_and_one_below_is_not(untied: Path, mine: Path) -> None:
    profile, limit = read_profile(mine), 50e9 / bytes_of(untied, without="token_embd.weight")
    below = assess(document(untied, 0.99 * limit), profile, untied)["roofline"]
    assert below["decode_tps_limit"] == pytest.approx(limit)
    assert below["efficiency"] == pytest.approx(0.99)
    assert below["implausible"] is False
    above = assess(document(untied, 1.01 * limit), profile, untied)["roofline"]
    assert above["implausible"] is True
    assert "memory gives 50 GB/s" in above["reason"]


def test_bench_s_text_begins_with_what_is_implausible_and_marks_estimates(untied: Path, mine: Path) -> None:
    data = document(untied, 1e8)
    data |= assess(data, read_profile(mine), untied)
    lines = roofline_lines(data)
    assert lines[1].startswith("IMPLAUSIBLE: decode of 100000000.00 tok/s would read")
    assert lines[2].startswith("roofline ")
    assert all("estimated" in line for line in lines[3:])
    assert any(line.startswith("decode ") for line in lines[3:])
    data = document(untied, 1.0)
    data |= assess(data, read_profile(mine), untied)
    assert not any("IMPLAUSIBLE" in line for line in roofline_lines(data))


def test_without_a_bandwidth_nothing_is_called_implausible(untied: Path, mine: Path) -> None:
    mine.write_text(DEVICE.replace("bandwidth_gb_s = 50 ", ""))
    found = assess(document(untied, 1e9), read_profile(mine), untied)
    assert found["roofline"]["implausible"] is None
    assert "bandwidth is not known" in found["roofline"]["reason"]
    assert found["decode_tps_estimated"]["value"] is None
    assert found["decode_tps_estimated"]["reason"].startswith("not estimated")


def test_the_report_marks_what_is_implausible_and_keeps_estimates_apart(untied: Path, mine: Path) -> None:
    profile = read_profile(mine)
    data = document(untied, 1e8)
    data |= assess(data, profile, untied)
    results = mine.parent / "results"
    results.mkdir()
    (results / "x.bench.json").write_text(json.dumps({"schema": "phi4edge/bench/1", "ok": True, "data": data}))
    report = build_report([results])
    text = write_report(report, mine.parent / "report")["md"].read_text()
    assert "implausible" in text
    assert "memory gives 50 GB/s" in text
    assert "not plausible: the decode speed of u.gguf on mine" in report.data["summary"]
    estimated = next(line for line in text.splitlines() if "decode tps, estimated" in line)
    assert ", estimated |" in estimated


# --- written back


def calibrated(path: Path, artifact: Path, decode: float, profile: Profile | None = None) -> dict[str, Any]:
    entry = open_catalog([path.parent]).entry("mine")
    return calibrate_target(path, document(artifact, decode), profile or entry.profile(), entry, artifact)


def test_a_calibration_makes_the_estimate_what_was_measured(untied: Path, mine: Path) -> None:
    limit = 50e9 / bytes_of(untied)
    calibrated(mine, untied, 0.3 * limit)
    profile = read_profile(mine)
    option, traffic = profile.runtimes[0], artifact_traffic(untied, 128)
    decode, prefill = (estimate(profile, option, traffic) for estimate in (estimate_decode, estimate_prefill))
    assert decode.typical == pytest.approx(0.3 * limit, rel=1e-3)
    assert prefill.typical == pytest.approx(1000, rel=1e-3)
    entry = next(e for e in profile.efficiency if e.scheme == "f16")
    assert not entry.figure.estimated
    assert entry.figure.low is not None
    assert entry.figure.low < (entry.figure.value or 0)
    for words in ("measured on 20", "u.gguf", "sha256 abab", "llama_cpp 0.3.36"):
        assert words in (entry.figure.source or "")


def test_comments_and_other_entries_stay_and_a_second_calibration_replaces_the_first(untied: Path, mine: Path) -> None:
    limit = 50e9 / bytes_of(untied)
    calibrated(mine, untied, 0.3 * limit)
    calibrated(mine, untied, 0.4 * limit)
    text = mine.read_text()
    for kept in ("# a device of mine", "# the data sheet", "# what the web says", 'reason = "a blog"'):
        assert kept in text
    entries = tomllib.loads(text)["efficiency"]
    assert [entry.get("scheme") for entry in entries] == [None, "f16"]
    assert main(["targets", "validate", str(mine)]) == 0


def test_a_measurement_above_the_roofline_is_not_written(untied: Path, mine: Path) -> None:
    with pytest.raises(TargetError, match="no efficiency to plan with"):
        calibrated(mine, untied, 2 * 50e9 / bytes_of(untied))
    assert mine.read_text() == DEVICE


def test_a_target_without_bandwidth_is_not_calibrated(untied: Path, mine: Path) -> None:
    mine.write_text(DEVICE.replace("bandwidth_gb_s = 50 ", ""))
    with pytest.raises(InputError, match="an efficiency is a share of it"):
        calibrated(mine, untied, 1.0)


def test_built_in_files_are_copied_and_never_written(untied: Path, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = open_catalog([mine.parent])
    builtin = catalog.entry("laptop-x86-ddr4")
    assert builtin.path is not None
    before = builtin.path.read_text()
    with pytest.raises(UsageError, match="is a built-in target"):
        calibration_file(builtin, data_folder("targets") / "laptop-x86-ddr4.toml", ())
    with pytest.raises(UsageError, match="no folder to put one into"):
        calibration_file(builtin, None, ())
    path = calibration_file(builtin, None, [mine.parent])
    assert path == mine.parent / "laptop-x86-ddr4.toml"
    calibrate_target(path, document(untied, 10.0), builtin.profile(), builtin, untied)
    assert builtin.path.read_text() == before
    assert [e.scheme for e in read_profile(path).efficiency][-1] == "f16"
    monkeypatch.setenv(TARGET_PATH, str(mine.parent))
    assert calibration_file(open_catalog().entry("mine"), None, ()) == mine
    assert calibration_file(open_catalog().entry("local"), None, ()) == mine.parent / "this-machine.toml"


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_bench_writes_a_target_of_this_machine_that_plan_then_uses(
    untied: Path, mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_machine_speed import speed

    from phi4edge.targets.measured import store

    monkeypatch.setenv("PHI4EDGE_CACHE", str(mine.parent / "cache"))
    small = ["bench", str(untied), "--prompt-tokens", "8", "--gen-tokens", "4", "--repetitions", "2", "--threads", "1"]
    path = mine.parent / "desk.toml"
    assert main([*small, "--calibrate-target", str(path)]) == 3
    assert "targets show local --measure" in capsys.readouterr().err
    fast = {"read": [1e5], "triad": [1e5], "threads": 1, "load": 0.0}  # a memory that no tiny model's decode exceeds
    store(speed(memory=fast, decode={"error": "not asked"}))
    assert main([*small, "--calibrate-target", str(path), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)["data"]
    assert written["roofline"]["implausible"] is False
    profile = read_profile(path)
    assert profile.bandwidth_gb_s.value == 1e5
    assert connection_of(profile) == ("local", Address())
    assert [entry.scheme for entry in profile.efficiency] == ["f16"]
    assert main(["plan", "phi-4-mini", "--target", "desk", "--target-path", str(mine.parent), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["data"]["targets"][0]
    assert planned["decode_tps_estimated"] is not None
    assert "efficiency known for f16 only" in planned["decode_tps_estimated"]["basis"]
    assert main(small) == 0
    assert "roofline" in capsys.readouterr().out
