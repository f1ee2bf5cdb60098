"""For the tests of the ONNX format: checkpoints that ONNX Runtime takes, one node, and transformers beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from transformers import Phi3ForCausalLM

from phi4edge.model.source import WeightSource

ORIGINAL = 64  # of mini's context
TOLERANCE = 5e-6  # relative, of float32 logits; 6e-7 to 9e-7 measured


def tokens_of(length: int, seed: int = 1, rows: int = 1) -> NDArray[np.int64]:
    return torch.randint(0, 512, (rows, length), generator=torch.Generator().manual_seed(seed)).numpy()


def peer(base: Path, source: WeightSource) -> Any:
    """transformers' own model with the weights that ``source`` gives."""
    model = Phi3ForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    weights = {name: source.tensor(name) for name in source.config.tensor_shapes()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (unexpected, set(missing) - {"lm_head.weight"}) == ([], set())
    return model.eval()


def peer_logits(base: Path, source: WeightSource, tokens: NDArray[np.int64]) -> torch.Tensor:
    """Logits [rows, length, vocab] of transformers."""
    with torch.inference_mode():
        return peer(base, source)(torch.from_numpy(tokens)).logits


def ort_logits(folder: Path, tokens: NDArray[np.int64]) -> torch.Tensor:
    """Logits [1, length, vocab] that ONNX Runtime itself computes from a folder's graph, in one run."""
    width = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    feeds: dict[str, Any] = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    for entry in session.get_inputs():
        if entry.name.startswith("past_key_values"):
            feeds[entry.name] = np.zeros((1, entry.shape[1], 0, width), dtype=np.float32)
    return torch.from_numpy(session.run(["logits"], feeds)[0])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found - expected).norm() / expected.norm())


def run_node(
    kind: str, x: NDArray[Any], weights: dict[str, NDArray[Any]], width: int, **attributes: Any
) -> torch.Tensor:
    """What one operator of com.microsoft makes of ``x`` [rows, …] and ``weights``, [rows, width] float32."""
    inputs = ["x", *weights]
    if kind == "GatherBlockQuantized":
        inputs = [next(iter(weights)), "x", *list(weights)[1:]]
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, ["y"], domain="com.microsoft", **attributes)],
        "probe",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [x.shape[0], width])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    opsets = [helper.make_opsetid("", 22), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x})[0])
