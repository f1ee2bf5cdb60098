"""config.json of Phi-4 and of Phi-4-mini-instruct as published, and how their weights are cut into files.

Sources: the models' pages on the Hugging Face hub (microsoft/phi-4, microsoft/Phi-4-mini-instruct). The checkpoints
were saved by transformers with files of at most 5 GB, tensors taken in the order of the modules.
"""

from __future__ import annotations

__all__ = ["CONFIGS", "TOKENIZERS", "module_order"]

from collections.abc import Iterator
from typing import Any

from phi4edge.checkpoint.config import ModelConfig

_COMMON: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "phi3",
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
# fmt: off
_LONG_FACTORS = [
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424,
    6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252,
    16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6,
    32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]
# fmt: on
CONFIGS: dict[str, dict[str, Any]] = {
    "phi-4": _COMMON
    | {
        "bos_token_id": 100257,
        "eos_token_id": 100257,
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "max_position_embeddings": 16384,
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "num_key_value_heads": 10,
        "original_max_position_embeddings": 16384,
        "pad_token_id": 100257,
        "rope_scaling": None,
        "rope_theta": 250000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 100352,
    },
    "phi-4-mini": _COMMON
    | {
        "bos_token_id": 199999,
        "eos_token_id": 199999,
        "full_attn_mod": 1,
        "hidden_size": 3072,
        "interpolate_factor": 1,
        "intermediate_size": 8192,
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 24,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 199999,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"long_factor": _LONG_FACTORS, "short_factor": [1.0] * 48, "type": "longrope"},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "vocab_size": 200064,
    },
}
TOKENIZERS = {"phi-4": "phi4", "phi-4-mini": "mini"}  # kinds of tests/phi_tokenizers.py


def module_order(config: ModelConfig) -> Iterator[str]:
    """Names of all tensors in the order in which transformers' Phi3ForCausalLM lists them."""
    yield "model.embed_tokens.weight"
    parts = ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")
    for layer in range(config.num_layers):
        for part in (*parts, "input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{part}.weight"
    yield "model.norm.weight"
    if not config.tie_word_embeddings:
        yield "lm_head.weight"
