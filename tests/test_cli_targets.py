"""The commands `targets`, `plan` and `doctor`, as a user or a script calls them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from phi4edge.cli.commands import doctor, plan
from phi4edge.cli.main import main
from phi4edge.cli.target_options import writable_formats
from phi4edge.targets.catalog import TARGET_PATH

MINE = """
name = "Mine"
kind = "phone"
sources = ["a test"]
ram_gb = 8
usable_ram_gb = 4
bandwidth_gb_s = 50
arch = "aarch64"
transports = ["adb"]

[[runtimes]]
name = "llama_cpp"
formats = ["gguf"]
schemes = ["q4_0", "q8_0"]
"""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        document = json.loads(self.out)
        assert isinstance(document, dict)
        return document

    @property
    def data(self) -> dict[str, Any]:
        assert self.document["ok"] is (self.code == 0)
        data = self.document["data"]
        assert isinstance(data, dict)
        return data


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv(TARGET_PATH, raising=False)

    def run(*arguments: str) -> Result:
        capfd.readouterr()
        code = main(arguments)
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def gguf_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan as if GGUF were the only format that is written, whatever writers there are by now."""
    monkeypatch.setattr(plan, "writable_formats", lambda: frozenset({"gguf"}))


# --- targets list, show, validate


def test_list_shows_every_device_with_estimated_figures_marked(call: Any) -> None:
    result = call("targets", "list")
    assert result.code == 0
    lines = {line.split()[0]: line for line in result.out.splitlines() if line.strip()}
    assert len(lines) >= 23
    assert "detected" in lines["local"]
    assert "~51.2" in lines["laptop-x86-ddr4"]
    assert " 120 " in lines["mac-m4"]


def test_a_users_target_is_marked_in_the_list_and_announced_where_it_replaces(call: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(MINE)
    (tmp_path / "mac-m4.toml").write_text(MINE)
    result = call("targets", "list", "--target-path", str(tmp_path))
    assert [line.split()[-1] for line in result.out.splitlines() if line.startswith(("mine ", "mac-m4 "))] == [
        "yours"
    ] * 2
    assert f"Note: mac-m4: {tmp_path / 'mac-m4.toml'} takes the place of" in result.err
    data = call("targets", "list", "--target-path", str(tmp_path), "--json").data
    by_id = {target["id"]: target for target in data["targets"]}
    assert by_id["mac-m4"]["replaces"].endswith("mac-m4.toml")
    assert by_id["mine"]["replaces"] is None
    assert len(data["notes"]) == 1


def test_show_gives_every_figure_with_its_source_or_its_guess(call: Any) -> None:
    result = call("targets", "show", "laptop-x86-ddr4")
    assert "51.2 GB/s, estimated" in result.out
    assert "guess: vendor figure quoted from memory" in result.out
    assert "edge-llm-bench" in result.out
    target = call("targets", "show", "laptop-x86-ddr4", "--json").data["target"]
    assert target["bandwidth_gb_s"]["estimated"] is True
    assert target["efficiency"][0]["figure"]["value"] == 0.34


def test_this_machines_bandwidth_is_shown_as_not_measured(call: Any) -> None:
    assert "not measured" in call("targets", "show", "local").out
    assert call("targets", "show", "local", "--json").data["target"]["bandwidth_gb_s"]["value"] is None


def test_an_unknown_target_is_a_usage_error_that_offers_the_closest(call: Any) -> None:
    result = call("targets", "show", "jetson-orin-nono-8gb", "--json")
    assert result.code == 2
    assert result.document["error"]["hint"].startswith("did you mean 'jetson-orin-nano-8gb'?")


def test_validate_reads_all_shipped_files_and_finds_the_wrong_one_of_several(call: Any, tmp_path: Path) -> None:
    assert call("targets", "validate").out.count("ok ") >= 22
    (tmp_path / "a-good.toml").write_text(MINE)
    (tmp_path / "b-bad.toml").write_text(MINE.replace("ram_gb = 8", "ram_gbb = 8"))
    (tmp_path / "c-good.toml").write_text(MINE)
    result = call("targets", "validate", str(tmp_path), "--json")
    assert result.code == 3
    assert [file["ok"] for file in result.data["files"]] == [True, False, True]
    assert "b-bad.toml: ram_gbb: unknown key" in result.document["error"]["message"]
    assert result.document["error"]["hint"] == "did you mean 'ram_gb'?"


# --- targets check


def test_check_prints_the_sum_line_by_line(call: Any) -> None:
    result = call("targets", "check", "phone-snapdragon-8gen3-12gb", "--model", "phi-4-mini", "--scheme", "q4_0")
    assert result.code == 0
    for label in (
        "linears",
        "embedding and head",
        "KV cache",
        "compute buffers",
        "process",
        "needed",
        "usable",
        "left",
    ):
        assert f"\n{label} " in result.out
    data = call(
        "targets", "check", "phone-snapdragon-8gen3-12gb", "--model", "phi-4-mini", "--scheme", "q4_0", "--json"
    ).data["check"]
    assert data["needed_bytes"] == sum(line["nbytes"] for line in data["lines"])
    assert data["fits"] is True


def test_phi_4_on_an_8_gb_phone_is_refused_with_what_would_fit(call: Any) -> None:
    result = call("targets", "check", "phone-snapdragon-8gen2-8gb", "--model", "phi-4", "--context", "4096")
    assert result.code == 4
    assert "needs 9.98 GB, and one process can use 4.00 GB" in result.err
    assert "Hint: phi-4-mini at q4_0 with 4,096 tokens" in result.err
    assert "missing" in result.out, "the sum is shown all the same"


def test_a_refusal_as_json_is_one_document_with_the_sum_and_the_error(call: Any) -> None:
    arguments = ("targets", "check", "phone-snapdragon-8gen2-8gb", "--model", "phi-4", "--scheme", "q4_0", "--json")
    result = call(*arguments)
    assert result.code == 4
    assert result.err == ""
    assert result.document["schema"] == "phi4edge/targets/1"
    assert result.document["error"]["code"] == 4
    assert result.data["check"]["fits"] is False


def test_the_command_in_the_hint_works(call: Any) -> None:
    for target in ("phone-snapdragon-8gen2-8gb", "jetson-orin-nano-8gb", "laptop-rtx-4070"):
        hint = call("targets", "check", target, "--model", "phi-4", "--json").document["error"]["hint"]
        command = hint.split("phi4edge ", 1)[1].split(". Up to")[0]
        assert call(*command.split()).code == 0


def test_a_context_beyond_the_models_is_refused_with_both_numbers(call: Any) -> None:
    result = call("targets", "check", "mac-m4", "--model", "phi-4", "--context", "20000")
    assert result.code == 3
    assert "context 20,000 is more than the 16,384 tokens" in result.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--context", "0"), 2, "0 is not in the range"),
        (("--kv", "q5_0"), 2, "'q5_0' is not one of"),
        (("--scheme", "q4_9"), 2, "unknown scheme 'q4_9'"),
        (("--scheme", "w4g100"), 3, "in_features 3072 is not divisible by group_size 100"),
        (("--scheme", "w4g16"), 4, "no format of its runtimes (mlx, gguf) holds w4g16"),
    ],
)
def test_impossible_requests_name_what_is_wrong(call: Any, arguments: tuple[str, ...], code: int, words: str) -> None:
    result = call("targets", "check", "mac-m4", "--model", "phi-4-mini", *arguments)
    assert words in result.err
    assert result.code == code


def test_a_checkpoint_folder_is_checked_without_its_weights(call: Any, mini_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((mini_checkpoint / "config.json").read_text())
    data = call("targets", "check", "phone-pixel-6a-6gb", "--model", str(tmp_path), "--scheme", "q8_0", "--json").data
    assert data["check"]["fits"] is True
    assert data["check"]["context"] == 2048, "the target's default; the model's own is as long"


def test_a_graphics_card_is_held_against_its_video_memory(call: Any) -> None:
    result = call("targets", "check", "laptop-rtx-4070", "--model", "phi-4")
    assert result.code == 4
    assert "one process can use 7.30 GB of video memory" in result.err
    assert "usable VRAM" in result.out
    assert "embedding that is not the" in result.out
    assert "VRAM" in call("targets", "show", "laptop-rtx-4070").out


def test_a_users_device_is_shown_with_its_connection(call: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(MINE + '\n[connection]\ntransport = "adb"\naddress = "R5CT20ABCDE"\n')
    assert "transport adb, address R5CT20ABCDE" in call("targets", "show", "mine", "--target-path", str(tmp_path)).out
    (tmp_path / "mine.toml").write_text(MINE + '\n[connection]\nadress = "R5CT20ABCDE"\n')
    result = call("targets", "show", "mine", "--target-path", str(tmp_path))
    assert result.code == 3
    assert "connection.adress: unknown key" in result.err
    assert "did you mean 'address'?" in result.err


# --- plan


@pytest.mark.usefixtures("gguf_only")
def test_plan_explains_its_choice_for_each_target(call: Any) -> None:
    result = call("plan", "phi-4-mini", "--target", "laptop-x86-ddr4", "--target", "phone-pixel-9-12gb", "--json")
    assert result.code == 0
    laptop, phone = result.data["targets"]
    assert (laptop["target"], laptop["scheme"], laptop["format"], laptop["runtime"]) == (
        "laptop-x86-ddr4",
        "q4_0",
        "gguf",
        "llama_cpp",
    )
    assert any("below the 6 tok/s to keep" in step for step in laptop["steps"])
    assert phone["scheme"] == "q8_0"


@pytest.mark.usefixtures("gguf_only")
def test_speeds_are_given_as_estimated_ranges_only(call: Any) -> None:
    result = call("plan", "phi-4-mini", "--target", "laptop-x86-ddr4", "--target", "local", "--json")
    laptop, local = result.data["targets"]
    assert laptop["decode_tps_estimated"]["low"] < laptop["decode_tps_estimated"]["high"]
    assert local["decode_tps_estimated"] is None
    assert local["decode_tps_estimated_missing"] == "bandwidth is not measured"
    assert not [key for key in (*laptop, *local) if "tps" in key and "estimated" not in key]
    text = call("plan", "phi-4-mini", "--target", "laptop-x86-ddr4").out
    assert all("estimated" in line for line in text.splitlines() if "tok/s" in line)


@pytest.mark.usefixtures("gguf_only")
def test_plan_fails_only_when_nothing_fits_any_target(call: Any) -> None:
    some = call("plan", "phi-4", "--target", "phone-midrange-8gb", "--target", "jetson-orin-nx-16gb", "--json")
    assert some.code == 0
    assert [target["fits"] for target in some.data["targets"]] == [False, True]
    none = call("plan", "phi-4", "--target", "phone-midrange-8gb", "--target", "iphone-15-pro-8gb", "--json")
    assert none.code == 4
    assert [target["fits"] for target in none.data["targets"]] == [False, False]
    assert "phi-4-mini" in none.document["error"]["hint"]


def test_formats_are_written_that_have_a_plug_in() -> None:
    files = {path.stem for path in (Path(plan.__file__).parents[2] / "writers").glob("[!_]*.py")}
    assert writable_formats() == files


# --- doctor


def test_doctor_finds_this_environment_whole(call: Any) -> None:
    result = call("doctor", "--json")
    checks = {check["name"]: check for check in result.data["checks"]}
    assert {"python", "torch", "tokenizers", "llama_cpp", "memory", "disk", "cpu"} <= set(checks)
    assert checks["torch"]["status"] == "ok"
    assert result.code == (0 if checks["llama_cpp"]["status"] == "ok" else 5)


def fake_package(folder: Path, name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package ``name`` that comes before the installed one, here and in child processes."""
    (folder / f"{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(folder))


def test_a_llama_cpp_that_crashes_is_a_line_of_the_table_and_exit_5(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", {})
    monkeypatch.setattr(doctor, "OPTIONAL", {})
    fake_package(tmp_path, "llama_cpp", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", monkeypatch)
    result = call("doctor", "--json")
    assert result.code == 5
    line = next(check for check in result.data["checks"] if check["name"] == "llama_cpp")
    assert line["status"] == "broken"
    assert "SIGSEGV" in line["detail"]
    assert (
        "llama-cpp-python" in result.document["error"]["hint"] or "phi4edge[llama]" in result.document["error"]["hint"]
    )


def test_a_missing_optional_package_says_how_to_get_it_and_fails_nothing(
    call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", {})
    monkeypatch.setattr(doctor, "OPTIONAL", {"no_such_module": ("none", "a test", "pip install none")})
    monkeypatch.setattr(doctor, "_llama", lambda: doctor.Check("llama_cpp", "ok", "", True))
    result = call("doctor")
    assert result.code == 0
    assert "no_such_module: pip install none" in result.out


def test_a_target_whose_transport_is_not_there_is_exit_5(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", {})
    monkeypatch.setattr(doctor, "OPTIONAL", {})
    monkeypatch.setattr(doctor, "_llama", lambda: doctor.Check("llama_cpp", "ok", "", True))
    monkeypatch.setattr("phi4edge.core.registry.names", lambda package: ("local",))
    result = call("doctor", "--target", "jetson-orin-nano-8gb", "--json")
    assert result.code == 5
    assert "transport ssh is missing" in result.document["error"]["message"]


def test_adb_is_found_where_the_transport_finds_it(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", {})
    monkeypatch.setattr(doctor, "OPTIONAL", {})
    monkeypatch.setattr(doctor, "_llama", lambda: doctor.Check("llama_cpp", "ok", "", True))
    adb = tmp_path / "sdk" / "platform-tools" / "adb"
    adb.parent.mkdir(parents=True)
    adb.write_text("#!/bin/sh\nexit 1\n")
    adb.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ANDROID_HOME", str(tmp_path / "sdk"))
    result = call("doctor", "--target", "phone-pixel-9-12gb", "--json")
    [line] = [check for check in result.data["checks"] if check["name"] == "adb"]
    assert (line["status"], line["detail"]) == ("ok", str(adb))


# --- start-up


@pytest.mark.parametrize(
    "arguments",
    [
        ["targets", "list"],
        ["targets", "check", "mac-m4", "--model", "phi-4-mini"],
        ["plan", "phi-4-mini"],
        ["doctor", "-h"],
    ],
    ids=" ".join,
)
def test_the_commands_start_without_torch(arguments: list[str]) -> None:
    code = "import sys; from phi4edge.cli.main import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
