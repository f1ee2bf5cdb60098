"""llama.cpp's own programs on a device: flags that the build knows, times that it printed, and how it failed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from device_support import BENCH_HELP, BENCH_JSON, PERPLEXITY_HELP, PERPLEXITY_OUTPUT, program, this_machine

from phi4edge.core.errors import InputError, MissingToolError, TargetError
from phi4edge.measurement.device_speed import summarize_bench
from phi4edge.measurement.drift import PositionFigures, summarize
from phi4edge.measurement.llama_perplexity import parse_drift
from phi4edge.runtimes._api import Settings, SpeedRequest
from phi4edge.runtimes._llama_tools import (
    bench_arguments,
    help_of,
    parse_bench,
    perplexity_arguments,
    run_tool,
)
from phi4edge.runtimes._remote import Program

ASKED = SpeedRequest(32, 8, repetitions=3, warmup=2)


def follows(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_what_was_asked_is_told_to_llama_bench_in_its_flags() -> None:
    settings = Settings(threads=3, kv_type="q8_0", flash_attention="on", gpu_layers=999)
    words = bench_arguments(BENCH_HELP, "m.gguf", ASKED, settings)
    told = {flag: follows(words, flag) for flag in ("-m", "-p", "-n", "-r", "-t", "-ctk", "-ctv", "-fa", "-ngl", "-o")}
    assert told == {
        "-m": "m.gguf", "-p": "32", "-n": "8", "-r": "4", "-t": "3", "-ctk": "q8_0", "-ctv": "q8_0", "-fa": "on",
        "-ngl": "999", "-o": "json",
    }  # fmt: skip
    assert "--no-warmup" not in words
    assert "--no-warmup" in bench_arguments(BENCH_HELP, "m.gguf", SpeedRequest(32, 8, warmup=0), settings)


@pytest.mark.parametrize(
    ("takes", "auto", "on", "off"),
    [
        ("<on|off|auto>", ["-fa", "auto"], ["-fa", "on"], ["-fa", "off"]),
        ("<0|1>", [], ["-fa", "1"], ["-fa", "0"]),
        ("", [], ["-fa"], []),
    ],
)
def test_flash_attention_is_asked_for_in_the_form_that_the_build_knows(
    takes: str, auto: list[str], on: list[str], off: list[str]
) -> None:
    known = BENCH_HELP.replace("<on|off|auto>", takes)
    for asked, words in (("auto", auto), ("on", on), ("off", off)):
        found = bench_arguments(known, "m", ASKED, Settings(flash_attention=asked))
        assert found[found.index("-ngl") + 2 : found.index("-o")] == words


@pytest.mark.parametrize(
    ("settings", "request_", "without"),
    [
        (Settings(kv_type="q8_0"), ASKED, "-ctk, --cache-type-k"),
        (Settings(flash_attention="on"), ASKED, "-fa, --flash-attn"),
        (Settings(gpu_layers=999), ASKED, "-ngl, --n-gpu-layers"),
        (Settings(), SpeedRequest(32, 8, warmup=0), "--no-warmup"),
    ],
)
def test_a_flag_that_the_build_does_not_know_is_refused(
    settings: Settings, request_: SpeedRequest, without: str
) -> None:
    bench_arguments(BENCH_HELP, "m", request_, settings)
    with pytest.raises(TargetError, match=f"does not know {without.split(',')[0]}"):
        bench_arguments(BENCH_HELP.replace(without, "--other"), "m", request_, settings)


def test_llama_perplexity_takes_one_chunk_at_a_time_as_ours_does() -> None:
    words = perplexity_arguments(PERPLEXITY_HELP, "m", "base", 64, Settings())
    assert [follows(words, flag) for flag in ("-c", "-b", "-ub", "--kl-divergence-base")] == ["64", "64", "64", "base"]
    words = perplexity_arguments(PERPLEXITY_HELP, "m", "base", 2048, Settings())
    assert [follows(words, flag) for flag in ("-c", "-b", "-ub")] == ["2048", "512", "512"]
    with pytest.raises(TargetError, match="does not know --kl-divergence"):
        perplexity_arguments("-b -ngl", "m", "base", 64, Settings())


def test_times_are_llama_bench_s_and_further_warm_up_is_left_out() -> None:
    tests = parse_bench("ggml: a line before it\n" + BENCH_JSON, ASKED)
    assert tests["prefill"].seconds == (0.008506069, 0.006017222, 0.001753653)
    assert tests["decode"].seconds == (0.015102172, 0.016044652, 0.003735443)
    metrics = summarize_bench(tests, ASKED)
    assert metrics["prefill_tps"].samples == pytest.approx((3762.02, 5318.07, 18247.6), rel=1e-5)
    assert metrics["decode_tps"].samples[0] == pytest.approx(8 / 0.015102172)
    assert metrics["tpot_s"].value == pytest.approx((0.015102172 + 0.016044652 + 0.003735443) / 24)
    for name in ("ttft_s", "load_s", "peak_rss_bytes"):
        assert metrics[name].value is None
        assert metrics[name].reason == "llama-bench does not tell it"


@pytest.mark.parametrize(
    "printed",
    [
        "",
        "no JSON",
        "{}",
        "[3]",
        '[{"n_prompt": 32, "n_gen": 0}]',
        BENCH_JSON[:-20],
        BENCH_JSON.replace("[ 8953033,", "[ -1,"),
    ],
    ids=["nothing", "words", "an object", "a number", "no samples", "cut off", "negative time"],
)
def test_what_is_not_llama_bench_s_json_is_a_sentence(printed: str) -> None:
    asked = SpeedRequest(32, 8, repetitions=4, warmup=1)
    assert len(parse_bench(BENCH_JSON, asked)["decode"].seconds) == 4
    with pytest.raises(TargetError, match="llama-bench printed"):
        parse_bench(printed, asked)


def test_fewer_repetitions_than_asked_are_refused() -> None:
    with pytest.raises(TargetError, match="no 6 times of 32 tokens"):
        parse_bench(BENCH_JSON, SpeedRequest(32, 8, repetitions=5, warmup=2))


def test_figures_of_llama_perplexity_are_ours_by_name_and_unit() -> None:
    metrics = parse_drift(PERPLEXITY_OUTPUT, 248)
    assert (metrics["ppl"].value, metrics["ppl"].se, metrics["ppl"].n) == (4954.702485, 656.965567, 248)
    assert (metrics["ln_ppl_ratio"].value, metrics["ln_ppl_ratio"].se) == (-0.000229, 0.00014)
    assert (metrics["kld"].value, metrics["kld_p01"].value, metrics["kld_min"].value) == (2e-6, 0, -1e-6)
    assert metrics["kld"].se == 5e-7, "0.000000 is no certainty"
    assert metrics["same_top_p"].value == 1
    assert metrics["delta_p_p001"].value == pytest.approx(-0.00003)
    some = np.random.default_rng(0).random((2, 60))
    ours = summarize(PositionFigures(some, some + 0.1, some / 9, some > 0.5))
    assert {name: m.unit for name, m in ours.items()} == {name: m.unit for name, m in metrics.items()}


def test_nan_from_llama_perplexity_is_a_damaged_artifact_and_no_figures_are_its_words() -> None:
    with pytest.raises(InputError, match="nan as kld"):
        parse_drift(PERPLEXITY_OUTPUT.replace("0.000002 ±   0.000000", "nan ±   nan"), 248)
    lost = parse_drift(PERPLEXITY_OUTPUT.replace("100.00%", "-nan%"), 248)["ln_ppl_correlation"]
    assert lost.value is None
    assert "-nan" in str(lost.reason)
    with pytest.raises(TargetError, match="inconsistent vocabulary"):
        parse_drift("kl_divergence: inconsistent vocabulary (5 vs 7)\nllama_perf_context_print: nothing\n", 248)


@pytest.mark.parametrize(
    ("then", "words"),
    [
        ("echo 'error: failed to load model' >&2; exit 1", "ended with exit code 1: error: failed to load model"),
        ("kill -ILL $$", "was ended by SIGILL"),
        ("kill -KILL $$", "was ended by SIGKILL"),
    ],
)
def test_a_program_that_fails_says_how_and_its_last_words(tmp_path: Path, then: str, words: str) -> None:
    path = program(tmp_path, "llama-bench", then=then)
    with this_machine(tmp_path / "device", path) as site, pytest.raises(TargetError, match=words) as caught:
        run_tool(site.device, Program(str(path)), [], 30)
    assert caught.value.hint is not None or "exit code 1" in words


def test_a_program_for_another_processor_is_no_crash_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "llama-bench"
    machine = b"\xb7\x00" if os.uname().machine == "x86_64" else b"\x3e\x00"
    path.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00" + machine + b"\x01\x00\x00\x00" + bytes(100))
    path.chmod(0o755)
    with this_machine(tmp_path / "device", path) as site, pytest.raises(TargetError, match="xec format error"):
        help_of(site.device, site.found.programs["llama-bench"])


def test_places_of_the_user_are_looked_at_alone_and_named_when_they_are_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "bin", "llama-bench")
    with this_machine(tmp_path / "device", tmp_path / "bin") as site:
        assert set(site.found.programs) == {"llama-bench"}
        assert site.found.programs["llama-bench"].path == str(tmp_path / "bin" / "llama-bench")
        assert site.found.python is None, "the Python of this machine was not named"
    monkeypatch.setenv("HOME", str(tmp_path))
    for of_home in ("~/bin", "~/bin/llama-bench"):
        with this_machine(tmp_path / "device", of_home) as site:
            assert site.found.programs["llama-bench"].path == str(tmp_path / "bin" / "llama-bench")
    (tmp_path / "empty").mkdir()
    for wrong, words in (("empty", "has neither"), ("nowhere", "there is no such program")):
        with pytest.raises(MissingToolError, match=words), this_machine(tmp_path / "device", tmp_path / wrong):
            pass
