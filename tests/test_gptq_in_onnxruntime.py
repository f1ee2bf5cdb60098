"""Someone else's reader: ONNX Runtime GenAI's builder takes our GPTQ folder for what our own reader takes it for.

The builder turns the packed tensors into MatMulNBits nodes with unpacking code of its own; its model runs in
ONNX Runtime and is compared with transformers on the weights that our reader gives. Three settings make the
comparison exact: the head is kept out of the builder's own 4-bit rounding (``nodes_to_exclude``, and for a tied
head ``shared_embeddings=false``), accuracy_level 1 keeps activations in float32, and ``int4`` on ``cpu`` has
float32 inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rounded import quantized_model
from safetensors.torch import load_file, save_file
from support import write_checkpoint
from transformers import Phi3ForCausalLM

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.writers import gguf, gptq
from phi4edge.writers._api import ArtifactReader, WriteOptions

pytest.importorskip("onnx_ir", reason="onnx-ir, which the builder imports, is not installed")
ort = pytest.importorskip("onnxruntime")
builder = pytest.importorskip("onnxruntime_genai.models.builder")

OPTIONS = ["nodes_to_exclude=/lm_head/MatMul", "accuracy_level=1", "shared_embeddings=false"]
TOLERANCE = 5e-6  # relative, of float32 logits; 6e-7 to 9e-7 measured


@pytest.fixture(scope="module")
def mini_for_ort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of Phi-4-mini's kind, its rotated half-heads a multiple of 8 as ONNX Runtime's attention wants them."""
    half = 24  # head_dim 64 × 0.75 / 2
    scaling = {
        "type": "longrope",
        "short_factor": [1.0 + 0.02 * i for i in range(half)],
        "long_factor": [1.0 + 1.5 * i for i in range(half)],
    }
    folder = tmp_path_factory.mktemp("mini-ort")
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    return write_checkpoint(folder, "mini", rope_scaling=scaling, **shape)


def onnx_logits(folder: Path, out: Path, config: ModelConfig, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [batch, length, vocab] of the ONNX model that the builder makes from ``folder``."""
    arguments = ("", str(folder), str(out), "int4", "cpu", str(out / "cache"))
    builder.create_model(*arguments, **builder.parse_extra_options(*arguments, OPTIONS))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(out / "model.onnx"), options, providers=["CPUExecutionProvider"])
    batch, length = tokens.shape
    feeds = {"input_ids": tokens.numpy(), "attention_mask": np.ones((batch, length), dtype=np.int64)}
    if "position_ids" in (names := [entry.name for entry in session.get_inputs()]):
        feeds["position_ids"] = np.tile(np.arange(length, dtype=np.int64), (batch, 1))
    empty = np.zeros((batch, config.num_kv_heads, 0, config.head_dim), dtype=np.float32)
    feeds |= {name: empty for name in names if name.startswith("past_key_values")}
    return torch.from_numpy(session.run(["logits"], feeds)[0])


def transformers_logits(base: Path, reader: ArtifactReader, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of transformers' own model with the weights that our reader gives."""
    model = Phi3ForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    weights = {name: reader.tensor(name) for name in reader.config.tensor_shapes()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (unexpected, set(missing) - {"lm_head.weight"}) == ([], set())
    with torch.inference_mode():
        return model(tokens).logits


def difference(base: Path, folder: Path, out: Path, length: int) -> float:
    """‖theirs − ours‖ / ‖ours‖ over the logits of one random sequence."""
    tokens = torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(1))
    reader = gptq.read(folder)
    ours = transformers_logits(base, reader, tokens)
    theirs = onnx_logits(folder, out, reader.config, tokens)
    return float((theirs - ours).norm() / ours.norm())


@pytest.mark.parametrize(
    "scheme_name", ["w4g32", "w4g64", "w4row", "w8g32", "w4g32-asym", "w8g32-asym", "q4_0", "q8_0"]
)
def test_onnxruntime_computes_the_logits_of_our_codes(phi4_checkpoint: Path, tmp_path: Path, scheme_name: str) -> None:
    folder = gptq.write(quantized_model(phi4_checkpoint, scheme_name), tmp_path / "gptq", WriteOptions()).path
    assert gptq.read(folder).metadata["checkpoint_format"] == "gptq"
    assert difference(phi4_checkpoint, folder, tmp_path / "onnx", 40) <= TOLERANCE


@pytest.mark.parametrize("length", [40, 100])
@pytest.mark.parametrize("scheme_name", ["w4g32", "w8g32", "w4g32-asym"])
def test_so_it_does_for_mini_on_both_sides_of_the_original_context(
    mini_for_ort: Path, tmp_path: Path, scheme_name: str, length: int
) -> None:
    folder = gptq.write(quantized_model(mini_for_ort, scheme_name), tmp_path / "gptq", WriteOptions()).path
    assert difference(mini_for_ort, folder, tmp_path / "onnx", length) <= TOLERANCE


def test_a_head_of_8_bits_is_announced_so_that_onnxruntime_computes_with_its_codes(
    phi4_checkpoint: Path, tmp_path: Path
) -> None:
    model = quantized_model(phi4_checkpoint, "w4g64")
    folder = gptq.write(model, tmp_path / "gptq", WriteOptions(head="q8_0")).path
    reader = gptq.read(folder)
    head = reader.quantized("lm_head")
    assert head is not None
    assert head.scheme.name == "q8_0"
    assert (
        0 < float((head.dequantize() - model.tensor("lm_head.weight")).norm()) < 1e-2 * float(head.dequantize().norm())
    )
    assert difference(phi4_checkpoint, folder, tmp_path / "onnx", 40) <= TOLERANCE


def test_it_is_the_head_that_a_gguf_holds(phi4_checkpoint: Path, tmp_path: Path) -> None:
    model = quantized_model(phi4_checkpoint, "w4g32")
    packed = gptq.read(gptq.write(model, tmp_path / "gptq", WriteOptions(head="q8_0")).path)
    blocks = gguf.read(gguf.write(model, tmp_path / "model.gguf", WriteOptions()).path)
    assert torch.equal(packed.tensor("lm_head.weight"), blocks.tensor("lm_head.weight"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (WriteOptions(head="q6_k"), "as it is, or as q8_0"),
        (WriteOptions(embedding="q8_0"), "embedding"),
    ],
)
def test_another_head_is_refused(phi4_checkpoint: Path, options: WriteOptions, reason: str) -> None:
    assert reason in (gptq.refusal(quantized_model(phi4_checkpoint, "w4g64"), options) or "")


def test_a_tied_head_is_not_packed(mini_for_ort: Path) -> None:
    reason = gptq.refusal(quantized_model(mini_for_ort, "w4g64"), WriteOptions(head="q8_0"))
    assert reason is not None
    assert "tied" in reason


def _add_to_zeros(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.qzeros"] += 0x11111111


def _swap_scales(tensors: dict[str, torch.Tensor]) -> None:
    scales = tensors["model.layers.1.mlp.down_proj.scales"]
    scales.copy_(scales.flip(0))


@pytest.mark.parametrize("fault", [_add_to_zeros, _swap_scales])
def test_the_comparison_sees_a_fault_in_one_linear(
    phi4_checkpoint: Path, tmp_path: Path, fault: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    model = quantized_model(phi4_checkpoint, "w4g32-asym")
    right, wrong = (gptq.write(model, tmp_path / name, WriteOptions()).path for name in ("right", "wrong"))
    tensors = load_file(wrong / "model.safetensors")
    fault(tensors)
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.randint(0, 512, (1, 40), generator=torch.Generator().manual_seed(1))
    ours = transformers_logits(phi4_checkpoint, gptq.read(right), tokens)
    theirs = onnx_logits(wrong, tmp_path / "onnx", model.config, tokens)
    assert float((theirs - ours).norm() / ours.norm()) > 1000 * TOLERANCE


def test_v2_is_misread_there_which_is_why_v1_is_written_where_it_can_be(phi4_checkpoint: Path, tmp_path: Path) -> None:
    def zero_somewhere(linear: QuantizedLinear) -> QuantizedLinear:
        zeros = linear.params["zeros"].clone()
        zeros[0, 0] = 0
        return replace(linear, params={**linear.params, "zeros": zeros})

    model = quantized_model(phi4_checkpoint, "w4g32-asym", zero_somewhere)
    folder = gptq.write(model, tmp_path / "gptq", WriteOptions()).path
    assert gptq.read(folder).metadata["checkpoint_format"] == "gptq_v2"
    assert difference(phi4_checkpoint, folder, tmp_path / "onnx", 40) > 1000 * TOLERANCE
