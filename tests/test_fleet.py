"""Several devices in one go: side by side, one after the other, failing and dying midway, and started again."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.cli.main import main
from phi4edge.core.errors import Phi4EdgeError, TargetError, UsageError
from phi4edge.core.events import SILENT, Progress
from phi4edge.measurement.artifact import describe
from phi4edge.measurement.connection import connection_of, machine_of
from phi4edge.report.build import build_report
from phi4edge.runtimes._api import SpeedRequest
from phi4edge.runtimes._remote import RUNNER_FOLDER
from phi4edge.stages.fleet import Visit, first_failure, visit_all
from phi4edge.stages.speeds import SpeedOrder, check_places, measure_speeds
from phi4edge.targets.catalog import Catalog, open_catalog
from phi4edge.targets.schema import read_profile
from phi4edge.transports import local
from phi4edge.transports._api import Address
from phi4edge.writers._api import WriteOptions
from phi4edge.writers.gguf import write_f16

DEVICE = """
name = "A device"
kind = "laptop"
sources = ["a test"]
ram_gb = 8
usable_ram_gb = 4
arch = "x86_64"
transports = {transports}

[[runtimes]]
name = "llama_cpp"
formats = ["gguf"]
schemes = ["q4_0", "q8_0"]
"""
NAP = 0.3  # seconds


def visit(target: str, machine: str, **changes: Any) -> Visit:
    made = Visit(target, Path("model.gguf"), "ab" * 32, machine, {"request": {"gen_tokens": 4}})
    return replace(made, **changes)


class Bench:
    """Measures by running a program on this machine as a device; says when it was at work on which target."""

    def __init__(self, folder: Path, dying: tuple[str, ...] = ()) -> None:
        self.folder, self.dying = folder, dying
        self.spans: dict[str, tuple[float, float]] = {}

    def __call__(self, visit: Visit, progress: Progress) -> dict[str, Any]:
        began = time.monotonic()
        script = f"sleep {NAP}; kill -9 $$" if visit.target in self.dying else f"sleep {NAP}; echo 7"
        with local.open(Address(folder=str(self.folder))) as device:
            done = device.run(["sh", "-c", script], timeout_s=20)
        self.spans[visit.target] = began, time.monotonic()
        if done.code:
            raise TargetError(f"the program was ended by {signal.Signals(done.code - 128).name}", "look at the device")
        return {"tokens": int(done.text)}

    def overlap(self, one: str, other: str) -> bool:
        return self.spans[one][0] < self.spans[other][1] and self.spans[other][0] < self.spans[one][1]


# --- visits


def test_different_machines_are_measured_at_the_same_time_and_one_machine_s_targets_in_turn(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    visits = [visit("a", "ssh one"), visit("b", "ssh two"), visit("c", "ssh one")]
    visited = visit_all(visits, {"bench": bench}, tmp_path)
    assert [each.visit for each in visited] == visits
    assert all(each.data["bench"]["tokens"] == 7 for each in visited)
    assert bench.overlap("a", "b")
    assert not bench.overlap("a", "c")


def test_a_device_that_dies_midway_costs_nobody_else_anything(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dying=("b",))
    visits = [visit("a", "1"), visit("b", "2"), visit("c", "2"), visit("d", "3")]
    visited = visit_all(visits, {"warm": Bench(tmp_path), "bench": bench}, tmp_path)
    assert [each.error is None for each in visited] == [True, False, True, True]
    assert set(visited[1].data) == {"warm"}, "what was measured until then"
    assert json.loads(visits[1].document(tmp_path, "warm").read_text())["ok"] is True
    failed = json.loads(visits[1].document(tmp_path, "bench").read_text())
    assert failed["ok"] is False
    assert failed["error"] == {
        "code": 4, "message": "b: the program was ended by SIGKILL", "hint": "look at the device"
    }  # fmt: skip
    failure = first_failure(visited)
    assert isinstance(failure, TargetError)
    assert failure.message.startswith("b: ")
    report = build_report([visits[1].document(tmp_path, "bench")])
    assert "bench (model.gguf.b.bench.json)" in report.data["summary"]


def test_a_second_run_measures_only_what_is_missing(tmp_path: Path) -> None:
    visits = [visit("a", "1"), visit("b", "2")]
    visit_all(visits, {"bench": Bench(tmp_path, dying=("b",))}, tmp_path)
    bench = Bench(tmp_path)
    again = visit_all(visits, {"bench": bench}, tmp_path)
    assert set(bench.spans) == {"b"}
    assert [each.kept for each in again] == [("bench",), ()]
    assert first_failure(again) is None
    assert again[0].data["bench"]["tokens"] == 7


@pytest.mark.parametrize(
    "changes", [{"sha256": "cd" * 32}, {"asked": {"request": {"gen_tokens": 8}}}], ids=["artifact", "settings"]
)
def test_another_artifact_or_other_settings_are_measured_again(tmp_path: Path, changes: Mapping[str, Any]) -> None:
    visit_all([visit("a", "1")], {"bench": Bench(tmp_path)}, tmp_path)
    bench = Bench(tmp_path)
    visit_all([visit("a", "1", **changes)], {"bench": bench}, tmp_path)
    assert set(bench.spans) == {"a"}


def test_anew_measures_all_and_a_cut_off_document_counts_as_none(tmp_path: Path) -> None:
    one = visit("a", "1")
    visit_all([one], {"bench": Bench(tmp_path)}, tmp_path)
    bench = Bench(tmp_path)
    visit_all([one], {"bench": bench}, tmp_path, anew=True)
    assert set(bench.spans) == {"a"}
    one.document(tmp_path, "bench").write_text('{"ok": tr')
    bench = Bench(tmp_path)
    visit_all([one], {"bench": bench}, tmp_path)
    assert set(bench.spans) == {"a"}


def test_a_fault_of_our_own_is_not_taken_for_a_device_s(tmp_path: Path) -> None:
    def broken(visit: Visit, progress: Progress) -> dict[str, Any]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        visit_all([visit("a", "1"), visit("b", "2")], {"bench": broken}, tmp_path)


# --- where a device is


def target(folder: Path, name: str, transports: str, connection: str = "") -> None:
    text = DEVICE.format(transports=transports) + (f"\n[connection]\n{connection}\n" if connection else "")
    (folder / f"{name}.toml").write_text(text)


def test_what_the_user_says_is_stronger_than_the_file_and_without_a_word_no_device_is_taken(tmp_path: Path) -> None:
    target(tmp_path, "phone", '["adb", "browser"]')
    target(tmp_path, "board", '["adb", "ssh"]', 'transport = "ssh"\naddress = "me@board"\noptions = ["Port=2222"]')
    target(tmp_path, "wrong", '["adb"]', 'transport = "ssh"')
    phone, board = (read_profile(tmp_path / f"{name}.toml") for name in ("phone", "board"))
    assert connection_of(phone) is None
    assert connection_of(phone, "R5CT") == ("adb", Address("R5CT"))
    assert connection_of(board) == ("ssh", Address("me@board", None, ("Port=2222",)))
    assert connection_of(board, "other") == ("ssh", Address("other", None, ("Port=2222",)))
    with pytest.raises(UsageError, match="reached over adb, not ssh"):
        connection_of(read_profile(tmp_path / "wrong.toml"))
    here = open_catalog().profile("local")
    assert connection_of(here) == ("local", Address())
    with pytest.raises(UsageError, match="local is this machine"):
        connection_of(here, "there")


def test_two_addresses_of_one_machine_are_told_by_their_words() -> None:
    assert machine_of("ssh", Address("me@Board")) == machine_of("ssh", Address("board"))
    assert machine_of("ssh", Address("me@127.0.0.1")) == machine_of("local", Address())
    assert machine_of("adb", Address("A")) != machine_of("adb", Address("B"))


def test_an_address_for_no_target_is_refused_with_the_closest(tmp_path: Path) -> None:
    catalog = open_catalog()
    with pytest.raises(UsageError) as caught:
        check_places(catalog, ["jetson-orin-nano-8gb"], {"jetson-orin-nono-8gb": "nano"})
    assert caught.value.hint == "did you mean 'jetson-orin-nano-8gb'?"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--address", "local"), "is not ID=PLACE"),
        (("--address", "a=1", "--address", "a=2"), "names a twice"),
        (("--address", "mac-m4=there"), "is none of the targets"),
        (("--address", "local=there"), "local is this machine"),
    ],
)
def test_run_refuses_a_wrong_address_before_any_work(
    arguments: tuple[str, ...], words: str, phi4_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code = main(["run", str(phi4_checkpoint), "--method", "rtn", "--scheme", "q8_0", "--out", str(out), *arguments])
    assert code == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


# --- real artifacts


@pytest.fixture(scope="module")
def artifact(phi4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_f16(open_checkpoint(phi4_checkpoint), tmp_path_factory.mktemp("f") / "f16.gguf", WriteOptions()).path


@pytest.fixture
def fleet(tmp_path: Path) -> Catalog:
    """This machine twice more, as devices with folders of their own; one whose llama-bench dies; and an unknown one."""
    for name in ("one", "dying"):
        folder = tmp_path / f"device-{name}"
        (folder / ".phi4edge").mkdir(parents=True)
        (folder / ".phi4edge" / "ours").touch()
        target(tmp_path, name, '["local"]', f'transport = "local"\nfolder = "{folder}"')
    target(tmp_path, "nowhere", '["ssh"]')
    program = tmp_path / "device-dying" / RUNNER_FOLDER / "llama-bench"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\ncase "$*" in *-h*) exit 0;; esac\necho "[{"; kill -9 $$\n')
    program.chmod(0o755)
    return open_catalog([tmp_path])


def rows(
    catalog: Catalog, artifact: Path, results: Path, **changes: Any
) -> tuple[dict[str, dict[str, Any]], Phi4EdgeError | None]:
    request = SpeedRequest(prompt_tokens=8, gen_tokens=4, repetitions=2, warmup=0)
    artifacts = dict.fromkeys(("local", "one", "dying", "nowhere"), artifact)
    return measure_speeds(SpeedOrder(artifacts, catalog, request), results, progress=SILENT, **changes)


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_a_fleet_of_real_devices_is_measured_but_for_the_one_that_dies(
    fleet: Catalog, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")  # the device's Python is this one
    told, failure = rows(fleet, artifact, tmp_path / "results")
    assert told["local"]["measured"]
    assert told["one"]["measured"], told["one"]
    assert told["one"]["metrics"]["decode_tps"]["value"] > 0
    assert not told["dying"]["measured"]
    assert isinstance(failure, TargetError)
    assert failure.message.startswith("dying: ")
    assert told["nowhere"] == {
        "measured": False,
        "reason": "nobody said where it is: --address nowhere=PLACE, or [connection] in its file",
    }
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {"f16.gguf.bench.json", "f16.gguf.one.bench.json", "f16.gguf.dying.bench.json"}
    document = json.loads((tmp_path / "results" / "f16.gguf.one.bench.json").read_text())
    assert document["data"]["target"] == "one"
    assert document["data"]["asked"]["sha256"] == describe(artifact)["sha256"]
    again, failure = rows(fleet, artifact, tmp_path / "results")
    assert (again["local"]["kept"], again["one"]["kept"]) == (True, True)
    assert again["one"]["metrics"] == told["one"]["metrics"]
    assert failure is not None
    report = build_report([tmp_path / "results"])
    assert {group["target"] for group in report.data["speeds"]} == {"local", "one"}
    assert len(report.data["failures"]) == 1
