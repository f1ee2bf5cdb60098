"""ONNX Runtime GenAI as a runtime: its logits are the artifact's, its times are its own, and its death is a message."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rounded import quantized_model, rounded

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.cli.main import main
from phi4edge.core.errors import InputError, MissingToolError, TargetError, UsageError
from phi4edge.measurement.artifact import default_runtime, describe
from phi4edge.measurement.drift_run import measure_drift
from phi4edge.measurement.references import resolve_reference
from phi4edge.measurement.speed import measure_speed
from phi4edge.quant.matmulnbits_packing import pack_linear
from phi4edge.quant.scheme import parse_scheme
from phi4edge.runtimes import onnxruntime_genai as runtime
from phi4edge.runtimes import torch_ref
from phi4edge.runtimes._activations import rounding_of
from phi4edge.runtimes._api import Settings, SpeedRequest
from phi4edge.writers import onnx as writer
from phi4edge.writers._api import WriteOptions
from phi4edge.writers.gguf import write_f16

og = pytest.importorskip("onnxruntime_genai")
pytest.importorskip("transformers")

from onnx_support import ORIGINAL, TOLERANCE, peer, peer_logits, relative, run_node, tokens_of  # noqa: E402
from onnxruntime_support import mini_for_onnxruntime  # noqa: E402

ONE = Settings(threads=1, kv_type="f32")


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mini_for_onnxruntime(tmp_path_factory.mktemp("mini-ort"))


@pytest.fixture(scope="module")
def folders(phi4_checkpoint: Path, mini: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """Folders by kind and accuracy level. Copy one before you change it."""
    root = tmp_path_factory.mktemp("onnx")
    return {
        (kind, level): writer.write(
            quantized_model(base, "w4g32"), root / f"{kind}-{level}", WriteOptions(accuracy_level=level, context=200)
        ).path
        for kind, base in (("phi4", phi4_checkpoint), ("mini", mini))
        for level in (1, 4)
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(__file__).read_text() * 2)
    return path


def logits(folder: Path, tokens: np.ndarray, settings: Settings = ONE, first: int = 0) -> torch.Tensor:
    with runtime.open(folder, tokens.shape[1], settings) as session:
        return torch.stack([torch.tensor(rows) for rows in session.logits(tokens, first=first)])


# Logits


@pytest.mark.parametrize("length", [ORIGINAL, 100])
@pytest.mark.parametrize("kind", ["phi4", "mini"])
def test_logits_are_transformers_for_every_row_and_position(
    phi4_checkpoint: Path, mini: Path, folders: dict[tuple[str, int], Path], kind: str, length: int
) -> None:
    """Rows follow one another in one cache, which must be empty before each."""
    base, folder = {"phi4": phi4_checkpoint, "mini": mini}[kind], folders[kind, 1]
    tokens = tokens_of(length, rows=3)
    expected = peer_logits(base, writer.read(folder), tokens)
    found = logits(folder, tokens)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative(ours, theirs) <= TOLERANCE
    late = logits(folder, tokens, first=length // 2)
    assert torch.equal(late, found[:, length // 2 :])


@pytest.mark.parametrize("kind", ["phi4", "mini"])
def test_batches_change_nothing_even_where_longrope_would_turn_the_rest_otherwise(
    folders: dict[tuple[str, int], Path], kind: str
) -> None:
    tokens = tokens_of(100, rows=2)
    small = replace(ONE, batch=24, ubatch=24)
    whole, pieces = logits(folders[kind, 1], tokens), logits(folders[kind, 1], tokens, small)
    assert relative(pieces, whole) <= TOLERANCE
    late = logits(folders[kind, 1], tokens, small, first=30)
    assert torch.equal(late, pieces[:, 30:])


def test_int8_activations_are_those_that_torch_ref_simulates(
    phi4_checkpoint: Path, folders: dict[tuple[str, int], Path]
) -> None:
    """Of lone tokens, before a value that falls to the other side of a tie has anything to spread to, most agree."""
    tokens = tokens_of(1, rows=64)
    exact, served = (logits(folders["phi4", level], tokens) for level in (1, 4))
    with torch_ref.open(folders["phi4", 4], 1, replace(ONE, activations="int8-b32")) as session:
        simulated = torch.stack([torch.tensor(rows) for rows in session.logits(tokens)])
    moved, left = (sorted(map(relative, served, other)) for other in (exact, simulated))
    assert moved[0] > 2e-3
    assert left[48] <= TOLERANCE  # three quarters of them


@pytest.mark.parametrize("scheme_name", ["w4g32", "w4g64", "w4g128-asym", "w8g32", "q8_0"])
def test_one_node_rounds_its_input_in_blocks_as_wide_as_its_weights(scheme_name: str) -> None:
    scheme = parse_scheme(scheme_name)
    linear = rounded("linear", torch.randn(24, 256, generator=torch.Generator().manual_seed(1)), scheme)
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(2))
    weights = {field: values.numpy() for field, values in pack_linear(linear).items()}
    sizes = {"K": 256, "N": 24, "bits": scheme.bits, "block_size": scheme.group_size}
    served = run_node("MatMulNBits", x.numpy(), weights, 24, **sizes, accuracy_level=4)
    simulated = rounding_of(f"int8-b{scheme.group_size}")(x) @ linear.dequantize().t()
    assert relative(served, simulated) <= TOLERANCE
    assert relative(served, x @ linear.dequantize().t()) > 1000 * relative(served, simulated)


@pytest.mark.parametrize(
    ("kind", "original", "prompt_length"),
    [("phi4", None, 12), ("mini", 128, 12), ("mini", ORIGINAL, ORIGINAL + 6)],
    ids=["phi4", "mini-below-its-original-context", "mini-above-it"],
)
def test_64_greedy_tokens_are_transformers_own(
    phi4_checkpoint: Path, tmp_path: Path, kind: str, original: int | None, prompt_length: int
) -> None:
    base = phi4_checkpoint
    if original is not None:
        base = mini_for_onnxruntime(tmp_path / "mini")
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "original_max_position_embeddings": original}))
    exact = WriteOptions(accuracy_level=1)
    folder = writer.write(quantized_model(base, "w4g32"), tmp_path / "onnx", exact).path
    prompt = tokens_of(prompt_length, seed=4)
    model = peer(base, writer.read(folder))
    model.generation_config.eos_token_id = None
    given = torch.from_numpy(prompt)
    ones = torch.ones_like(given)  # or tokens equal to the padding would not be seen
    expected = model.generate(given, attention_mask=ones, max_new_tokens=64, do_sample=False, pad_token_id=0)
    loaded = og.Model(str(folder))
    params = og.GeneratorParams(loaded)
    params.set_search_options(max_length=prompt_length + 64, min_length=prompt_length + 64, do_sample=False)
    generator = og.Generator(loaded, params)
    generator.append_tokens(prompt[0].astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0).tolist() == expected[0].tolist()


def test_genai_s_tokenizer_reads_the_folder_and_knows_every_end(
    phi4_checkpoint: Path, folders: dict[tuple[str, int], Path]
) -> None:
    from phi4edge.model.tokenizer import load_tokenizer

    tokenizer = og.Tokenizer(og.Model(str(folders["phi4", 4])))
    ours, words = load_tokenizer(phi4_checkpoint), "the quick brown fox, 3 times <|im_end|>"
    assert tokenizer.encode(words).tolist() == ours.encode(words)
    assert sorted(tokenizer.eos_token_ids) == [0, 3]
    turns = [{"role": "user", "content": "hello"}]
    shown = tokenizer.apply_chat_template(json.dumps(turns), add_generation_prompt=True)
    assert shown == ours.apply_chat_template(turns, add_generation_prompt=True)


# What it says of itself, and what it refuses


def test_details_say_what_the_settings_came_to(folders: dict[tuple[str, int], Path]) -> None:
    for kind, whole in (("phi4", None), ("mini", ORIGINAL)):
        with runtime.open(folders[kind, 4], 64, ONE) as session:
            details = dict(session.details)
            assert session.vocab_size == 512
        expected = {"threads": 1, "kv_type": "f32", "accuracy_levels": [4], "whole_beyond": whole, "provider": "cpu"}
        assert (expected | {"activations": "int8"}).items() <= details.items()
        assert details["onnxruntime"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_type": "f16"}, "kv_type f16: the KV cache is f32"),
        ({"flash_attention": "on"}, "flash_attention on"),
        ({"gpu_layers": 4}, "gpu_layers 4"),
        ({"ubatch": 16}, "ubatch 16"),
        ({"activations": "q8_0"}, "activations q8_0"),
    ],
)
def test_a_setting_that_it_cannot_honour_is_refused(
    folders: dict[tuple[str, int], Path], change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        runtime.open(folders["phi4", 4], 64, replace(ONE, **change))


def test_what_is_no_sound_folder_is_refused(
    folders: dict[tuple[str, int], Path], phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"has no genai_config\.json"):
        runtime.open(phi4_checkpoint, 64, ONE)
    with pytest.raises(InputError, match="a context of 513 exceeds the model's 512"):
        runtime.open(folders["phi4", 4], 513, ONE)
    short, unknown = tmp_path / "short", tmp_path / "unknown"
    shutil.copytree(folders["phi4", 4], short)
    data = short / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"ends at byte \d+, the file has"):
        runtime.open(short, 64, ONE)
    shutil.copytree(folders["phi4", 4], unknown)
    settings = json.loads((unknown / "genai_config.json").read_text())
    settings["model"]["type"] = "no such model"
    (unknown / "genai_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"ONNX Runtime cannot load it: .*no such model"):
        runtime.open(unknown, 64, ONE)
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingToolError, match="onnxruntime-genai is not installed"):
        runtime.open(folders["phi4", 4], 64, ONE)


def test_a_process_that_dies_is_reported_and_no_child_stays(folders: dict[tuple[str, int], Path]) -> None:
    with runtime.open(folders["phi4", 4], 64, ONE) as session:
        rows = session.logits(tokens_of(40, rows=3))
        next(rows)
        os.kill(session._child.pid, signal.SIGKILL)
        with pytest.raises(TargetError, match="ONNX Runtime's process was ended by SIGKILL"):
            list(rows)
    assert session._child.poll() is not None


# Speed


def test_every_sample_is_kept_and_the_warm_up_is_not(folders: dict[tuple[str, int], Path]) -> None:
    data = measure_speed(folders["mini", 4], request=SpeedRequest(80, 5, 3), settings=ONE)
    metrics = data["metrics"]
    assert [len(metrics[name]["samples"]) for name in ("prefill_tps", "ttft_s", "decode_tps")] == [3, 3, 3]
    assert len(metrics["tpot_s"]["samples"]) == 15
    assert all(0 < 80 / rate <= ttft for rate, ttft in _pairs(metrics))
    assert metrics["peak_rss_bytes"]["value"] > metrics["idle_rss_bytes"]["value"] > 2**20
    assert (data["runtime"]["name"], data["settings"]["kv_type"]) == ("onnxruntime_genai", "f32")
    assert (data["artifact"]["format"], data["artifact"]["scheme"]) == ("onnx", "w4g32")
    nothing = measure_speed(folders["phi4", 4], request=SpeedRequest(0, 2, 1))
    assert nothing["metrics"]["prefill_tps"]["value"] is None
    assert nothing["metrics"]["decode_tps"]["value"] > 0


def _pairs(metrics: dict[str, Any]) -> Iterator[tuple[float, float]]:
    return zip(metrics["prefill_tps"]["samples"], metrics["ttft_s"]["samples"], strict=True)


# Drift, and the command line


def test_drift_of_exact_arithmetic_is_the_weights_own(
    phi4_checkpoint: Path, folders: dict[tuple[str, int], Path], text: Path, tmp_path: Path
) -> None:
    store = resolve_reference(str(phi4_checkpoint), text=str(text), context=64, chunks=4, store=tmp_path / "store")
    found = measure_drift(folders["phi4", 1], store, settings=ONE)
    reference = measure_drift(folders["phi4", 1], store, runtime="torch_ref")
    assert found["runtime"]["name"] == "onnxruntime_genai"
    for name in ("kld", "kld_p99", "ln_ppl_ratio", "mean_delta_p"):
        ours, theirs = found["metrics"][name]["value"], reference["metrics"][name]["value"]
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)
    served = measure_drift(folders["phi4", 4], store, settings=ONE)
    simulated = measure_drift(
        folders["phi4", 4], store, runtime="torch_ref", settings=replace(ONE, activations="int8-b32")
    )
    assert served["metrics"]["kld"]["value"] != found["metrics"]["kld"]["value"]
    assert served["metrics"]["kld"]["value"] == pytest.approx(simulated["metrics"]["kld"]["value"], rel=0.01)


def test_a_folder_is_its_own_runtime_s_and_a_gguf_llama_cpp_s(
    phi4_checkpoint: Path, folders: dict[tuple[str, int], Path], tmp_path: Path
) -> None:
    folder = folders["phi4", 4]
    gguf = write_f16(open_checkpoint(phi4_checkpoint), tmp_path / "model.gguf", WriteOptions()).path
    kinds = {folder: "onnxruntime_genai", gguf: "llama_cpp", phi4_checkpoint: "torch_ref"}
    assert {path: default_runtime(path) for path in kinds} == kinds
    told = describe(folder)
    assert (told["format"], told["scheme"], told["bytes"]) == (
        "onnx", "w4g32", sum(path.stat().st_size for path in folder.iterdir())
    )  # fmt: skip
    assert told["provenance"]["base_model"] == "someone/tiny-phi"
    assert "config" not in told["provenance"]


def test_drift_and_bench_through_the_command_line(
    phi4_checkpoint: Path,
    folders: dict[tuple[str, int], Path],
    text: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = str(folders["phi4", 4])
    drift = ["drift", folder, "--reference", str(phi4_checkpoint), "--text", str(text), "--context", "64"]
    drift += ["--chunks", "2", "--threads", "1", "-q", "--json"]
    assert main([*drift, "--store", str(tmp_path / "store")]) == 0
    data = json.loads(capfd.readouterr().out)["data"]
    assert (data["runtime"]["name"], data["artifact"]["format"]) == ("onnxruntime_genai", "onnx")
    assert 1e-4 < data["metrics"]["kld"]["value"] < 1
    assert main([*drift, "--kv", "q8_0"]) == 2
    assert "cannot honour kv_type q8_0" in capfd.readouterr().out
    bench = ["bench", folder, "--prompt-tokens", "16", "--gen-tokens", "3", "--repetitions", "2", "--threads", "1"]
    assert main([*bench, "--json"]) == 0
    data = json.loads(capfd.readouterr().out)["data"]
    assert data["runtime"]["details"]["accuracy_levels"] == [4]
    assert len(data["metrics"]["decode_tps"]["samples"]) == 2
    assert main(bench) == 0
    assert "in onnxruntime_genai 0." in capfd.readouterr().out
