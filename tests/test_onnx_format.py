"""The ONNX folder holds exactly the codes that were decided, computes what they mean, and says so when it cannot."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gptq_support import random_linear
from hypothesis import given, settings
from hypothesis import strategies as st
from rounded import quantized_model
from support import write_checkpoint

from phi4edge.cli.main import main
from phi4edge.core.errors import InputError, UsageError
from phi4edge.core.hashing import sha256_file
from phi4edge.quant.ggml import BLOCK_TYPES
from phi4edge.quant.ggml import unpack_linear as unpack_blocks
from phi4edge.quant.ggml_rounding import quantize_q8_0
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.matmulnbits_packing import pack_linear, packed_layout, packing_refusal, unpack_linear
from phi4edge.quant.scheme import parse_scheme
from phi4edge.targets.catalog import open_catalog
from phi4edge.targets.fit import Request, layout_holds, weight_lines
from phi4edge.writers import gguf, gptq
from phi4edge.writers import onnx as writer
from phi4edge.writers._api import WriteOptions

pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")
builder = pytest.importorskip("onnxruntime_genai.models.builder")

import onnx  # noqa: E402
from onnx_support import ORIGINAL, TOLERANCE, ort_logits, peer_logits, relative, run_node, tokens_of  # noqa: E402
from onnxruntime_support import mini_for_onnxruntime  # noqa: E402

SCHEMES = (
    "w4g16",
    "w4g32",
    "w4g64",
    "w8g32",
    "w8g64",
    "w4row",
    "w4g32-asym",
    "w4g64-asym",
    "w8g16-asym",
    "q4_0",
    "q8_0",
)
DTYPES = {torch.uint8: "U8", torch.float32: "F32"}
EXACT = WriteOptions(accuracy_level=1)


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mini_for_onnxruntime(tmp_path_factory.mktemp("mini-ort"))


def assert_same(ours: QuantizedLinear | None, theirs: QuantizedLinear) -> None:
    assert ours is not None
    assert (ours.name, ours.scheme) == (theirs.name, theirs.scheme)
    assert torch.equal(ours.codes, theirs.codes)
    assert ours.params.keys() == theirs.params.keys()
    for field, value in theirs.params.items():
        assert ours.params[field].dtype == value.dtype
        bits = torch.int16 if value.dtype == torch.float16 else value.dtype
        assert torch.equal(ours.params[field].contiguous().view(bits), value.contiguous().view(bits)), field


# Packing


@pytest.mark.parametrize("scheme_name", SCHEMES)
def test_every_code_and_zero_lies_in_the_bits_that_the_operator_documents(scheme_name: str) -> None:
    scheme = parse_scheme(scheme_name)
    linear = random_linear(scheme, 6, 64, seed=3)
    packed, rebuilt = pack_linear(linear), torch.empty(6, 64)
    groups, bits = scheme.groups(64), scheme.bits
    size, row_bytes = 64 // groups, -(-groups * bits // 8)
    for n in range(6):
        for k in range(64):
            group, inner = divmod(k, size)
            code = int(packed["qweight"][n, group, inner * bits // 8]) >> (bits * inner % 8) & (2**bits - 1)
            zero = 2 ** (bits - 1)
            if "zeros" in packed:
                zero = int(packed["zeros"][n * row_bytes + group * bits // 8]) >> (bits * group % 8) & (2**bits - 1)
            rebuilt[n, k] = float(packed["scales"][n * groups + group]) * (code - zero)
    assert torch.equal(rebuilt, linear.dequantize())


@settings(deadline=None, max_examples=60)
@given(
    scheme_name=st.sampled_from([name for name in SCHEMES if name != "w4row"]),
    rows=st.integers(1, 9),
    in_blocks=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_packing_round_trip_is_bit_exact(scheme_name: str, rows: int, in_blocks: int, seed: int) -> None:
    scheme = parse_scheme(scheme_name)
    linear = random_linear(scheme, rows, in_blocks * 64, seed)
    packed = pack_linear(linear)
    layout = packed_layout(scheme, rows, in_blocks * 64)
    assert {field: (DTYPES[t.dtype], tuple(t.shape)) for field, t in packed.items()} == layout
    assert_same(unpack_linear("linear", scheme, packed), linear)


@pytest.mark.parametrize("scheme_name", SCHEMES)
def test_onnxruntime_gives_our_weights_for_the_identity_and_for_every_row(scheme_name: str) -> None:
    scheme = parse_scheme(scheme_name)
    linear = random_linear(scheme, 24, 128, seed=5)
    weights = {field: values.numpy() for field, values in pack_linear(linear).items()}
    block = 128 // scheme.groups(128)
    attributes: dict[str, Any] = {"bits": scheme.bits, "block_size": block}
    found = run_node("MatMulNBits", torch.eye(128).numpy(), weights, 24, K=128, N=24, accuracy_level=1, **attributes)
    assert torch.equal(found.t(), linear.dequantize())
    flat = weights | {"qweight": weights["qweight"].reshape(24, -1), "scales": weights["scales"].reshape(24, -1)}
    if "zeros" in flat:
        flat["zeros"] = flat["zeros"].reshape(24, -1)
    rows = torch.arange(24).numpy()
    assert torch.equal(
        run_node("GatherBlockQuantized", rows, flat, 128, gather_axis=0, quantize_axis=1, **attributes),
        linear.dequantize(),
    )


@pytest.mark.parametrize(
    ("scheme_name", "in_features", "reason"),
    [
        ("q4_1", 64, "floating-point minimum"),
        ("q5_0", 64, "has 5 bits; 4 and 8 are packed"),
        ("q6_k", 256, "scales in steps that a super-block shares"),
        ("w4g8", 64, "group_size 8 is not a power of two from 16 up"),
        ("w4g96", 192, "group_size 96 is not a power of two"),
        ("w4row", 96, r"group_size 96 (a whole row) is not a power of two"),
        ("w4g32", 48, "in_features 48 is not divisible by group_size 32"),
    ],
)
def test_what_the_operator_cannot_hold_is_refused_with_the_reason(
    scheme_name: str, in_features: int, reason: str
) -> None:
    assert reason in str(packing_refusal(parse_scheme(scheme_name), 32, in_features))


def test_what_a_target_is_offered_is_what_the_operator_holds() -> None:
    for name in (*SCHEMES, "q4_1", "q5_0", "q6_k", "w4g8", "w4g96", "w8g128-asym"):
        scheme = parse_scheme(name)
        assert layout_holds("onnx", scheme) == (
            packing_refusal(scheme, 32, 768 if scheme.group_size == 96 else 256) is None
        )


def test_a_scale_that_no_float16_is_is_named() -> None:
    linear = random_linear(parse_scheme("w4g32"), 4, 64, seed=1)
    packed = pack_linear(linear)
    packed["scales"][5] = 0.1
    with pytest.raises(InputError, match=r"linear: the scale of row 2, group 1 is 0\.1"):
        unpack_linear("linear", linear.scheme, packed)
    packed["scales"][5] = float("nan")
    with pytest.raises(InputError, match="1 scale"):
        unpack_linear("linear", linear.scheme, packed)


# Writer and reader


@pytest.mark.parametrize("scheme_name", SCHEMES)
def test_write_then_read_gives_the_run_bit_for_bit(phi4_checkpoint: Path, tmp_path: Path, scheme_name: str) -> None:
    model = quantized_model(phi4_checkpoint, scheme_name)
    artifact = writer.write(model, tmp_path / "out", WriteOptions())
    assert writer.matches(artifact.path)
    assert not gptq.matches(artifact.path)
    reader = writer.read(artifact.path)
    for name in model.linears:
        assert_same(reader.quantized(name), model.load(name))
        assert torch.equal(reader.tensor(f"{name}.weight"), model.load(name).dequantize())
        assert torch.equal(reader.tensor(f"{name}.weight", slice(3, 9)), model.load(name).dequantize()[3:9])
    for name in ("model.norm.weight", "model.layers.1.input_layernorm.weight"):
        assert torch.equal(reader.tensor(name), model.tensor(name))
    assert (reader.config, artifact.scheme) == (model.config, scheme_name)
    assert artifact.quantized_fraction > 0.99


@pytest.mark.parametrize("kind", ["phi4", "mini"])
def test_head_and_embedding_have_the_codes_of_a_gguf(
    phi4_checkpoint: Path, mini: Path, tmp_path: Path, kind: str
) -> None:
    model = quantized_model({"phi4": phi4_checkpoint, "mini": mini}[kind], "w4g32")
    ours = writer.read(writer.write(model, tmp_path / "onnx", WriteOptions()).path)
    theirs = gguf.read(gguf.write(model, tmp_path / "model.gguf", WriteOptions()).path)
    names = ["model.embed_tokens"] if kind == "mini" else ["model.embed_tokens", "lm_head"]
    for name in names:
        assert ours.holds_integers(name)
        expected = unpack_blocks(name, BLOCK_TYPES["q8_0"], quantize_q8_0(model.tensor(f"{name}.weight")))
        found = ours.quantized(name)
        assert found is not None
        assert_same(replace(found, name=name), expected)
        for rows in (None, slice(7, 30), slice(500, 600)):
            assert torch.equal(ours.tensor(f"{name}.weight", rows), theirs.tensor(f"{name}.weight", rows))


def test_a_head_in_f16_is_the_checkpoint_s(phi4_checkpoint: Path, tmp_path: Path) -> None:
    model = quantized_model(phi4_checkpoint, "w4g32")
    artifact = writer.write(model, tmp_path / "out", WriteOptions(head="f16", embedding="f16"))
    reader = writer.read(artifact.path)
    for name in ("lm_head", "model.embed_tokens"):
        assert not reader.holds_integers(name)
        assert reader.quantized(name) is None
        assert torch.equal(reader.tensor(f"{name}.weight"), model.tensor(f"{name}.weight").half().float())
        assert torch.equal(reader.tensor(f"{name}.weight", slice(3, 5)), reader.tensor(f"{name}.weight")[3:5])
    assert artifact.quantized_fraction == model.config.linear_parameters / model.config.parameters


def test_linears_on_other_schemes_than_the_run_s_keep_them(phi4_checkpoint: Path, tmp_path: Path) -> None:
    model, other = quantized_model(phi4_checkpoint, "w4g32"), quantized_model(phi4_checkpoint, "w8g64")
    wide = {name for name in model.linears if name.endswith("down_proj")}
    mixed = replace(
        model,
        load=lambda name: (other if name in wide else model).load(name),
        exceptions=dict.fromkeys(wide, parse_scheme("w8g64")),
    )
    reader = writer.read(writer.write(mixed, tmp_path / "out", EXACT).path)
    for name in model.linears:
        assert_same(reader.quantized(name), mixed.load(name))
    tokens = tokens_of(40)
    assert relative(ort_logits(tmp_path / "out", tokens), peer_logits(phi4_checkpoint, reader, tokens)) <= TOLERANCE


def test_only_one_linear_is_in_memory_at_a_time(phi4_checkpoint: Path, tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def watch(linear: QuantizedLinear) -> QuantizedLinear:
        assert all(codes() is None for codes in alive)
        alive.append(weakref.ref(linear.codes))
        return linear

    model = quantized_model(phi4_checkpoint, "w4g32-asym", watch)
    writer.write(model, tmp_path / "out", WriteOptions())
    assert len(alive) == len(model.linears)


def test_large_tensors_lie_where_they_can_be_mapped(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phi4edge.writers._onnx_tensors._LARGE", 8192)
    model = quantized_model(mini, "w4g32")
    reader = writer.read(writer.write(model, tmp_path / "out", EXACT).path)
    assert all(ref.offset % (65536 if ref.nbytes >= 8192 else 64) == 0 for ref in reader.file.tensors.values())
    assert_same(reader.quantized(model.linears[-1]), model.load(model.linears[-1]))
    assert relative(ort_logits(tmp_path / "out", tokens_of(9)), peer_logits(mini, reader, tokens_of(9))) <= TOLERANCE


def test_a_tied_table_is_stored_once(mini: Path, tmp_path: Path) -> None:
    out = writer.write(quantized_model(mini, "w4g32"), tmp_path / "out", WriteOptions()).path
    config = writer.read(out).config
    table = config.vocab_size * config.hidden_size
    linears = config.linear_parameters // 2 + config.linear_parameters // 32 * 4
    assert (out / "model.onnx.data").stat().st_size < 1.02 * (table + table // 32 * 4 + linears) + 4096


@pytest.mark.parametrize("head", ["q8_0", "f16"])
@pytest.mark.parametrize("scheme_name", ["w4g32", "w4g32-asym", "w8g64-asym", "w4row"])
def test_a_target_is_told_the_bytes_that_the_file_has(
    phi4_checkpoint: Path, mini: Path, tmp_path: Path, scheme_name: str, head: str
) -> None:
    for folder in (phi4_checkpoint, mini):
        model = quantized_model(folder, scheme_name)
        out = writer.write(model, tmp_path / "out", WriteOptions(head=head, embedding=head, force=True)).path
        reader = writer.read(out)
        places = {ref.offset: ref.nbytes for name, ref in reader.file.tensors.items() if "_cache" not in name}
        request = Request(model.scheme, 256, "onnx", head=head, embedding=head)
        assert sum(line.nbytes for line in weight_lines(reader.config, request)) == sum(places.values())


def test_the_folder_carries_settings_tokenizer_licence_and_card(phi4_checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(phi4_checkpoint, source)
    (source / "LICENSE").write_text("do as you like")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "temperature": 0.5}))
    artifact = writer.write(quantized_model(source, "q8_0"), tmp_path / "out", WriteOptions(context=300))
    out = artifact.path
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    genai = json.loads((out / "genai_config.json").read_text())
    assert genai["model"]["eos_token_id"] == [3, 2, 0]  # the template's <|im_end|>, then those of the two files
    assert (genai["search"]["max_length"], genai["search"]["temperature"]) == (300, 0.5)
    assert (genai["model"]["context_length"], genai["model"]["type"]) == (512, "phi3")
    card = (out / "README.md").read_text()
    for words in (
        "library_name: onnxruntime-genai",
        "rounded to 8 bits in blocks of 32",
        "`accuracy_level` 4",
        "is 300",
    ):
        assert words in card
    assert {p.name: sha256_file(p) for p in out.iterdir()} == dict(artifact.files)
    assert artifact.nbytes == sum(p.stat().st_size for p in out.iterdir())
    metadata = writer.read(out).metadata
    assert metadata["phi4edge.base_model"] == "someone/tiny-phi"
    assert (metadata["phi4edge.scheme"], metadata["phi4edge.head"]) == ("q8_0", "q8_0")


def test_the_cache_is_for_4096_tokens_unless_said_otherwise(mini: Path, phi4_checkpoint: Path, tmp_path: Path) -> None:
    def length(folder: Path, **options: Any) -> int:
        out = writer.write(quantized_model(folder, "w4g32"), tmp_path / "out", WriteOptions(force=True, **options)).path
        return int(json.loads((out / "genai_config.json").read_text())["search"]["max_length"])

    assert length(phi4_checkpoint) == 512
    assert length(write_checkpoint(tmp_path / "long", max_position_embeddings=16384)) == 4096
    assert length(mini, context=100) == 100
    with pytest.raises(InputError, match="context 3000 is more than the 2048 tokens"):
        length(mini, context=3000)


# What cannot be written


def test_a_run_that_does_not_fit_is_refused_before_anything_is_written(
    phi4_checkpoint: Path, mini_checkpoint: Path, tmp_path: Path
) -> None:
    q4_1, w4 = quantized_model(phi4_checkpoint, "q4_1"), quantized_model(phi4_checkpoint, "w4g32")
    with pytest.raises(InputError, match=r"onnx cannot hold this run: .*floating-point minimum") as caught:
        writer.write(q4_1, tmp_path / "out", WriteOptions())
    assert "w4g32" in str(caught.value.hint)
    fewer = replace(w4, linears=w4.linears[1:])
    windowed = quantized_model(write_checkpoint(tmp_path / "windowed", sliding_window=100), "w4g32")
    cases = {
        "layers.0.self_attn.qkv_proj: is not quantized": (fewer, WriteOptions()),
        "--head q8_0": (w4, WriteOptions(head="q6_k")),
        "rotates 6 pairs of channels a head": (quantized_model(mini_checkpoint, "w4g32"), WriteOptions()),
        "sliding window of 100 tokens": (windowed, WriteOptions()),
    }
    for words, (model, options) in cases.items():
        assert words in str(writer.refusal(model, options))
    with pytest.raises(UsageError, match="accuracy_level 2"):
        writer.write(w4, tmp_path / "out", WriteOptions(accuracy_level=2))
    assert [path.name for path in tmp_path.iterdir()] == ["windowed"]


@pytest.mark.parametrize("scheme_name", SCHEMES)
def test_what_fits_is_not_refused(mini: Path, scheme_name: str) -> None:
    assert writer.refusal(quantized_model(mini, scheme_name), WriteOptions()) is None


# What it computes


@pytest.mark.parametrize("scheme_name", ["w4g32", "w4g64-asym", "w4row", "w8g32", "w8g16-asym", "q4_0", "q8_0"])
def test_onnxruntime_computes_the_logits_of_our_codes(phi4_checkpoint: Path, tmp_path: Path, scheme_name: str) -> None:
    reader = writer.read(writer.write(quantized_model(phi4_checkpoint, scheme_name), tmp_path / "out", EXACT).path)
    tokens = tokens_of(40)
    assert relative(ort_logits(tmp_path / "out", tokens), peer_logits(phi4_checkpoint, reader, tokens)) <= TOLERANCE


@pytest.mark.parametrize("head", ["q8_0", "f16"])
@pytest.mark.parametrize("length", [ORIGINAL, ORIGINAL + 1, 100])
def test_so_it_does_for_mini_on_both_sides_of_the_original_context(
    mini: Path, tmp_path: Path, head: str, length: int
) -> None:
    options = replace(EXACT, head=head)
    reader = writer.read(writer.write(quantized_model(mini, "w4g32-asym"), tmp_path / "out", options).path)
    tokens = tokens_of(length)
    assert relative(ort_logits(tmp_path / "out", tokens), peer_logits(mini, reader, tokens)) <= TOLERANCE


@pytest.mark.parametrize("kind", ["phi4", "mini"])
def test_genai_s_own_builder_makes_a_model_of_the_same_logits(
    phi4_checkpoint: Path, mini: Path, tmp_path: Path, kind: str
) -> None:
    base = {"phi4": phi4_checkpoint, "mini": mini}[kind]
    model = quantized_model(base, "w4g32-asym", _without_zero)
    ours = writer.write(model, tmp_path / "ours", replace(EXACT, head="f16", embedding="f16")).path
    folder, theirs = gptq.write(model, tmp_path / "gptq", WriteOptions()).path, tmp_path / "theirs"
    arguments = ("", str(folder), str(theirs), "int4", "cpu", str(tmp_path / "cache"))
    options = ["nodes_to_exclude=/lm_head/MatMul", "accuracy_level=1", "shared_embeddings=false"]
    builder.create_model(*arguments, **builder.parse_extra_options(*arguments, options))
    for length in (40, 100):
        tokens = tokens_of(length)
        assert relative(ort_logits(ours, tokens), ort_logits(theirs, tokens)) <= TOLERANCE
    nodes = [sorted(_operators(path)) for path in (ours, theirs)]
    assert [n for n in nodes[0] if n not in ("Cast", "FusedMatMul")] == [
        n for n in nodes[1] if n not in ("Cast", "MatMul")
    ]
    settings = [json.loads((path / "genai_config.json").read_text()) for path in (ours, theirs)]
    for found in settings:
        found["model"]["decoder"].pop("sliding_window", None)  # theirs tells a window as wide as the context
        found["search"].pop("max_length")  # theirs is the model's whole context
    assert settings[0] == settings[1]


def _without_zero(linear: QuantizedLinear) -> QuantizedLinear:
    """GPTQ's v1, which the builder reads, has no zero point of 0."""
    return replace(linear, params={**linear.params, "zeros": linear.params["zeros"].clamp(min=1)})


def _operators(folder: Path) -> list[str]:
    return [node.op_type for node in onnx.load_model(folder / "model.onnx", load_external_data=False).graph.node]


@pytest.mark.parametrize("fault", ["zeros", "scales", "codes"])
def test_the_comparison_sees_a_fault_in_one_linear(phi4_checkpoint: Path, tmp_path: Path, fault: str) -> None:
    def change(linear: QuantizedLinear) -> QuantizedLinear:
        if linear.name != "model.layers.1.mlp.down_proj":
            return linear
        if fault == "codes":
            return replace(linear, codes=linear.codes.roll(1, dims=1))
        return replace(linear, params={**linear.params, fault: linear.params[fault].roll(1, dims=0)})

    right = quantized_model(phi4_checkpoint, "w4g32-asym")
    writer.write(quantized_model(phi4_checkpoint, "w4g32-asym", change), tmp_path / "out", EXACT)
    tokens = tokens_of(40)
    good = writer.read(writer.write(right, tmp_path / "good", EXACT).path)
    assert relative(ort_logits(tmp_path / "out", tokens), peer_logits(phi4_checkpoint, good, tokens)) > 1000 * TOLERANCE


# The command line


def test_export_and_verify_through_the_command_line(
    phi4_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "onnx"
    assert (
        main(["quantize", str(phi4_checkpoint), "--out", str(run), "--method", "rtn", "--scheme", "w4g32", "-q"]) == 0
    )
    options = ("--context", "256", "--accuracy-level", "1", "--json", "-q")
    capsys.readouterr()
    assert main(["export", str(run), "--format", "onnx", "--out", str(out), *options]) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert (data["format"], data["scheme"]) == ("onnx", "w4g32")
    assert json.loads((out / "genai_config.json").read_text())["search"]["max_length"] == 256
    assert writer.read(out).metadata["phi4edge.accuracy_level"] == "1"
    assert main(["verify", str(out), "--against", str(run), "-q"]) == 0
    _flip = writer.read(out).file.tensors["model.layers.0.attn.qkv_proj.MatMulNBits.scales"]
    with (out / "model.onnx.data").open("r+b") as file:
        file.seek(_flip.offset)
        file.write(torch.tensor([0.5]).numpy().tobytes())
    assert main(["verify", str(out), "--against", str(run), "-q"]) == 8
    assert "layers.0.self_attn.qkv_proj: scales at row 0" in capsys.readouterr().err


def test_a_target_gives_the_length_of_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = str(write_checkpoint(tmp_path / "long", max_position_embeddings=16384))
    run, out = tmp_path / "run", tmp_path / "onnx"
    assert main(["quantize", base, "--out", str(run), "--method", "rtn", "--scheme", "w4g32", "-q"]) == 0
    command = ["export", str(run), "--format", "onnx", "--out", str(out), "-q", "--force", "--target"]
    default = open_catalog().profile("laptop-x86-ddr5").default_context
    assert default not in (4096, 16384)  # what it would be without a target
    for context, expected in ((("--context", "200"), 200), ((), default)):
        assert main([*command, "laptop-x86-ddr5", *context]) == 0
        assert json.loads((out / "genai_config.json").read_text())["search"]["max_length"] == expected
    assert main([*command, "jetson-orin-nano-8gb"]) == 4
    assert "runs no onnx" in capsys.readouterr().err
