"""Someone else's reader: ONNX Runtime GenAI's builder takes our GPTQ folder for what our own reader takes it for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from onnxruntime_support import (
    TOLERANCE,
    mini_for_onnxruntime,
    onnx_logits,
    onnxruntime_difference,
    transformers_logits,
)
from rounded import quantized_model
from safetensors.torch import load_file, save_file

from phi4edge.quant.linear import QuantizedLinear
from phi4edge.writers import gguf, gptq
from phi4edge.writers._api import WriteOptions


@pytest.fixture(scope="module")
def mini_for_ort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mini that ONNX Runtime's attention can run."""
    return mini_for_onnxruntime(tmp_path_factory.mktemp("mini-ort"))


@pytest.mark.parametrize(
    "scheme_name", ["w4g32", "w4g64", "w4row", "w8g32", "w4g32-asym", "w8g32-asym", "q4_0", "q8_0"]
)
def test_onnxruntime_computes_the_logits_of_our_codes(phi4_checkpoint: Path, tmp_path: Path, scheme_name: str) -> None:
    folder = gptq.write(quantized_model(phi4_checkpoint, scheme_name), tmp_path / "gptq", WriteOptions()).path
    assert gptq.read(folder).metadata["checkpoint_format"] == "gptq"
    assert onnxruntime_difference(phi4_checkpoint, folder, tmp_path / "onnx", 40) <= TOLERANCE


@pytest.mark.parametrize("length", [40, 100])
@pytest.mark.parametrize("scheme_name", ["w4g32", "w8g32", "w4g32-asym"])
def test_so_it_does_for_mini_on_both_sides_of_the_original_context(
    mini_for_ort: Path, tmp_path: Path, scheme_name: str, length: int
) -> None:
    folder = gptq.write(quantized_model(mini_for_ort, scheme_name), tmp_path / "gptq", WriteOptions()).path
    assert onnxruntime_difference(mini_for_ort, folder, tmp_path / "onnx", length) <= TOLERANCE


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
    assert onnxruntime_difference(phi4_checkpoint, folder, tmp_path / "onnx", 40) <= TOLERANCE


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
    assert onnxruntime_difference(phi4_checkpoint, folder, tmp_path / "onnx", 40) > 1000 * TOLERANCE
