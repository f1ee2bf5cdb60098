"""An artifact's weights as the runtime's own code sees them, and its logits in runtimes that are no plug-in of ours."""

from __future__ import annotations

__all__ = ["VIEWS", "built_by_genai", "mlx_logits", "mlx_speed", "transformers_logits"]

import json
import logging
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "peers"))
from libggml import to_float

from phi4edge.runtimes._api import SpeedRequest
from phi4edge.writers._gguf_names import gguf_name

Logits = NDArray[np.float32]
_NODES = {  # in ONNX Runtime GenAI's names, which our writer keeps
    "self_attn.qkv_proj": ("attn/qkv_proj",),
    "self_attn.o_proj": ("attn/o_proj",),
    "mlp.gate_up_proj": ("mlp/gate_proj", "mlp/up_proj"),
    "mlp.down_proj": ("mlp/down_proj",),
}


# llama.cpp


def in_libggml(artifact: Path, linear: str) -> Tensor:
    """gguf-py finds the tensor, libggml turns it into floats."""
    name = gguf_name(f"{linear}.weight")
    tensor = next(t for t in gguf.GGUFReader(artifact).tensors if t.name == name)
    columns, rows = (int(n) for n in tensor.shape)
    values = to_float(int(tensor.tensor_type), np.ascontiguousarray(tensor.data), rows * columns)
    return torch.from_numpy(values).reshape(rows, columns)


# ONNX Runtime


def in_onnxruntime(folder: Path, linear: str) -> Tensor:
    """The linear's nodes, cut out of the graph and fed the identity."""
    _, _, layer, rest = linear.split(".", 3)
    return torch.cat([_probe(folder, f"/model/layers.{layer}/{part}/MatMulNBits") for part in _NODES[rest]])


def _probe(folder: Path, name: str) -> Tensor:
    import onnx
    import onnxruntime
    from onnx import helper
    from onnx.external_data_helper import load_external_data_for_tensor

    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    node = next(node for node in graph.node if node.name == name)
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute} | {"accuracy_level": 1}
    weights = [tensor for tensor in graph.initializer if tensor.name in node.input]
    for tensor in weights:
        load_external_data_for_tensor(tensor, str(folder))
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    width, rows = attributes["K"], attributes["N"]
    probe = helper.make_graph(
        [helper.make_node("MatMulNBits", ["x", *node.input[1:]], ["y"], domain="com.microsoft", **attributes)],
        "probe",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [width, width])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [width, rows])],
        weights,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(probe, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": np.eye(width, dtype=np.float32)})[0]).T.contiguous()


def built_by_genai(folder: Path, out: Path) -> Path:
    """The ONNX folder that GenAI's own builder makes of a GPTQ or AWQ folder: float activations, head untouched."""
    from onnxruntime_genai.models import builder

    if not (out / "genai_config.json").is_file():
        arguments = ("", str(folder), str(out), "int4", "cpu", str(out / "cache"))
        options = ["nodes_to_exclude=/lm_head/MatMul", "accuracy_level=1", "shared_embeddings=false"]
        logging.disable(logging.INFO)
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            builder.create_model(*arguments, **builder.parse_extra_options(*arguments, options))
    return out


def built_in_onnxruntime(artifact: Path, linear: str) -> Tensor:
    """A linear after the builder unpacked and packed it."""
    return in_onnxruntime(built_by_genai(artifact, artifact.with_name("built")), linear)


# compressed-tensors, and transformers through it


def in_compressed_tensors(folder: Path, linear: str) -> Tensor:
    """What the package multiplies out of the folder's own tensors, scales widened to float32."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors import safe_open

    declared = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = QuantizationConfig.model_validate(declared).config_groups.values()
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(f"{linear}.")]  # noqa: SIM118  not a mapping
            tensors |= {name.rpartition(".")[2]: file.get_tensor(name) for name in names}
    tensors["weight_scale"] = tensors["weight_scale"].float()
    found: Tensor = BaseCompressor.get_value_from_registry("pack-quantized").decompress(tensors, group)["weight"]
    return found


def transformers_logits(folder: Path, tokens: NDArray[np.int64]) -> Logits | None:
    """Of the one sequence, in float32; None where transformers loads only in float16: with zero points."""
    from transformers import AutoModelForCausalLM

    declared = json.loads((folder / "config.json").read_text())["quantization_config"]
    if not all(group["weights"]["symmetric"] for group in declared["config_groups"].values()):
        return None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return np.asarray(model(torch.from_numpy(tokens)).logits[0].numpy())


# MLX


def in_mlx(folder: Path, linear: str) -> Tensor:
    """mx.dequantize on the folder's own tensors, with what its config.json says of the linear."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    declared = json.loads((folder / "config.json").read_text())["quantization"]
    own = {**declared, **declared.get(linear, {})}
    arrays: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        arrays |= mx.load(str(path))
    weight, scales, biases = (arrays[f"{linear}.{field}"] for field in ("weight", "scales", "biases"))
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)  # as beside float32 activations
    found = mx.dequantize(weight, scales, biases, group_size=own["group_size"], bits=own["bits"])
    return torch.from_numpy(np.array(found))


def _mlx_model(folder: Path) -> Any:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    return load_model(folder)[0]


def mlx_logits(folder: Path, tokens: NDArray[np.int64]) -> Logits:
    """Of mlx-lm's model in float32."""
    import mlx.core as mx

    model = _mlx_model(folder)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(tokens))[0].astype(mx.float32))


def mlx_speed(folder: Path, request: SpeedRequest) -> float:
    """Median decode speed of mlx-lm on this CPU, tokens a second, as the folder is."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    model, seconds = _mlx_model(folder), []
    prompt = mx.arange(request.prompt_tokens) + 100
    for repetition in range(request.warmup + request.repetitions):
        last = None
        for _ in generate_step(prompt, model, max_tokens=request.gen_tokens):
            now = time.perf_counter()
            if last is not None and repetition >= request.warmup:
                seconds.append(now - last)
            last = now
    return 1 / float(np.median(seconds))


VIEWS: dict[str, Callable[[Path, str], Tensor]] = {
    "gguf": in_libggml,
    "onnx": in_onnxruntime,
    "gptq": built_in_onnxruntime,
    "awq": built_in_onnxruntime,
    "compressed_tensors": in_compressed_tensors,
    "mlx": in_mlx,
}
