"""The report as files: a page that stands alone, whatever the documents hold, and the command that makes it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_support import (
    BASELINE,
    NAMES,
    PageReader,
    artifact,
    bench,
    drift,
    environment,
    manifest,
    measured,
    page_of,
    positions,
    report_of,
    rows_of,
    sha,
    write,
)

from phi4edge.cli.main import main
from phi4edge.core.errors import InputError
from phi4edge.core.hashing import sha256_file
from phi4edge.report.build import Report, build_report, write_report
from phi4edge.report.markdown import render_markdown
from phi4edge.report.svg import ROLES


@pytest.fixture(scope="module")
def toy_page(toy_files: dict[str, Path]) -> PageReader:
    return PageReader(toy_files["html"].read_text())


# The page as a file


def test_the_same_inputs_give_the_same_bytes(
    toy_results: Path, toy_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib as mpl

    monkeypatch.setitem(mpl.rcParams, "font.size", 31.0)  # a user's own settings are not in the page
    monkeypatch.setitem(mpl.rcParams, "axes.labelsize", 31.0)
    monkeypatch.chdir(toy_results.parent)
    again = write_report(build_report([Path("in")], baseline=BASELINE), tmp_path / "elsewhere")
    assert {kind: sha256_file(path) for kind, path in again.items()} == {
        k: sha256_file(p) for k, p in toy_files.items()
    }


def test_page_takes_nothing_from_outside(toy_files: dict[str, Path], toy_page: PageReader) -> None:
    html = toy_files["html"].read_text()
    assert not {"script", "link", "img", "iframe", "object", "image", "base", "form"} & set(toy_page.tags)
    assert not re.search(r"https?:|//[a-z]|@import|@font-face", html)
    addresses = [value for _, name, value in toy_page.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert addresses
    assert all(address.startswith("#") for address in addresses)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert not [name for _, name, _ in toy_page.attributes if name.startswith("on")]


def test_every_reference_inside_the_page_has_one_target(toy_files: dict[str, Path], toy_page: PageReader) -> None:
    ids = Counter(value for _, name, value in toy_page.attributes if name == "id")
    assert ids.most_common(1)[0][1] == 1
    wanted = {value[1:] for _, name, value in toy_page.attributes if name == "href"}
    wanted |= set(re.findall(r"url\(#([^)]*)\)", toy_files["html"].read_text()))
    assert wanted <= set(ids)


def test_plots_are_text_and_take_their_colours_from_the_page(toy_files: dict[str, Path], toy_page: PageReader) -> None:
    html = toy_files["html"].read_text()
    assert toy_page.tags["svg"] == 6
    for label in ("q4_0-gptq", "q4_0-llamacpp", "Size (MiB)", "Mean KLD (nat)", "tok/s", "down_proj", "Block"):
        assert label in toy_page.svg_text, label
    svgs = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert not set(re.findall(r"#[0-9a-f]{6}\b", svgs)), "a colour that dark mode does not change"
    assert {f"var(--{role})" for role in ROLES} >= set(re.findall(r"var\(--[a-z0-9-]+\)", svgs))
    themes = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    assert len(themes) == 3, "light, dark, print"
    assert all(f"--{role}:" in theme for theme in themes for role in ROLES)


def test_every_repetition_is_a_dot(toy_report: Report, toy_files: dict[str, Path]) -> None:
    svg = re.findall(r"<svg[^>]*Decode speed.*?</svg>", toy_files["html"].read_text(), re.DOTALL)[0]
    samples = sum(len(row.metrics["decode_tps"].samples) for row in toy_report.speeds[0].rows)
    assert samples == 5 * len(NAMES)
    assert len(re.findall(r"<use [^>]*accent|<use [^>]*contrast|<use [^>]*muted", svg)) >= samples


def test_start_of_the_command_needs_neither_torch_nor_matplotlib() -> None:
    code = "import sys, phi4edge.cli.commands.report; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_page_says_how_and_what_not(toy_page: PageReader) -> None:
    assert "255 of the 512 positions of a chunk are scored" in toy_page.words
    assert "What they do not say" in toy_page.words
    assert "Example CPU 9000" in toy_page.words
    assert sha("toy-model") in toy_page.words
    assert sha("text") in toy_page.words
    assert all(sha(name) in toy_page.words for name, *_ in NAMES)


def test_order_of_the_page(toy_files: dict[str, Path]) -> None:
    titles = re.findall(r"^## (.*)$", toy_files["md"].read_text(), re.MULTILINE)
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
    toy_results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda uri: shown.append(uri) or True)
    out = tmp_path / "new" / "folder"
    assert (
        main(["report", str(toy_results), "--out", str(out), "--baseline", "q4_0-llamacpp", "--title", "T", "--open"])
        == 0
    )
    assert {path.name for path in out.iterdir()} == {"report.json", "report.md", "report.html"}
    assert shown == [(out / "report.html").resolve().as_uri()]
    printed = capsys.readouterr().out
    assert "toy-q4_0-gptq.gguf drifts least" in printed
    assert str(out / "report.html") in printed
    assert main(["report", str(toy_results), "--out", str(out), "--json"]) == 0
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
    toy_results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(toy_results), "--out", str(tmp_path / "out"), "--baseline", "toy-q4_0-gtpq.gguf"]) == 2
    assert "did you mean 'toy-q4_0-gptq.gguf'?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_failed_command_leaves_the_old_report_whole(tmp_path: Path) -> None:
    old = {k: p.read_bytes() for k, p in write_report(report_of(tmp_path, drift("a.gguf")), tmp_path / "out").items()}
    write(tmp_path / "bad.json", {"schema": "phi4edge/drift/1", "ok": True, "data": {}})
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 3
    assert {path.suffix[1:]: path.read_bytes() for path in (tmp_path / "out").iterdir()} == old


# What stands beside the tables


def test_environment_that_all_share_is_shown_once(toy_page: PageReader) -> None:
    assert toy_page.text.count("cpu.model") == 1
    assert toy_page.text.count("load_average") == 1
    assert environment()["ram_bytes"] == 25276502016
    assert "23.54 GiB" in toy_page.words


def test_artifact_without_size_is_named_beside_the_plot(tmp_path: Path) -> None:
    unsized = drift("a.gguf")
    unsized["data"]["artifact"] = artifact("a.gguf") | {"bytes": None}
    report = report_of(tmp_path, unsized, drift("b.gguf", seed=1))
    page = page_of(report, tmp_path / "out")
    assert "Not shown: a." in page.words


def test_what_learned_rounding_did_is_on_the_page(tmp_path: Path) -> None:
    def block(kept: int, after: float, moved: float) -> dict[str, Any]:
        heldout = [{"step": 0, "error": 0.4}, {"step": 14, "error": after}]
        return {"steps": 14, "kept_step": kept, "heldout": heldout, "losses": [], "codes_moved": moved}

    learned = [block(14, 0.3, 0.0025), block(14, 0.38, 0.004), block(0, 0.5, 0.0)]
    write(tmp_path / "manifest.json", manifest(2, rounding=learned))
    markdown = render_markdown(build_report([tmp_path / "manifest.json"]).page)
    assert "kept in 2 of 3" in markdown
    assert "median 0.9500, from 0.7500 to 1.000" in markdown
    assert "0.00 to 0.40 %" in markdown
    write(tmp_path / "manifest.json", manifest(2, rounding=[block(7, 0.3, 0.1)]))
    with pytest.raises(InputError, match="no figures of step 7"):
        build_report([tmp_path / "manifest.json"])


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
