"""Speed: what is timed, what is kept, and in which process."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import MissingToolError, UsageError
from phi4edge.measurement.environment import environment
from phi4edge.measurement.speed import measure_speed, summarize_speed
from phi4edge.runtimes import llama_cpp as runtime
from phi4edge.runtimes._api import Settings, SpeedRequest, SpeedSamples
from phi4edge.writers._api import WriteOptions
from phi4edge.writers.gguf import write_f16

MODULES = "phi4edge.runtimes._llama_worker", "phi4edge.measurement.result", "phi4edge.measurement.gates"


@pytest.fixture(scope="module")
def f16(phi4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    out = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_f16(open_checkpoint(phi4_checkpoint), out, WriteOptions()).path


def samples(**changes: object) -> SpeedSamples:
    known = {
        "prefill_s": (0.5, 0.25, 0.5),
        "ttft_s": (0.6, 0.3, 0.6),
        "token_s": ((0.1, 0.3), (0.1, 0.1), (0.2, 0.2)),
        "load_s": 1.5,
        "peak_rss_bytes": 2**30,
        "idle_rss_bytes": 2**25,
        "details": {"threads": 2},
    }
    return SpeedSamples(**(known | changes))  # type: ignore[arg-type]


def test_rates_are_tokens_over_seconds_of_each_repetition() -> None:
    metrics = summarize_speed(samples(), SpeedRequest(100, 2, 3))
    assert metrics["prefill_tps"].samples == (200, 400, 200)
    assert metrics["prefill_tps"].value == pytest.approx(800 / 3)
    assert metrics["prefill_tps"].median == 200
    assert metrics["prefill_tps"].se == pytest.approx(200 / 3)
    assert metrics["decode_tps"].samples == pytest.approx((5, 10, 5))
    assert metrics["ttft_s"].value == pytest.approx(0.5)
    assert metrics["tpot_s"].value == pytest.approx(1 / 6)
    assert metrics["tpot_s"].samples == (0.1, 0.3, 0.1, 0.1, 0.2, 0.2)
    assert metrics["tpot_s"].median == pytest.approx(0.15)
    assert (metrics["load_s"].value, metrics["load_s"].se) == (1.5, None)


def test_what_was_not_asked_for_is_missing_with_a_reason() -> None:
    metrics = summarize_speed(samples(prefill_s=(), ttft_s=()), SpeedRequest(0, 2, 3))
    for name in ("prefill_tps", "ttft_s"):
        assert metrics[name].value is None
        assert "--prompt-tokens 0" in str(metrics[name].reason)
    metrics = summarize_speed(samples(token_s=()), SpeedRequest(10, 0, 3))
    for name in ("decode_tps", "tpot_s"):
        assert metrics[name].value is None
        assert "--gen-tokens 0" in str(metrics[name].reason)


def test_every_sample_of_the_real_runtime_is_kept_and_the_warm_up_is_not(f16: Path) -> None:
    data = measure_speed(f16, request=SpeedRequest(24, 5, 3), settings=Settings(threads=1))
    metrics = data["metrics"]
    assert [len(metrics[name]["samples"]) for name in ("prefill_tps", "ttft_s", "decode_tps")] == [3, 3, 3]
    assert len(metrics["tpot_s"]["samples"]) == 15
    for rate, seconds in zip(metrics["prefill_tps"]["samples"], metrics["ttft_s"]["samples"], strict=True):
        assert 24 / rate <= seconds < 24 / rate + 0.05
    assert metrics["peak_rss_bytes"]["value"] > metrics["idle_rss_bytes"]["value"] > 2**20
    assert metrics["load_s"]["value"] > 0
    assert data["settings"] | {"seed": 0} == {
        "threads": 1, "batch": 512, "ubatch": 512, "flash_attention": "auto", "kv_type": "f16", "gpu_layers": 0,
        "prompt_tokens": 24, "gen_tokens": 5, "repetitions": 3, "warmup": 1, "seed": 0, "activations": "none",
    }  # fmt: skip
    assert data["artifact"]["scheme"] == "f16"


def test_a_prompt_longer_than_a_batch_is_timed_whole(f16: Path) -> None:
    found = runtime.speed(f16, SpeedRequest(100, 0, 2, 0), Settings(threads=1, batch=32, ubatch=16))
    assert (len(found.prefill_s), found.token_s) == (2, ())
    assert found.details["ubatch"] == 16


def test_impossible_requests_are_refused() -> None:
    for wrong in ((0, 0, 5), (-1, 5, 5), (5, 5, 0)):
        with pytest.raises(UsageError):
            SpeedRequest(*wrong)


def test_a_folder_has_no_speed_and_a_missing_runtime_is_named(
    f16: Path, phi4_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="serves nothing"):
        measure_speed(phi4_checkpoint)
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingToolError, match="not installed"):
        measure_speed(f16)


def test_the_process_that_is_measured_and_the_report_s_types_start_without_torch() -> None:
    code = f"import sys\nfor name in {MODULES!r}: __import__(name)\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_fingerprint_names_the_machine_and_neither_host_nor_user(monkeypatch: pytest.MonkeyPatch) -> None:
    import getpass
    import platform

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = environment()
    assert found["cpu"]["physical_cores"] >= 1
    assert found["ram_bytes"] > 2**28
    assert found["versions"]["torch"]
    assert found["variables"]["OMP_NUM_THREADS"] == "3"
    text = json.dumps(found)
    for secret in (platform.node(), str(Path.home())):
        assert len(secret) < 3 or secret not in text
    assert f'"{getpass.getuser()}"' not in text
