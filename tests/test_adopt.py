"""A checkpoint that another tool quantized becomes a run: its codes travel on to other formats, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from killing import killed_at
from rounded import quantized_model
from safetensors.torch import load_file, save_file
from support import write_checkpoint

from phi4edge.cli.main import main
from phi4edge.core.errors import InputError, ResumeError
from phi4edge.stages.adopt import adopt
from phi4edge.stages.export import export
from phi4edge.stages.run_reader import open_run
from phi4edge.stages.verify import verify
from phi4edge.writers import gptq
from phi4edge.writers._api import WriteOptions

LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("adopt") / "model", "phi4", hidden_size=128, intermediate_size=256)


@pytest.fixture
def theirs(base: Path, tmp_path: Path) -> Path:
    return gptq.write(quantized_model(base, "w4g32"), tmp_path / "theirs", WriteOptions()).path


def split(folder: Path, fused: str, parts: dict[str, int]) -> None:
    """Store a fused projection as GPTQModel does: a matrix each, its columns (output channels) cut apart."""
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if f".{fused}." in n]:
        whole, field = tensors.pop(name), name.rsplit(".", 1)[1]
        sizes = [rows // 8 if field == "qzeros" else rows for rows in parts.values()]
        pieces = [whole] * len(parts) if field == "g_idx" else list(whole.split(sizes, dim=1))
        for part, piece in zip(parts, pieces, strict=True):
            tensors[name.replace(fused, part)] = piece.contiguous().clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_codes_of_a_gptq_checkpoint_reach_a_gguf_bit_for_bit(theirs: Path, tmp_path: Path) -> None:
    adopt(theirs, tmp_path / "run")
    artifact = export(tmp_path / "run", "gguf", tmp_path / "model.gguf", WriteOptions())
    assert verify(artifact.path, tmp_path / "run").linears == 8
    reader = gptq.read(theirs)
    run = open_run(tmp_path / "run")
    for name in run.linears:
        expected, found = reader.quantized(name), run.load(name)
        assert expected is not None
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.params["scales"], expected.params["scales"])
    assert run.provenance["calibration"] == "unknown"
    assert "quantization_config" not in run.config.raw


def test_and_a_gptq_checkpoint_again_with_the_same_bytes(theirs: Path, tmp_path: Path) -> None:
    adopt(theirs, tmp_path / "run")
    again = export(tmp_path / "run", "gptq", tmp_path / "again", WriteOptions()).path
    assert (again / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    for name in ("config.json", "quantize_config.json", "tokenizer.json"):
        assert json.loads((again / name).read_text()) == json.loads((theirs / name).read_text())


def test_projections_that_another_tool_split_are_fused_again(theirs: Path, base: Path, tmp_path: Path) -> None:
    whole = gptq.read(theirs)
    expected = {
        f"model.layers.{i}.{name}": whole.quantized(f"model.layers.{i}.{name}") for i in range(2) for name in LINEARS
    }
    config = whole.config
    split(theirs, "gate_up_proj", {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size})
    split(theirs, "qkv_proj", {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size})
    adopt(theirs, tmp_path / "run")
    run = open_run(tmp_path / "run")
    for name, linear in expected.items():
        assert linear is not None
        assert torch.equal(run.load(name).codes, linear.codes)
        assert torch.equal(run.load(name).dequantize(), linear.dequantize())


def test_a_missing_part_is_named(theirs: Path, tmp_path: Path) -> None:
    config = gptq.read(theirs).config
    split(theirs, "qkv_proj", {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size})
    tensors = load_file(theirs / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.scales"]
    save_file(tensors, theirs / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.k_proj\.scales is missing"):
        adopt(theirs, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_channels_in_activation_order_are_refused_by_that_name(theirs: Path, tmp_path: Path) -> None:
    tensors = load_file(theirs / "model.safetensors")
    order = tensors["model.layers.0.mlp.down_proj.g_idx"]
    order.copy_(order.flip(0))
    save_file(tensors, theirs / "model.safetensors")
    with pytest.raises(InputError, match="g_idx"):
        adopt(theirs, tmp_path / "run")


def test_desc_act_with_groups_in_place_is_taken_over(theirs: Path, tmp_path: Path) -> None:
    for name in ("config.json", "quantize_config.json"):
        document = json.loads((theirs / name).read_text())
        (document.get("quantization_config") or document)["desc_act"] = True
        (theirs / name).write_text(json.dumps(document))
    assert adopt(theirs, tmp_path / "run").manifest["data"]["scheme"] == "w4g32"


def test_zero_points_keep_a_checkpoint_out_of_gguf_and_the_reason_is_said(base: Path, tmp_path: Path) -> None:
    folder = gptq.write(quantized_model(base, "w4g32-asym"), tmp_path / "theirs", WriteOptions()).path
    adopt(folder, tmp_path / "run")
    with pytest.raises(InputError, match="−scale·zero is not exact"):
        export(tmp_path / "run", "gguf", tmp_path / "model.gguf", WriteOptions())
    assert not (tmp_path / "model.gguf").exists()
    export(tmp_path / "run", "gptq", tmp_path / "again", WriteOptions())


def test_killed_at_a_commit_it_goes_on_to_the_same_bytes(theirs: Path, tmp_path: Path) -> None:
    script = """
from phi4edge.core.workdir import Workdir
from phi4edge.stages.adopt import adopt
Workdir.commit = dying(Workdir.commit)
adopt(sys.argv[2], Path(sys.argv[3]))
"""
    assert killed_at(2, script, theirs, tmp_path / "killed")
    assert not (tmp_path / "killed" / "manifest.json").exists()
    assert main(["quantize", str(theirs), "--out", str(tmp_path / "killed"), "--quiet"]) == 0
    adopt(theirs, tmp_path / "whole")
    for name in ("manifest.json", "blocks/00000.safetensors", "blocks/00001.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_checkpoint_under_the_same_name_is_not_gone_on_with(theirs: Path, base: Path, tmp_path: Path) -> None:
    adopt(theirs, tmp_path / "run")
    gptq.write(quantized_model(base, "w4g64"), theirs, WriteOptions(force=True))
    with pytest.raises(ResumeError, match="begun with other inputs"):
        adopt(theirs, tmp_path / "run")


def test_flags_that_say_how_to_solve_are_refused(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(theirs), "--out", str(tmp_path / "run"), "--method", "gptq"]) == 2
    assert "--method cannot change them" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_says_what_it_took_over_and_a_report_reads_it(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(theirs), "--out", str(tmp_path / "run"), "--json", "--quiet"]
    assert main([*command, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["linears"] == 8
    assert not (tmp_path / "run").exists()
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["data"]["method"] == "adopted"
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report"), "--quiet"]) == 0
    assert "adopted" in (tmp_path / "report" / "report.md").read_text()
