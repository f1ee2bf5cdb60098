"""The report shows domains, positions, greedy text and attribution as the drift command wrote them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_support import drift, write

from phi4edge.cli.main import main
from phi4edge.core.errors import InputError
from phi4edge.core.recipe import Recipe
from phi4edge.report.build import Report, build_report
from phi4edge.report.html import render_html
from phi4edge.report.markdown import render_markdown
from phi4edge.stages.export import export
from phi4edge.stages.quantize import quantize
from phi4edge.writers._api import WriteOptions


@pytest.fixture(scope="module")
def results(phi4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One artifact attributed on one text, and measured on two."""
    folder = tmp_path_factory.mktemp("parts")
    run = quantize(phi4_checkpoint, Recipe(method="rtn", scheme="w4g32"), folder / "run").path
    artifact = export(run, "gptq", folder / "tiny-gptq", WriteOptions()).path
    text = folder / "words.txt"
    text.write_text("Every good thing is 3 or 4 things, said the fox. " * 60)
    common = ["drift", str(artifact), "--reference", str(phi4_checkpoint), "--context", "64", "--chunks", "3"]
    common += ["--threads", "1", "-q", "--greedy", "chunks", "--greedy-tokens", "8"]
    one = ["--text", str(text), "--attribute", "--against", str(run)]
    two = ["--text", f"prose={text}", "--text", f"code={__file__}"]
    for name, more in (("one", one), ("two", two)):
        assert main([*common, *more, "--out", str(folder / "results" / f"{name}.json")]) == 0
    return folder / "results"


def data_of(results: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((results / f"{name}.json").read_text())["data"])


@pytest.fixture(scope="module")
def report(results: Path) -> Report:
    return build_report([results])


def test_json_holds_what_the_results_hold(report: Report, results: Path) -> None:
    one, two = (next(p for p in report.data["drift_parts"] if p["file"].endswith(f"{n}.json")) for n in ("one", "two"))
    measured = data_of(results, "one")["attribution"]
    for row, stage in zip(measured["stages"], one["attribution"]["stages"], strict=True):
        assert stage["name"] == row["stage"]
        for ours, theirs in (("kld", "kld"), ("added", "added_kld"), ("step", "step_kld")):
            assert (stage[ours]["value"], stage[ours]["se"]) == (row[theirs]["value"], row[theirs]["se"])
    assert one["attribution"]["output_errors"] == measured["tensors"]["output_errors"]
    assert [t["name"] for t in one["attribution"]["tensors"]] == [t["name"] for t in measured["tensors"]["measured"]]
    domains = data_of(results, "two")["domains"]
    assert [d["metrics"]["kld"]["value"] for d in two["domains"]] == [d["metrics"]["kld"]["value"] for d in domains]
    assert two["greedy"]["median"] == data_of(results, "two")["greedy"]["median"]["value"]
    assert [p["kld_se"] for p in one["per_position"]] == [p["kld_se"] for p in data_of(results, "one")["per_position"]]


def test_the_page_has_a_row_for_each_stage_tensor_and_domain_and_the_plots(report: Report, results: Path) -> None:
    text, page = render_markdown(report.page), render_html(report.page)
    for sentence in data_of(results, "one")["attribution"]["findings"]:
        assert sentence.split(":")[0] in text
    for row in (
        "weights: the run's linears",
        "embedding, head, norms",
        "| format |",
        "| prose |",
        "| code |",
        "| all |",
    ):
        assert row in text, row
    assert "Where drift comes from" in page
    titles = (
        "Mean KLD by position",
        "Same top-1 by position",
        "What single tensors cost",
        "Output error of every linear",
    )
    for title in titles:
        assert f'aria-label="{title}"' in page
    assert re.search(r"\| format \| [^|]+ \| 0 ± 0 \| 0 ± 0 \|", text)
    assert "| 3 | 8 |" in text  # prompts and tokens of the one result, and of the other
    assert "| 6 | 8 |" in text
    assert "not measured (measured in torch\\_ref" in text or "not measured (measured in torch_ref" in text


def test_results_without_these_parts_make_no_section_of_them(tmp_path: Path) -> None:
    write(tmp_path / "plain.json", drift())
    report = build_report([tmp_path])
    titles = [section.title for section in report.page.sections]
    assert "Where drift comes from" not in titles
    assert report.data["drift_parts"] == []


def test_a_reference_that_left_tokens_out_is_said_to_give_a_lower_bound(tmp_path: Path) -> None:
    document = drift()
    write(tmp_path / "whole.json", document)
    assert "lower bound" not in render_markdown(build_report([tmp_path]).page)
    document["data"]["reference"] |= {"tail_mass": 0.0123, "encoding": "u16-fixed-32-top512"}
    write(tmp_path / "whole.json", document)
    assert "1.230 % of the probability" in render_markdown(build_report([tmp_path]).page)


def test_a_damaged_part_is_named_with_its_file_and_key(results: Path, tmp_path: Path) -> None:
    for path, words in (
        (("attribution", "stages", 0, "kld", "value"), r"data\.attribution\.stages\[0\]\.kld\.value: is a string"),
        (("greedy", "median", "interval"), r"data\.greedy\.median\.interval: is a string"),
        (("per_position", 1, "kld"), r"data\.per_position\[1\]\.kld: is a string"),
    ):
        document = json.loads((results / "one.json").read_text())
        place = document["data"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = "much"
        write(tmp_path / "bad.json", document)
        with pytest.raises(InputError, match=words):
            build_report([tmp_path])
