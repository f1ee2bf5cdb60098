"""``bench``, ``drift`` and ``doctor`` on a device behind a real ssh server on the loopback, as scripts call them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cli_support import call_json, drift_of
from device_support import BENCH_HELP, BENCH_JSON, program
from scripts import ROOT
from ssh_support import Keys, OpenSsh, need, serving

from phi4edge.cli.commands import doctor

AS_IN_BENCH_JSON = ("--prompt-tokens", 32, "--gen-tokens", 8, "--repetitions", 3, "--warmup", 2)
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenSsh]:
    need("ssh", "ssh-keygen")
    folder = tmp_path_factory.mktemp("ssh")
    with serving(OpenSsh(Keys(folder / "keys"), folder / "server")) as found:
        yield found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(Path(__file__).read_text() * 2)
    return path


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """A target of this machine's processor that only ssh reaches."""
    folder = tmp_path_factory.mktemp("targets")
    words = (ROOT / "targets" / "laptop-x86-ddr5.toml").read_text()
    for key, value in (("transports", '["ssh"]'), ("arch", f'"{os.uname().machine}"'), ("isa", "[]")):
        words = re.sub(rf"^{key} = .*$", f"{key} = {value}", words, flags=re.MULTILINE)
    (folder / "behind-ssh.toml").write_text(words)
    return "--target", "behind-ssh", "--target-path", folder


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Any:
    return partial(call_json, capfd)


def reached(server: OpenSsh, folder: Path, *runners: object) -> list[object]:
    """The options of a device that no configuration of a user's knows."""
    words: list[object] = ["--address", f"127.0.0.1:{server.port}", "--device-folder", folder]
    for option in server.options:
        words += ["--transport-option", option]
    for runner in runners:
        words += ["--runner", runner]
    return words


def test_drift_over_ssh_is_drift_here(
    run: Any,
    server: OpenSsh,
    target: tuple[object, ...],
    phi4_gguf: Path,
    phi4_checkpoint: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    asked = drift_of(phi4_gguf, phi4_checkpoint, text)
    code, here = run(*asked)
    assert code == 0
    there = reached(server, tmp_path / "our folder", sys.executable)
    code, document = run(*asked, *target, *there, "--max-kld", 1e-9, "--clean")
    assert code == 6, "a gate that a device misses is a gate missed"
    data = document["data"]
    assert data["metrics"] == here["data"]["metrics"]
    assert (data["target"], data["transport"]) == ("behind-ssh", "ssh")
    assert data["environment"]["cpu"] == here["data"]["environment"]["cpu"]
    assert not (tmp_path / "our folder").exists()


def test_bench_over_ssh_is_llama_bench_s(
    run: Any,
    server: OpenSsh,
    target: tuple[object, ...],
    phi4_gguf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tool = program(tmp_path / "bin", "llama-bench", help=BENCH_HELP, says=BENCH_JSON)
    there = reached(server, tmp_path / "device", tool)[2:]
    asked = ("bench", phi4_gguf, *AS_IN_BENCH_JSON, *target)
    monkeypatch.setenv("PHI4EDGE_ADDRESS", f"127.0.0.1:{server.port}")
    code, document = run(*asked, *there)
    assert code == 0, document
    assert document["data"]["metrics"]["decode_tps"]["samples"][0] == pytest.approx(8 / 0.015102172)
    assert document["data"]["runtime"]["details"]["program"] == "llama-bench"
    assert list((tmp_path / "device").rglob("*.gguf")), "kept for the next run"


def test_doctor_says_what_can_measure_there_and_fails_where_nothing_can(
    run: Any, server: OpenSsh, target: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("REQUIRED", "OPTIONAL"):  # of this machine, looked at by other tests
        monkeypatch.setattr(doctor, name, {})
    monkeypatch.setattr(doctor, "_llama", lambda: doctor.Check("llama_cpp", "ok", "", True))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # no runner that was built on this machine
    tool = program(tmp_path / "bin", "llama-bench", help=BENCH_HELP)
    code, document = run("doctor", *target, *reached(server, tmp_path / "device", sys.executable, tool))
    checks = {check["name"]: check for check in document["data"]["checks"]}
    assert code == 0, document
    assert checks["behind-ssh speed"]["detail"].startswith("llama-bench (GGUF); Python with llama_cpp")
    assert "llama_cpp" in checks["behind-ssh python"]["detail"]
    code, document = run("doctor", *target, *reached(server, tmp_path / "device", tool))
    assert code == 5
    assert "behind-ssh drift is missing" in document["error"]["message"]
    assert "phi4edge runner build" in document["error"]["hint"]


def test_places_that_do_not_go_together_are_refused(
    run: Any, target: tuple[object, ...], phi4_gguf: Path, phi4_checkpoint: Path, text: Path
) -> None:
    for arguments, words in (
        (("bench", phi4_gguf, *target, "--transport", "local"), "is reached over ssh, not local"),
        (("bench", phi4_gguf, "--transport", "ssh", "--address", "here"), "is reached over local, not ssh"),
        (("bench", phi4_gguf, "--address", "here"), "this machine has no address"),
        (("drift", phi4_gguf, "--reference", phi4_checkpoint, *target), "measured on a text"),
        (
            ("drift", phi4_gguf, "--reference", phi4_checkpoint, "--text", text, "--attribute", *target),
            "on this machine only",
        ),
    ):
        code, document = run(*arguments)
        assert code == 2
        assert words in document["error"]["message"]


def test_an_artifact_that_is_not_here_is_told_before_a_device_is_reached(
    run: Any, target: tuple[object, ...], phi4_checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    nowhere = ("--address", "no.such.host.invalid", *target)
    for command in (
        ("bench", tmp_path / "none.gguf"),
        ("drift", tmp_path / "none.gguf", "--reference", phi4_checkpoint),
    ):
        code, document = run(*command, *(("--text", text) if "drift" in command else ()), *nowhere)
        assert code == 3
        assert "no such file" in document["error"]["message"]


def test_a_target_s_own_file_says_where_its_device_is(
    server: OpenSsh, phi4_gguf: Path, target: tuple[object, ...], tmp_path: Path, run: Any
) -> None:
    words = (Path(str(target[3])) / "behind-ssh.toml").read_text()
    tool = program(tmp_path / "bin", "llama-bench", help=BENCH_HELP, says=BENCH_JSON)
    options = json.dumps(list(server.options))
    place = f'address = "127.0.0.1:{server.port}"\nfolder = "{tmp_path / "ours"}"\noptions = {options}\n'
    (tmp_path / "my-board.toml").write_text(f"{words}\n[connection]\n{place}")
    code, document = run(
        "bench", phi4_gguf, "--target", "my-board", "--target-path", tmp_path, "--runner", tool, *AS_IN_BENCH_JSON
    )
    assert code == 0, document
    assert document["data"]["transport"] == "ssh"
    assert any((tmp_path / "ours").iterdir())
