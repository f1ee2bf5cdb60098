"""Names of the files and in the graph, those that ONNX Runtime GenAI's own builder gives."""

from __future__ import annotations

__all__ = ["CONFIG", "DATA", "EMBEDDING", "GENAI_CONFIG", "HEAD", "MODEL", "norm_name", "part_name", "parts"]

import re
from itertools import pairwise

from phi4edge.checkpoint.config import ModelConfig

MODEL, DATA, GENAI_CONFIG = "model.onnx", "model.onnx.data", "genai_config.json"
CONFIG = "phi4edge.config"  # key of the graph's metadata: config.json of the base model
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
_PARTS = {
    "self_attn.qkv_proj": ("attn.qkv_proj",),
    "self_attn.o_proj": ("attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),  # halves of the rows
    "mlp.down_proj": ("mlp.down_proj",),
}


def parts(linear: str, out_features: int) -> list[tuple[str, int, int]]:
    """The nodes that a block's linear (checkpoint name) becomes: name, first row, row behind the last."""
    match = re.fullmatch(r"(model\.layers\.\d+)\.(.+)", linear)
    assert match is not None, f"{linear} is no linear of a block"
    names = _PARTS[match[2]]
    bounds = range(0, out_features + 1, out_features // len(names))
    return [(f"{match[1]}.{name}", *rows) for name, rows in zip(names, pairwise(bounds), strict=True)]


def part_name(part: str, field: str) -> str:
    """The initializer that holds ``field`` (see quant/matmulnbits_packing.py) of node ``part``."""
    return f"{part}.MatMulNBits.{'qzeros' if field == 'zeros' else field}"


def norm_name(name: str, config: ModelConfig) -> str:
    """The initializer of a norm's gain; the last norm counts as one more layer's."""
    return f"model.layers.{config.num_layers}.final_norm_layernorm.weight" if name == "model.norm.weight" else name
