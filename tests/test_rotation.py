"""Rotations: orthogonal whatever the size, folded without changing the function, and refused where they cannot be."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support import write_checkpoint
from torch import Tensor

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.cli.commands.quantize import command
from phi4edge.core.errors import InputError, UsageError
from phi4edge.core.recipe import CorpusRecipe, MixRecipe, Recipe, TuningRecipe, solving_recipe
from phi4edge.core.workdir import JOURNAL
from phi4edge.model.block import LINEARS
from phi4edge.model.compute import BFLOAT16, FLOAT32, computing, has_bfloat16_units
from phi4edge.model.forward import stream_logits
from phi4edge.model.source import WeightSource
from phi4edge.stages import export
from phi4edge.stages.quantize import plan, quantize
from phi4edge.stages.run_reader import open_run
from phi4edge.stages.verify import verify
from phi4edge.transforms.rotation import Rotated, orthogonal, rotated
from phi4edge.writers._api import WriteOptions

TEXT = str(Path(__file__).with_name("support.py"))
CORPUS = CorpusRecipe(corpus=TEXT, samples=8, sequence_length=48)
RECIPE = Recipe(scheme="q4_0", corpus=CORPUS, rotation="residual+heads", rotation_seed=3)


def logits(source: WeightSource) -> Tensor:
    tokens = torch.randint(0, 512, (2, 70), generator=torch.Generator().manual_seed(1))
    return torch.stack(list(stream_logits(source, tokens)))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("size", [1, 2, 15, 28, 64, 96, 128, 320, 576, 768, 3072, 5120])
def test_a_rotation_is_orthogonal(size: int) -> None:
    turn = orthogonal((size,), "seed")
    Q = turn(torch.eye(size))
    assert torch.allclose(Q @ Q.T, torch.eye(size), atol=1e-5)
    x = torch.randn(3, 2, size, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(turn(x), x @ Q, atol=1e-4)


@pytest.mark.parametrize("size", [64, 96, 576, 768, 3072, 5120])
def test_sizes_of_the_family_get_hadamard_matrices_and_one_channel_is_spread_over_all(size: int) -> None:
    Q = orthogonal((size,), "seed")(torch.eye(size))
    assert torch.allclose(Q.abs(), torch.full((size, size), size**-0.5), rtol=1e-5)


def test_the_seed_and_the_place_decide_the_signs_and_nothing_else_does() -> None:
    assert torch.equal(orthogonal((64,), "0/a").signs, orthogonal((64,), "0/a").signs)
    assert not torch.equal(orthogonal((64,), "0/a").signs, orthogonal((64,), "1/a").signs)
    # A run stores its seed alone: these must stay what they are, on every machine.
    assert orthogonal((8,), "0/residual").signs.tolist() == [1, 1, 1, -1, 1, -1, -1, 1]


@pytest.mark.parametrize("rotation", ["residual", "heads", "residual+heads"])
@pytest.mark.parametrize("hidden", [64, 96], ids=["power of two", "3 · 32"])
def test_rotation_leaves_full_precision_logits_unchanged(rotation: str, hidden: int, tmp_path: Path) -> None:
    source = open_checkpoint(write_checkpoint(tmp_path / "model", "phi4", hidden_size=hidden))
    changed = rotated(source, rotation, 0)
    for name in ("self_attn.qkv_proj", "self_attn.o_proj"):
        weight = f"model.layers.1.{name}.weight"
        assert relative(changed.tensor(weight), source.tensor(weight)) > 0.3
    assert relative(logits(changed), logits(source)) <= 1e-4


def test_heads_alone_can_be_rotated_where_the_head_is_tied_and_the_residual_stream_cannot(
    mini_checkpoint: Path, tmp_path: Path
) -> None:
    source = open_checkpoint(mini_checkpoint)
    assert relative(logits(rotated(source, "heads", 0)), logits(source)) <= 1e-4
    for rotation in ("residual", "residual+heads"):
        with pytest.raises(InputError, match="the head is tied to the embedding") as caught:
            rotated(source, rotation, 0)
        assert "--rotation heads" in str(caught.value.hint)
    flags = [str(mini_checkpoint), "--out", str(tmp_path / "run"), "--rotation", "residual", "--json"]
    result = CliRunner().invoke(command, flags)
    assert isinstance(result.exception, InputError)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="unknown rotation"):
        Recipe(rotation="spin")


def test_queries_and_keys_are_not_rotated(phi4_checkpoint: Path) -> None:
    source = open_checkpoint(phi4_checkpoint)
    kept, name = source.config.q_size + source.config.kv_size, "model.layers.0.self_attn.qkv_proj.weight"
    changed = rotated(source, "heads", 0).tensor(name)
    assert torch.equal(changed[:kept], source.tensor(name)[:kept])
    assert not torch.allclose(changed[kept:], source.tensor(name)[kept:], rtol=1e-2)


def test_rows_of_a_rotated_tensor_are_rows_of_the_whole(phi4_checkpoint: Path) -> None:
    source = Rotated(open_checkpoint(phi4_checkpoint), "residual+heads", 0)
    for name, shape in source.config.tensor_shapes().items():
        whole = source.tensor(name)
        assert whole.shape == shape
        assert torch.allclose(source.tensor(name, slice(3, 40)), whole[3:40], atol=1e-6)
        if name.endswith("norm.weight"):
            assert torch.equal(whole, torch.ones(shape))


def test_a_rotated_run_goes_through_every_format_and_verifies(phi4_checkpoint: Path, tmp_path: Path) -> None:
    quantize(phi4_checkpoint, RECIPE, tmp_path / "run")
    model = open_run(tmp_path / "run")
    assert relative(logits(model), logits(open_checkpoint(phi4_checkpoint))) < 0.5
    for name, form in (("model.gguf", "gguf"), ("folder", "gptq")):
        export.export(tmp_path / "run", form, tmp_path / name, WriteOptions(embedding="f16", head="f16"))
        assert verify(tmp_path / name, tmp_path / "run").linears == 8
        reader = export.reader_of(tmp_path / name)
        assert relative(logits(reader), logits(model)) <= 0.02  # embedding and head are rounded to what is stored
        assert torch.equal(reader.tensor("model.norm.weight"), torch.ones(64))


def digests(run: Path) -> dict[str, str]:
    kept = [*run.glob("blocks/*"), run / "imatrix.safetensors", run / "manifest.json"]
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


def test_a_rotated_run_with_scaled_inputs_is_resumed_to_the_same_bytes(phi4_checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [str(phi4_checkpoint), "--out", str(run), "--corpus", TEXT, "--samples", "8", "--sequence-length", "48"]
    flags = ["--scheme", "q4_0", "--awq", "--rotation", "residual+heads", "--rotation-seed", "3", "--json"]
    result = CliRunner().invoke(command, [*arguments, *flags])
    assert json.loads(result.stdout)["data"]["recipe"]["rotation"] == "residual+heads"
    whole = digests(run)
    lines = (run / JOURNAL).read_bytes().split(b"\n")
    (run / JOURNAL).write_bytes(lines[0] + b"\n")  # as if killed after block 0; its stream is gone
    (run / "manifest.json").unlink()
    assert CliRunner().invoke(command, [*arguments, *flags]).exit_code == 0
    assert digests(run) == whole


@pytest.mark.parametrize("unit", [FLOAT32, BFLOAT16])
def test_a_rotated_weight_is_the_same_whatever_else_is_computed_on(unit: str, phi4_checkpoint: Path) -> None:
    source = rotated(open_checkpoint(phi4_checkpoint), "residual+heads", 3)
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    names += [f"model.layers.0.{linear}.weight" for linear in LINEARS]
    before = [source.tensor(name) for name in names]
    with computing(unit):
        assert all(torch.equal(source.tensor(name), weight) for name, weight in zip(names, before, strict=True))


@pytest.mark.parametrize(
    "unit",
    [
        FLOAT32,
        pytest.param(BFLOAT16, marks=pytest.mark.skipif(not has_bfloat16_units(), reason="no bfloat16 units")),
    ],
)
def test_both_streams_of_a_rotated_run_are_made_again_to_the_same_bytes(
    unit: str, phi4_checkpoint: Path, tmp_path: Path
) -> None:
    """Full precision's stream is made of weights that are rotated once more, while products are computed on units."""
    run, recipe = tmp_path / "run", solving_recipe({"scheme": "q4_0", "compute": unit, "tune_passes": 0}, CORPUS)
    manifest = quantize(phi4_checkpoint, recipe, run).manifest["data"]
    assert manifest["recipe"]["rotation"] == "residual+heads"
    assert manifest["recipe"]["full_precision_targets"] > 0
    whole = digests(run)
    lines = (run / JOURNAL).read_bytes().split(b"\n")
    (run / JOURNAL).write_bytes(lines[0] + b"\n")
    (run / "manifest.json").unlink()
    assert not list((run / "hidden").glob("*.bin"))
    quantize(phi4_checkpoint, recipe, run)
    assert digests(run) == whole


def test_rotation_goes_with_a_mix_of_types_scaled_inputs_and_tuning(tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}
    folder = write_checkpoint(tmp_path / "model", "phi4", **shape)
    recipe = replace(
        RECIPE, awq=True, tuning=TuningRecipe(passes=1), mix=MixRecipe(("q4_0", "q4_k", "q6_k"), target_bpw=6.5)
    )
    manifest = quantize(folder, recipe, tmp_path / "run").manifest["data"]
    model = open_run(tmp_path / "run")
    assert {model.scheme_of(name).name for name in model.linears} >= {"q4_k", "q6_k"}
    assert any(linear["awq"]["alpha"] for linear in manifest["linears"])
    export.export(tmp_path / "run", "gguf", tmp_path / "model.gguf", WriteOptions())
    assert verify(tmp_path / "model.gguf", tmp_path / "run").linears == 8
    exact = logits(open_checkpoint(folder))
    assert relative(logits(export.reader_of(tmp_path / "model.gguf")), exact) < 0.3


@pytest.mark.parametrize("effort", ["default", "high"])
def test_an_effort_rotates_both_where_the_head_is_a_matrix_of_its_own_and_nothing_where_it_is_tied(
    effort: str, phi4_checkpoint: Path, mini_checkpoint: Path
) -> None:
    recipe = solving_recipe({"effort": effort}, CorpusRecipe(samples=64))
    assert recipe.rotation == "auto"
    assert plan(phi4_checkpoint, recipe)["recipe"]["rotation"] == "residual+heads"
    assert plan(mini_checkpoint, recipe)["recipe"]["rotation"] == "none"
    kept = solving_recipe({"effort": effort, "rotation": "none"}, CorpusRecipe(samples=64))
    assert plan(phi4_checkpoint, kept)["recipe"]["rotation"] == "none"
