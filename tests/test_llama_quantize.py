"""llama.cpp's quantizer as a peer: the types asked for, the imatrix really used, nothing half-made left."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from safetensors.numpy import save_file
from scripts import load_script
from support import write_checkpoint

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import InputError, Phi4EdgeError, UsageError
from phi4edge.writers._api import WriteOptions
from phi4edge.writers.gguf import write_f16

peer = load_script("benchmarks/peers/llama_quantize.py")
Options = peer.QuantizeOptions
LAYERS = 8
LINEARS = ("attn_output", "attn_qkv", "ffn_down", "ffn_up")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 GGUF of a tiny model whose widths suit blocks of 256."""
    folder = tmp_path_factory.mktemp("peer")
    shapes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": LAYERS}
    checkpoint = open_checkpoint(write_checkpoint(folder / "model", "phi4", **shapes))
    return Path(write_f16(checkpoint, folder / "f16.gguf", WriteOptions()).path)


@pytest.fixture(scope="module")
def imatrix() -> dict[str, NDArray[np.float32]]:
    """An importance for every linear, far from uniform and different in each."""
    random = np.random.default_rng(0)
    return {
        f"blk.{layer}.{name}.weight": np.exp(random.normal(0, 2, 256)).astype(np.float32)
        for layer in range(LAYERS)
        for name in LINEARS
    }


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(tensor: gguf.ReaderTensor) -> NDArray[np.float32]:
    return gguf.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize(("kind", "base"), [("q4_0", "q4_0"), ("q4_1", "q4_1"), ("q8_0", "q8_0")])
def test_every_linear_gets_the_type_and_head_and_embedding_theirs(
    source: Path, tmp_path: Path, kind: str, base: str
) -> None:
    result = peer.quantize(source, tmp_path / "out.gguf", Options(kind, embedding="f16", threads=1))
    linears = {f"blk.{layer}.{name}.weight" for layer in range(LAYERS) for name in LINEARS}
    assert {result.types[name] for name in linears} == {base}
    assert (result.types["output.weight"], result.types["token_embd.weight"]) == ("q8_0", "f16")
    assert {kind for name, kind in result.types.items() if "norm" in name} == {"f32"}
    assert result.nbytes == (tmp_path / "out.gguf").stat().st_size
    assert result.as_dict()["linear_types"] == {base: 4 * LAYERS}


def test_blocks_are_those_that_gguf_rounds_to(source: Path, tmp_path: Path) -> None:
    peer.quantize(source, tmp_path / "out.gguf", Options("q4_0", threads=2))
    before, after = tensors(source), tensors(tmp_path / "out.gguf")
    for name, kind in (("blk.3.ffn_up.weight", Type.Q4_0), ("output.weight", Type.Q8_0)):
        assert np.array_equal(after[name].data, gguf.quantize(values(before[name]), kind)), name


def test_mixed_types_of_q4_k_m_are_recorded(source: Path, tmp_path: Path) -> None:
    result = peer.quantize(source, tmp_path / "out.gguf", Options("q4_k_m", head="q6_k", threads=1)).as_dict()
    assert set(result["linear_types"]) >= {"q4_k", "q6_k"}
    assert result["other_types"]["blk.0.ffn_down.weight"] == "q6_k"
    assert result["other_types"]["output.weight"] == "q6_k"


def test_imatrix_changes_every_linear_and_lowers_its_weighted_error(
    source: Path, tmp_path: Path, imatrix: dict[str, NDArray[np.float32]]
) -> None:
    without = peer.quantize(source, tmp_path / "without.gguf", Options("q4_0", pure=True, threads=1))
    weighted = peer.quantize(source, tmp_path / "with.gguf", Options("q4_0", pure=True, imatrix=imatrix, threads=1))
    assert (without.imatrix_entries, weighted.imatrix_entries) == (0, 4 * LAYERS)
    assert without.types == weighted.types
    float16, plain, searched = (tensors(p) for p in (source, without.path, weighted.path))
    for name, tensor in float16.items():
        if name not in imatrix:
            assert np.array_equal(plain[name].data, searched[name].data), name
            continue
        loss = [float((imatrix[name] * (values(t[name]) - values(tensor)) ** 2).sum()) for t in (plain, searched)]
        assert loss[1] < 0.8 * loss[0], name
    metadata = gguf.GGUFReader(weighted.path)
    assert metadata.fields["quantize.imatrix.file"].contents() == "imatrix.safetensors"
    assert metadata.fields["quantize.imatrix.entries_count"].contents() == 4 * LAYERS


def test_imatrix_puts_early_ffn_down_of_q4_0_into_q4_1_unless_pure(
    source: Path, tmp_path: Path, imatrix: dict[str, NDArray[np.float32]]
) -> None:
    mixed = peer.quantize(source, tmp_path / "mixed.gguf", Options("q4_0", imatrix=imatrix, threads=1))
    pure = peer.quantize(source, tmp_path / "pure.gguf", Options("q4_0", imatrix=imatrix, pure=True, threads=1))
    assert mixed.as_dict()["other_types"] == {
        "blk.0.ffn_down.weight": "q4_1",
        "output.weight": "q8_0",
        "token_embd.weight": "q8_0",
    }
    assert pure.as_dict()["linear_types"] == {"q4_0": 4 * LAYERS}


def test_imatrix_file_is_read_by_linear_names(tmp_path: Path) -> None:
    ones = np.ones(4, np.float32)
    file = tmp_path / "imatrix.safetensors"
    save_file({"model.layers.7.mlp.gate_up_proj.imatrix": ones, "model.layers.7.mlp.gate_up_proj.count": ones}, file)
    assert list(peer.load_imatrix(file)) == ["blk.7.ffn_up.weight"]
    assert peer.gguf_name("model.layers.0.self_attn.qkv_proj") == "blk.0.attn_qkv.weight"
    with pytest.raises(InputError, match="lm_head: not a linear of a block"):
        peer.gguf_name("lm_head")
    with pytest.raises(InputError, match=r"nothing\.safetensors: no such file"):
        peer.load_imatrix(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blk.2.ffn_up.weight": None}, r"31 entries, the model 32 linears; first missing: blk\.2\.ffn_up\.weight"),
        ({"blk.9.ffn_up.weight": np.ones(256, np.float32)}, r"first unknown: blk\.9\.ffn_up\.weight"),
        ({"blk.1.ffn_down.weight": np.ones(128, np.float32)}, r"imatrix of shape \[128\], in_features 256"),
        ({"blk.1.ffn_down.weight": np.full(256, np.nan, np.float32)}, "must hold finite squares"),
        ({"blk.1.ffn_down.weight": np.zeros(256, np.float32)}, "not all zero"),
    ],
)
def test_imatrix_that_does_not_fit_the_model_is_refused(
    source: Path,
    tmp_path: Path,
    imatrix: dict[str, NDArray[np.float32]],
    change: dict[str, NDArray[np.float32] | None],
    message: str,
) -> None:
    changed = {name: value for name, value in (imatrix | change).items() if value is not None}
    with pytest.raises(InputError, match=message):
        peer.quantize(source, tmp_path / "out.gguf", Options("q4_0", imatrix=changed))
    assert not list(tmp_path.iterdir())


def test_what_llama_cpp_refuses_is_an_error_with_its_reason_and_leaves_no_file(source: Path, tmp_path: Path) -> None:
    quantized = peer.quantize(source, tmp_path / "q8.gguf", Options("q8_0", threads=1)).path
    with pytest.raises(Phi4EdgeError, match="requantizing from type q8_0 is disabled"):
        peer.quantize(quantized, tmp_path / "out.gguf", Options("q4_0", threads=1))
    with pytest.raises(UsageError, match="unknown file type 'q4_km'") as unknown:
        peer.quantize(source, tmp_path / "out.gguf", Options("q4_km"))
    assert unknown.value.hint is not None
    assert "did you mean 'q4_k_m'?" in unknown.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["q8.gguf"]


def test_head_whose_rows_do_not_fill_a_block_is_refused_before_llama_cpp_aborts(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "model", "phi4"))
    source = Path(write_f16(checkpoint, tmp_path / "f16.gguf", WriteOptions()).path)
    with pytest.raises(InputError, match=r"output\.weight: rows of 64 are not divisible by q6_k's block of 256"):
        peer.quantize(source, tmp_path / "out.gguf", Options("q4_0", head="q6_k"))
    fallen = peer.quantize(source, tmp_path / "out.gguf", Options("q4_k_s", threads=1))
    assert fallen.fallbacks == 8
    assert set(fallen.as_dict()["linear_types"]) <= {"q5_0", "q5_1"}


def test_who_received_llama_cpps_log_receives_it_again_afterwards(source: Path, tmp_path: Path) -> None:
    def receiver() -> int | None:
        callback, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
        llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
        return ctypes.cast(callback, ctypes.c_void_p).value

    before = receiver()
    peer.quantize(source, tmp_path / "out.gguf", Options("q8_0", threads=1))
    assert before is not None
    assert receiver() == before
