"""The GPTQ checkpoint holds exactly the codes that were decided, and says so when it cannot or does not."""

from __future__ import annotations

import importlib.util
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gptq_support import random_linear
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_support import assert_same, check_refused, check_round_trip
from rounded import quantized_model, rounded
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import write_checkpoint

from phi4edge.core.errors import InputError
from phi4edge.core.events import Progress
from phi4edge.core.hashing import sha256_file
from phi4edge.quant.gptq_packing import pack_linear, packed_layout, packing_refusal, unpack_linear
from phi4edge.quant.grid import grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.scheme import parse_scheme
from phi4edge.writers import _packed_folder, gptq
from phi4edge.writers._api import WriteOptions

SCHEMES = ("w4g32", "w4g64", "w4row", "w8g32", "w8row", "w4g32-asym", "w8g16-asym", "q4_0", "q8_0")
DTYPES = {torch.int32: "I32", torch.float16: "F16"}


# Packing


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("scheme_name", SCHEMES)
def test_every_code_and_zero_lies_in_the_bits_that_the_format_documents(scheme_name: str, offset: int) -> None:
    scheme = parse_scheme(scheme_name)
    linear = random_linear(scheme, 16, 64, seed=3, lowest_zero=offset)
    packed = pack_linear(linear, offset)
    bits, mask, size = scheme.bits, 2**scheme.bits - 1, 64 // scheme.groups(64)
    per_word, rebuilt = 32 // bits, torch.empty(16, 64)
    for n in range(16):
        for k in range(64):
            group = int(packed["g_idx"][k])
            assert group == k // size
            code = (int(packed["qweight"][k // per_word, n]) >> (bits * (k % per_word))) & mask
            zero = (int(packed["qzeros"][group, n // per_word]) >> (bits * (n % per_word))) & mask
            rebuilt[n, k] = float(packed["scales"][group, n]) * (code - (zero + offset))
    assert torch.equal(rebuilt, linear.dequantize())


@settings(deadline=None, max_examples=60)
@given(
    scheme_name=st.sampled_from(SCHEMES),
    out_words=st.integers(1, 5),
    in_blocks=st.integers(1, 3),
    offset=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**31),
)
def test_packing_round_trip_is_bit_exact(
    scheme_name: str, out_words: int, in_blocks: int, offset: int, seed: int
) -> None:
    scheme = parse_scheme(scheme_name)
    linear = random_linear(scheme, out_words * 8, in_blocks * 64, seed, lowest_zero=offset)
    packed = pack_linear(linear, offset)
    layout = packed_layout(scheme, linear.out_features, linear.in_features)
    assert {name: (DTYPES[t.dtype], tuple(t.shape)) for name, t in packed.items()} == layout
    assert_same(unpack_linear("linear", scheme, packed, offset), linear)


def test_a_zero_point_that_v1_cannot_store_is_refused_not_wrapped() -> None:
    linear = random_linear(parse_scheme("w4g32-asym"), 8, 32, seed=0)
    linear.params["zeros"][3, 0] = 0
    with pytest.raises(InputError, match="linear: zero points from 0 to"):
        pack_linear(linear, zero_offset=1)
    assert_same(unpack_linear("linear", linear.scheme, pack_linear(linear, 0), 0), linear)


@pytest.mark.parametrize(
    ("scheme_name", "shape", "reason"),
    [
        ("q4_1", (32, 64), "floating-point minimum"),
        ("q5_1", (32, 64), "floating-point minimum"),
        ("q5_0", (32, 64), "has 5 bits; 4 and 8 are packed"),
        ("q6_k", (32, 256), "q6_k has scales in steps that a super-block shares"),
        ("w4g32", (12, 64), "out_features 12 is not divisible by 8"),
        ("w8g32", (6, 64), "out_features 6 is not divisible by 4"),
        ("w4row", (16, 36), "in_features 36 is not divisible by 8"),
        ("w4g32", (16, 48), "not divisible by group_size 32"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_with_the_reason(
    scheme_name: str, shape: tuple[int, int], reason: str
) -> None:
    assert reason in str(packing_refusal(parse_scheme(scheme_name), *shape))


# Writer


@pytest.mark.parametrize("scheme_name", SCHEMES)
def test_write_then_read_gives_the_run_bit_for_bit(phi4_checkpoint: Path, tmp_path: Path, scheme_name: str) -> None:
    check_round_trip(gptq, quantized_model(phi4_checkpoint, scheme_name), tmp_path / "out")


def test_tensors_that_are_not_quantized_keep_dtype_and_bytes(phi4_checkpoint: Path, tmp_path: Path) -> None:
    model = quantized_model(phi4_checkpoint, "w4g32")
    gptq.write(model, tmp_path / "out", WriteOptions())
    written = load_file(tmp_path / "out" / "model.safetensors")
    original: dict[str, torch.Tensor] = {}
    for shard in model.checkpoint.index.shards:
        original |= load_file(shard)
    kept = {name for name in original if name.removesuffix(".weight") not in model.linears}
    assert len(kept) == 7
    for name in kept:
        assert written[name].dtype == original[name].dtype == torch.bfloat16
        assert torch.equal(written[name].view(torch.int16), original[name].view(torch.int16))
    assert written.keys() == kept | {
        f"{n}.{f}" for n in model.linears for f in ("qweight", "qzeros", "scales", "g_idx")
    }


def test_shards_hold_the_same_tensors_and_the_index_names_them_all(
    phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized_model(phi4_checkpoint, "w4g32")
    gptq.write(model, tmp_path / "whole", WriteOptions())
    monkeypatch.setattr(_packed_folder, "SHARD_BYTES", 40_000)
    gptq.write(model, tmp_path / "split", WriteOptions())
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "split").glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 2
    whole, seen = load_file(tmp_path / "whole" / "model.safetensors"), {}
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        sizes = [t.numel() * t.element_size() for t in tensors.values()]
        assert sum(sizes) <= 40_000 or len(sizes) == 1
        seen |= tensors
        assert all(index["weight_map"][name] == file.name for name in tensors)
    assert index["weight_map"].keys() == seen.keys() == whole.keys()
    assert all(torch.equal(seen[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values())
    assert_same(gptq.read(tmp_path / "split").quantized(model.linears[-1]), model.load(model.linears[-1]))


def test_only_one_linear_is_in_memory_at_a_time(phi4_checkpoint: Path, tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def watch(linear: QuantizedLinear) -> QuantizedLinear:
        assert all(codes() is None for codes in alive)
        alive.append(weakref.ref(linear.codes))
        return linear

    model = quantized_model(phi4_checkpoint, "w4g32-asym", watch)
    gptq.write(model, tmp_path / "out", WriteOptions())
    assert len(alive) == 2 * len(model.linears)  # zero points are looked at first


def test_folder_carries_config_tokenizer_licence_and_card(phi4_checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(phi4_checkpoint, source)
    (source / "LICENSE").write_text("do as you like")
    model = quantized_model(source, "q8_0")
    artifact = gptq.write(model, tmp_path / "out", WriteOptions())
    out = artifact.path
    config = json.loads((out / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert quantization == json.loads((out / "quantize_config.json").read_text())
    expected = {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": True, "desc_act": False}
    assert expected | {"checkpoint_format": "gptq"} == {k: quantization[k] for k in (*expected, "checkpoint_format")}
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    card = (out / "README.md").read_text()
    assert 'base_model: "someone/tiny-phi"' in card
    assert "| recipe | rtn \\| none |" in card
    assert {p.name: sha256_file(p) for p in out.iterdir()} == dict(artifact.files)
    assert artifact.nbytes == sum(p.stat().st_size for p in out.iterdir())


class _Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.total = self.done = 0

    def start(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        self.total = total

    def advance(self, count: int = 1) -> None:
        self.done += count

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(("lowest", "declared"), [(0, "gptq_v2"), (1, "gptq")])
def test_asymmetric_is_v1_unless_a_zero_point_is_0_and_then_says_so(
    phi4_checkpoint: Path, tmp_path: Path, lowest: int, declared: str
) -> None:
    def change(linear: QuantizedLinear) -> QuantizedLinear:
        zeros = linear.params["zeros"].clamp(min=1)
        if linear.name.endswith("1.mlp.down_proj"):
            zeros[5, 1] = lowest
        return replace(linear, params={**linear.params, "zeros": zeros})

    model, progress = quantized_model(phi4_checkpoint, "w4g32-asym", change), _Notes()
    gptq.write(model, tmp_path / "out", WriteOptions(progress=progress))
    reader = gptq.read(tmp_path / "out")
    assert reader.metadata["checkpoint_format"] == declared
    assert [declared in note for note in progress.notes] == [True] * (1 - lowest)
    assert f"`checkpoint_format` is `{declared}`" in (tmp_path / "out" / "README.md").read_text()
    assert progress.done == progress.total > 0
    for name in model.linears:
        assert_same(reader.quantized(name), model.load(name))


def test_a_run_that_does_not_fit_is_refused_before_anything_is_written(phi4_checkpoint: Path, tmp_path: Path) -> None:
    model = quantized_model(phi4_checkpoint, "q4_1")
    check_refused(gptq, model, WriteOptions(), "floating-point minimum", tmp_path / "out")
    fewer = replace(quantized_model(phi4_checkpoint, "w4g32"), linears=model.linears[1:])
    check_refused(gptq, fewer, WriteOptions(), "layers.0.self_attn.qkv_proj: is not quantized", tmp_path / "out")


@pytest.mark.parametrize("scheme_name", ["w4g32", "w8g32", "w4g32-asym", "q4_0", "q8_0"])
def test_what_fits_is_not_refused(mini_checkpoint: Path, scheme_name: str) -> None:
    assert gptq.refusal(quantized_model(mini_checkpoint, scheme_name), WriteOptions()) is None


def test_an_existing_folder_is_replaced_only_by_force(phi4_checkpoint: Path, tmp_path: Path) -> None:
    model = quantized_model(phi4_checkpoint, "w4g32")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="already exists"):
        gptq.write(model, tmp_path / "out", WriteOptions())
    assert (tmp_path / "out" / "mine.txt").exists()
    gptq.write(model, tmp_path / "out", WriteOptions(force=True))
    assert not (tmp_path / "out" / "mine.txt").exists()


def test_the_base_model_is_never_replaced_even_by_force(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "models" / "base")
    model = quantized_model(source, "w4g32")
    for out in (source, tmp_path / "models"):
        with pytest.raises(InputError, match="base model's own folder"):
            gptq.write(model, out, WriteOptions(force=True))
    assert (source / "model.safetensors").is_file()


def test_nan_in_the_embedding_is_named(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "base")
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][300, 7] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.embed_tokens\.weight holds 1 value.* \[300, 7\]"):
        gptq.write(quantized_model(source, "w4g32"), tmp_path / "out", WriteOptions())
    assert not (tmp_path / "out").exists()


def test_tied_head_is_stored_once(mini_checkpoint: Path, tmp_path: Path) -> None:
    gptq.write(quantized_model(mini_checkpoint, "w4g32"), tmp_path / "out", WriteOptions())
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert gptq.read(tmp_path / "out").config.tie_word_embeddings


# Reader


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for path, key in ((folder / "config.json", "quantization_config"), (folder / "quantize_config.json", None)):
            document = json.loads(path.read_text())
            (document if key is None else document[key]).update(changes)
            path.write_text(json.dumps(document))

    return apply


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def contradict(folder: Path) -> None:
    path = folder / "quantize_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"group_size": 64}))


LINEAR = "model.layers.1.mlp.gate_up_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "the file has"),
        (contradict, "group_size is 32 in config.json, 64 in quantize_config.json"),
        (edit_config(bits=8), "meta.scheme w4g32 contradicts bits 8"),
        (edit_config(bits=3, meta={}), "bits 3 is not supported"),
        (edit_config(bits="4"), "bits '4'"),
        (edit_config(group_size=64, meta={}), r"qzeros is I32 \[2, 16\], expected I32 \[1, 16\]"),
        (edit_config(meta={"scheme": "w4g33x"}), "unknown scheme"),
        (edit_config(quant_method="awq"), "quant_method is 'awq'"),
        (edit_config(checkpoint_format="marlin"), "checkpoint_format 'marlin' is unknown"),
        (edit_config(checkpoint_format="gptq_v2"), "zero point 7, a symmetric 4-bit grid has 8"),
        (edit_config(desc_act="yes"), "desc_act 'yes' is not supported"),
        (edit_config(dynamic={"+:.*down.*": {"bits": 8}}), "dynamic .* is not supported"),
        (edit_tensors(lambda t: t.pop(f"{LINEAR}.qzeros")), "gate_up_proj.qzeros is missing"),
        (edit_tensors(lambda t: t.pop(f"{LINEAR}.qweight")), "gate_up_proj.weight is missing"),
        (edit_tensors(lambda t: t[f"{LINEAR}.qzeros"].add_(1)), "gate_up_proj: zero point 9"),
        (edit_tensors(lambda t: t[f"{LINEAR}.g_idx"].copy_(t[f"{LINEAR}.g_idx"].flip(0))), "gate_up_proj: g_idx"),
        (edit_tensors(lambda t: t[f"{LINEAR}.scales"][0, :3].fill_(torch.nan)), "3 scale.s. are NaN"),
        (
            edit_tensors(lambda t: t.update({f"{LINEAR}.scales": t[f"{LINEAR}.scales"].float()})),
            "scales is F32 .* expected F16",
        ),
        (
            edit_tensors(lambda t: t.update({f"{LINEAR}.weight": torch.zeros(256, 64)})),
            "stored twice",
        ),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_named_for_its_damage(
    phi4_checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    out = gptq.write(quantized_model(phi4_checkpoint, "w4g32"), tmp_path / "out", WriteOptions()).path
    damage(out)
    assert gptq.matches(out)
    with pytest.raises(InputError, match=message):
        gptq.read(out).quantized(LINEAR)


def test_other_folders_are_not_taken_for_gptq(phi4_checkpoint: Path, tmp_path: Path) -> None:
    assert not gptq.matches(phi4_checkpoint)
    assert not gptq.matches(tmp_path)
    assert not gptq.matches(phi4_checkpoint / "config.json")
    with pytest.raises(InputError, match="quant_method is None"):
        gptq.read(phi4_checkpoint)


def test_a_checkpoint_of_another_tool_is_read_by_bits_and_group_size(phi4_checkpoint: Path, tmp_path: Path) -> None:
    model = quantized_model(phi4_checkpoint, "w4g32")
    out = gptq.write(model, tmp_path / "out", WriteOptions()).path
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    (out / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "sym": True, "desc_act": False}))
    assert gptq.matches(out)
    assert_same(gptq.read(out).quantized(LINEAR), model.load(LINEAR))


def test_the_test_models_exercise_what_they_claim_to(phi4_checkpoint: Path) -> None:
    model = quantized_model(phi4_checkpoint, "q8_0")
    linear = model.load(LINEAR)
    assert bool((linear.params["scales"] < 0).any())
    assert bool((linear.params["scales"] > 0).any())
    assert int(linear.codes.min()) == grid_for(linear.scheme).low == 1
    asym = rounded("x", model.checkpoint.tensor(f"{LINEAR}.weight"), parse_scheme("w4g32-asym"))
    assert asym.params["zeros"].unique().numel() > 3


def test_the_interop_table_in_the_readme_is_the_recorded_result() -> None:
    folder = Path(__file__).parents[1] / "benchmarks" / "formats"
    spec = importlib.util.spec_from_file_location("gptq_interop", folder / "gptq_interop.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    document = json.loads(benchmark.RESULT.read_text())
    assert benchmark.table(document) in (folder / "README.md").read_text()
    assert all(row["agrees"] == row["should_agree"] for row in document["results"]["cases"])
