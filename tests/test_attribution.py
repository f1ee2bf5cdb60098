"""Attribution: every step of drift is measured apart, and a planted fault is found where it was planted."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rounded import quantized_model
from support import write_checkpoint

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.cli.main import main
from phi4edge.core.errors import InputError
from phi4edge.core.recipe import Recipe
from phi4edge.measurement.attribution import config_differences
from phi4edge.measurement.attribution_run import attribute
from phi4edge.measurement.drift import divergence
from phi4edge.measurement.drift_run import measure_drift
from phi4edge.measurement.gates import Limits
from phi4edge.measurement.reference import ReferenceStore
from phi4edge.measurement.references import resolve_reference
from phi4edge.measurement.tensors import output_errors, stream_errors, stream_swapped
from phi4edge.model.block import forward_block, load_block
from phi4edge.model.forward import embed, stream_logits
from phi4edge.model.rope import rotary_table
from phi4edge.model.source import Overlay, Swapped
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.runtimes._api import Settings
from phi4edge.stages.export import export
from phi4edge.stages.quantize import quantize
from phi4edge.stages.run_reader import open_run
from phi4edge.stages.verify import verify
from phi4edge.writers import gguf, gptq
from phi4edge.writers._api import WriteOptions

HAS_LLAMA = importlib.util.find_spec("llama_cpp") is not None
ONE = Settings(threads=1, kv_type="f32")
FAULTY = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attribution")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return write_checkpoint(folder / "model", "phi4", hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="module")
def text(folder: Path) -> Path:
    path = folder / "words.txt"
    path.write_text(Path(__file__).read_text())
    return path


@pytest.fixture(scope="module")
def store(folder: Path, model: Path, text: Path) -> ReferenceStore:
    return resolve_reference(str(model), text=str(text), context=64, chunks=8, store=folder / "store")


@pytest.fixture(scope="module")
def run(folder: Path, model: Path) -> Path:
    return quantize(model, Recipe(method="rtn", scheme="w4g32"), folder / "run").path


@pytest.fixture(scope="module")
def artifact(folder: Path, run: Path) -> Path:
    return export(run, "gguf", folder / "model.gguf", WriteOptions()).path


def attributed(artifact: Path, store: ReferenceStore, model: Path, **more: Any) -> dict[str, Any]:
    return attribute(artifact, store, str(model), **({"runtime": "torch_ref", "settings": ONE} | more))


def by_stage(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["stage"]: row for row in found["stages"]}


# --- stages ------------------------------------------------------------------------------------


def test_divergence_is_the_definition_and_exactly_zero_for_equal_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    before = 4 * torch.randn(30, 700, generator=generator)
    before[:, 5] = -1e4
    after = before + 0.3 * torch.randn(before.shape, generator=generator)
    p, q = torch.log_softmax(before.double(), 1), torch.log_softmax(after.double(), 1)
    exact = (p.exp() * (p - q)).sum(1).numpy()
    np.testing.assert_allclose(divergence(before, after), exact, rtol=1e-4)
    assert (divergence(before, before.clone()) == 0).all()


def test_what_the_stages_add_sums_to_the_drift_that_is_measured(
    artifact: Path, store: ReferenceStore, model: Path
) -> None:
    found = attributed(artifact, store, model, tensors=0)
    measured = measure_drift(artifact, store, runtime="torch_ref", settings=ONE)["metrics"]["kld"]["value"]
    assert [row["stage"] for row in found["stages"]] == ["weights"]
    assert found["stages"][-1]["kld"]["value"] == pytest.approx(measured, rel=1e-6)
    assert found["positions"] == 8 * 31
    assert found["tensors"] is None
    assert "not asked for" in found["tensors_reason"]


def test_the_format_s_step_is_zero_where_verify_holds(
    artifact: Path, store: ReferenceStore, model: Path, run: Path
) -> None:
    verify(artifact, run)
    found = attributed(artifact, store, model, run=open_run(run), tensors=0)
    stages = by_stage(found)
    assert list(stages) == ["linears", "tables", "format"]
    assert stages["format"]["step_kld"]["value"] == stages["format"]["added_kld"]["value"] == 0
    assert stages["linears"]["step_kld"]["value"] > 100 * stages["tables"]["step_kld"]["value"] > 0
    assert "bit for bit" in found["findings"][0]
    total = sum(row["added_kld"]["value"] for row in found["stages"])
    assert total == pytest.approx(stages["format"]["kld"]["value"], rel=1e-9)


def test_the_format_s_step_is_not_zero_for_another_run_s_artifact(
    folder: Path, artifact: Path, store: ReferenceStore, model: Path
) -> None:
    other = quantize(model, Recipe(method="rtn", scheme="q4_1"), folder / "other").path
    found = attributed(artifact, store, model, run=open_run(other), tensors=0)
    assert by_stage(found)["format"]["step_kld"]["value"] > 1e-3
    assert "does not hold the run's linears" in found["findings"][0]


def test_a_run_of_another_model_is_refused(folder: Path, artifact: Path, store: ReferenceStore, model: Path) -> None:
    other = write_checkpoint(folder / "same-shapes", "phi4", hidden_size=128, intermediate_size=256, seed=7)
    made = quantize(other, Recipe(method="rtn", scheme="w4g32"), folder / "foreign").path
    with pytest.raises(InputError, match="not those of the reference"):
        attributed(artifact, store, model, run=open_run(made))
    small = open_checkpoint(write_checkpoint(folder / "small", "phi4")).config
    with pytest.raises(InputError, match="hidden_size is 64 in the artifact, 128 in the reference"):
        config_differences(open_checkpoint(model).config, small)


@pytest.mark.skipif(not HAS_LLAMA, reason="llama-cpp-python is not installed")
def test_kernels_and_kv_cache_are_steps_of_their_own(artifact: Path, store: ReferenceStore, model: Path) -> None:
    settings = Settings(threads=1, kv_type="q4_0", flash_attention="on")
    found = attributed(artifact, store, model, runtime="llama_cpp", settings=settings, tensors=0)
    stages = by_stage(found)
    assert list(stages) == ["weights", "runtime", "kv_cache"]
    assert (stages["runtime"]["settings"]["kv_type"], stages["kv_cache"]["settings"]["kv_type"]) == ("f32", "q4_0")
    steps = {name: row["step_kld"] for name, row in stages.items()}
    assert 0 < steps["runtime"]["value"] < steps["weights"]["value"]
    assert steps["kv_cache"]["value"] > 3 * steps["kv_cache"]["se"] > 0
    drift = measure_drift(artifact, store, settings=settings)["metrics"]["kld"]["value"]
    assert stages["kv_cache"]["kld"]["value"] == pytest.approx(drift, rel=1e-6)
    plain = attributed(artifact, store, model, runtime="llama_cpp", tensors=0)
    assert plain["not_measured"]["kv_cache"] == "the KV cache is in float32"


# --- tensors -----------------------------------------------------------------------------------


def test_swapped_models_streamed_together_equal_each_model_alone(model: Path, run: Path, store: ReferenceStore) -> None:
    full, quantized = open_checkpoint(model), open_run(run)
    tokens = torch.from_numpy(store.tokens[:3])
    everything = frozenset(full.config.tensor_shapes())
    swaps = [
        frozenset[str](),
        frozenset({"model.embed_tokens.weight"}),
        frozenset({"model.layers.0.input_layernorm.weight", f"{FAULTY}.weight"}),
        frozenset({"model.layers.1.self_attn.qkv_proj.weight", "lm_head.weight"}),
        everything,
    ]
    noisy = {name: 1.1 * full.tensor(name) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    gain = {"model.layers.0.input_layernorm.weight": 0.7 * full.tensor("model.layers.0.input_layernorm.weight")}
    other = Overlay(quantized, noisy | gain)
    together = list(stream_swapped(full, other, swaps, tokens, first=32))
    for i, names in enumerate(swaps):
        alone = stream_logits(Swapped(full, other, names, full.config), tokens, first=32)
        for chunk, expected in enumerate(alone):
            torch.testing.assert_close(together[chunk][i], expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(together[0][2], together[0][0])


def test_output_errors_are_those_that_were_put_in(mini_checkpoint: Path, model: Path, store: ReferenceStore) -> None:
    full = open_checkpoint(model)
    tokens = torch.from_numpy(store.tokens[:2])
    for number, name in enumerate(full.config.tensor_shapes()):
        scale = 1 + 0.01 * (number + 1)
        errors = output_errors(full, Overlay(full, {name: scale * full.tensor(name)}), tokens)
        assert errors.pop(name) == pytest.approx((scale - 1) ** 2, rel=1e-3)
        assert set(errors.values()) == {0.0}
        assert len(errors) == len(full.config.tensor_shapes()) - 1
    generator = torch.Generator().manual_seed(0)
    changed = {
        n: full.tensor(n) + 0.1 * torch.randn(s, generator=generator) for n, s in full.config.tensor_shapes().items()
    }
    together = output_errors(full, Overlay(full, changed), tokens)  # activations are the full-precision model's
    for name in together:
        alone = output_errors(full, Overlay(full, {name: changed[name]}), tokens)[name]
        assert together[name] == pytest.approx(alone, rel=1e-5)
    tied = open_checkpoint(mini_checkpoint)
    assert set(output_errors(tied, tied, tokens)) == set(tied.config.tensor_shapes())


def test_stream_errors_are_those_of_the_block_s_output(model: Path, run: Path, store: ReferenceStore) -> None:
    full, quantized = open_checkpoint(model), open_run(run)
    tokens = torch.from_numpy(store.tokens[:2])
    found = stream_errors(full, quantized, tokens, output_errors(full, quantized, tokens))
    rotary, x = rotary_table(full.config.rope, 64), embed(full, tokens)
    right = forward_block(load_block(full, 0), x, rotary, full.config)
    for name in ("self_attn.qkv_proj", "mlp.down_proj"):
        changed = f"model.layers.0.{name}.weight"
        source = Swapped(full, quantized, frozenset({changed}), full.config)
        wrong = forward_block(load_block(source, 0), x, rotary, full.config)
        expected = ((wrong - right).square().sum(-1) / right.square().sum(-1)).mean()
        assert found[changed] == pytest.approx(float(expected), rel=1e-4)
    assert found["model.layers.0.input_layernorm.weight"] == 0
    assert set(found) == set(full.config.tensor_shapes())


def test_a_rotated_run_is_measured_in_its_own_basis_or_refused(
    folder: Path, store: ReferenceStore, model: Path
) -> None:
    made = quantize(model, Recipe(method="rtn", scheme="w4g32", rotation="residual"), folder / "rotated").path
    path = export(made, "gguf", folder / "rotated.gguf", WriteOptions()).path
    refused = attributed(path, store, model, tensors=1)
    assert refused["tensors"] is None
    assert "the artifact's channels are not the reference's" in refused["tensors_reason"]
    found = attributed(path, store, model, run=open_run(made), tensors=1)
    assert max(found["tensors"]["output_errors"].values()) < 0.1
    assert by_stage(found)["format"]["step_kld"]["value"] == 0


# --- planted faults ----------------------------------------------------------------------------


def damaged(
    change: Callable[[QuantizedLinear], dict[str, torch.Tensor]],
) -> Callable[[QuantizedLinear], QuantizedLinear]:
    def apply(linear: QuantizedLinear) -> QuantizedLinear:
        if linear.name != FAULTY:
            return linear
        return QuantizedLinear(linear.name, linear.scheme, linear.codes, {**linear.params, **change(linear)})

    return apply


def shuffled(linear: QuantizedLinear) -> dict[str, torch.Tensor]:
    scales = linear.params["scales"]
    order = torch.randperm(scales.shape[0], generator=torch.Generator().manual_seed(0))
    return {"scales": scales[order]}


def off_by_one(linear: QuantizedLinear) -> dict[str, torch.Tensor]:
    zeros = linear.params["zeros"]
    return {"zeros": torch.where(zeros < 15, zeros + 1, zeros - 1).to(zeros.dtype)}


@pytest.mark.parametrize(
    ("scheme", "writer", "fault"),
    [("w4g32", gguf, shuffled), ("w4g32", gptq, shuffled), ("w4g32-asym", gptq, off_by_one)],
    ids=["scales-gguf", "scales-gptq", "zero-point-gptq"],
)
def test_a_fault_in_one_tensor_is_named(
    folder: Path, store: ReferenceStore, model: Path, scheme: str, writer: Any, fault: Any
) -> None:
    name = f"{scheme}-{writer.FORMAT}-{fault.__name__}"
    sound = writer.write(quantized_model(model, scheme), folder / f"{name}.sound", WriteOptions()).path
    bad = writer.write(quantized_model(model, scheme, damaged(fault)), folder / f"{name}.bad", WriteOptions()).path
    before, found = (attributed(path, store, model, tensors=None)["tensors"] for path in (sound, bad))
    first = found["measured"][0]
    assert first["name"] == f"{FAULTY}.weight"
    (same,) = (row for row in before["measured"] if row["name"] == first["name"])
    assert first["alone_kld"]["value"] > 3 * same["alone_kld"]["value"]
    saved = found["artifact_kld"]["value"] - first["saved_kld"]["value"]
    assert saved < 1.1 * before["artifact_kld"]["value"]
    (costs, looks) = found["findings"]
    assert FAULTY in costs
    assert f"{FAULTY}.weight has" in looks
    assert "scales and zero points" in looks
    assert not any("look at" in sentence for sentence in before["findings"])


def test_a_wrong_rope_base_passes_on_ppl_and_is_named_as_configuration(
    folder: Path, store: ReferenceStore, model: Path
) -> None:
    wrong = write_checkpoint(folder / "wrong-rope", "phi4", hidden_size=128, intermediate_size=256, rope_theta=10000.0)
    path = gguf.write(quantized_model(wrong, "q8_0"), folder / "rope.gguf", WriteOptions()).path
    limits = Limits(max_ppl_ratio=1.05, max_kld=0.05, undecided="pass")
    data = measure_drift(path, store, runtime="torch_ref", settings=ONE, limits=limits)
    assert {gate["name"]: gate["passed"] for gate in data["gates"]} == {"max_kld": False, "max_ppl_ratio": True}
    found = attributed(path, store, model)
    stages = by_stage(found)
    assert stages["configuration"]["step_kld"]["value"] > 20 * stages["weights"]["step_kld"]["value"]
    assert found["configuration"] == [{"field": "rope.theta", "reference": 250000.0, "artifact": 10000.0}]
    assert "rope.theta is 10000 in the artifact, 250000 in the reference" in found["findings"][0]
    assert "the largest step is configuration" in found["findings"][-1]
    assert not any("look at" in sentence for sentence in found["tensors"]["findings"])


# --- the command -------------------------------------------------------------------------------


def drift(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["drift", *map(str, arguments), "--threads", "1", "-q"])
    return code, *capfd.readouterr()


def test_the_command_prints_the_tables_and_puts_them_in_its_document(
    capfd: pytest.CaptureFixture[str], artifact: Path, store: ReferenceStore, model: Path, run: Path, text: Path
) -> None:
    small = ("--text", text, "--context", 64, "--chunks", 2, "--runtime", "torch_ref", "--attribute")
    code, out, err = drift(
        capfd, artifact, "--reference", model, *small, "--against", run, "--attribute-tensors", "all"
    )
    assert code == 0, err
    for words in ("weights: the run's linears", "format", "KLD saved if restored", f"{FAULTY}.weight", "bit for bit"):
        assert words in out
    code, out, _ = drift(capfd, artifact, "--reference", store.path, *small[4:], "--json")
    found = json.loads(out)["data"]["attribution"]
    assert found["tensors"] is None
    assert "holds no weights" in found["tensors_reason"]
    assert found["chunks"] == 2
    for arguments, words in (
        (("--against", run), "add --attribute"),
        (("--attribute", "--attribute-tensors", "some"), "is no number"),
    ):
        code, _, err = drift(capfd, artifact, "--reference", store.path, *arguments)
        assert code == 2
        assert words in err
