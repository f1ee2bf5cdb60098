"""``bench``, ``drift`` and ``report`` on a phone behind Google's adb client, as scripts call them; it is emulated."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from adb_support import Phone, eventually, phones, serving
from cli_support import call_json, drift_of
from device_support import BENCH_HELP, BENCH_JSON, program
from scripts import ROOT

AS_IN_BENCH_JSON = ("--prompt-tokens", 32, "--gen-tokens", 8, "--repetitions", 3, "--warmup", 2)


@pytest.fixture
def phone(tmp_path: Path) -> Iterator[Phone]:
    phone = Phone(tmp_path / "phone", android=False)
    with pytest.MonkeyPatch.context() as patch, serving(tmp_path / "adb", patch), phones(phone):
        yield phone


@pytest.fixture
def there(phone: Phone, tmp_path: Path) -> tuple[object, ...]:
    """A phone of this machine's processor, and where it is."""
    words = (ROOT / "targets" / "phone-pixel-9-12gb.toml").read_text()
    for key, value in (("transports", '["adb"]'), ("arch", f'"{os.uname().machine}"'), ("isa", "[]")):
        words = re.sub(rf"^{key} = .*$", f"{key} = {value}", words, flags=re.MULTILINE)
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "my-phone.toml").write_text(words)
    folder = phone.data / "phi4edge"
    return (
        "--target",
        "my-phone",
        "--target-path",
        tmp_path / "targets",
        "--address",
        phone.serial,
        *(
            "--device-folder",
            folder,
        ),
    )


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_a_phone_is_measured_and_reported(
    phone: Phone,
    there: tuple[object, ...],
    phi4_gguf: Path,
    phi4_checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    results = tmp_path / "results"
    text = tmp_path / "words.txt"
    text.write_text(Path(__file__).read_text() * 2)
    asked = drift_of(phi4_gguf, phi4_checkpoint, text)
    _, here = call_json(capfd, *asked)
    code, drift = call_json(capfd, *asked, *there, "--runner", sys.executable, "--out", results / "drift.json")
    assert code == 0, drift
    assert drift["data"]["metrics"] == here["data"]["metrics"]
    assert (drift["data"]["target"], drift["data"]["transport"]) == ("my-phone", "adb")
    tool = program(tmp_path / "bin", "llama-bench", help=BENCH_HELP, says=BENCH_JSON)
    bench = ("bench", phi4_gguf, *AS_IN_BENCH_JSON, *there, "--runner", tool)
    code, speed = call_json(capfd, *bench, "--out", results / "bench.json")
    assert code == 0, speed
    assert speed["data"]["metrics"]["decode_tps"]["samples"][0] == pytest.approx(8 / 0.015102172)
    assert list(phone.data.rglob("*.gguf")), "kept for the next run"
    assert phone.setting() in (None, "0", "null"), "it was kept awake, and may sleep again"
    code, report = call_json(capfd, "report", results, "--out", tmp_path / "report")
    assert code == 0, report
    assert "my-phone" in (tmp_path / "report" / "report.md").read_text()
    code, _ = call_json(capfd, *bench, "--clean")
    assert code == 0
    assert not list(phone.data.iterdir()), "all of it was ours"


def test_a_phone_that_is_unplugged_while_it_works_is_told_and_the_next_run_goes_on(
    phone: Phone, there: tuple[object, ...], phi4_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    started = tmp_path / "started"
    slow = program(tmp_path / "bin", "llama-bench", help=BENCH_HELP, then=f'echo $$ >"{started}"; exec sleep 60')
    bench = ("bench", phi4_gguf, *AS_IN_BENCH_JSON, *there, "--runner", slow)

    def unplug() -> None:
        eventually(started.exists, within_s=60)
        phone.unplug()

    puller = threading.Thread(target=unplug)
    puller.start()
    code, document = call_json(capfd, *bench)
    puller.join()
    assert code == 4, document
    assert "the connection was lost" in document["error"]["message"]
    pid = int(started.read_text())
    eventually(lambda: not Path(f"/proc/{pid}").exists(), within_s=20)
    program(tmp_path / "bin", "llama-bench", help=BENCH_HELP, says=BENCH_JSON)
    code, document = call_json(capfd, *bench)
    assert code == 0, document
