"""Attribution of a folder of ONNX Runtime GenAI: from the run to the runtime, its int8 activations a step by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import write_checkpoint

from phi4edge.cli.main import main
from phi4edge.core.recipe import Recipe
from phi4edge.measurement.attribution_run import attribute
from phi4edge.measurement.drift_run import measure_drift
from phi4edge.measurement.reference import ReferenceStore
from phi4edge.measurement.references import resolve_reference
from phi4edge.runtimes._api import Settings
from phi4edge.stages.export import export
from phi4edge.stages.quantize import quantize
from phi4edge.stages.run_reader import open_run
from phi4edge.writers._api import WriteOptions

pytest.importorskip("onnxruntime_genai")

ONE = Settings(threads=1, kv_type="f32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attribution-onnx")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return write_checkpoint(folder / "model", "phi4", hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="module")
def store(folder: Path, model: Path) -> ReferenceStore:
    text = folder / "words.txt"
    text.write_text(Path(__file__).read_text())
    return resolve_reference(str(model), text=str(text), context=64, chunks=6, store=folder / "store")


@pytest.fixture(scope="module")
def run(folder: Path, model: Path) -> Path:
    return quantize(model, Recipe(method="rtn", scheme="w4g32"), folder / "run").path


@pytest.fixture(scope="module")
def artifacts(folder: Path, run: Path) -> dict[int, Path]:
    """The run as a folder of each accuracy level."""
    return {
        level: export(run, "onnx", folder / f"onnx-{level}", WriteOptions(accuracy_level=level, context=64)).path
        for level in (1, 4)
    }


def stages(artifact: Path, store: ReferenceStore, model: Path, run: Path) -> dict[str, dict[str, Any]]:
    found = attribute(artifact, store, str(model), runtime=None, settings=ONE, run=open_run(run), tensors=0)
    assert found["not_measured"] == {"kv_cache": "the KV cache is in float32"}
    return {row["stage"]: row for row in found["stages"]}


def test_int8_activations_are_the_runtime_s_step_and_float32_ones_leave_kernels_alone(
    artifacts: dict[int, Path], store: ReferenceStore, model: Path, run: Path
) -> None:
    exact, rounded = (stages(artifacts[level], store, model, run) for level in (1, 4))
    assert list(exact) == list(rounded) == ["linears", "tables", "format", "runtime"]
    assert exact["runtime"]["title"] == "onnxruntime_genai: kernels, activations in float32"
    assert rounded["runtime"]["title"] == "onnxruntime_genai: kernels, activations in int8"
    assert exact["format"]["step_kld"]["value"] == rounded["format"]["step_kld"]["value"] == 0
    assert 0 < exact["runtime"]["step_kld"]["value"] < 1e-9
    step = rounded["runtime"]["step_kld"]
    assert step["value"] > 10 * step["se"] > 0
    assert step["value"] > 1e4 * exact["runtime"]["step_kld"]["value"]


def test_the_steps_sum_to_what_drift_measures_and_simulated_activations_explain_the_runtime_s(
    artifacts: dict[int, Path], store: ReferenceStore, model: Path, run: Path
) -> None:
    found = stages(artifacts[4], store, model, run)
    measured = measure_drift(artifacts[4], store, settings=ONE)["metrics"]["kld"]["value"]
    assert sum(row["added_kld"]["value"] for row in found.values()) == pytest.approx(measured, rel=1e-6)
    how = Settings(threads=1, kv_type="f32", activations="int8-b32")
    simulated = attribute(artifacts[4], store, str(model), runtime="torch_ref", settings=how, tensors=0)["stages"][-1]
    assert simulated["stage"] == "activations"
    assert simulated["step_kld"]["value"] == pytest.approx(found["runtime"]["step_kld"]["value"], rel=0.1)


def test_the_command_prints_every_stage_of_the_folder_s_way(
    artifacts: dict[int, Path], store: ReferenceStore, model: Path, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["drift", str(artifacts[4]), "--reference", str(store.path), "--threads", "1", "-q", "--attribute"]
    command += ["--against", str(run), "--attribute-tensors", "1", "--attribute-chunks", "2"]
    assert main(command) == 0
    out = capfd.readouterr().out
    for words in (
        "weights: the run's linears", "weights: embedding, head, norms", "format",
        "onnxruntime_genai: kernels, activations in int8", "kv_cache: not measured (the KV cache is in float32)",
        "the artifact's linears give bit for bit the run's logits", "KLD saved if restored",
    ):  # fmt: skip
        assert words in out
    assert main([*command, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)["data"]["attribution"]
    assert found["stages"][-1]["settings"]["accuracy_levels"] == [4]
    assert len(found["tensors"]["measured"]) == 1
