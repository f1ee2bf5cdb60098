"""compressed-tensors folders: the package itself, alone and through transformers, takes our codes for what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_support import (
    adversarial_linear,
    assert_same,
    check_refused,
    check_round_trip,
    described,
    edit_json,
    edit_tensors,
)
from rounded import quantized_model, rounded
from torch import Tensor
from transformers import CompressedTensorsConfig, Phi3ForCausalLM

from phi4edge.core.errors import InputError
from phi4edge.core.hashing import sha256_file
from phi4edge.quant.compressed_packing import pack_linear, packed_layout, packing_refusal, unpack_linear
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.scheme import Scheme, parse_scheme
from phi4edge.writers import compressed_tensors
from phi4edge.writers._api import WriteOptions
from phi4edge.writers._compressed_config import quantization_config

SYMMETRIC = ("w4g32", "w4g64", "w4row", "w8g32", "w8row", "q4_0", "q8_0")
ASYMMETRIC = ("w4g32-asym", "w4row-asym", "w8g32-asym")
LINEAR = "model.layers.1.mlp.gate_up_proj"
TOLERANCE = 1e-6  # relative, of float32 logits from equal weights


def their_scheme(scheme: Scheme) -> QuantizationScheme:
    """What the package makes of the configuration that we write."""
    group = QuantizationConfig.model_validate(quantization_config(scheme)).config_groups["group_0"]
    assert isinstance(group, QuantizationScheme)
    return group


def their_model(folder: Path, **arguments: object) -> Phi3ForCausalLM:
    """transformers' model of ``folder``, decompressed as its first use does."""
    model = Phi3ForCausalLM.from_pretrained(folder, attn_implementation="eager", **arguments)
    logits_of(model, 3)
    return model


def logits_of(model: Phi3ForCausalLM, length: int) -> Tensor:
    tokens = torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(tokens).logits


# Packing


@settings(deadline=None, max_examples=60)
@given(
    scheme_name=st.sampled_from(SYMMETRIC + ASYMMETRIC),
    out_words=st.integers(1, 5),
    in_blocks=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_packing_round_trip_is_bit_exact_and_the_package_reads_the_same(
    scheme_name: str, out_words: int, in_blocks: int, seed: int
) -> None:
    scheme = parse_scheme(scheme_name)
    linear = adversarial_linear(scheme, out_words * 8, in_blocks * 64, seed)
    packed = pack_linear(linear)
    assert described(packed) == packed_layout(scheme, linear.out_features, linear.in_features)
    assert_same(unpack_linear("linear", scheme, packed), linear)
    in_float32 = {**packed, "weight_scale": packed["weight_scale"].float()}  # it multiplies in the dtype of the scales
    theirs = BaseCompressor.get_value_from_registry("pack-quantized").decompress(in_float32, their_scheme(scheme))
    assert torch.equal(theirs["weight"], linear.dequantize())


@pytest.mark.parametrize("scheme_name", SYMMETRIC + ASYMMETRIC)
def test_the_package_packs_our_weights_into_the_same_bytes(scheme_name: str) -> None:
    scheme = parse_scheme(scheme_name)
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(4))
    linear = rounded("linear", weight, scheme)
    ours = pack_linear(linear)
    state = {"weight": linear.dequantize(), "weight_scale": linear.params["scales"].float()}
    if not scheme.symmetric:
        signed = linear.params["zeros"].to(torch.int16) - 2 ** (scheme.bits - 1)
        state["weight_zero_point"] = signed.to(torch.int8)
    theirs = BaseCompressor.get_value_from_registry("pack-quantized").compress(state, their_scheme(scheme))
    theirs["weight_scale"] = theirs["weight_scale"].half()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


@pytest.mark.parametrize(
    ("scheme_name", "shape", "reason"),
    [
        ("q4_1", (32, 64), "floating-point minimum"),
        ("q5_0", (32, 64), "has 5 bits; vLLM's kernels know 4 and 8"),
        ("q6_k", (32, 256), "q6_k has scales in steps that a super-block shares"),
        ("w4g32", (12, 64), "out_features 12 is not divisible by 8"),
        ("w4row", (16, 36), "in_features 36 is not divisible by 8"),
        ("w4g32", (16, 48), "not divisible by group_size 32"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_with_the_reason(
    scheme_name: str, shape: tuple[int, int], reason: str
) -> None:
    assert reason in str(packing_refusal(parse_scheme(scheme_name), *shape))


# Configuration


@pytest.mark.parametrize("scheme_name", SYMMETRIC + ASYMMETRIC)
def test_the_package_dumps_our_configuration_as_we_wrote_it(scheme_name: str) -> None:
    ours = quantization_config(parse_scheme(scheme_name))
    theirs = QuantizationConfig.model_validate(ours).model_dump(mode="json")
    assert theirs.pop("moe_sparsity_config") is None  # younger than readers that should take the folder
    del ours["meta"]
    assert theirs == ours


def test_folder_carries_config_and_card(phi4_checkpoint: Path, tmp_path: Path) -> None:
    model = quantized_model(phi4_checkpoint, "w8g64")
    artifact = compressed_tensors.write(model, tmp_path / "out", WriteOptions())
    config = json.loads((artifact.path / "config.json").read_text())
    assert config.pop("quantization_config")["ignore"] == ["lm_head"]
    assert config == json.loads((phi4_checkpoint / "config.json").read_text())
    card = (artifact.path / "README.md").read_text()
    assert "--dtype float16" in card
    assert "dequantize=True" not in card
    assert {p.name: sha256_file(p) for p in artifact.path.iterdir()} == dict(artifact.files)
    assert (artifact.format, artifact.scheme) == ("compressed_tensors", "w8g64")


# transformers


@pytest.mark.parametrize("scheme_name", SYMMETRIC)
def test_transformers_has_exactly_our_weights_and_logits(
    phi4_checkpoint: Path, tmp_path: Path, scheme_name: str
) -> None:
    model = quantized_model(phi4_checkpoint, scheme_name)
    folder = compressed_tensors.write(model, tmp_path / "out", WriteOptions()).path
    theirs = their_model(folder, dtype=torch.float32)
    weights = theirs.state_dict()
    for name in model.config.tensor_shapes():
        assert torch.equal(weights[name], model.tensor(name)), name
    ours = Phi3ForCausalLM.from_pretrained(phi4_checkpoint, dtype=torch.float32, attn_implementation="eager")
    ours.load_state_dict({name: model.tensor(name) for name in model.config.tensor_shapes()})
    expected = logits_of(ours, 40)
    assert float((logits_of(theirs, 40) - expected).norm() / expected.norm()) <= TOLERANCE


@pytest.mark.parametrize("length", [40, 100])
def test_so_it_has_for_mini_on_both_sides_of_the_original_context(
    mini_checkpoint: Path, tmp_path: Path, length: int
) -> None:
    model = quantized_model(mini_checkpoint, "w4g32")
    folder = compressed_tensors.write(model, tmp_path / "out", WriteOptions()).path
    ours = Phi3ForCausalLM.from_pretrained(mini_checkpoint, dtype=torch.float32, attn_implementation="eager")
    ours.load_state_dict({name: model.tensor(name) for name in model.config.tensor_shapes()}, strict=False)
    expected = logits_of(ours, length)
    found = logits_of(their_model(folder, dtype=torch.float32), length)
    assert float((found - expected).norm() / expected.norm()) <= TOLERANCE


@pytest.mark.parametrize("scheme_name", ASYMMETRIC)
def test_asymmetric_folders_load_dequantized_which_the_card_says(
    phi4_checkpoint: Path, tmp_path: Path, scheme_name: str
) -> None:
    """Left packed, transformers 5.23 expects unpacked zero points; dequantized at load, it multiplies in float16."""
    model = quantized_model(phi4_checkpoint, scheme_name)
    folder = compressed_tensors.write(model, tmp_path / "out", WriteOptions()).path
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert "CompressedTensorsConfig(dequantize=True)" in (folder / "README.md").read_text()
    with pytest.warns(UserWarning, match="quantization_config"):
        theirs = their_model(
            folder, dtype=torch.float16, quantization_config=CompressedTensorsConfig(dequantize=True)
        ).state_dict()
    for name in model.linears:
        assert torch.equal(theirs[f"{name}.weight"], model.load(name).dequantize().half()), name


def test_in_bfloat16_the_scales_are_rounded_which_is_why_the_card_asks_for_float16(
    phi4_checkpoint: Path, tmp_path: Path
) -> None:
    model = quantized_model(phi4_checkpoint, "w8g32")
    folder = compressed_tensors.write(model, tmp_path / "out", WriteOptions()).path
    exact = model.load(LINEAR).dequantize()
    found = {dtype: their_model(folder, dtype=dtype).state_dict() for dtype in (torch.float16, torch.bfloat16)}
    assert torch.equal(found[torch.float16][f"{LINEAR}.weight"], exact.half())
    assert not torch.equal(found[torch.bfloat16][f"{LINEAR}.weight"], exact.bfloat16())


@pytest.mark.parametrize(
    "fault",
    [
        lambda tensors: tensors[f"{LINEAR}.weight_packed"][7, 3:4].bitwise_xor_(1),
        lambda tensors: tensors[f"{LINEAR}.weight_scale"].copy_(tensors[f"{LINEAR}.weight_scale"].flip(0)),
    ],
)
def test_the_comparison_sees_a_fault(
    phi4_checkpoint: Path, tmp_path: Path, fault: Callable[[dict[str, Tensor]], object]
) -> None:
    model = quantized_model(phi4_checkpoint, "w4g32")
    folder = compressed_tensors.write(model, tmp_path / "out", WriteOptions()).path
    edit_tensors(fault)(folder)
    weights = their_model(folder, dtype=torch.float32).state_dict()
    assert not torch.equal(weights[f"{LINEAR}.weight"], model.load(LINEAR).dequantize())


# Writer and reader


@pytest.mark.parametrize("scheme_name", SYMMETRIC + ASYMMETRIC)
def test_write_then_read_gives_the_run_bit_for_bit(phi4_checkpoint: Path, tmp_path: Path, scheme_name: str) -> None:
    check_round_trip(compressed_tensors, quantized_model(phi4_checkpoint, scheme_name), tmp_path / "out")


@pytest.mark.parametrize(
    ("scheme_name", "options", "reason"),
    [
        ("q4_1", WriteOptions(), "qkv_proj: q4_1 stores a floating-point minimum"),
        ("w4g32", WriteOptions(head="q8_0"), "head: q8_0 is asked for"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_before_anything_is_written(
    phi4_checkpoint: Path, tmp_path: Path, scheme_name: str, options: WriteOptions, reason: str
) -> None:
    check_refused(compressed_tensors, quantized_model(phi4_checkpoint, scheme_name), options, reason, tmp_path / "out")


def test_an_export_that_fails_midway_leaves_nothing(phi4_checkpoint: Path, tmp_path: Path) -> None:
    def too_large(linear: QuantizedLinear) -> QuantizedLinear:
        if not linear.name.endswith("1.self_attn.o_proj"):
            return linear
        return replace(linear, params={**linear.params, "zeros": linear.params["zeros"] + 16})

    model = quantized_model(phi4_checkpoint, "w4g32-asym", too_large)
    with pytest.raises(InputError, match=r"1\.self_attn\.o_proj: zero points up to"):
        compressed_tensors.write(model, tmp_path / "out", WriteOptions())
    assert list(tmp_path.iterdir()) == []


def _weights(**changes: object) -> Callable[[Path], None]:
    return edit_json(lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes))


def _top(**changes: object) -> Callable[[Path], None]:
    return edit_json(lambda c: c["quantization_config"].update(changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_weights(num_bits=8), "meta.scheme w4g32 contradicts bits 8"),
        (_weights(symmetric=False), "contradicts bits 4, group_size 32, sym False"),
        (_weights(strategy="tensor"), "strategy 'tensor' with group_size 32 is not supported"),
        (_weights(type="float"), "type 'float' in weights is not supported"),
        (_weights(dynamic=True), "dynamic True in weights"),
        (_top(format="int-quantized"), "format 'int-quantized' in quantization_config is not supported"),
        (_top(quantization_status="frozen"), "quantization_status 'frozen'"),
        (_top(config_groups={}), "config_groups holds {}"),
        (edit_tensors(lambda t: t.pop(f"{LINEAR}.weight_shape")), "gate_up_proj.weight_shape is missing"),
        (
            edit_tensors(lambda t: t[f"{LINEAR}.weight_shape"].fill_(8)),
            r"weight_shape is \[8, 8\], weight_packed holds",
        ),
        (edit_tensors(lambda t: t[f"{LINEAR}.weight_scale"][0, :2].fill_(torch.inf)), "2 scale.s. are NaN or Inf"),
        (edit_tensors(lambda t: t.update({f"{LINEAR}.weight": torch.zeros(256, 64)})), "stored twice"),
    ],
)
def test_a_damaged_folder_is_named_for_its_damage(
    phi4_checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    out = compressed_tensors.write(quantized_model(phi4_checkpoint, "w4g32"), tmp_path / "out", WriteOptions()).path
    damage(out)
    assert compressed_tensors.matches(out)
    with pytest.raises(InputError, match=message):
        compressed_tensors.read(out).quantized(LINEAR)


def test_a_folder_that_names_no_scheme_is_read_by_its_numbers(phi4_checkpoint: Path, tmp_path: Path) -> None:
    model = quantized_model(phi4_checkpoint, "w4row")
    out = compressed_tensors.write(model, tmp_path / "out", WriteOptions()).path
    edit_json(lambda c: c["quantization_config"].pop("meta"))(out)
    assert_same(compressed_tensors.read(out).quantized(LINEAR), model.load(LINEAR))


def test_other_folders_are_not_taken_for_compressed_tensors(phi4_checkpoint: Path, tmp_path: Path) -> None:
    assert not compressed_tensors.matches(phi4_checkpoint)
    assert not compressed_tensors.matches(tmp_path)
    with pytest.raises(InputError, match="quant_method is None, not 'compressed-tensors'"):
        compressed_tensors.read(phi4_checkpoint)
