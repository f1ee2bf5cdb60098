"""The run directory: a step counts if and only if it was committed whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi4edge.core.atomic import write_bytes
from phi4edge.core.errors import InputError, ResumeError
from phi4edge.core.workdir import CALIBRATION, JOURNAL, Workdir, differences

INPUTS = {"recipe": {"bits": 4, "corpus": {"name": "builtin"}}, "code": "1"}


def begin(path: Path, steps: int) -> None:
    with Workdir.open(path, INPUTS) as work:
        for step in range(steps):
            write_bytes(path / f"{step}.bin", bytes([step]))
            work.commit({"step": step}, [f"{step}.bin"])


def test_finished_steps_are_found_again(tmp_path: Path) -> None:
    begin(tmp_path / "run", 3)
    with Workdir.open(tmp_path / "run", INPUTS) as work:
        assert [r["step"] for r in work.records] == [0, 1, 2]
        assert work.repaired is None


@pytest.mark.parametrize("cut", range(1, 120, 7))
def test_a_torn_last_line_is_dropped_and_nothing_else(tmp_path: Path, cut: int) -> None:
    begin(tmp_path / "run", 3)
    journal = tmp_path / "run" / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-cut])
    with Workdir.open(tmp_path / "run", INPUTS) as work:
        assert [r["step"] for r in work.records] == [0, 1]
        write_bytes(tmp_path / "run" / "2.bin", b"again")
        work.commit({"step": 2}, ["2.bin"])
    with Workdir.open(tmp_path / "run", INPUTS) as work:
        assert [r["step"] for r in work.records] == [0, 1, 2]


def test_a_flipped_bit_in_the_journal_drops_that_step_and_later_ones(tmp_path: Path) -> None:
    begin(tmp_path / "run", 3)
    journal = tmp_path / "run" / JOURNAL
    lines = journal.read_bytes().split(b"\n")
    lines[1] = lines[1].replace(b'"step": 1', b'"step": 7')
    journal.write_bytes(b"\n".join(lines))
    with Workdir.open(tmp_path / "run", INPUTS) as work:
        assert [r["step"] for r in work.records] == [0]
        assert "damaged after 1 steps" in (work.repaired or "")


def test_other_inputs_are_refused_naming_what_changed(tmp_path: Path) -> None:
    begin(tmp_path / "run", 1)
    changed = {"recipe": {"bits": 8, "corpus": {"name": "builtin"}}, "code": "1"}
    with pytest.raises(ResumeError, match=r"recipe\.bits was 4, is now 8") as caught:
        Workdir.open(tmp_path / "run", changed)
    assert caught.value.exit_code == 7


def test_restart_begins_anew_but_keeps_the_calibration(tmp_path: Path) -> None:
    begin(tmp_path / "run", 2)
    begin(tmp_path / "run" / CALIBRATION, 1)
    with Workdir.open(tmp_path / "run", {"code": "2"}, restart=True) as work:
        assert work.records == []
    assert not (tmp_path / "run" / "0.bin").exists()
    assert (tmp_path / "run" / CALIBRATION / "0.bin").exists()


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with Workdir.open(tmp_path / "run", INPUTS), pytest.raises(ResumeError, match="another process"):
        Workdir.open(tmp_path / "run", INPUTS)


def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path) -> None:
    begin(tmp_path / "run", 2)
    for name in (JOURNAL, "run.json"):
        (tmp_path / "run" / f"{name}.partial").write_bytes(b"half of")
    with Workdir.open(tmp_path / "run", INPUTS) as work:
        assert len(work.records) == 2
        assert not list((tmp_path / "run").glob("*.partial"))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for restart in (False, True):
        with pytest.raises(InputError, match="not empty and not a run directory"):
            Workdir.open(tmp_path, INPUTS, restart=restart)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_differences_name_both_values() -> None:
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 1}, "c": 3}) == ["c was 2, is now 3"]
    assert differences({"a": 1}, {"a": 1, "b": None}) == []
    assert differences({"a": 1}, {"b": 2}) == ["a was 1, is now null", "b was null, is now 2"]


def test_the_journal_is_plain_json_lines(tmp_path: Path) -> None:
    begin(tmp_path / "run", 2)
    lines = (tmp_path / "run" / JOURNAL).read_text().splitlines()
    assert [json.loads(line)["record"]["step"] for line in lines] == [0, 1]
