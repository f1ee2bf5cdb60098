"""Tiny checkpoints with the real architecture, config spelling and tokenizer kind of the Phi-4 family."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from phi4edge.checkpoint.config import parse_config

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content']"
    " + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>")
# The split pattern of the tiktoken cl100k vocabulary, which Phi-4's tokenizer.json carries.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def tiny_tokenizer(vocab_size: int = 512) -> str:
    """tokenizer.json (as text) of a byte-level BPE with Phi-4's split pattern, trained on this file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(Path(__file__).read_text().splitlines(), trainer)
    return tokenizer.to_str(pretty=True)


def tiny_config(kind: str = "phi4", **changes: Any) -> dict[str, Any]:
    """config.json of a small model, spelled as Microsoft published it; ``kind`` is "phi4" or "mini"."""
    config: dict[str, Any] = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 250000.0,
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    if kind == "mini":
        half = 6  # head_dim 16 × 0.75 / 2
        config |= {
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0 + 0.02 * i for i in range(half)],
                "long_factor": [1.0 + 1.5 * i for i in range(half)],
            },
            "max_position_embeddings": 2048,
            "original_max_position_embeddings": 64,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        }
    return config | changes


def tiny_weights(config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Random weights for ``config``, with a few outlier channels as trained models have them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in parse_config(config).tensor_shapes().items():
        if len(shape) == 1:
            value = 1 + 0.2 * torch.randn(shape, generator=generator)
        else:
            value = torch.randn(shape, generator=generator) / shape[1] ** 0.5
            if "layers" in name:
                value[:, :: max(shape[1] // 4, 1)] *= 3
            else:
                value = value * (2.0 if name.startswith("lm_head") else shape[1] ** 0.5 / 2)
        tensors[name] = value.to(dtype)
    return tensors


def write_checkpoint(folder: Path, kind: str = "phi4", *, shards: int = 1, seed: int = 0, **changes: Any) -> Path:
    """Write a small checkpoint folder (config, weights in ``shards`` files, tokenizer) and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(kind, **changes)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(tiny_tokenizer())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "GPT2Tokenizer",
                "bos_token": "<|endoftext|>",
                "eos_token": "<|im_end|>",
                "chat_template": CHAT_TEMPLATE,
            }
        )
    )
    weights = tiny_weights(config, seed)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = list(weights), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
