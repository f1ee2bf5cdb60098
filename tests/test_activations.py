"""Simulated 8-bit activations are those of the runtimes: they explain what float32 inputs leave unexplained."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rounded import quantized_model
from support import write_checkpoint
from torch import Tensor

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.cli.main import main
from phi4edge.core.errors import InputError, UsageError
from phi4edge.quant.ggml import BLOCK_TYPES
from phi4edge.runtimes import torch_ref
from phi4edge.runtimes._activations import rounding_of
from phi4edge.runtimes._api import ACTIVATIONS, Settings, load_runtime
from phi4edge.writers import gguf
from phi4edge.writers._api import WriteOptions

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
CONTEXT = 4  # short: see the note on ties below
TOKENS = np.random.default_rng(0).integers(0, 512, (40, CONTEXT))


def logits(
    artifact: Path, settings: Settings, runtime: str = "torch_ref", tokens: NDArray[np.int64] = TOKENS
) -> Tensor:
    with load_runtime(runtime).open(artifact, tokens.shape[1], settings) as session:
        return torch.from_numpy(np.stack([rows.copy() for rows in session.logits(tokens)]))


def served(artifact: Path, tokens: NDArray[np.int64] = TOKENS) -> Tensor:
    """llama.cpp's logits with everything but its integer products in float32."""
    return logits(artifact, Settings(threads=1, kv_type="f32", flash_attention="off"), "llama_cpp", tokens)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def assert_explained(simulated: Tensor, plain: Tensor, real: Tensor) -> None:
    """At most positions the simulation is the runtime to float32's accuracy, and on average far nearer to it.

    Not at all of them: a value at a tie falls to one side or the other by its last bit, and all that follows is then
    rounded anew. The more tokens, the more of these.
    """
    far, near = ((found - real).norm(dim=-1) / real.norm(dim=-1) for found in (plain, simulated))
    assert float(far.median()) > 3e-3
    assert float(near.median()) < 1e-5
    assert float(near.mean()) < float(far.mean()) / 4


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["phi4", "mini"])
@pytest.mark.parametrize("scheme", ["q4_0", "q8_0"])
def test_simulated_q8_0_activations_explain_llama_cpp(scheme: str, kind: str, tmp_path: Path) -> None:
    # llama.cpp takes longrope's factors by the size of its context, which is 256 at least.
    folder = write_checkpoint(tmp_path / "model", kind, original_max_position_embeddings=512)
    artifact = gguf.write(quantized_model(folder, scheme), tmp_path / "model.gguf", WriteOptions()).path
    simulated = logits(artifact, Settings(activations="q8_0"))
    assert_explained(simulated, logits(artifact, Settings()), served(artifact))


@needs_llama_cpp
def test_the_drift_of_simulated_activations_is_that_of_llama_cpp(phi4_checkpoint: Path, tmp_path: Path) -> None:
    """Over longer texts ties make other logits, and the same mean KLD."""
    tokens = np.random.default_rng(1).integers(0, 512, (40, 64))
    artifact = gguf.write(quantized_model(phi4_checkpoint, "q8_0"), tmp_path / "model.gguf", WriteOptions()).path
    exact = logits(phi4_checkpoint, Settings(), tokens=tokens).log_softmax(-1)

    def kld(found: Tensor) -> float:
        return float((exact.exp() * (exact - found.log_softmax(-1))).sum(-1).mean())

    real = kld(served(artifact, tokens))
    assert kld(logits(artifact, Settings(), tokens=tokens)) < 0.75 * real
    assert kld(logits(artifact, Settings(activations="q8_0"), tokens=tokens)) == pytest.approx(real, rel=0.03)


@needs_llama_cpp
@pytest.mark.parametrize("ftype", [14, 18], ids=["Q4_K_S", "Q6_K"])
def test_simulated_q8_k_activations_explain_llama_cpp_on_its_own_k_quants(ftype: int, tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    folder = write_checkpoint(tmp_path / "model", "phi4", **shape)
    f16 = gguf.write_f16(open_checkpoint(folder), tmp_path / "f16.gguf", WriteOptions()).path
    artifact = tmp_path / "k.gguf"
    code = (
        f"import sys, llama_cpp as l; p = l.llama_model_quantize_default_params(); p.ftype = {ftype}; p.nthread = 1;"
        "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), p))"
    )
    subprocess.run([sys.executable, "-c", code, str(f16), str(artifact)], check=True, capture_output=True)
    simulated = logits(artifact, Settings(activations="q8_k"))
    assert_explained(simulated, logits(artifact, Settings()), served(artifact))


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
@pytest.mark.parametrize("block", [32, 64, 128])
def test_simulated_int8_activations_explain_matmulnbits(block: int) -> None:
    """One product at accuracy_level 4, which computes in int8."""
    import onnxruntime
    from onnx import TensorProto, helper

    rows, columns = 96, 256
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (rows, columns), dtype=np.uint8)
    scales = rng.uniform(0.5, 1.5, (rows, columns // block)).astype(np.float32)
    packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).reshape(rows, columns // block, block // 2)
    node = helper.make_node(
        "MatMulNBits", ["x", "B", "s"], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=4, block_size=block, accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, rows])],
        [
            helper.make_tensor("B", TensorProto.UINT8, packed.shape, packed.tobytes(), raw=True),
            helper.make_tensor("s", TensorProto.FLOAT, [scales.size], scales.tobytes(), raw=True),
        ],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = rng.standard_normal((7, columns)).astype(np.float32) * np.exp(rng.standard_normal(columns)).astype(np.float32)
    real = torch.from_numpy(session.run(None, {"x": x})[0])
    weight = torch.from_numpy((codes.astype(np.float32) - 8) * np.repeat(scales, block, axis=1))
    plain = relative(torch.from_numpy(x) @ weight.T, real)
    simulated = relative(rounding_of(f"int8-b{block}")(torch.from_numpy(x)) @ weight.T, real)
    assert plain > 1e-3
    assert simulated < plain / 20


@needs_llama_cpp
def test_q8_0_rounds_as_libggml_does() -> None:
    from gguf_support import libggml_dequantize, libggml_quantize

    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-25, 25)[:, None]
    x[3] = 0
    kind = BLOCK_TYPES["q8_0"]
    inside = x.abs().amax(1) < 1e6  # beyond, d exceeds float16
    assert torch.equal(rounding_of("q8_0")(x[inside]), libggml_dequantize(kind, libggml_quantize(kind, x[inside])))


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "none"])
def test_a_value_moves_by_at_most_half_a_step_of_its_block(name: str) -> None:
    block = {"q8_0": 32, "q8_k": 256}.get(name) or int(name.removeprefix("int8-b"))
    x = torch.randn(5, 3, 512, generator=torch.Generator().manual_seed(0))
    step = x.reshape(5, 3, -1, block).abs().amax(-1, keepdim=True) / 127
    moved = (rounding_of(name)(x) - x).reshape(5, 3, -1, block).abs()
    assert (moved <= step * 0.57).all()  # half, and 127 times the rounding of d to float16
    assert (moved > step * 0.4).any()
    whole = rounding_of("none")
    assert whole(x) is x


def test_a_row_may_end_within_a_block_of_onnx_runtime_and_not_of_ggml(phi4_checkpoint: Path) -> None:
    x = torch.randn(2, 80, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, (0, 48))
    assert torch.equal(rounding_of("int8-b128")(x), rounding_of("int8-b128")(padded)[:, :80])
    with pytest.raises(InputError, match=r"self_attn.qkv_proj: in_features 64 is not divisible by 256"):
        torch_ref.open(phi4_checkpoint, CONTEXT, Settings(activations="q8_k"))
    with pytest.raises(UsageError, match="unknown activations"):
        Settings(activations="int4")


@needs_llama_cpp
def test_the_input_of_a_float_head_stays_as_it_is(phi4_checkpoint: Path, tmp_path: Path) -> None:
    settings = Settings(activations="q8_0")
    model = quantized_model(phi4_checkpoint, "q8_0")
    artifact = gguf.write(model, tmp_path / "model.gguf", WriteOptions(head="f16")).path
    integer_head = gguf.write(model, tmp_path / "other.gguf", WriteOptions(head="q8_0")).path
    assert not torch_ref.open_source(artifact).holds_integers("lm_head")  # type: ignore[attr-defined]
    assert torch_ref.open_source(integer_head).holds_integers("lm_head")  # type: ignore[attr-defined]
    # llama.cpp multiplies a float16 head with inputs in float16: its rounding is far below that of 8 bits.
    near = (logits(artifact, settings) - served(artifact)).norm(dim=-1) / served(artifact).norm(dim=-1)
    assert 1e-5 < float(near.median()) < 1e-3


def test_drift_says_what_was_simulated_and_llama_cpp_simulates_nothing(
    phi4_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text())
    artifact = gguf.write(quantized_model(phi4_checkpoint, "q8_0"), tmp_path / "model.gguf", WriteOptions()).path
    arguments = ["--reference", str(phi4_checkpoint), "--text", str(text), "--context", "64", "--chunks", "2"]

    def drift(path: Path, *more: str, expect: int = 0) -> dict[str, object]:
        assert main(["drift", str(path), *arguments, *more, "--json", "-q"]) == expect
        document: dict[str, object] = json.loads(capsys.readouterr().out)
        return document

    found = drift(phi4_checkpoint, "--activations", "q8_0")["data"]
    assert isinstance(found, dict)
    assert found["runtime"]["settings"]["activations"] == "q8_0"
    assert found["metrics"]["kld"]["value"] > 1e-6  # of the activations alone: the weights are full precision's
    exact = drift(phi4_checkpoint)["data"]
    assert isinstance(exact, dict)
    assert exact["metrics"]["kld"]["value"] < found["metrics"]["kld"]["value"] / 10
    drift(artifact, "--runtime", "torch_ref", "--activations", "q8_k", expect=3)
    drift(artifact, "--runtime", "llama_cpp", "--activations", "q8_0", expect=2)
