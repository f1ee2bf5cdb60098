"""Verify names what differs: the tensor, the row and the column, or the file whose hash is another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import write_checkpoint

from phi4edge.checkpoint.index import open_index
from phi4edge.cli.main import main
from phi4edge.core.errors import InputError, VerifyError
from phi4edge.core.recipe import Recipe
from phi4edge.report.card import fill_card
from phi4edge.stages.export import export
from phi4edge.stages.quantize import quantize
from phi4edge.stages.verify import verify
from phi4edge.writers._api import WriteOptions
from phi4edge.writers._gguf_file import read_gguf


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    model = write_checkpoint(folder / "model", "phi4", hidden_size=128, intermediate_size=256)
    return quantize(model, Recipe(method="rtn", scheme="w4g32"), folder / "run").path


def flip(path: Path, offset: int) -> None:
    """Another lowest bit in one byte of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


def exported(run: Path, out: Path, format_name: str, **options: str) -> Path:
    return export(run, format_name, out, WriteOptions(**options)).path  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"head": "f16", "embedding": "q8_0"}])
@pytest.mark.parametrize("format_name", ["gguf", "gptq"])
def test_an_artifact_equals_its_run_in_every_tensor(
    run: Path, tmp_path: Path, format_name: str, options: dict[str, str]
) -> None:
    if format_name == "gptq":
        options = {"head": "q8_0"} if options else {}
    found = verify(exported(run, tmp_path / "artifact", format_name, **options), run)
    assert (found.tensors, found.compared, found.linears, found.hashes) == (15, 15, 8, True)


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj"),
        ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
    ],
)
def test_a_flipped_bit_in_a_gguf_is_named(run: Path, tmp_path: Path, tensor: str, name: str) -> None:
    path = exported(run, tmp_path / "model.gguf", "gguf")
    place = read_gguf(path).tensors[tensor]
    flip(path, place.offset + place.nbytes - 1)
    with pytest.raises(VerifyError, match=rf"{name}: \w+ at row {place.rows - 1 if len(place.shape) > 1 else 127}, "):
        verify(path, run)
    with pytest.raises(VerifyError, match=r"model\.gguf is changed since it was written"):
        verify(path, None)


@pytest.mark.parametrize("field", ["mlp.down_proj.qweight", "input_layernorm.weight"])
def test_a_flipped_bit_in_a_folder_is_named(run: Path, tmp_path: Path, field: str) -> None:
    folder = exported(run, tmp_path / "gptq", "gptq")
    place = open_index(folder, check=False).tensors[f"model.layers.1.{field}"]
    flip(place.path, place.offset)
    with pytest.raises(VerifyError, match=rf"model\.layers\.1\.{field.rsplit('.', 1)[0]}"):
        verify(folder, run)
    with pytest.raises(VerifyError, match=r"model\.safetensors is changed"):
        verify(folder, None)


def test_a_side_file_that_changed_or_went_is_named(run: Path, tmp_path: Path) -> None:
    folder = exported(run, tmp_path / "gptq", "gptq")
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    with pytest.raises(VerifyError, match=r"tokenizer\.json is changed, tokenizer_config\.json is missing"):
        verify(folder, run)


def test_sha256sum_reads_the_lists(run: Path, tmp_path: Path) -> None:
    folder = exported(run, tmp_path / "gptq", "gptq")
    subprocess.run(["sha256sum", "--strict", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=True)
    exported(run, tmp_path / "model.gguf", "gguf")
    subprocess.run(["sha256sum", "--strict", "--quiet", "-c", "model.gguf.sha256"], cwd=tmp_path, check=True)


def test_the_manifest_says_what_the_folder_is_and_what_it_was_made_from(run: Path, tmp_path: Path) -> None:
    folder = exported(run, tmp_path / "gptq", "gptq")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["scheme"], manifest["made"]["method"]) == ("gptq", "w4g32", "rtn")
    named = {path.name for path in folder.iterdir()} - {"manifest.json", "SHA256SUMS"}
    assert set(manifest["files"]) == named


def test_a_replaced_artifact_is_not_held_against_the_old_list(run: Path, tmp_path: Path) -> None:
    path = exported(run, tmp_path / "model.gguf", "gguf")
    before = (tmp_path / "model.gguf.sha256").read_text()
    export(run, "gguf", path, WriteOptions(head="f16", force=True))
    assert (tmp_path / "model.gguf.sha256").read_text() != before
    assert verify(path, run).hashes


def test_without_a_list_the_bits_are_compared_all_the_same(run: Path, tmp_path: Path) -> None:
    path = exported(run, tmp_path / "model.gguf", "gguf")
    (tmp_path / "model.gguf.sha256").unlink()
    found = verify(path, run)
    assert (found.compared, found.hashes) == (15, False)


def test_a_list_that_is_none_is_an_error(run: Path, tmp_path: Path) -> None:
    path = exported(run, tmp_path / "model.gguf", "gguf")
    (tmp_path / "model.gguf.sha256").write_text("all is well\n")
    with pytest.raises(InputError, match="is no line of sha256sum's"):
        verify(path, run)


def test_an_artifact_of_another_run_differs(run: Path, tmp_path: Path) -> None:
    model = json.loads((run / "location.json").read_text())["folder"]
    other = quantize(model, Recipe(method="rtn", scheme="w4g64"), tmp_path / "other").path
    path = exported(run, tmp_path / "model.gguf", "gguf")
    with pytest.raises(VerifyError, match="the run has"):
        verify(path, other)


def test_a_model_card_gets_the_drift_of_its_own_artifact_and_verify_still_agrees(run: Path, tmp_path: Path) -> None:
    model = json.loads((run / "location.json").read_text())["folder"]
    folder = exported(run, tmp_path / "gptq", "gptq")
    assert "Not measured." in (folder / "README.md").read_text()
    text = tmp_path / "text.txt"
    text.write_text("Every good thing is 3 or 4 things. " * 60)
    measure = ["drift", str(folder), "--reference", model, "--text", str(text), "--context", "64", "--chunks", "2"]
    answer = subprocess.run([sys.executable, "-m", "phi4edge", *measure, "--json"], capture_output=True, check=True)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "drift.json").write_bytes(answer.stdout)
    kld = json.loads(answer.stdout)["data"]["metrics"]["kld"]["value"]
    report = ["report", str(tmp_path / "results"), "--out", str(tmp_path / "report"), "--card", str(folder), "--quiet"]
    assert main(report) == 0
    card = (folder / "README.md").read_text()
    assert "Not measured." not in card
    assert "Mean KLD" in card
    assert any(f"{kld:.{digits}g}" in card for digits in (2, 3, 4))
    assert verify(folder, run).hashes
    other = exported(run, tmp_path / "other", "gptq", head="q8_0")
    with pytest.raises(InputError, match="no drift of it"):
        fill_card(other, [tmp_path / "results"])
