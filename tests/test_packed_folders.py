"""Every packed folder format through the command line: exported, verified, and found out when a bit changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from packed_support import assert_same, mixed_model
from rounded import quantized_model
from safetensors import safe_open
from support import write_checkpoint

from phi4edge.cli.main import main
from phi4edge.core.errors import InputError, TargetError
from phi4edge.core.recipe import Recipe
from phi4edge.core.registry import load, names
from phi4edge.pipeline import Order, plan
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.stages.adopt import adopt
from phi4edge.stages.export import export, reader_of, writer_of
from phi4edge.stages.quantize import quantize
from phi4edge.stages.run_reader import open_run
from phi4edge.stages.verify import verify
from phi4edge.writers import mlx
from phi4edge.writers._api import ArtifactReader, WriteOptions

WRITERS = "phi4edge.writers"
FIELDS = {
    "awq": ("qweight", "qzeros", "scales"),
    "compressed_tensors": ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "mlx": ("weight", "scales", "biases"),
}
FOLDERS = (*FIELDS, "onnx")  # all formats that are a folder
CASES = [(form, field) for form, fields in FIELDS.items() for field in fields]
LINEAR = "model.layers.1.self_attn.o_proj"


@pytest.fixture(scope="module")
def runs(phi4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for scheme in ("w4g32", "w4g32-asym", "q4_1"):
        quantize(phi4_checkpoint, Recipe(method="rtn", scheme=scheme, corpus=None), folder / scheme)
    return {path.name: path for path in folder.iterdir()}


def command(capsys: pytest.CaptureFixture[str], arguments: Sequence[str | Path]) -> tuple[int, dict[str, Any]]:
    """Exit code and document of a command with --json."""
    code = main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("form", FIELDS)
@pytest.mark.parametrize("scheme", ["w4g32", "w4g32-asym"])
def test_a_run_is_exported_and_verified_bit_for_bit(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, scheme: str
) -> None:
    out = tmp_path / "artifact"
    code, document = command(capsys, ["export", runs[scheme], "--format", form, "--out", out])
    assert (code, document["data"]["format"], document["data"]["scheme"]) == (0, form, scheme)
    code, document = command(capsys, ["verify", out, "--against", runs[scheme]])
    assert (code, document["data"]["format"], document["data"]["linears_compared"]) == (0, form, 8)
    assert isinstance(reader_of(out), ArtifactReader)


@pytest.mark.parametrize(("form", "field"), CASES)
def test_one_flipped_bit_anywhere_in_a_linear_is_found_and_the_linear_named(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, field: str
) -> None:
    run = runs["w4g32-asym"]
    file = export(run, form, tmp_path / "artifact", WriteOptions()).path / "model.safetensors"
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8:header])[f"{LINEAR}.{field}"]["data_offsets"]
    for position in {begin, begin + 1, (begin + end) // 2, end - 1}:
        data[header + position] ^= 4
        file.write_bytes(data)
        code, document = command(capsys, ["verify", file.parent, "--against", run])
        assert code in (3, 8), position  # 3: the tensors contradict each other; 8: they differ from the run's
        assert LINEAR in document["error"]["message"]
        data[header + position] ^= 4
    file.write_bytes(data)
    assert verify(file.parent, run).linears == 8


@pytest.mark.parametrize("form", FIELDS)
def test_the_fields_above_are_all_that_a_linear_has(runs: dict[str, Path], tmp_path: Path, form: str) -> None:
    file = export(runs["w4g32-asym"], form, tmp_path / "artifact", WriteOptions()).path / "model.safetensors"
    with safe_open(file, "pt") as opened:
        stored = {name.removeprefix(f"{LINEAR}.") for name in opened.keys() if name.startswith(LINEAR)}  # noqa: SIM118
    assert stored == set(FIELDS[form])


@pytest.mark.parametrize("form", FIELDS)
def test_a_folder_becomes_a_run_again_which_every_format_takes(
    runs: dict[str, Path], tmp_path: Path, form: str
) -> None:
    folder, run = export(runs["w4g32"], form, tmp_path / "folder", WriteOptions()).path, tmp_path / "run"
    adopt(folder, run)
    before, after = open_run(runs["w4g32"]), open_run(run)
    for name in before.linears:
        assert_same(after.load(name), before.load(name))
    for other in FIELDS:
        path = export(run, other, tmp_path / other, WriteOptions()).path
        assert verify(path, run).linears == 8
        config = json.loads((path / "config.json").read_text())
        assert ("quantization" in config) == (other == "mlx")  # nothing of the first format is left


def test_a_folder_on_several_schemes_does_not_become_a_run(phi4_checkpoint: Path, tmp_path: Path) -> None:
    folder = mlx.write(mixed_model(phi4_checkpoint), tmp_path / "folder", WriteOptions()).path
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj is on q8_0, others on q4_1"):
        adopt(folder, tmp_path / "run")


def test_each_artifact_is_taken_by_its_own_writer_alone(runs: dict[str, Path], tmp_path: Path) -> None:
    for form in FIELDS:
        path = export(runs["w4g32"], form, tmp_path / form, WriteOptions()).path
        assert writer_of(path).__name__.endswith(f".{form}")


@pytest.mark.parametrize("form", ["awq", "compressed_tensors", "gptq"])
def test_a_refused_run_is_told_which_formats_hold_it(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    code, document = command(capsys, ["export", runs["q4_1"], "--format", form, "--out", tmp_path / "artifact"])
    assert code == 3
    assert document["error"]["message"].startswith(
        f"{form} cannot hold this run: model.layers.0.self_attn.qkv_proj: q4_1"
    )
    able = document["error"]["hint"].partition("; formats that can hold q4_1: ")[2].split(", ")
    assert able == sorted(able)
    assert {"gguf", "mlx"} <= set(able)
    assert not {"awq", "compressed_tensors", "gptq"} & set(able)


@pytest.mark.parametrize("form", FOLDERS)
def test_every_scheme_of_the_hint_fits(tmp_path_factory: pytest.TempPathFactory, form: str) -> None:
    wide = write_checkpoint(tmp_path_factory.mktemp("wide"), "phi4", hidden_size=256, intermediate_size=256)
    writer = load(WRITERS, form)
    for name in writer.SCHEMES.split(", "):
        assert writer.refusal(quantized_model(wide, name), WriteOptions()) is None, name


@pytest.mark.parametrize("form", FOLDERS)
def test_an_export_that_fails_midway_leaves_nothing(phi4_checkpoint: Path, tmp_path: Path, form: str) -> None:
    def fail_late(linear: QuantizedLinear) -> QuantizedLinear:
        if linear.name.endswith("1.self_attn.o_proj"):
            raise OSError(28, "No space left on device")
        return linear

    model = quantized_model(phi4_checkpoint, "w4g32", fail_late)
    with pytest.raises(TargetError, match="No space left on device"):
        load(WRITERS, form).write(model, tmp_path / "out", WriteOptions())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FOLDERS)
def test_a_disk_that_is_too_small_is_noticed_before_writing(
    phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(TargetError, match=r"needs .* KiB, but 1000 B are free"):
        load(WRITERS, form).write(quantized_model(phi4_checkpoint, "w4g32"), tmp_path / "out", WriteOptions())
    assert list(tmp_path.iterdir()) == []


def test_something_else_is_told_the_known_formats_in_the_order_of_the_registry(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not an artifact of a known format") as caught:
        writer_of(tmp_path)
    assert caught.value.hint == f"known formats: {', '.join(names(WRITERS))}"
    assert set(FIELDS) < set(names(WRITERS))


@pytest.mark.parametrize(("target", "form"), [("jetson-agx-orin-64gb", "gptq"), ("mac-m4", "gguf")])
def test_a_fixed_scheme_takes_the_first_format_whose_size_is_known(
    phi4_checkpoint: Path, tmp_path: Path, target: str, form: str
) -> None:
    """Both targets list another of these formats first; that it can be written is not enough to plan with it."""
    order = Order(str(phi4_checkpoint), (target,), tmp_path, Recipe(scheme="w4g32"), scheme_given=True)
    assert [planned["format"] for planned in plan(order)] == [form]
