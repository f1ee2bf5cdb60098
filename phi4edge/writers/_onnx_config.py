"""What lies beside the graph: genai_config.json as ONNX Runtime GenAI 0.18 reads it, and what the graph says of itself.

``search.max_length`` is what GenAI allocates the KV cache for when a generator is made, all of it, so it is never the
model's whole context by default. ``eos_token_id`` holds every token that ends an answer: those of config.json and
generation_config.json, and the one that the chat template puts behind an assistant's message, which Phi-4's config.json
lacks. ``past_present_share_buffer`` lets the cache be written in place.
"""

from __future__ import annotations

__all__ = ["EXCEPTIONS", "PREFIX", "SCHEME", "default_context", "genai_config", "properties"]

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.core.jsonfile import read_object
from phi4edge.model.source import QuantizedModel
from phi4edge.model.tokenizer import load_tokenizer
from phi4edge.writers._onnx_names import MODEL

PREFIX = "phi4edge."  # of our keys in the graph's metadata
SCHEME = "phi4edge.scheme"  # of every linear that the exceptions do not name
EXCEPTIONS = "phi4edge.exceptions"  # {linear: scheme} as JSON
_CONTEXT = 4096
_SAMPLING: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}


def default_context(config: ModelConfig) -> int:
    """Tokens that the KV cache is allocated for where nobody says: 4096, within the model's context."""
    return min(_CONTEXT, config.context_length)


def genai_config(folder: Path, config: ModelConfig, max_length: int) -> dict[str, Any]:
    """genai_config.json of the model whose tokenizer and settings lie in ``folder``.

    Raises:
        InputError: a tokenizer or generation_config.json that cannot be read.
    """
    path = folder / "generation_config.json"
    settings = read_object(path) if path.is_file() else {}
    eos = list(dict.fromkeys(_ends(folder, config, settings)))
    sampling = {key: settings.get(key, default) for key, default in _SAMPLING.items()}
    return {
        "model": {
            "bos_token_id": config.bos_token_id if config.bos_token_id is not None else eos[0],
            "context_length": config.context_length,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": MODEL,
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": config.num_heads,
                "num_hidden_layers": config.num_layers,
                "num_key_value_heads": config.num_kv_heads,
            },
            "eos_token_id": eos,
            "pad_token_id": config.pad_token_id if config.pad_token_id is not None else eos[0],
            "type": "phi3",
            "vocab_size": config.vocab_size,
        },
        "search": {
            "diversity_penalty": 0.0,
            "do_sample": sampling["do_sample"],
            "early_stopping": True,
            "length_penalty": 1.0,
            "max_length": max_length,
            "min_length": 0,
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": sampling["temperature"],
            "top_k": sampling["top_k"],
            "top_p": sampling["top_p"],
        },
    }


def _ends(folder: Path, config: ModelConfig, settings: Mapping[str, Any]) -> Iterator[int]:
    end_of_turn = load_tokenizer(folder).eot_id
    if end_of_turn is not None:
        yield end_of_turn
    listed = settings.get("eos_token_id")
    yield from (listed if isinstance(listed, list) else [] if listed is None else [listed])
    yield from config.eos_token_ids


def properties(model: QuantizedModel, tables: Mapping[str, str], accuracy_level: int) -> dict[str, str]:
    """The metadata of the graph: where the weights come from, and what a reader needs to give the codes back."""
    own = {
        **model.provenance,
        "scheme": model.scheme.name,
        **tables,
        "accuracy_level": str(accuracy_level),
        "config": json.dumps(model.config.raw, ensure_ascii=False, separators=(",", ":")),
    }
    if model.exceptions:
        own["exceptions"] = json.dumps({linear: scheme.name for linear, scheme in model.exceptions.items()})
    return {f"{PREFIX}{key}": value for key, value in own.items()}
