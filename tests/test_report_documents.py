"""Which JSON files a report is made of, and what it says of those that are damaged."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_support import drift, report_of, write

from phi4edge.core.errors import InputError
from phi4edge.report.build import build_report, write_report

DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda d: d["data"]["artifact"].pop("sha256"), "data.artifact.sha256: is missing"),
    "null": (lambda d: d["data"]["text"].update(context=None), "data.text.context: is null"),
    "no kld": (lambda d: d["data"]["metrics"].pop("kld"), "data.metrics.kld: is missing"),
    "word": (lambda d: d["data"]["metrics"]["kld"].update(value="x"), "data.metrics.kld.value: is a string, expected"),
    "no value": (lambda d: d["data"]["metrics"].update(ppl={"se": 1}), "data.metrics.ppl.value: is missing"),
    "se": (lambda d: d["data"]["metrics"]["ppl"].update(se=-1), "data.metrics.ppl.se: is -1, expected a number of at"),
    "list": (lambda d: d["data"].update(per_chunk_kld=[0.1, True]), r"data.per_chunk_kld\[1\]: is true or false"),
    "data": (lambda d: d.update(data=[1]), "data: is a list, expected an object"),
    "newer": (lambda d: d.update(schema="phi4edge/drift/2"), "schema: is 'phi4edge/drift/2', this version reads"),
    "nan": (lambda d: d["data"]["metrics"]["kld"].update(value=math.nan), "holds NaN, which is not a JSON number"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_document_is_named_with_its_key(kind: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[kind]
    document = drift("a.gguf")
    damage(document)
    write(tmp_path / "good.json", drift("b.gguf", seed=1))
    path = write(tmp_path / "bad.json", document)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: {message}"):
        build_report([tmp_path])


def test_a_truncated_document_is_an_error_wherever_it_is_found(tmp_path: Path) -> None:
    write(tmp_path / "good.json", drift("a.gguf"))
    text = json.dumps(drift("b.gguf"))
    (tmp_path / "cut.json").write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match=r"cut\.json: not valid JSON"):
        build_report([tmp_path])


def test_other_json_is_left_out_with_a_note(tmp_path: Path) -> None:
    write(tmp_path / "tokenizer.json", {"model": {"vocab": {}}})
    write(tmp_path / "plan.json", {"schema": "phi4edge/plan/1", "ok": True, "data": {}})
    (tmp_path / "broken.json").write_text("{ not ours")
    report = report_of(tmp_path, drift("a.gguf"))
    assert sorted(report.data["ignored"]) == [f"{tmp_path.name}/{n}.json" for n in ("broken", "plan", "tokenizer")]
    assert "3 JSON files are no results" in report.notes[0]


def test_a_report_is_not_made_of_reports(tmp_path: Path) -> None:
    before = report_of(tmp_path, drift("a.gguf"))
    first = write_report(before, tmp_path / "out")["json"].read_bytes()
    assert write_report(build_report([tmp_path]), tmp_path / "out")["json"].read_bytes() == first


def test_the_same_file_given_twice_counts_once(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", drift("a.gguf"))
    write(tmp_path / "y.json", drift("a.gguf"))
    report = build_report([path, tmp_path, path])
    assert [len(comparison.rows) for comparison in report.comparisons] == [1]
    assert "y.json has the same content as x.json" in report.notes[0]
