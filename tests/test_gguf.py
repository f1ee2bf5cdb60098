"""GGUF files: the codes survive, and llama.cpp computes the model that was meant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf as gguf_py
import llama_cpp
import numpy as np
import pytest
import torch
from gguf_support import Llama, libggml_dequantize, libggml_quantize
from rounded import quantized_model
from support import tiny_config, tiny_weights, write_checkpoint
from torch import Tensor

from phi4edge.checkpoint.config import parse_config
from phi4edge.checkpoint.reader import CheckpointReader, open_checkpoint
from phi4edge.core.errors import InputError, TargetError
from phi4edge.core.events import Progress
from phi4edge.model.source import QuantizedModel
from phi4edge.quant.ggml import BLOCK_TYPES
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.writers import _gguf_tensors, gguf
from phi4edge.writers._api import ArtifactReader, WriteOptions
from phi4edge.writers._gguf_metadata import safe_name
from phi4edge.writers._gguf_names import checkpoint_name, gguf_name

HELD = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "w4g32", "w4g64", "w4row")  # schemes that blocks hold
KINDS = ("phi4", "mini")


def written(model: QuantizedModel, out: Path, **options: Any) -> ArtifactReader:
    return gguf.read(gguf.write(model, out, WriteOptions(**options)).path)


@pytest.fixture
def folders(phi4_checkpoint: Path, mini_checkpoint: Path) -> dict[str, Path]:
    return {"phi4": phi4_checkpoint, "mini": mini_checkpoint}


# --- the codes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", HELD)
def test_codes_and_parameters_come_back_bit_for_bit(
    folders: dict[str, Path], tmp_path: Path, kind: str, scheme: str
) -> None:
    model = quantized_model(folders[kind], scheme)
    reader = written(model, tmp_path / "m.gguf")
    for name in model.linears:
        expected, found = model.load(name), reader.quantized(name)
        assert found is not None
        assert found.scheme == expected.scheme
        assert torch.equal(found.codes, expected.codes)
        for field, values in expected.params.items():
            assert found.params[field].numpy().tobytes() == values.numpy().tobytes()
        weight = reader.tensor(f"{name}.weight")
        assert torch.equal(weight, expected.dequantize())
        assert torch.equal(reader.tensor(f"{name}.weight", slice(3, 9)), weight[3:9])


def test_8_bit_affine_codes_without_minus_128_are_held(phi4_checkpoint: Path, tmp_path: Path) -> None:
    def lift(linear: QuantizedLinear) -> QuantizedLinear:
        return QuantizedLinear(linear.name, linear.scheme, linear.codes.clamp(min=1), linear.params)

    model = quantized_model(phi4_checkpoint, "w8g64", lift)
    assert gguf.refusal(model, WriteOptions()) is None
    reader = written(model, tmp_path / "m.gguf")
    for name in model.linears:
        found = reader.quantized(name)
        assert found is not None
        assert torch.equal(found.codes, model.load(name).codes)


def test_8_bit_affine_codes_with_minus_128_are_refused_by_name(phi4_checkpoint: Path, tmp_path: Path) -> None:
    def sink(linear: QuantizedLinear) -> QuantizedLinear:
        codes = linear.codes.clamp(min=1)
        if linear.name.endswith("1.mlp.down_proj"):
            codes[5, 6] = 0
        return QuantizedLinear(linear.name, linear.scheme, codes, linear.params)

    model = quantized_model(phi4_checkpoint, "w8g32", sink)
    assert "model.layers.1.mlp.down_proj: holds the code −128" in str(gguf.refusal(model, WriteOptions()))
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.down_proj: code −128 at row 5, column 6"):
        gguf.write(model, tmp_path / "m.gguf", WriteOptions())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("scheme", "words"),
    [("w4g32-asym", "not exact"), ("w8g32-asym", "not exact"), ("w4g16", "group_size 16 is not a multiple of 32")],
)
def test_schemes_that_no_block_holds_are_refused_with_the_reason(
    phi4_checkpoint: Path, tmp_path: Path, scheme: str, words: str
) -> None:
    model = quantized_model(phi4_checkpoint, scheme)
    assert words in str(gguf.refusal(model, WriteOptions()))
    with pytest.raises(InputError, match=f"model.layers.0.self_attn.qkv_proj: .*{words}"):
        gguf.write(model, tmp_path / "m.gguf", WriteOptions())


def test_a_block_that_is_only_partly_quantized_is_refused(phi4_checkpoint: Path) -> None:
    whole = quantized_model(phi4_checkpoint, "q4_0")
    part = QuantizedModel(whole.checkpoint, whole.scheme, whole.linears[1:], whole.load, whole.provenance)
    assert "self_attn.qkv_proj: is not quantized" in str(gguf.refusal(part, WriteOptions()))


# --- embedding and head ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["q8_0", "q6_k", "f16"])
def test_embedding_and_head_are_stored_as_asked(wide_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    model = quantized_model(wide_checkpoint, "q4_0")
    artifact = gguf.write(model, tmp_path / "m.gguf", WriteOptions(head=kind, embedding=kind))
    stored = {t.name: t for t in gguf_py.GGUFReader(artifact.path).tensors}
    values = model.checkpoint.tensor("lm_head.weight")
    packed = torch.from_numpy(np.array(stored["output.weight"].data)).view(torch.uint8)
    block = BLOCK_TYPES[kind]
    assert stored["output.weight"].tensor_type == stored["token_embd.weight"].tensor_type == block.code
    assert torch.equal(gguf.read(artifact.path).tensor("lm_head.weight"), libggml_dequantize(block, packed))
    if kind != "q6_k":  # ours searches better than libggml's
        assert torch.equal(packed, libggml_quantize(block, values))
    table = 2 * 512 * 256 if kind != "f16" else 0
    assert artifact.quantized_fraction == (model.config.linear_parameters + table) / model.config.parameters


def test_q6_k_is_refused_where_rows_are_not_whole_blocks(phi4_checkpoint: Path) -> None:
    model = quantized_model(phi4_checkpoint, "q4_0")
    reason = gguf.refusal(model, WriteOptions(head="q6_k"))
    assert reason is not None
    assert reason.startswith("head: hidden_size 64 is not a multiple of 256")
    assert "unknown type 'q2_k'" in str(gguf.refusal(model, WriteOptions(embedding="q2_k")))


def test_a_tied_head_is_stored_once(mini_checkpoint: Path, tmp_path: Path) -> None:
    reader = written(quantized_model(mini_checkpoint, "q4_0"), tmp_path / "m.gguf", head="f16", embedding="q8_0")
    names = {t.name: t.tensor_type.name for t in gguf_py.GGUFReader(tmp_path / "m.gguf").tensors}
    assert "output.weight" not in names
    assert names["token_embd.weight"] == "F16"  # the one table is the head
    assert reader.config.tie_word_embeddings


# --- what the file says ------------------------------------------------------------------------


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf_py.GGUFReader(path).fields.items()}


def test_keys_are_those_that_llama_cpp_reads(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind, folder in folders.items():
        gguf.write(quantized_model(folder, "q4_0"), tmp_path / f"{kind}.gguf", WriteOptions())
    phi4, mini = fields(tmp_path / "phi4.gguf"), fields(tmp_path / "mini.gguf")
    assert {key: phi4[key] for key in phi4 if key.startswith("phi3.")} == {
        "phi3.context_length": 512,
        "phi3.rope.scaling.original_context_length": 512,
        "phi3.embedding_length": 64,
        "phi3.feed_forward_length": 128,
        "phi3.block_count": 2,
        "phi3.attention.head_count": 4,
        "phi3.attention.head_count_kv": 2,
        "phi3.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "phi3.rope.dimension_count": 16,
        "phi3.rope.freq_base": 250000.0,
        "phi3.attention.sliding_window": 0,  # so that a runtime knows Phi-4
    }
    assert mini["phi3.rope.dimension_count"] == 12
    assert mini["phi3.attention.sliding_window"] == 4096
    assert mini["phi3.rope.scaling.original_context_length"] == 64
    assert mini["phi3.rope.scaling.attn_factor"] == pytest.approx((1 + np.log(2048 / 64) / np.log(64)) ** 0.5)
    assert phi4["general.architecture"] == "phi3"
    assert phi4["general.file_type"] == gguf_py.LlamaFileType.MOSTLY_Q4_0
    assert phi4["general.quantization_version"] == 2
    assert (phi4["phi4edge.scheme"], phi4["phi4edge.method"]) == ("q4_0", "rtn")
    names = {t.name for t in gguf_py.GGUFReader(tmp_path / "mini.gguf").tensors}
    assert {"rope_factors_long.weight", "rope_factors_short.weight"} <= names
    assert not any("ffn_gate" in name for name in names)


def test_a_chat_ends_with_its_own_token_where_eos_is_another(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "phi4", "phi4")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    path = gguf.write_f16(open_checkpoint(folder), tmp_path / "m.gguf", WriteOptions()).path
    found = fields(path)
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.eot_token_id"]) == (0, 3)
    with Llama(path, vocab_only=True) as llama:
        assert llama_cpp.llama_vocab_eot(llama.vocab) == 3
        ends = [i for i in range(512) if llama_cpp.llama_vocab_is_eog(llama.vocab, i)]
        assert ends == [0, 3]
        assert not llama_cpp.llama_vocab_get_add_bos(llama.vocab)


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("Phi-3.5-mini-instruct", "Phi 3.5-mini-instruct"),
        ("phi3", "phi 3"),
        ("my-PHI-3-phi3", "my-PHI 3-phi 3"),
        ("Phi-4-mini", "Phi-4-mini"),
        ("phi-4", "phi-4"),
    ],
)
def test_the_name_never_looks_like_phi_3_to_llama_cpp(name: str, safe: str) -> None:
    assert safe_name(name) == safe
    assert "phi3" not in safe.lower()
    assert "phi-3" not in safe.lower()


@pytest.mark.parametrize("kind", KINDS)
def test_the_reader_finds_the_exact_configuration(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    model = quantized_model(folders[kind], "q4_0")
    assert written(model, tmp_path / "m.gguf").config == model.config


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_of_others_files_is_told_by_the_keys(
    folders: dict[str, Path], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(folders[kind])
    expected = checkpoint.config
    path = gguf.write_f16(checkpoint, tmp_path / "m.gguf", WriteOptions()).path
    data = path.read_bytes()
    assert data.count(b"phi4edge.config") == 1
    path.write_bytes(data.replace(b"phi4edge.config", b"someone.comment"))
    found = gguf.read(path).config
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
        assert getattr(found, field) == getattr(expected, field)
    assert (found.head_dim, found.context_length) == (expected.head_dim, expected.context_length)
    assert (found.sliding_window, found.tie_word_embeddings) == (expected.sliding_window, expected.tie_word_embeddings)
    assert (found.rope.dim, found.rope.theta) == (expected.rope.dim, expected.rope.theta)
    assert found.rope.original_context == expected.rope.original_context
    assert found.rope.attention_factor == pytest.approx(expected.rope.attention_factor, rel=1e-6)
    assert found.rope.long_factor == (
        None if expected.rope.long_factor is None else pytest.approx(expected.rope.long_factor, rel=1e-6)
    )


def test_keys_and_the_stored_configuration_must_agree(phi4_checkpoint: Path, tmp_path: Path) -> None:
    path = gguf.write_f16(open_checkpoint(phi4_checkpoint), tmp_path / "m.gguf", WriteOptions()).path
    data = path.read_bytes()
    assert data.count(b'"rope_theta":250000.0') == 1
    path.write_bytes(data.replace(b'"rope_theta":250000.0', b'"rope_theta":260000.0'))
    with pytest.raises(InputError, match=r"rope theta is 250000\.0 in the file's keys, but 260000\.0"):
        gguf.read(path)


def test_names_are_the_same_in_both_directions() -> None:
    for kind in KINDS:
        for name in parse_config(tiny_config(kind)).tensor_shapes():
            stored = gguf_name(name)
            assert stored is not None
            assert checkpoint_name(stored) == name
    assert gguf_name("model.layers.0.self_attn.q_proj.weight") is None
    assert checkpoint_name("blk.0.ffn_gate.weight") is None


def test_file_and_bytes_are_the_same_every_time(phi4_checkpoint: Path, tmp_path: Path) -> None:
    model = quantized_model(phi4_checkpoint, "q4_1")
    first = gguf.write(model, tmp_path / "a.gguf", WriteOptions())
    again = gguf.write(model, tmp_path / "b.gguf", WriteOptions())
    assert list(first.files.values()) == list(again.files.values())
    assert first.nbytes == (tmp_path / "a.gguf").stat().st_size


def test_a_file_is_made_from_slices_of_rows(
    phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gguf.write_f16(open_checkpoint(phi4_checkpoint), tmp_path / "whole.gguf", WriteOptions())
    read: list[int] = []
    original = CheckpointReader.tensor

    def watched(self: CheckpointReader, name: str, rows: slice | None = None) -> Tensor:
        values = original(self, name, rows)
        read.append(values.numel())
        return values

    monkeypatch.setattr(CheckpointReader, "tensor", watched)
    monkeypatch.setattr(_gguf_tensors, "_CHUNK", 1000)
    sliced = gguf.write_f16(open_checkpoint(phi4_checkpoint), tmp_path / "sliced.gguf", WriteOptions())
    assert list(sliced.files.values()) == list(whole.files.values())
    assert max(read) <= 1000
    assert sum(read) == open_checkpoint(phi4_checkpoint).config.parameters


def test_what_llama_cpp_will_do_otherwise_is_said(tmp_path: Path) -> None:
    notes: list[str] = []

    class Listening(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    folder = write_checkpoint(tmp_path / "phi4", "phi4", sliding_window=100)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"][1]["rstrip"] = True
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    gguf.write_f16(open_checkpoint(folder), tmp_path / "m.gguf", WriteOptions(progress=Listening()))
    assert len(notes) == 2
    assert "ignores this architecture's sliding window of 100 tokens" in notes[0]
    assert "1 special tokens such as '<|im_start|>' swallow the white space" in notes[1]
    notes.clear()
    gguf.write_f16(
        open_checkpoint(write_checkpoint(tmp_path / "mini", "mini")),
        tmp_path / "n.gguf",
        WriteOptions(progress=Listening()),
    )
    (note,) = notes
    assert "context of more than 64 tokens, llama.cpp takes the long rope factors for short texts too" in note


def test_a_model_that_llama_cpps_graph_cannot_hold_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "phi4", "phi4", head_dim=32)
    with pytest.raises(InputError, match="num_heads × head_dim is 128 and hidden_size 64"):
        gguf.write_f16(open_checkpoint(folder), tmp_path / "m.gguf", WriteOptions())


# --- the unquantized model ---------------------------------------------------------------------


def test_bf16_holds_a_bfloat16_checkpoint_exactly(mini_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(mini_checkpoint)
    reader = gguf.read(gguf.write_f16(checkpoint, tmp_path / "m.gguf", WriteOptions(), "bf16").path)
    for name in checkpoint.config.tensor_shapes():
        assert torch.equal(reader.tensor(name), checkpoint.tensor(name)), name
    assert reader.quantized("model.layers.0.mlp.down_proj") is None


def test_a_value_beyond_float16_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = write_checkpoint(tmp_path / "huge", "phi4")
    weights = tiny_weights(tiny_config("phi4"))
    weights["model.layers.1.self_attn.o_proj.weight"][2, 3] = 1e5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder)
    with pytest.raises(InputError, match=r"model\.layers\.1\.self_attn\.o_proj\.weight: .* at \[2, 3\] exceeds"):
        gguf.write_f16(checkpoint, tmp_path / "m.gguf", WriteOptions())
    assert [p.name for p in tmp_path.iterdir()] == ["huge"]
    gguf.write_f16(checkpoint, tmp_path / "m.gguf", WriteOptions(), "bf16")


# --- places -------------------------------------------------------------------------


def test_an_existing_file_is_replaced_only_when_told(phi4_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint, out = open_checkpoint(phi4_checkpoint), tmp_path / "m.gguf"
    out.write_bytes(b"mine")
    with pytest.raises(InputError, match="already exists"):
        gguf.write_f16(checkpoint, out, WriteOptions())
    assert out.read_bytes() == b"mine"
    gguf.write_f16(checkpoint, out, WriteOptions(force=True))
    assert gguf.matches(out)
    with pytest.raises(InputError, match="is a folder"):
        gguf.write_f16(checkpoint, tmp_path, WriteOptions(force=True))


def test_no_room_is_said_before_anything_is_written(
    phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(TargetError, match="1000 B are free"):
        gguf.write_f16(open_checkpoint(phi4_checkpoint), tmp_path / "new" / "m.gguf", WriteOptions())
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_nothing(phi4_checkpoint: Path, tmp_path: Path) -> None:
    class Interrupting(Progress):
        def status(self, text: str) -> None:
            if text == "blk.1.ffn_up.weight":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gguf.write_f16(open_checkpoint(phi4_checkpoint), tmp_path / "m.gguf", WriteOptions(progress=Interrupting()))
    assert not list(tmp_path.iterdir())


def test_other_files_are_not_taken_for_a_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no")
    assert not gguf.matches(tmp_path / "x.gguf")
    assert not gguf.matches(tmp_path)
    assert not gguf.matches(tmp_path / "none")
