"""What ONNX Runtime GenAI's builder makes of a packed folder, run and compared with transformers on our weights.

The builder turns the packed tensors into MatMulNBits nodes with unpacking code of its own. Three settings make the
comparison exact: the head is kept out of the builder's own 4-bit rounding (``nodes_to_exclude``, and for a tied
head ``shared_embeddings=false``), accuracy_level 1 keeps activations in float32, and ``int4`` on ``cpu`` has
float32 inputs and outputs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support import write_checkpoint
from transformers import Phi3ForCausalLM

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.stages.export import reader_of
from phi4edge.writers._api import ArtifactReader

pytest.importorskip("onnx_ir", reason="onnx-ir, which the builder imports, is not installed")
ort = pytest.importorskip("onnxruntime")
builder = pytest.importorskip("onnxruntime_genai.models.builder")

OPTIONS = ["nodes_to_exclude=/lm_head/MatMul", "accuracy_level=1", "shared_embeddings=false"]
TOLERANCE = 5e-6  # relative, of float32 logits; 6e-7 to 9e-7 measured


def mini_for_onnxruntime(folder: Path) -> Path:
    """Of Phi-4-mini's kind, its rotated half-heads a multiple of 8 as ONNX Runtime's attention wants them."""
    half = 24  # head_dim 64 × 0.75 / 2
    scaling = {
        "type": "longrope",
        "short_factor": [1.0 + 0.02 * i for i in range(half)],
        "long_factor": [1.0 + 1.5 * i for i in range(half)],
    }
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    return write_checkpoint(folder, "mini", rope_scaling=scaling, **shape)


def onnx_logits(folder: Path, out: Path, config: ModelConfig, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [batch, length, vocab] of the ONNX model that the builder makes from ``folder``."""
    arguments = ("", str(folder), str(out), "int4", "cpu", str(out / "cache"))
    builder.create_model(*arguments, **builder.parse_extra_options(*arguments, OPTIONS))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(out / "model.onnx"), options, providers=["CPUExecutionProvider"])
    batch, length = tokens.shape
    feeds = {"input_ids": tokens.numpy(), "attention_mask": np.ones((batch, length), dtype=np.int64)}
    if "position_ids" in (names := [entry.name for entry in session.get_inputs()]):
        feeds["position_ids"] = np.tile(np.arange(length, dtype=np.int64), (batch, 1))
    empty = np.zeros((batch, config.num_kv_heads, 0, config.head_dim), dtype=np.float32)
    feeds |= {name: empty for name in names if name.startswith("past_key_values")}
    return torch.from_numpy(session.run(["logits"], feeds)[0])


def transformers_logits(base: Path, reader: ArtifactReader, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of transformers' own model with the weights that our reader gives."""
    model = Phi3ForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    weights = {name: reader.tensor(name) for name in reader.config.tensor_shapes()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (unexpected, set(missing) - {"lm_head.weight"}) == ([], set())
    with torch.inference_mode():
        return model(tokens).logits


def onnxruntime_difference(base: Path, folder: Path, out: Path, length: int) -> float:
    """‖theirs − ours‖ / ‖ours‖ over the logits of one random sequence."""
    tokens = torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(1))
    reader = reader_of(folder)
    ours = transformers_logits(base, reader, tokens)
    theirs = onnx_logits(folder, out, reader.config, tokens)
    return float((theirs - ours).norm() / ours.norm())
