"""The report says what the results say: joined rightly, kept apart where they must be."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_support import (
    CHUNKS,
    NAMES,
    bench,
    drift,
    manifest,
    measured,
    positions,
    report_of,
    rows_of,
    sha,
    write,
)

from phi4edge.core.errors import UsageError
from phi4edge.core.hashing import sha256_file
from phi4edge.report.build import Report, build_report
from phi4edge.report.markdown import render_markdown
from phi4edge.report.numbers import with_error


def test_main_table_joins_drift_and_speed_by_hash(toy_files: dict[str, Path]) -> None:
    rows = rows_of(toy_files["md"].read_text(), "## Results")
    assert [row["Artifact"] for row in rows][:2] == ["full precision", "toy-f16.gguf"]
    measured_rows = {row["Artifact"].removesuffix(" *(baseline)*"): row for row in rows[1:]}
    for seed, (name, scheme, mebibytes, level, speed) in enumerate(NAMES):
        drifted = drift(name, scheme, mebibytes, level, seed)["data"]
        timed = bench(name, scheme, mebibytes, speed, seed)["data"]["metrics"]
        kld, decode, row = drifted["metrics"]["kld"], timed["decode_tps"], measured_rows[name]
        assert row["Mean KLD (nat)"] == with_error(kld["value"], kld["se"])
        assert row["Decode (tok/s)"] == with_error(decode["value"], decode["se"])
        assert row["Size (MiB)"] == f"{mebibytes:.1f}"
        top = drifted["metrics"]["same_top_p"]
        assert row["Same top-1 (%)"] == with_error(100 * top["value"], 100 * top["se"])
        details = drifted["runtime"]["settings"]
        assert math.isclose(
            float(row["Bits / weight"]), 8 * details["weight_bytes"] / details["parameters"], rel_tol=1e-3
        )


def test_summary_is_computed_from_the_results(toy_report: Report) -> None:
    ours, theirs = positions(0.134, 5), positions(0.25, 2)
    ratio = ours.mean() / theirs.mean()
    text = toy_report.page.summary
    assert "toy-q4_0-gptq.gguf drifts least" in text
    assert f"{ratio:.4f} ± " in text
    assert with_error(float(ours.mean()), float(ours.std() / math.sqrt(ours.size - 1))) in text
    fallen = sum(linear["method"] == "rtn" for linear in manifest()["data"]["linears"])
    assert f"{fallen} of 120 linears did not take gptq's weights" in text


def test_error_of_a_paired_ratio_is_that_of_a_jackknife_over_chunks(toy_report: Report) -> None:
    rows = {row.artifact.name: row for row in toy_report.comparisons[0].rows}
    row, base = rows["toy-q4_0-gptq.gguf"], rows["toy-q4_0-llamacpp.gguf"]
    a, b = np.array(row.per_chunk_kld), np.array(base.per_chunk_kld)
    left_out = np.array([np.delete(a, i).sum() / np.delete(b, i).sum() for i in range(CHUNKS)])
    jackknife = math.sqrt((CHUNKS - 1) * float(left_out.var()))
    assert row.ratio is not None
    assert row.ratio.se == pytest.approx(jackknife, rel=0.05)
    unpaired = row.ratio.value * math.hypot(
        row.kld_se_by_chunk / row.kld,
        base.kld_se_by_chunk / base.kld,  # type: ignore[operator]
    )
    assert row.ratio.se < 0.6 * unpaired, "chunks are hard for both: pairing must pay"


def test_error_of_a_ratio_is_propagated_where_chunks_do_not_pair(tmp_path: Path) -> None:
    ours = drift("a.gguf", level=0.1, per_chunk_kld=[])
    report = report_of(tmp_path, ours, drift("b.gguf", level=0.2, seed=1), baseline="b")
    row = next(row for row in report.comparisons[0].rows if row.label == "a.gguf")
    a, b = ours["data"]["metrics"]["kld"], drift("b.gguf", level=0.2, seed=1)["data"]["metrics"]["kld"]
    assert row.ratio is not None
    assert row.ratio.se == pytest.approx(
        row.ratio.value * math.hypot(a["se"] / a["value"], b["se"] / b["value"]), rel=1e-12
    )
    assert "as if independent" in row.ratio.method


def test_no_ratio_to_a_baseline_at_the_noise_floor(tmp_path: Path) -> None:
    exact = drift("exact.gguf", level=1e-12)
    report = report_of(tmp_path, exact, drift("b.gguf", level=0.2, seed=1), baseline="exact")
    row = next(row for row in report.comparisons[0].rows if row.label == "b.gguf")
    assert row.ratio is not None
    assert row.ratio.value is None
    markdown = render_markdown(report.page)
    assert "none (the baseline's KLD is at the noise floor)" in markdown
    assert "not to be told from zero" in markdown


CONDITIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "reference": lambda data: data["reference"].update(fingerprint=sha("another model"), model="other"),
    "reference encoding": lambda data: data["reference"].update(encoding="u16-float"),
    "text": lambda data: data["text"].update(sha256=sha("another text")),
    "context": lambda data: data["text"].update(context=1024),
    "chunks": lambda data: data["text"].update(chunks=10),
}


@pytest.mark.parametrize("what", CONDITIONS)
def test_results_of_different_conditions_never_share_a_table(what: str, tmp_path: Path) -> None:
    other = drift("b.gguf", level=0.2, seed=1)
    CONDITIONS[what](other["data"])
    report = report_of(tmp_path, drift("a.gguf"), drift("c.gguf", seed=2), other, baseline="a")
    assert [{row.label for row in c.rows} for c in report.comparisons] == [{"a.gguf", "c.gguf"}, {"b.gguf"}]
    assert report.comparisons[1].rows[0].ratio is None
    markdown = render_markdown(report.page)
    assert f"Table 2 differs from table 1 in {what} (" in markdown
    assert "must not be set against" in markdown
    assert "The baseline a.gguf was not measured under these conditions" in markdown
    names = [{row["Artifact"] for row in rows_of(markdown, f"### Table {i}")} for i in (1, 2)]
    assert "b.gguf" not in names[0]
    assert names[1] == {"full precision", "b.gguf"}


@pytest.mark.parametrize("what", ["target", "threads", "machine", "runtime"])
def test_speeds_of_different_devices_or_settings_never_share_a_table(what: str, tmp_path: Path) -> None:
    other = bench("b.gguf", seed=1)
    data = other["data"]
    if what == "target":
        data["target"] = "jetson"
    elif what == "threads":
        data["settings"]["threads"] = 8
    elif what == "machine":
        data["environment"]["cpu"]["model"] = "Another CPU"
    else:
        data["runtime"]["version"] = "9.9"
    data["settings"]["repetitions"] = 7
    report = report_of(tmp_path, bench("a.gguf"), other)
    assert [[row.label for row in group.rows] for group in report.speeds] == [["a.gguf"], ["b.gguf"]]
    assert "must not be compared" in render_markdown(report.page)


def test_one_artifact_in_two_runtimes_is_two_rows_that_say_which(tmp_path: Path) -> None:
    second = drift("a.gguf", level=0.2, seed=1)
    second["data"]["runtime"]["settings"]["kv_type"] = "q8_0"
    report = report_of(tmp_path, drift("a.gguf"), second)
    labels = [row.label for row in report.comparisons[0].rows]
    assert labels == ["a.gguf, llama_cpp 0.3.36, kv_type f16", "a.gguf, llama_cpp 0.3.36, kv_type q8_0"]


def test_facts_about_an_artifact_are_not_taken_for_settings(toy_report: Report) -> None:
    assert {row.runtime for row in toy_report.comparisons[0].rows} == {"llama_cpp 0.3.36"}


def test_same_bytes_under_two_names_are_one_artifact(tmp_path: Path) -> None:
    renamed = bench("renamed.gguf")
    renamed["data"]["artifact"]["sha256"] = sha("a.gguf")
    report = report_of(tmp_path, drift("a.gguf"), renamed)
    assert [a["name"] for a in report.data["artifacts"]] == ["a.gguf"]
    markdown = render_markdown(report.page)
    assert "a.gguf and renamed.gguf are the same bytes" in markdown
    row = rows_of(markdown, "## Results")[1]
    assert row["Artifact"] == "a.gguf"
    assert "not measured" not in row.values()


def test_different_bytes_under_one_name_are_told_apart(tmp_path: Path) -> None:
    other = drift("a.gguf", level=0.2, seed=1)
    other["data"]["artifact"]["sha256"] = sha("other bytes")
    report = report_of(tmp_path, drift("a.gguf"), other)
    assert {row.label for row in report.comparisons[0].rows} == {
        f"a.gguf [{sha('a.gguf')[:8]}]",
        f"a.gguf [{sha('other bytes')[:8]}]",
    }
    with pytest.raises(UsageError, match="means 2 artifacts"):
        build_report([tmp_path], baseline="a.gguf")


def test_what_was_not_measured_says_so_with_its_reason(tmp_path: Path) -> None:
    timed = bench("a.gguf")
    reason = "no generation was asked for"
    timed["data"]["metrics"]["decode_tps"] = {"value": None, "unit": "token/s", "n": 0, "se": None, "reason": reason}
    drifted = drift("a.gguf")
    del drifted["data"]["metrics"]["kld_p99"]
    report = report_of(tmp_path, drifted, timed, bench("b.gguf", seed=1))
    rows = rows_of(render_markdown(report.page), "## Results")
    assert rows[1]["Decode (tok/s)"] == f"not measured ({reason})"
    assert rows[1]["99 % KLD (nat)"] == "not measured (not in the result)"
    assert rows[2]["Mean KLD (nat)"] == "not measured"
    assert report.data["speeds"][0]["rows"][0]["metrics"]["decode_tps"]["value"] is None


def test_estimates_stand_apart_and_carry_the_word(tmp_path: Path) -> None:
    timed = bench("a.gguf")
    timed["data"]["metrics"]["decode_tps_estimated"] = measured(123.456, "token/s", 0)
    timed["data"]["prefill_tps_estimated"] = measured(777.0, "token/s", 0)
    report = report_of(tmp_path, timed)
    markdown = render_markdown(report.page)
    lines = [line for line in markdown.splitlines() if "123.5" in line or "777.0" in line]
    assert len(lines) == 2
    assert all(line.count("estimated") == 2 for line in lines)
    assert "estimated" not in markdown[markdown.index("## Speed") : markdown.index("## Estimates")]
    assert report.data["estimates"][0]["metrics"].keys() == {"decode_tps_estimated", "prefill_tps_estimated"}


def test_a_missed_gate_keeps_its_figures(tmp_path: Path) -> None:
    gate = {"name": "max_kld", "metric": "kld", "limit": 0.1, "value": 0.13, "se": 0.003, "lower": 0.125}
    gate |= {"upper": 0.135, "outcome": "fail", "passed": False, "confidence": 0.95}
    document = drift("a.gguf", gates=[gate]) | {"ok": False}
    document["error"] = {"code": 6, "message": "kld 0.13 ± 0.003 ≤ 0.1: fail", "hint": None}
    report = report_of(tmp_path, document)
    markdown = render_markdown(report.page)
    assert rows_of(markdown, "## Gates") == [
        {"Artifact": "a.gguf", "Gate": "max_kld", "Limit": "0.1", "Value": "0.1300 ± 0.0030"}
        | {"Outcome": "fail", "Passed": "NO"}
    ]
    assert "1 of 1 gate was missed." in report.page.summary
    assert rows_of(markdown, "### Commands that ended in an error")[0]["Exit code"] == "6"
    assert rows_of(markdown, "## Results")[1]["Artifact"] == "a.gguf"


def test_run_section_shows_every_fallback(toy_files: dict[str, Path]) -> None:
    markdown, data = toy_files["md"].read_text(), manifest()["data"]
    fallen = [linear["name"] for linear in data["linears"] if linear["method"] == "rtn"]
    assert 4 < len(fallen) < 30
    run = rows_of(markdown, "## Quantization")[0]
    assert (run["Run"], run["Not by the method (linears)"]) == ("run", str(len(fallen)))
    assert (run["Quantized (% of parameters)"], run["Time (s)"], run["Peak RSS (MiB)"]) == ("65.20", "82.50", "584.1")
    event = rows_of(markdown, "Events of the run")[0]
    assert (event["Event"], event["Count"]) == ("`fallback_to_rtn`", str(len(fallen)))
    blocks = set(re.findall(r"\d+", event["Where"].replace("–", " ")))
    assert blocks <= {name.split(".")[2] for name in fallen}
    linears = rows_of(markdown, "Output error of each linear")
    assert sum(int(row["Not by gptq"]) for row in linears) == len(fallen)
    assert sum(int(row["Compared"]) for row in linears) == 120


def test_a_run_counts_once_however_often_it_is_given(tmp_path: Path) -> None:
    write(tmp_path / "run" / "manifest.json", manifest())
    copy = manifest(out="somewhere", performance={"seconds": 1.0, "peak_rss_bytes": 2**30})
    write(tmp_path / "quantize.json", copy)
    report = build_report([tmp_path])
    assert [run["run"] for run in report.data["quantizations"]] == ["quantize"]
    assert "describes the same run" in report.notes[0]


def test_json_keeps_samples_chunks_and_hashes(
    toy_report: Report, toy_files: dict[str, Path], toy_results: Path
) -> None:
    document = json.loads(toy_files["json"].read_text())
    assert (document["schema"], document["ok"]) == ("phi4edge/report/1", True)
    data = document["data"]
    assert data["summary"] == toy_report.page.summary
    row = next(r for r in data["comparisons"][0]["rows"] if r["label"] == "toy-q4_0-gptq.gguf")
    assert row["per_chunk_kld"] == positions(0.134, 5).mean(axis=1).tolist()
    timed = next(r for r in data["speeds"][0]["rows"] if r["label"] == "toy-f16.gguf")
    expected = bench("toy-f16.gguf", "f16", 312.4, 30.0, 0)["data"]["metrics"]["decode_tps"]
    assert timed["metrics"]["decode_tps"]["samples"] == expected["samples"]
    by_name = {source["name"]: source["sha256"] for source in data["sources"]}
    assert by_name == {
        f"in/{path.relative_to(toy_results).as_posix()}": sha256_file(path) for path in toy_results.rglob("*.json")
    }
    assert len(data["quantizations"][0]["linears"]) == 120
    assert data["quantizations"][0]["events"] == manifest()["data"]["events"]
