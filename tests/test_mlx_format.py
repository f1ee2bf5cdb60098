"""MLX folders: MLX and mlx-lm, run on the CPU, take our codes, scales and biases for what they are."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_support import (
    LARGEST,
    adversarial_linear,
    assert_same,
    check_refused,
    check_round_trip,
    described,
    edit_json,
    edit_tensors,
    mixed_model,
)
from rounded import quantized_model
from safetensors import safe_open
from support import write_checkpoint
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

from phi4edge.core.errors import InputError
from phi4edge.quant.grid import grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.mlx_packing import pack_linear, packed_layout, packing_refusal, unpack_linear
from phi4edge.quant.scheme import parse_scheme
from phi4edge.writers import gguf, mlx
from phi4edge.writers._api import ArtifactReader, WriteOptions

if platform.system() == "Darwin" and platform.machine() != "arm64":
    pytest.skip("MLX has no package for Macs with Intel's processors", allow_module_level=True)

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

SYMMETRIC = ("w4g32", "w4g64", "w4g128", "w8g64", "q4_0", "q5_0", "q8_0")
MINIMA = ("q4_1", "q5_1")
ASYMMETRIC = ("w4g32-asym", "w8g64-asym")
LINEAR = "model.layers.1.mlp.gate_up_proj"
TOLERANCE = 5e-6  # relative, of float32 logits; 7e-7 to 1e-6 measured
ORIGINAL = 64  # of the small mini


@pytest.fixture(autouse=True)
def on_the_cpu() -> None:
    """Whatever else there is: float32 on a GPU of Apple's rounds in another way."""
    mx.set_default_device(mx.cpu)


def as_mlx(tensor: Tensor) -> mx.array:
    return mx.array(tensor.numpy())


def as_torch(array: mx.array) -> Tensor:
    return torch.from_numpy(np.array(array.astype(mx.float32)))


def random_tokens(length: int) -> Tensor:
    return torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(1))


def mlx_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits of mlx-lm's model of ``folder``, its bfloat16 tensors widened to float32, which changes no value."""
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return as_torch(model(as_mlx(tokens)))


def our_model(base: Path, reader: ArtifactReader) -> Phi3ForCausalLM:
    """transformers' model with the weights that our reader gives."""
    model = Phi3ForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    weights = {name: reader.tensor(name) for name in reader.config.tensor_shapes()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (unexpected, set(missing) - {"lm_head.weight"}) == ([], set())
    return model


def difference(base: Path, folder: Path, length: int) -> float:
    """‖theirs − ours‖ / ‖ours‖ over the logits of one random sequence."""
    tokens = random_tokens(length)
    with torch.inference_mode():
        ours = our_model(base, mlx.read(folder))(tokens).logits
    return float((mlx_logits(folder, tokens) - ours).norm() / ours.norm())


# Packing


@settings(deadline=None, max_examples=80)
@given(
    scheme_name=st.sampled_from(SYMMETRIC + MINIMA + ASYMMETRIC),
    out_features=st.integers(1, 9),
    in_blocks=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_packing_round_trip_is_bit_exact_and_mlx_dequantizes_to_our_weights(
    scheme_name: str, out_features: int, in_blocks: int, seed: int
) -> None:
    scheme = parse_scheme(scheme_name)
    largest = LARGEST / grid_for(scheme).middle if scheme.symmetric else LARGEST
    linear = adversarial_linear(scheme, out_features, in_blocks * 128, seed, largest)
    packed = pack_linear(linear)
    assert described(packed) == packed_layout(scheme, linear.out_features, linear.in_features)
    assert_same(unpack_linear("linear", scheme, packed), linear)
    theirs = mx.dequantize(
        as_mlx(packed["weight"]),
        as_mlx(packed["scales"]).astype(mx.float32),  # as MLX does itself beside bfloat16 or float32 activations
        as_mlx(packed["biases"]).astype(mx.float32),
        group_size=scheme.group_size,
        bits=scheme.bits,
    )
    assert torch.equal(as_torch(theirs), linear.dequantize())


@pytest.mark.parametrize(
    ("scheme_name", "shape", "reason"),
    [
        ("q4_k", (32, 256), "q4_k has scales in steps that a super-block shares"),
        ("w4row", (32, 64), "w4row has a scale for a whole row, and MLX groups of 32, 64, 128"),
        ("w4g16", (32, 64), "groups of 16"),
        ("w4g256", (32, 256), "groups of 256"),
        ("w4g32", (16, 48), "in_features 48 is not divisible by group_size 32"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_with_the_reason(
    scheme_name: str, shape: tuple[int, int], reason: str
) -> None:
    assert reason in str(packing_refusal(parse_scheme(scheme_name), *shape))


@pytest.mark.parametrize(("scheme_name", "scale"), [("w4g32", 8192.0), ("q5_0", 4096.0), ("w8g64", 512.0)])
def test_a_bias_beyond_float16_is_refused_not_infinite(scheme_name: str, scale: float) -> None:
    linear = adversarial_linear(parse_scheme(scheme_name), 8, 64, seed=0, largest=LARGEST / 128)
    linear.params["scales"][3, 0] = scale
    with pytest.raises(InputError, match=r"linear: scale .* beyond float16's 65504"):
        pack_linear(linear)
    linear.params["scales"][3, 0] = scale - scale / 2048  # the float16 below
    assert_same(unpack_linear("linear", linear.scheme, pack_linear(linear)), linear)


def test_a_zero_point_that_a_scale_of_0_would_hide_is_refused() -> None:
    linear = adversarial_linear(parse_scheme("w4g32-asym"), 8, 64, seed=0)
    linear.params["scales"][2, 1], linear.params["zeros"][2, 1] = 0.0, 5
    with pytest.raises(InputError, match=r"1 group\(s\) of scale 0 have a zero point other than 0"):
        pack_linear(linear)


# mlx-lm


@pytest.mark.parametrize("scheme_name", ["w4g32", "w4g64", "w8g64", "w4g32-asym", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_mlx_lm_computes_the_logits_of_our_codes(phi4_checkpoint: Path, tmp_path: Path, scheme_name: str) -> None:
    folder = mlx.write(quantized_model(phi4_checkpoint, scheme_name), tmp_path / "mlx", WriteOptions()).path
    assert difference(phi4_checkpoint, folder, 40) <= TOLERANCE


@pytest.mark.parametrize("scheme_name", ["w4g32", "w4g32-asym"])
def test_so_it_does_for_mini_beyond_the_original_context(
    mini_checkpoint: Path, tmp_path: Path, scheme_name: str
) -> None:
    folder = mlx.write(quantized_model(mini_checkpoint, scheme_name), tmp_path / "mlx", WriteOptions()).path
    assert difference(mini_checkpoint, folder, ORIGINAL + 40) <= TOLERANCE


def test_within_it_mlx_lm_turns_by_the_long_factors_and_the_cards_remedy_works(
    mini_checkpoint: Path, tmp_path: Path
) -> None:
    """mlx-lm 0.32 never uses ``short_factor``: when this fails, the model card and the module's text are to change."""
    folder = mlx.write(quantized_model(mini_checkpoint, "w4g32"), tmp_path / "mlx", WriteOptions()).path
    assert f"contexts of up to {ORIGINAL} tokens: shorter ones drift" in (folder / "README.md").read_text()
    assert difference(mini_checkpoint, folder, 40) > 1000 * TOLERANCE
    edit_json(lambda c: c["rope_scaling"].update(long_factor=c["rope_scaling"]["short_factor"]))(folder)
    assert difference(mini_checkpoint, folder, 40) <= TOLERANCE
    assert difference(mini_checkpoint, folder, ORIGINAL + 40) > 1000 * TOLERANCE


@pytest.mark.parametrize(("kind", "prompt"), [("phi4", 20), ("mini", ORIGINAL + 6)])
def test_64_greedy_tokens_are_those_of_transformers(
    kind: str, prompt: int, phi4_checkpoint: Path, mini_checkpoint: Path, tmp_path: Path
) -> None:
    base = {"phi4": phi4_checkpoint, "mini": mini_checkpoint}[kind]
    folder = mlx.write(quantized_model(base, "w4g32"), tmp_path / "mlx", WriteOptions()).path
    tokens = random_tokens(prompt)
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    theirs = [int(token) for token, _ in generate_step(as_mlx(tokens[0]), model, max_tokens=64)]
    ours = our_model(base, mlx.read(folder))
    with torch.inference_mode():
        generated = ours.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=64, do_sample=False, eos_token_id=None
        )
    assert theirs == generated[0, prompt:].tolist()
    assert len(set(theirs)) > 3


@pytest.mark.parametrize("field", ["weight", "scales", "biases"])
def test_the_comparison_sees_a_fault_in_one_linear(phi4_checkpoint: Path, tmp_path: Path, field: str) -> None:
    model = quantized_model(phi4_checkpoint, "q4_1")
    right, wrong = (mlx.write(model, tmp_path / name, WriteOptions()).path for name in ("right", "wrong"))
    name, tokens = f"model.layers.1.mlp.down_proj.{field}", random_tokens(40)
    edit_tensors(
        lambda tensors: tensors.update({name: tensors[name].view(torch.uint8).flip(0).view(tensors[name].dtype)})
    )(wrong)
    assert float((mlx_logits(wrong, tokens) - (exact := mlx_logits(right, tokens))).norm() / exact.norm()) > 1e-3


def test_beside_bfloat16_mlx_computes_in_float32_as_the_card_says(phi4_checkpoint: Path, tmp_path: Path) -> None:
    folder = mlx.write(quantized_model(phi4_checkpoint, "w4g32"), tmp_path / "mlx", WriteOptions()).path
    model, _ = load_model(folder)
    assert model.model.embed_tokens.weight.dtype == mx.bfloat16
    assert model.model.layers[0].self_attn.qkv_proj.scales.dtype == mx.float16
    assert model(as_mlx(random_tokens(4))).dtype == mx.float32
    assert "computes these weights in float32" in (folder / "README.md").read_text()


# What differs from module to module


def test_a_mix_has_an_entry_for_every_module_that_differs(phi4_checkpoint: Path, tmp_path: Path) -> None:
    model = mixed_model(phi4_checkpoint)
    folder = mlx.write(model, tmp_path / "mlx", WriteOptions(head="q8_0")).path
    quantization = json.loads((folder / "config.json").read_text())["quantization"]
    eight = {"group_size": 32, "bits": 8, "mode": "affine"}
    assert quantization == {
        "group_size": 32, "bits": 4, "mode": "affine", "lm_head": eight,
        "model.layers.0.mlp.down_proj": eight, "model.layers.1.mlp.down_proj": eight,
    }  # fmt: skip
    reader = mlx.read(folder)
    for name in model.linears:
        assert_same(reader.quantized(name), model.load(name))
    assert difference(phi4_checkpoint, folder, 40) <= TOLERANCE


def test_the_head_is_the_one_that_a_gguf_holds(phi4_checkpoint: Path, tmp_path: Path) -> None:
    model = quantized_model(phi4_checkpoint, "w4g32")
    packed = mlx.read(mlx.write(model, tmp_path / "mlx", WriteOptions(head="q8_0")).path)
    blocks = gguf.read(gguf.write(model, tmp_path / "model.gguf", WriteOptions()).path)
    assert packed.quantized("lm_head") is not None
    assert torch.equal(packed.tensor("lm_head.weight"), blocks.tensor("lm_head.weight"))


def test_rope_is_said_in_the_words_that_mlx_lm_reads(mini_checkpoint: Path, tmp_path: Path) -> None:
    """transformers 5 writes rope_parameters; mlx-lm would pass over them and take plain rope of base 10000."""
    base = write_checkpoint(tmp_path / "base", "mini", rope_theta=50000.0)
    Phi3Config.from_pretrained(base).save_pretrained(base)
    assert "rope_scaling" not in json.loads((base / "config.json").read_text())
    folder = mlx.write(quantized_model(base, "w4g32"), tmp_path / "mlx", WriteOptions()).path
    assert mlx.read(folder).config == quantized_model(base, "w4g32").config
    assert difference(base, folder, ORIGINAL + 40) <= TOLERANCE


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sliding_window": 256}, "sliding_window 256 is below the context"),
        ({"head_dim": 32}, "head_dim 32 is not hidden_size / heads"),
    ],
)
def test_a_model_that_mlx_lm_would_compute_otherwise_is_refused(
    tmp_path: Path, changes: dict[str, int], reason: str
) -> None:
    base = write_checkpoint(tmp_path / "base", **changes)
    assert reason in str(mlx.refusal(quantized_model(base, "w4g32"), WriteOptions()))


def test_an_attention_factor_of_its_own_is_refused(mini_checkpoint: Path, tmp_path: Path) -> None:
    scaling = {**json.loads((mini_checkpoint / "config.json").read_text())["rope_scaling"], "attention_factor": 1.25}
    base = write_checkpoint(tmp_path / "base", "mini", rope_scaling=scaling)
    reason = "attention_factor 1.25 is not 1.35401, which mlx-lm computes"
    assert reason in str(mlx.refusal(quantized_model(base, "w4g32"), WriteOptions()))


# Writer and reader


@pytest.mark.parametrize(
    "scheme_name", ["w4g32", "w4g64", "w8g64", "w4g32-asym", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]
)
def test_write_then_read_gives_the_run_bit_for_bit(phi4_checkpoint: Path, tmp_path: Path, scheme_name: str) -> None:
    check_round_trip(mlx, quantized_model(phi4_checkpoint, scheme_name), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "mlx"}


def test_the_card_says_what_was_not_measured(phi4_checkpoint: Path, tmp_path: Path) -> None:
    cards = [
        (
            mlx.write(quantized_model(phi4_checkpoint, name), tmp_path / name, WriteOptions()).path / "README.md"
        ).read_text()
        for name in ("w4g32", "w4g32-asym")
    ]
    assert all("**not measured on hardware**" in card for card in cards)
    assert "scales and biases are float16." in cards[0]
    assert "scales and biases are float32, in which −s·z is exact" in cards[1]
    assert "longrope" not in cards[0]


@pytest.mark.parametrize(
    ("scheme_name", "options", "reason"),
    [
        ("q4_k", WriteOptions(), "qkv_proj: q4_k has scales in steps"),
        ("w4row", WriteOptions(), "a scale for a whole row"),
        ("w4g32", WriteOptions(head="q6_k"), "as it is, or as q8_0"),
        ("w4g32", WriteOptions(embedding="q8_0"), "embedding"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, scheme_name: str, options: WriteOptions, reason: str
) -> None:
    base = write_checkpoint(tmp_path / "base", hidden_size=256, intermediate_size=256)
    check_refused(mlx, quantized_model(base, scheme_name), options, reason, tmp_path / "out")


def test_an_export_that_fails_midway_leaves_nothing(phi4_checkpoint: Path, tmp_path: Path) -> None:
    def too_large(linear: QuantizedLinear) -> QuantizedLinear:
        if linear.name.endswith("1.self_attn.o_proj"):
            return replace(linear, params={"scales": torch.full_like(linear.params["scales"], 9000.0)})
        return linear

    with pytest.raises(InputError, match=r"1\.self_attn\.o_proj: scale 9000 has the bias"):
        mlx.write(quantized_model(phi4_checkpoint, "w4g32", too_large), tmp_path / "out", WriteOptions())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_json(lambda c: c["quantization"].update(bits=8)), "meta.scheme w4g32-asym contradicts bits 8"),
        (edit_json(lambda c: c["quantization"].update(mode="mxfp4")), "mode 'mxfp4' is not supported"),
        (edit_json(lambda c: c["quantization"].update(lm_head={"bits": 8})), r"entries for \['lm_head'\], meta for"),
        (edit_json(lambda c: c["quantization_config"].pop("meta")), "quantization_config names no scheme"),
        (edit_tensors(lambda t: t.pop(f"{LINEAR}.biases")), "gate_up_proj.biases is missing"),
        (edit_tensors(lambda t: t[f"{LINEAR}.biases"][5, 1].mul_(1.001)), "the bias of row 5, group 1 is"),
        (edit_tensors(lambda t: t[f"{LINEAR}.scales"][0, :2].fill_(torch.nan)), "2 scale value.s. are NaN or Inf"),
        (
            edit_tensors(lambda t: t.update({f"{LINEAR}.scales": t[f"{LINEAR}.scales"].half()})),
            "scales is F16 .* expected F32",
        ),
    ],
)
def test_a_damaged_folder_is_named_for_its_damage(
    phi4_checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    out = mlx.write(quantized_model(phi4_checkpoint, "w4g32-asym"), tmp_path / "out", WriteOptions()).path
    damage(out)
    assert mlx.matches(out)
    with pytest.raises(InputError, match=message):
        mlx.read(out).quantized(LINEAR)


def test_a_scale_off_float16_is_no_scale_of_ours(phi4_checkpoint: Path, tmp_path: Path) -> None:
    out = mlx.write(quantized_model(phi4_checkpoint, "w4g32-asym"), tmp_path / "out", WriteOptions()).path

    def stretch(tensors: dict[str, Tensor]) -> None:
        for field in ("scales", "biases"):
            tensors[f"{LINEAR}.{field}"] *= 1 + 2**-20

    edit_tensors(stretch)(out)
    with pytest.raises(InputError, match=r"a scale is no float16 number|the bias of row"):
        mlx.read(out).quantized(LINEAR)


def test_other_folders_are_not_taken_for_mlx(phi4_checkpoint: Path, tmp_path: Path) -> None:
    assert not mlx.matches(phi4_checkpoint)
    assert not mlx.matches(tmp_path)
    with pytest.raises(InputError, match="has no quantization, which MLX folders have"):
        mlx.read(phi4_checkpoint)
