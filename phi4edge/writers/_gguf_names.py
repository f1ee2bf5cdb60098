"""Names of the tensors in a GGUF of architecture phi3, and in the checkpoint."""

from __future__ import annotations

__all__ = ["FACTORS", "checkpoint_name", "gguf_name"]

import re

FACTORS = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}

_GLOBAL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",  # gate rows first; there is no ffn_gate
    "mlp.down_proj": "ffn_down",
}
_FROM_GLOBAL = {theirs: ours for ours, theirs in _GLOBAL.items()}
_FROM_BLOCK = {theirs: ours for ours, theirs in _BLOCK.items()}


def gguf_name(name: str) -> str | None:
    """The GGUF's name of checkpoint tensor ``name``, or None where it has none."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if match is None:
        return _GLOBAL.get(name)
    return f"blk.{match[1]}.{_BLOCK[match[2]]}.weight" if match[2] in _BLOCK else None


def checkpoint_name(name: str) -> str | None:
    """The checkpoint's name of GGUF tensor ``name``, or None where it has none."""
    match = re.fullmatch(r"blk\.(\d+)\.(.+)\.weight", name)
    if match is None:
        return _FROM_GLOBAL.get(name)
    return f"model.layers.{match[1]}.{_FROM_BLOCK[match[2]]}.weight" if match[2] in _FROM_BLOCK else None
