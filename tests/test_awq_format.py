"""The AWQ checkpoint holds exactly the codes that were decided, and says so when it cannot or does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime_support import (
    TOLERANCE,
    mini_for_onnxruntime,
    onnx_logits,
    onnxruntime_difference,
    transformers_logits,
)
from packed_support import (
    adversarial_linear,
    assert_same,
    check_refused,
    check_round_trip,
    described,
    edit_json,
    edit_tensors,
)
from rounded import quantized_model
from safetensors.torch import load_file
from scripts import load_script

from phi4edge.core.errors import InputError
from phi4edge.quant.awq_packing import pack_linear, packed_layout, packing_refusal, unpack_linear
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.scheme import parse_scheme
from phi4edge.writers import awq
from phi4edge.writers._api import WriteOptions

SCHEMES = ("w4g32", "w4g64", "w4row", "w4g32-asym", "w4row-asym", "q4_0")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
LINEAR = "model.layers.1.mlp.gate_up_proj"


@pytest.fixture(scope="module")
def mini_for_ort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mini that ONNX Runtime's attention can run."""
    return mini_for_onnxruntime(tmp_path_factory.mktemp("mini-ort"))


# Packing


@pytest.mark.parametrize("scheme_name", SCHEMES)
def test_every_code_and_zero_lies_in_the_nibble_that_the_format_documents(scheme_name: str) -> None:
    scheme = parse_scheme(scheme_name)
    linear = adversarial_linear(scheme, 16, 64, seed=3)
    packed, size = pack_linear(linear), 64 // scheme.groups(64)
    rebuilt = torch.empty(16, 64)
    for n in range(16):
        word, shift = n // 8, 4 * ORDER.index(n % 8)
        for k in range(64):
            code = (int(packed["qweight"][k, word]) >> shift) & 15
            zero = (int(packed["qzeros"][k // size, word]) >> shift) & 15
            rebuilt[n, k] = float(packed["scales"][k // size, n]) * (code - zero)
    assert torch.equal(rebuilt, linear.dequantize())


@settings(deadline=None, max_examples=60)
@given(
    scheme_name=st.sampled_from(SCHEMES),
    out_words=st.integers(1, 5),
    in_blocks=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_packing_round_trip_is_bit_exact(scheme_name: str, out_words: int, in_blocks: int, seed: int) -> None:
    scheme = parse_scheme(scheme_name)
    linear = adversarial_linear(scheme, out_words * 8, in_blocks * 64, seed)
    packed = pack_linear(linear)
    assert described(packed) == packed_layout(scheme, linear.out_features, linear.in_features)
    assert_same(unpack_linear("linear", scheme, packed), linear)


@pytest.mark.parametrize(
    ("scheme_name", "shape", "reason"),
    [
        ("q4_1", (32, 64), "floating-point minimum"),
        ("w8g32", (32, 64), "has 8 bits; AWQ's kernels know 4"),
        ("q8_0", (32, 64), "has 8 bits"),
        ("q4_k", (32, 256), "q4_k has scales in steps that a super-block shares"),
        ("w4g32", (12, 64), "out_features 12 is not divisible by 8"),
        ("w4g32", (16, 48), "not divisible by group_size 32"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_with_the_reason(
    scheme_name: str, shape: tuple[int, int], reason: str
) -> None:
    assert reason in str(packing_refusal(parse_scheme(scheme_name), *shape))


def test_a_zero_point_beyond_a_nibble_is_refused_not_cut() -> None:
    linear = adversarial_linear(parse_scheme("w4g32-asym"), 8, 32, seed=0)
    linear.params["zeros"][3, 0] = 16
    with pytest.raises(InputError, match="linear: zero points up to 16"):
        pack_linear(linear)


# Other readers


@pytest.mark.parametrize("scheme_name", SCHEMES)
def test_compressed_tensors_converter_unpacks_our_codes(scheme_name: str) -> None:
    linear = adversarial_linear(parse_scheme(scheme_name), 24, 128, seed=5)
    packed = pack_linear(linear)
    converter = AutoAWQConverter(group_size=linear.scheme.group_size)
    codes, scales, zeros = converter._convert_gemm_module(packed["qweight"], packed["scales"], packed["qzeros"])
    assert zeros is not None
    groups = scales.shape[1]
    signed = (codes.reshape(24, groups, -1).float() - zeros[:, :, None].float()) * scales[:, :, None].float()
    assert torch.equal(signed.reshape(24, 128), linear.dequantize())
    assert torch.equal(codes + 8, linear.codes.to(torch.int8))


@pytest.mark.parametrize("scheme_name", ["w4g32", "w4g64", "w4row", "w4g32-asym", "q4_0"])
def test_onnxruntime_computes_the_logits_of_our_codes(phi4_checkpoint: Path, tmp_path: Path, scheme_name: str) -> None:
    folder = awq.write(quantized_model(phi4_checkpoint, scheme_name), tmp_path / "awq", WriteOptions()).path
    assert onnxruntime_difference(phi4_checkpoint, folder, tmp_path / "onnx", 40) <= TOLERANCE


@pytest.mark.parametrize("length", [40, 100])
def test_so_it_does_for_mini_on_both_sides_of_the_original_context(
    mini_for_ort: Path, tmp_path: Path, length: int
) -> None:
    folder = awq.write(quantized_model(mini_for_ort, "w4g128-asym"), tmp_path / "awq", WriteOptions()).path
    assert onnxruntime_difference(mini_for_ort, folder, tmp_path / "onnx", length) <= TOLERANCE


def test_the_comparison_sees_two_words_swapped(phi4_checkpoint: Path, tmp_path: Path) -> None:
    model = quantized_model(phi4_checkpoint, "w4g32-asym")
    right, wrong = (awq.write(model, tmp_path / name, WriteOptions()).path for name in ("right", "wrong"))
    name = "model.layers.1.mlp.down_proj.qzeros"
    edit_tensors(lambda tensors: tensors.update({name: tensors[name].flip(1).contiguous()}))(wrong)
    tokens = torch.randint(0, 512, (1, 40), generator=torch.Generator().manual_seed(1))
    ours = transformers_logits(phi4_checkpoint, awq.read(right), tokens)
    theirs = onnx_logits(wrong, tmp_path / "onnx", model.config, tokens)
    assert float((theirs - ours).norm() / ours.norm()) > 1000 * TOLERANCE


# Writer


@pytest.mark.parametrize("scheme_name", SCHEMES)
def test_write_then_read_gives_the_run_bit_for_bit(phi4_checkpoint: Path, tmp_path: Path, scheme_name: str) -> None:
    check_round_trip(awq, quantized_model(phi4_checkpoint, scheme_name), tmp_path / "out")


def test_config_says_what_the_tools_look_for(phi4_checkpoint: Path, tmp_path: Path) -> None:
    out = awq.write(quantized_model(phi4_checkpoint, "w4g64"), tmp_path / "out", WriteOptions()).path
    config = json.loads((out / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((phi4_checkpoint / "config.json").read_text())
    assert {key: value for key, value in quantization.items() if key != "meta"} == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    assert quantization["meta"]["scheme"] == "w4g64"
    card = (out / "README.md").read_text()
    assert "stored in the awq format" in card
    assert "--dtype float16" in card
    assert not any(name.endswith("g_idx") for name in load_file(out / "model.safetensors"))


@pytest.mark.parametrize(
    ("scheme_name", "options", "reason"),
    [
        ("q4_1", WriteOptions(), "qkv_proj: q4_1 stores a floating-point minimum"),
        ("w8g32", WriteOptions(), "qkv_proj: w8g32 has 8 bits"),
        ("w4g32", WriteOptions(head="q8_0"), "head: q8_0 is asked for"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_before_anything_is_written(
    phi4_checkpoint: Path, tmp_path: Path, scheme_name: str, options: WriteOptions, reason: str
) -> None:
    check_refused(awq, quantized_model(phi4_checkpoint, scheme_name), options, reason, tmp_path / "out")


def test_an_export_that_fails_midway_leaves_nothing(phi4_checkpoint: Path, tmp_path: Path) -> None:
    def too_large(linear: QuantizedLinear) -> QuantizedLinear:
        if not linear.name.endswith("1.self_attn.o_proj"):
            return linear
        return replace(linear, params={**linear.params, "zeros": linear.params["zeros"] + 16})

    with pytest.raises(InputError, match=r"1\.self_attn\.o_proj: zero points up to"):
        awq.write(quantized_model(phi4_checkpoint, "w4g32-asym", too_large), tmp_path / "out", WriteOptions())
    assert list(tmp_path.iterdir()) == []


# Reader


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_json(lambda c: c["quantization_config"].update(quant_method="awq", bits=8)), "contradicts bits 8"),
        (edit_json(lambda c: c["quantization_config"].update(version="gemv")), "version 'gemv' has another layout"),
        (edit_json(lambda c: c["quantization_config"].update(zero_point=False)), "zero_point False is not supported"),
        (
            edit_json(lambda c: c["quantization_config"].update(group_size=64, meta=None)),
            r"qzeros is I32 \[2, 16\], expected I32 \[1, 16\]",
        ),
        (edit_tensors(lambda t: t.pop(f"{LINEAR}.qzeros")), "gate_up_proj.qzeros is missing"),
        (edit_tensors(lambda t: t.pop(f"{LINEAR}.qweight")), "gate_up_proj.weight is missing"),
        (edit_tensors(lambda t: t[f"{LINEAR}.qzeros"].add_(1)), "gate_up_proj: zero point 9"),
        (edit_tensors(lambda t: t[f"{LINEAR}.scales"][0, :3].fill_(torch.nan)), "3 scale.s. are NaN"),
    ],
)
def test_a_damaged_folder_is_named_for_its_damage(
    phi4_checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    out = awq.write(quantized_model(phi4_checkpoint, "w4g32"), tmp_path / "out", WriteOptions()).path
    damage(out)
    assert awq.matches(out)
    with pytest.raises(InputError, match=message):
        awq.read(out).quantized(LINEAR)


def test_a_folder_that_names_no_scheme_is_read_as_asymmetric(phi4_checkpoint: Path, tmp_path: Path) -> None:
    model = quantized_model(phi4_checkpoint, "w4g32")
    out = awq.write(model, tmp_path / "out", WriteOptions()).path
    edit_json(lambda c: c["quantization_config"].pop("meta"))(out)
    edit_json(lambda c: c["quantization_config"].update(version="GEMM", modules_to_not_convert=None))(out)
    found = awq.read(out).quantized(LINEAR)
    assert found is not None
    assert found.scheme.name == "w4g32-asym"
    assert torch.equal(found.dequantize(), model.load(LINEAR).dequantize())


def test_other_folders_are_not_taken_for_awq(phi4_checkpoint: Path, tmp_path: Path) -> None:
    assert not awq.matches(phi4_checkpoint)
    assert not awq.matches(tmp_path)
    with pytest.raises(InputError, match="quant_method is None, not 'awq'"):
        awq.read(phi4_checkpoint)


def test_the_interop_table_in_the_readme_is_the_recorded_result() -> None:
    benchmark = load_script("benchmarks/formats/awq_interop.py")
    document = json.loads(benchmark.RESULT.read_text())
    assert benchmark.table(document) in (benchmark.HERE / "README.md").read_text()
    assert all(row["agrees"] == row["should_agree"] for row in document["results"]["cases"])
