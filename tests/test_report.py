"""The report says what the results say: joined rightly, kept apart where they must be, escaped, always the same."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_support import (
    CHUNKS,
    NAMES,
    artifact,
    bench,
    drift,
    environment,
    manifest,
    measured,
    positions,
    report_of,
    sha,
    write,
    write_results,
)

from phi4edge.cli.main import main
from phi4edge.core.errors import InputError, UsageError
from phi4edge.core.hashing import sha256_file
from phi4edge.report.build import Report, build_report, write_report
from phi4edge.report.markdown import render_markdown
from phi4edge.report.numbers import with_error
from phi4edge.report.svg import ROLES

BASELINE = "toy-q4_0-llamacpp"


class PageReader(HTMLParser):
    """Text, attributes and tags of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.svg_text: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data.replace("\u00a0", " "))
        if "text" in self.open:
            self.svg_text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def page_of(report: Report, out: Path) -> PageReader:
    return PageReader(write_report(report, out)["html"].read_text())


def rows_of(markdown: str, title: str) -> list[dict[str, str]]:
    """The first table after ``title``, a dict a row."""
    lines = markdown[markdown.index(title) :].splitlines()
    table = []
    for line in lines:
        if line.startswith("|"):
            table.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif table:
            break
    head, _, *rows = table
    return [dict(zip(head, row, strict=True)) for row in rows]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_results(tmp_path_factory.mktemp("results") / "in")


@pytest.fixture(scope="module")
def report(results: Path) -> Report:
    return build_report([results], baseline=BASELINE)


@pytest.fixture(scope="module")
def files(report: Report, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_report(report, tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def page(files: dict[str, Path]) -> PageReader:
    return PageReader(files["html"].read_text())


# The page as a file


def test_the_same_inputs_give_the_same_bytes(
    results: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib as mpl

    monkeypatch.setitem(mpl.rcParams, "font.size", 31.0)  # a user's own settings are not in the page
    monkeypatch.setitem(mpl.rcParams, "axes.labelsize", 31.0)
    monkeypatch.chdir(results.parent)
    again = write_report(build_report([Path("in")], baseline=BASELINE), tmp_path / "elsewhere")
    assert {kind: sha256_file(path) for kind, path in again.items()} == {k: sha256_file(p) for k, p in files.items()}


def test_page_takes_nothing_from_outside(files: dict[str, Path], page: PageReader) -> None:
    html = files["html"].read_text()
    assert not {"script", "link", "img", "iframe", "object", "image", "base", "form"} & set(page.tags)
    assert not re.search(r"https?:|//[a-z]|@import|@font-face", html)
    addresses = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert addresses
    assert all(address.startswith("#") for address in addresses)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_every_reference_inside_the_page_has_one_target(files: dict[str, Path], page: PageReader) -> None:
    ids = Counter(value for _, name, value in page.attributes if name == "id")
    assert ids.most_common(1)[0][1] == 1
    wanted = {value[1:] for _, name, value in page.attributes if name == "href"}
    wanted |= set(re.findall(r"url\(#([^)]*)\)", files["html"].read_text()))
    assert wanted <= set(ids)


def test_plots_are_text_and_take_their_colours_from_the_page(files: dict[str, Path], page: PageReader) -> None:
    html = files["html"].read_text()
    assert page.tags["svg"] == 6
    for label in ("q4_0-gptq", "q4_0-llamacpp", "Size (MiB)", "Mean KLD (nat)", "tok/s", "down_proj", "Block"):
        assert label in page.svg_text, label
    svgs = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert not set(re.findall(r"#[0-9a-f]{6}\b", svgs)), "a colour that dark mode does not change"
    assert {f"var(--{role})" for role in ROLES} >= set(re.findall(r"var\(--[a-z0-9-]+\)", svgs))
    themes = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    assert len(themes) == 3, "light, dark, print"
    assert all(f"--{role}:" in theme for theme in themes for role in ROLES)


def test_every_repetition_is_a_dot(report: Report, files: dict[str, Path]) -> None:
    svg = re.findall(r"<svg[^>]*Decode speed.*?</svg>", files["html"].read_text(), re.DOTALL)[0]
    samples = sum(len(row.metrics["decode_tps"].samples) for row in report.speeds[0].rows)
    assert samples == 5 * len(NAMES)
    assert len(re.findall(r"<use [^>]*accent|<use [^>]*contrast|<use [^>]*muted", svg)) >= samples


def test_start_of_the_command_needs_neither_torch_nor_matplotlib() -> None:
    code = "import sys, phi4edge.cli.commands.report; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# What the figures say


def test_main_table_joins_drift_and_speed_by_hash(files: dict[str, Path]) -> None:
    rows = rows_of(files["md"].read_text(), "## Results")
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


def test_summary_is_computed_from_the_results(report: Report) -> None:
    ours, theirs = positions(0.134, 5), positions(0.25, 2)
    ratio = ours.mean() / theirs.mean()
    text = report.page.summary
    assert "toy-q4_0-gptq.gguf drifts least" in text
    assert f"{ratio:.4f} ± " in text
    assert with_error(float(ours.mean()), float(ours.std() / math.sqrt(ours.size - 1))) in text
    fallen = sum(linear["method"] == "rtn" for linear in manifest()["data"]["linears"])
    assert f"{fallen} of 120 linears did not take gptq's weights" in text


def test_error_of_a_paired_ratio_is_that_of_a_jackknife_over_chunks(report: Report) -> None:
    rows = {row.artifact.name: row for row in report.comparisons[0].rows}
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


def test_facts_about_an_artifact_are_not_taken_for_settings(report: Report) -> None:
    assert {row.runtime for row in report.comparisons[0].rows} == {"llama_cpp 0.3.36"}


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


def test_run_section_shows_every_fallback(files: dict[str, Path]) -> None:
    markdown, data = files["md"].read_text(), manifest()["data"]
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


def test_json_keeps_samples_chunks_and_hashes(report: Report, files: dict[str, Path], results: Path) -> None:
    document = json.loads(files["json"].read_text())
    assert (document["schema"], document["ok"]) == ("phi4edge/report/1", True)
    data = document["data"]
    assert data["summary"] == report.page.summary
    row = next(r for r in data["comparisons"][0]["rows"] if r["label"] == "toy-q4_0-gptq.gguf")
    assert row["per_chunk_kld"] == positions(0.134, 5).mean(axis=1).tolist()
    timed = next(r for r in data["speeds"][0]["rows"] if r["label"] == "toy-f16.gguf")
    expected = bench("toy-f16.gguf", "f16", 312.4, 30.0, 0)["data"]["metrics"]["decode_tps"]
    assert timed["metrics"]["decode_tps"]["samples"] == expected["samples"]
    by_name = {source["name"]: source["sha256"] for source in data["sources"]}
    assert by_name == {
        f"in/{path.relative_to(results).as_posix()}": sha256_file(path) for path in results.rglob("*.json")
    }
    assert len(data["quantizations"][0]["linears"]) == 120
    assert data["quantizations"][0]["events"] == manifest()["data"]["events"]


def test_page_says_how_and_what_not(page: PageReader) -> None:
    assert "255 of the 512 positions of a chunk are scored" in page.words
    assert "What they do not say" in page.words
    assert "Example CPU 9000" in page.words
    assert sha("toy-model") in page.words
    assert sha("text") in page.words
    assert all(sha(name) in page.words for name, *_ in NAMES)


def test_order_of_the_page(files: dict[str, Path]) -> None:
    titles = re.findall(r"^## (.*)$", files["md"].read_text(), re.MULTILINE)
    assert titles == [
        "Results",
        "Drift in detail",
        "Speed",
        "Quantization",
        "Environment and provenance",
        "How these figures were made",
    ]


# Hostile and odd documents


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>.gguf", 'a" onload="x', "$x_{$ & 100 %", "a|b`c*d\n\x1b", "模型"]
)
def test_names_come_through_as_text(name: str, tmp_path: Path) -> None:
    first, second = drift(name, gates=[{"name": name}]), bench(name)
    for document in (first, second):
        document["data"]["environment"] = {name: name}
    first["data"]["text"]["name"] = first["data"]["reference"]["model"] = name
    run = manifest(blocks=2, model=name, events=[{"kind": name, "where": name, "detail": name, "values": {}}])
    report = report_of(tmp_path, first, second, drift("plain.gguf", seed=1), run, title=name)
    written = write_report(report, tmp_path / "out")
    page = PageReader(written["html"].read_text())
    assert page.tags["script"] == 0
    assert not [attribute for attribute in page.attributes if attribute[1].startswith("on")]
    shown = "".join(c if c.isprintable() else "\ufffd" for c in name)
    assert shown in page.text
    assert any(shown.removesuffix(".gguf") in text for text in page.svg_text)
    markdown = written["md"].read_text()
    assert "<script" not in markdown
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    json.loads(written["json"].read_text())


@pytest.mark.parametrize(
    "documents",
    [
        [bench("a.gguf")],
        [manifest(blocks=3)],
        [manifest(blocks=2, events=[], corpus=None, linears=[{"name": "x", "method": "rtn"}], method="rtn")],
        [drift("a.gguf", None, per_chunk_kld=[0.1], environment={}, gates=None)],
        [drift(f"artifact-number-{i}.gguf", level=0.1 + i / 1000, seed=i) for i in range(24)],
        [drift("exact.gguf", metrics={"kld": measured(0.0, "nat", 1, 0.0), "same_top_p": 1.0})],
        [{"schema": "phi4edge/bench/1", "ok": False, "error": {"code": 5, "message": "no device", "hint": "plug in"}}],
    ],
    ids=["speed alone", "run alone", "data-free run", "one chunk", "many", "no drift at all", "failure alone"],
)
def test_what_there_is_makes_a_page(documents: list[dict[str, Any]], tmp_path: Path) -> None:
    report = report_of(tmp_path, *documents)
    page = page_of(report, tmp_path / "out")
    assert report.page.summary in page.words
    assert "How these figures were made" in page.words


def test_figures_of_the_measuring_code_have_their_columns(tmp_path: Path) -> None:
    """The documents of `drift` and `bench` as the code that measures makes them."""
    from phi4edge.measurement.drift import PositionFigures, between_chunks, summarize
    from phi4edge.measurement.gates import Limits, evaluate
    from phi4edge.measurement.speed import summarize_speed
    from phi4edge.runtimes._api import SpeedRequest, SpeedSamples

    rng = np.random.default_rng(0)
    nll = rng.gamma(2.0, 2.0, (4, 50))
    figures = PositionFigures(nll + 0.02, nll, positions(0.1, 0)[:4, :50], rng.random((4, 50)) > 0.2)
    metrics = summarize(figures)
    gates = evaluate(Limits(max_kld=0.5), metrics, between_chunks(figures))
    text = {"name": "t", "sha256": sha("t"), "context": 102, "chunks": 4, "positions": 200}
    drifted = drift(
        "a.gguf",
        metrics={name: metric.as_dict() for name, metric in metrics.items()},
        gates=[gate.as_dict() for gate in gates],
        per_chunk_kld=figures.kld.mean(axis=1).tolist(),
        text=text,
    )
    samples = SpeedSamples((0.5, 0.6), (0.5, 0.6), ((0.01, 0.02), (0.02, 0.03)), 0.3, 2**28, 2**26, {"threads": 2})
    speed = summarize_speed(samples, SpeedRequest(64, 2, 2))
    timed = bench("a.gguf", metrics={name: metric.as_dict() for name, metric in speed.items()})
    markdown = render_markdown(report_of(tmp_path, drifted, timed).page)
    for title in ("## Results", "## Drift in detail", "## Speed"):
        row = rows_of(markdown, title)[-1]
        assert not [key for key, value in row.items() if "not measured" in value or value in ("", "–")], title
        assert not [key for key in row if "_" in key], "a metric without a column of its own"
    assert rows_of(markdown, "## Gates")[0]["Outcome"] == "pass"


# The command


def test_command_writes_three_files_and_says_what_it_found(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda uri: shown.append(uri) or True)
    out = tmp_path / "new" / "folder"
    assert (
        main(["report", str(results), "--out", str(out), "--baseline", "q4_0-llamacpp", "--title", "T", "--open"]) == 0
    )
    assert {path.name for path in out.iterdir()} == {"report.json", "report.md", "report.html"}
    assert shown == [(out / "report.html").resolve().as_uri()]
    printed = capsys.readouterr().out
    assert "toy-q4_0-gptq.gguf drifts least" in printed
    assert str(out / "report.html") in printed
    assert main(["report", str(results), "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "phi4edge/report/1"
    assert document["data"]["files"]["html"] == str(out / "report.html")


def test_no_results_is_exit_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "other" / "a.json", {"a": 1})
    out = tmp_path / "out"
    for place in ("empty", "other", "missing"):
        assert main(["report", str(tmp_path / place), "--out", str(out), "--json"]) == 3
        assert json.loads(capsys.readouterr().out)["error"]["code"] == 3
    assert not out.exists()


def test_an_unknown_baseline_is_exit_code_2_and_offers_the_closest(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(results), "--out", str(tmp_path / "out"), "--baseline", "toy-q4_0-gtpq.gguf"]) == 2
    assert "did you mean 'toy-q4_0-gptq.gguf'?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_failed_command_leaves_the_old_report_whole(tmp_path: Path) -> None:
    old = {k: p.read_bytes() for k, p in write_report(report_of(tmp_path, drift("a.gguf")), tmp_path / "out").items()}
    write(tmp_path / "bad.json", {"schema": "phi4edge/drift/1", "ok": True, "data": {}})
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 3
    assert {path.suffix[1:]: path.read_bytes() for path in (tmp_path / "out").iterdir()} == old


# What stands beside the tables


def test_environment_that_all_share_is_shown_once(page: PageReader) -> None:
    assert page.text.count("cpu.model") == 1
    assert page.text.count("load_average") == 1
    assert environment()["ram_bytes"] == 25276502016
    assert "23.54 GiB" in page.words


def test_artifact_without_size_is_named_beside_the_plot(tmp_path: Path) -> None:
    unsized = drift("a.gguf")
    unsized["data"]["artifact"] = artifact("a.gguf") | {"bytes": None}
    report = report_of(tmp_path, unsized, drift("b.gguf", seed=1))
    page = page_of(report, tmp_path / "out")
    assert "Not shown: a." in page.words


def test_tuning_and_mix_of_a_run_are_on_the_page(tmp_path: Path) -> None:
    held = {"code": {"kld": 0.2, "se": 0.01, "samples": 4}, "prose": {"kld": 0.1, "se": None, "samples": 1}}
    better = {name: {**figures, "kld": figures["kld"] / 2} for name, figures in held.items()}
    tuning = {
        "recipe": {"code_rate": 0.002},
        "steps": 40,
        "kept_step": 40,
        "heldout": [{"step": 0, "domains": held}, {"step": 40, "domains": better}],
    }
    allocation = {
        "nbytes": 3 << 20,
        "bits_per_weight": 4.6,
        "predicted_kld": 0.0123,
        "types": {"model.layers.0.mlp.down_proj": "q6_k", "model.layers.1.mlp.down_proj": "q4_k"},
        "tables": {"head": "q8_0"},
    }
    write(tmp_path / "manifest.json", manifest(2, tuning=tuning, allocation=allocation))
    markdown = render_markdown(build_report([tmp_path / "manifest.json"]).page)
    assert "0.2000 ± 0.0100 | 0.100 ± 0.010 | 0.5000" in markdown
    assert "norm gains and codes. 40 steps, the state after step 40 was" in markdown
    assert "3.000 MiB of tensors, 4.600 bits a parameter" in markdown
    assert "(estimated)" in markdown
    halved = {"step": 40, "halvings": 2, "domains": held}
    tuning |= {"kept_halvings": 2, "heldout": [*tuning["heldout"], halved]}
    write(tmp_path / "manifest.json", manifest(2, tuning=tuning))
    markdown = render_markdown(build_report([tmp_path / "manifest.json"]).page)
    assert "the state after step 40, with its changes divided by 4, was kept" in markdown
    assert "0.2000 ± 0.0100 | 0.2000 ± 0.0100 | 1.000" in markdown
    tuning["kept_step"] = 13
    write(tmp_path / "manifest.json", manifest(2, tuning=tuning))
    with pytest.raises(InputError, match="no figures of step 13"):
        build_report([tmp_path / "manifest.json"])
