"""Does the llama.cpp that is installed here compute? Run as a process of its own, since a bad build crashes.

``python -m phi4edge.targets.probe_llama`` writes a two-block Q4_0 model of a few hundred kB, loads it, decodes
eight tokens and prints one JSON object: the version, llama.cpp's CPU features, and what it says of the model and
the buffers it allocated. A wheel built for another CPU dies here by a signal, with the parent unharmed.
"""

from __future__ import annotations

__all__ = ["PROBE_MODEL", "probe", "write_probe_model"]

import ctypes
import json
import math
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi4edge.checkpoint.config import ModelConfig, RopeConfig
from phi4edge.targets.fit import BLOCKS

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOKENS = 8
# Where a block keeps its float16 scales, bytes from its start; as in ggml-common.h.
_SCALES = {"q8_0": (0,), "q4_0": (0,), "q4_1": (0, 2), "q4_k": (0, 2), "q6_k": (208,)}
PROBE_MODEL = ModelConfig(
    vocab_size=256,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0, dim=64),
    context_length=16384,
    sliding_window=None,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_ids=(),
    pad_token_id=None,
    dtype="float32",
    raw={},
)


def write_probe_model(
    path: Path, config: ModelConfig, linear: str = "q4_0", head: str = "q8_0", *, repeat: bool = False
) -> None:
    """Write a GGUF of architecture phi3 with random weights and no vocabulary.

    With ``repeat``, rows are copies of a few random blocks, whatever the type: written in no time, and for timing only.
    """
    import gguf
    import numpy as np

    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.rope.dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_rope_scaling_orig_ctx_len(config.context_length)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_sliding_window(0)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)

    def add(name: str, shape: tuple[int, ...], kind: str) -> None:
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, dtype=np.float32))
            return
        block = gguf.GGMLQuantizationType[kind.upper()]
        if repeat:
            writer.add_tensor(name, _repeated_blocks(shape, kind), raw_dtype=block)
            return
        weights = generator.standard_normal(shape, dtype=np.float32) / math.sqrt(shape[1])
        writer.add_tensor(name, gguf.quants.quantize(weights, block), raw_dtype=block)

    names = {
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    add("token_embd.weight", (config.vocab_size, config.hidden_size), head)
    for layer in range(config.num_layers):
        add(f"blk.{layer}.attn_norm.weight", (config.hidden_size,), "f32")
        add(f"blk.{layer}.ffn_norm.weight", (config.hidden_size,), "f32")
        for name, shape in config.linear_shapes.items():
            add(f"blk.{layer}.{names[name]}.weight", shape, linear)
    add("output_norm.weight", (config.hidden_size,), "f32")
    if not config.tie_word_embeddings:
        add("output.weight", (config.vocab_size, config.hidden_size), head)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _repeated_blocks(shape: tuple[int, ...], kind: str) -> NDArray[Any]:
    """Rows of ``kind`` as a file has them, one row again and again: [rows, bytes of a row] uint8; f16 [rows, columns].

    Codes are random, and the float16 scales that a block has are small: no value is a NaN, or denormal in float32.
    """
    import numpy as np

    generator = np.random.default_rng(0)
    if kind == "f16":
        values = (generator.standard_normal(shape[1]) / math.sqrt(shape[1])).astype(np.float16)
        return np.broadcast_to(values, shape)
    weights, size = BLOCKS[kind]
    row = generator.integers(0, 256, (shape[1] // weights, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(1 / 1024).tobytes(), dtype=np.uint8)
    for offset in _SCALES[kind]:
        row[:, offset : offset + 2] = scale
    return np.broadcast_to(row.reshape(1, -1), (shape[0], row.size))


def probe(path: Path, context: int, kv_type: int = 1) -> dict[str, Any]:
    """Load the model at ``path``, decode a few tokens, and say what llama.cpp said; ``kv_type`` is ggml's number."""
    import llama_cpp

    said: list[str] = []

    def listen(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        said.append(text.decode(errors="replace"))

    callback = llama_cpp.llama_log_callback(listen)  # kept alive for as long as llama.cpp may call it
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp did not load the probe model: {''.join(said)[-500:]}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = context, 1, 1
    params.n_batch = params.n_ubatch = 512
    params.type_k = params.type_v = kv_type
    handle = llama_cpp.llama_init_from_model(model, params)
    if not handle:
        raise RuntimeError(f"llama.cpp made no context for the probe model: {''.join(said)[-500:]}")
    tokens = (llama_cpp.llama_token * TOKENS)(*range(1, TOKENS + 1))
    status = llama_cpp.llama_decode(handle, llama_cpp.llama_batch_get_one(tokens, TOKENS))
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    logits = llama_cpp.llama_get_logits_ith(handle, -1)[:vocabulary]
    log = "".join(said)
    result = {
        "version": llama_cpp.__version__,
        "features": llama_cpp.llama_print_system_info().decode().strip(),
        "decode_status": status,
        "finite": all(math.isfinite(value) for value in logits) and len(set(logits)) > 1,
        "model_bytes": llama_cpp.llama_model_size(model),
        "kv_mib": _mib(log, r"KV buffer size ="),
        "compute_mib": _mib(log, r"compute buffer size ="),
    }
    llama_cpp.llama_free(handle)
    llama_cpp.llama_model_free(model)
    return result


def _mib(log: str, label: str) -> float | None:
    """Sum of the sizes that llama.cpp logs under ``label``, MiB; None where it logged none."""
    found = re.findall(rf"{label}\s+([\d.]+) MiB", log)
    return sum(map(float, found)) if found else None


def main() -> int:
    """Print the probe's JSON object; exit status 1 with ``error`` in it when something is missing."""
    try:
        with tempfile.TemporaryDirectory(prefix="phi4edge-probe-") as folder:
            path = Path(folder) / "probe.gguf"
            write_probe_model(path, PROBE_MODEL)
            print(json.dumps(probe(path, context=512)))  # noqa: T201  the child's answer to its parent
    except (ImportError, OSError, RuntimeError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
