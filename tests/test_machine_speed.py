"""This machine's speed: measured when asked, kept with its date, shown by the light commands, and what rests on it."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phi4edge.checkpoint.published import PUBLISHED
from phi4edge.cli.main import main
from phi4edge.quant.scheme import parse_scheme
from phi4edge.targets import local, measured, probe_decode, probe_memory
from phi4edge.targets.fit import BLOCKS, Request, decode_bytes
from phi4edge.targets.local import detect_local, local_fingerprint
from phi4edge.targets.measured import MachineSpeed, figures, load_stored, store
from phi4edge.targets.probe_llama import write_probe_model
from phi4edge.targets.roofline import estimate_decode, estimate_prefill, traffic_of

KINDS = {"f16": (12.0, 40.0), "q8_0": (16.0, 50.0), "q4_1": (10.0, 30.0), "q4_0": (8.0, 60.0)}


def speed(**changes: Any) -> MachineSpeed:
    """A made-up measurement: 20 GB/s read at best, 50 µs a layer, each type's rates as KINDS has them."""
    memory = {"read": [18.0, 20.0, 19.0], "triad": [9.0, 10.0], "threads": 2, "load": 0.1}
    kinds = {
        kind: {"bytes": 1, "read_gb_s": [rate * x for x in (0.9, 1.0, 1.0, 1.0, 1.1)], "gflop_s": [0.9 * flop, flop]}
        for kind, (rate, flop) in KINDS.items()
    }
    decode = {"layer_us": [40.0, 50.0, 60.0], "kinds": kinds, "threads": 2, "load": 0.1, "version": "1.2.3"}
    made = MachineSpeed("2026-01-02T03:04:05+00:00", local_fingerprint(), memory, decode)
    return replace(made, **changes)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MachineSpeed:
    """A measurement in a cache of the test's own."""
    monkeypatch.setenv("PHI4EDGE_CACHE", str(tmp_path))
    made = speed()
    store(made)
    return made


# --- measuring


def test_the_memory_probe_times_reads_and_triads() -> None:
    found = probe_memory.measure_memory(2, 1 << 22, rounds=3)
    assert len(found["read"]) == len(found["triad"]) == 3
    assert all(0.01 < rate < 3000 for rate in found["read"] + found["triad"])


@pytest.mark.slow
def test_the_memory_probe_prints_what_the_parent_reads() -> None:
    found = measured._child("probe_memory", 1)
    assert {"read", "triad", "threads", "load", "buffer_bytes", "cache_bytes"} == set(found)
    assert found["buffer_bytes"] >= 4 * (found["cache_bytes"] or 0)


def test_buffers_grow_with_the_cache_and_leave_half_of_the_memory_alone() -> None:
    assert probe_memory.buffer_bytes(None, 2**40) == probe_memory.SMALLEST
    assert probe_memory.buffer_bytes(2**28, 2**40) == 8 * 2**28
    assert 3 * probe_memory.buffer_bytes(2**28, 10**9) <= 10**9 / 2


def test_the_largest_cache_is_the_one_that_counts(tmp_path: Path) -> None:
    for index, size in enumerate(("32K", "512K", "32M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert probe_memory.last_level_cache(tmp_path) == 32 << 20
    assert probe_memory.last_level_cache(tmp_path / "none") is None


SMALL = """
import json, sys
from dataclasses import replace
from pathlib import Path
from phi4edge.targets import probe_decode as p

p.SMALLEST, p.PROMPTS, p.PROMPT, p.STEPS = 1, 1, 2, 2
p._WIDE = replace(p._WIDE, hidden_size=256, intermediate_size=256, num_heads=2, num_kv_heads=1)
print(json.dumps(p.measure_decode(1, Path(sys.argv[1]), None)))
"""


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_the_decode_probe_runs_every_type_in_llama_cpp(tmp_path: Path) -> None:
    """On models as small as can be: that each type loads and computes, not how fast."""
    done = subprocess.run([sys.executable, "-c", SMALL, str(tmp_path)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["kinds"]) == set(probe_decode.KINDS)
    for rates in found["kinds"].values():
        assert all(math.isfinite(rate) and rate > 0 for rate in rates["read_gb_s"] + rates["gflop_s"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", probe_decode.KINDS)
def test_a_probe_models_repeated_blocks_are_finite_and_of_the_types_size(kind: str, tmp_path: Path) -> None:
    import gguf
    import numpy as np

    config = replace(probe_decode._THIN, num_layers=1)
    write_probe_model(tmp_path / "probe.gguf", config, kind, "q8_0", repeat=True)
    tensor = next(t for t in gguf.GGUFReader(tmp_path / "probe.gguf").tensors if t.name == "blk.0.ffn_down.weight")
    weights, size = BLOCKS[kind]
    assert tensor.n_bytes == tensor.n_elements // weights * size
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    assert np.isfinite(values).all()
    assert np.unique(values).size > 10


# --- keeping


def test_a_measurement_is_kept_with_its_date_and_comes_back_the_same(kept: MachineSpeed) -> None:
    assert load_stored(kept.fingerprint) == kept
    profile = detect_local()
    assert profile.bandwidth_gb_s.value == 20.0
    assert profile.bandwidth_gb_s.source == "measured on 2026-01-02 with 2 threads"
    assert {entry.scheme: entry.figure.value for entry in profile.efficiency} == {
        "f16": 0.6, "q8_0": 0.8, "q4_1": 0.5, "q4_0": 0.4
    }  # fmt: skip
    assert profile.runtimes[0].layer_us is not None
    assert profile.runtimes[0].layer_us.value == 50


def test_another_machine_has_another_fingerprint(kept: MachineSpeed) -> None:
    seen = {
        measured.fingerprint("A", ("avx2",), 2, 8 << 30),
        measured.fingerprint("B", ("avx2",), 2, 8 << 30),
        measured.fingerprint("A", ("avx2", "vnni"), 2, 8 << 30),
        measured.fingerprint("A", ("avx2",), 4, 8 << 30),
        measured.fingerprint("A", ("avx2",), 2, 16 << 30),
    }
    assert len(seen) == 5
    assert load_stored("0" * 16) is None


def test_a_damaged_measurement_is_not_measured_and_says_why(kept: MachineSpeed) -> None:
    path = measured.store_path(kept.fingerprint)
    path.write_text("{")
    figure = detect_local().bandwidth_gb_s
    assert figure.value is None
    assert figure.text() == "not measured"
    assert str(path) in (figure.reason or "")
    path.write_text("{}")
    assert "version" in (detect_local().bandwidth_gb_s.reason or "")


def test_a_measurement_on_a_busy_machine_says_so_in_its_source() -> None:
    busy = speed(memory=speed().memory | {"load": 7.5})
    assert busy.busy
    assert "busy machine (load 7.5)" in (figures(busy)[0].source or "")


def test_without_llama_cpp_the_bandwidth_stands_and_nothing_is_estimated(kept: MachineSpeed) -> None:
    store(replace(kept, decode={"error": "ImportError: no llama_cpp"}))
    profile = detect_local()
    assert profile.bandwidth_gb_s.value == 20.0
    traffic = traffic_of(PUBLISHED["phi-4-mini"], Request(parse_scheme("q4_0"), 4096))
    estimate = estimate_decode(profile, profile.runtimes[0], traffic)
    assert estimate.as_dict() is None
    assert "no efficiency of llama_cpp" in estimate.basis


# --- what rests on it


def test_decode_adds_the_types_bytes_at_their_own_rates_and_the_layers_cost(kept: MachineSpeed) -> None:
    profile, config = detect_local(), PUBLISHED["phi-4-mini"]
    request = Request(parse_scheme("q4_0"), 256, head="q8_0")
    traffic = traffic_of(config, request)
    assert traffic.empty == decode_bytes(config, request)[0]
    assert set(traffic.weights) == {"q4_0", "q8_0", "f32"}
    found = estimate_decode(profile, profile.runtimes[0], traffic)
    others = (traffic.weights["q4_0"] + traffic.weights["f32"] + traffic.kv_bytes / 2) / 8e9
    expected = 1 / (others + traffic.weights["q8_0"] / 16e9 + 32 * 50e-6)
    assert found.typical == pytest.approx(expected)
    assert found.low is not None
    assert found.high is not None
    assert found.low < expected < found.high


def test_prefill_is_two_operations_a_weight_at_the_types_rate(kept: MachineSpeed) -> None:
    profile, config = detect_local(), PUBLISHED["phi-4-mini"]
    found = estimate_prefill(profile, profile.runtimes[0], traffic_of(config, Request(parse_scheme("q8_0"), 256)))
    assert found.typical == pytest.approx(50e9 / (2 * config.linear_parameters))
    assert found.low == pytest.approx(0.9 * 50e9 / (2 * config.linear_parameters))
    unmeasured = estimate_prefill(profile, profile.runtimes[1], traffic_of(config, Request(parse_scheme("q8_0"), 256)))
    assert unmeasured.text() == "not estimated: no compute rate of onnxruntime_genai is known on this target"


def test_doctor_plan_and_check_show_what_was_kept_and_measure_nothing(
    kept: MachineSpeed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a light command measured")

    monkeypatch.setattr(measured, "_child", refuse)
    assert main(["plan", "phi-4-mini", "--target", "local", "--json"]) == 0
    target = json.loads(capsys.readouterr().out)["data"]["targets"][0]
    assert target["decode_tps_estimated"]["low"] < target["decode_tps_estimated"]["high"]
    assert target["prefill_tps_estimated"]["typical"] > 0
    assert main(["plan", "phi-4-mini", "--target", "local"]) == 0
    assert "bandwidth 20.0 GB/s read, measured on 2026-01-02" in capsys.readouterr().out
    assert main(["targets", "check", "local", "--model", "phi-4-mini"]) == 0
    assert "measured on 2026-01-02" in capsys.readouterr().out
    from phi4edge.cli.commands.doctor import _machine

    line = next(check for check in _machine(detect_local()) if check.name == "bandwidth")
    assert line.detail == "20.0 GB/s read (triad 10.0), measured on 2026-01-02 with 2 threads"


def test_show_measures_when_asked_and_only_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PHI4EDGE_CACHE", str(tmp_path))
    asked: list[str] = []

    def answer(module: str, threads: int) -> dict[str, Any]:
        asked.append(module)
        return speed().memory if module == "probe_memory" else speed().decode

    monkeypatch.setattr(measured, "_child", answer)
    assert main(["targets", "show", "local"]) == 0
    assert "not measured" in capsys.readouterr().out
    assert asked == []
    assert main(["targets", "show", "local", "--measure", "--json"]) == 0
    assert asked == ["probe_memory", "probe_decode"]
    assert json.loads(capsys.readouterr().out)["data"]["target"]["bandwidth_gb_s"]["value"] == 20.0
    assert measured.store_path(local.local_fingerprint()).is_file()
    assert main(["targets", "show", "mac-m4", "--measure"]) == 2
    assert "--calibrate-target" in capsys.readouterr().err


def test_a_memory_that_cannot_be_measured_is_exit_4_and_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PHI4EDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(measured, "_child", lambda module, threads: {"error": "no room"})
    assert main(["targets", "show", "local", "--measure"]) == 4
    assert "no room" in capsys.readouterr().err
    assert list(tmp_path.rglob("*.json")) == []
