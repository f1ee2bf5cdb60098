"""A damaged ONNX folder is refused, and the damage named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rounded import quantized_model

from phi4edge.core.errors import InputError, VerifyError
from phi4edge.core.recipe import Recipe
from phi4edge.stages.export import export
from phi4edge.stages.quantize import quantize
from phi4edge.stages.verify import verify
from phi4edge.writers import onnx as writer
from phi4edge.writers._api import WriteOptions

pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

import onnx


@pytest.fixture(scope="module")
def written(phi4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of w4g32-asym. Copy it before you change it."""
    out = tmp_path_factory.mktemp("onnx") / "model"
    return writer.write(quantized_model(phi4_checkpoint, "w4g32-asym"), out, WriteOptions(accuracy_level=1)).path


def _flip_last_code(folder: Path) -> None:
    ref = writer.read(folder).file.tensors["model.layers.1.mlp.up_proj.MatMulNBits.qweight"]
    with (folder / "model.onnx.data").open("r+b") as file:
        file.seek(ref.offset + ref.nbytes - 1)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 16]))


def test_verify_names_the_first_code_that_differs(phi4_checkpoint: Path, tmp_path: Path) -> None:
    run = quantize(phi4_checkpoint, Recipe(method="rtn", scheme="w4g32-asym", corpus=None), tmp_path / "run").path
    out = export(run, "onnx", tmp_path / "onnx", WriteOptions()).path
    found = verify(out, run)
    assert (found.format, found.compared, found.hashes) == ("onnx", found.tensors, True)
    _flip_last_code(out)
    with pytest.raises(VerifyError, match=r"gate_up_proj: code at row 255, column 63"):
        verify(out, run)
    with pytest.raises(VerifyError, match=r"model\.onnx\.data is changed"):
        verify(out, None)


def _cut(name: str, nbytes: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-nbytes])

    return damage


def _other(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        model = onnx.load_model(folder / "model.onnx", load_external_data=False)
        change(model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    return damage


def _node(model: Any, part: str) -> Any:
    return next(node for node in model.graph.node if node.name.endswith(f"{part}/MatMulNBits"))


def _block_size(model: Any) -> None:
    next(a for a in _node(model, "layers.1/mlp/up_proj").attribute if a.name == "block_size").i = 64


def _drop(model: Any) -> None:
    model.graph.initializer.remove(
        next(t for t in model.graph.initializer if t.name.endswith("1.attn.o_proj.MatMulNBits.scales"))
    )


def _outside(model: Any) -> None:
    entry = next(e for e in model.graph.initializer[0].external_data if e.key == "location")
    entry.value = "../elsewhere"


def _unnamed(model: Any) -> None:
    del model.metadata_props[:]


def _scheme(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        next(entry for entry in model.metadata_props if entry.key == "phi4edge.scheme").value = name

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_cut("model.onnx.data", 1), r"model\.onnx\.data: .*ends at byte \d+, the file has \d+"),
        (_cut("model.onnx", 3), r"model\.onnx: not an ONNX model"),
        (_cut("genai_config.json", 9), r"genai_config\.json: not valid JSON"),
        (lambda folder: (folder / "model.onnx").unlink(), r"model\.onnx: is missing"),
        (lambda folder: (folder / "model.onnx.data").unlink(), r"model\.onnx\.data: is missing"),
        (_other(_block_size), r"layers\.1\.mlp\.up_proj: block_size is 64, w4g32-asym has 32"),
        (_other(_drop), r"has no model\.layers\.1\.attn\.o_proj\.MatMulNBits\.scales"),
        (_other(_outside), r"outside of the folder"),
        (_other(_unnamed), r"was not written by phi4edge"),
        (
            _other(_scheme("w4g64-asym")),
            r"qkv_proj\.MatMulNBits\.qweight is U8 \[128, 2, 16\], expected U8 \[128, 1, 32\]",
        ),
        (_other(_scheme("w4g33")), r"not divisible|power of two"),
        (_other(_scheme("nonsense")), r"unknown scheme 'nonsense'"),
    ],
)
def test_a_damaged_folder_is_refused_and_the_damage_named(
    written: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(written, out)
    damage(out)
    with pytest.raises(InputError, match=words):
        writer.read(out)
