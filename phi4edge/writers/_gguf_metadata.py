"""What a GGUF of architecture phi3 says of the model and its tokenizer, written and read back.

The keys are those of llama.cpp's converter for Phi3ForCausalLM, and of its loader. A GGUF stores reals as float32;
the configuration itself stands beside them in ``phi4edge.config``, so that a reader gets the exact values back.

Keys that decide how the file behaves:

* ``phi3.attention.sliding_window`` is 0 for none. llama.cpp ignores the window of this architecture either way.
* ``phi3.rope.scaling.attn_factor`` multiplies cos and sin, whichever factors (long or short) are in use.
* ``general.name`` must not contain "phi3" or "phi-3": llama.cpp then strips white space behind special tokens.
* ``tokenizer.ggml.eot_token_id`` ends a chat where the eos token is another one.
* ``tokenizer.chat_template`` is the checkpoint's. llama.cpp's older interface, llama_chat_apply_template, does not
  run it but recognises it: Phi-4's as it is, Phi-4-mini's as Phi-3's, with line breaks that mini's has not.
"""

from __future__ import annotations

__all__ = [
    "ARCHITECTURE",
    "EXCEPTIONS",
    "SCHEME",
    "add_config",
    "add_origin",
    "add_tokenizer",
    "check_tokenizer",
    "read_config",
    "safe_name",
]

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from phi4edge import __version__
from phi4edge.checkpoint.config import ModelConfig, parse_config
from phi4edge.checkpoint.index import CheckpointIndex
from phi4edge.core.errors import InputError
from phi4edge.model.tokenizer import Tokenizer
from phi4edge.writers._licence import licence_name

ARCHITECTURE = "phi3"
CONFIG = "phi4edge.config"
SCHEME = "phi4edge.scheme"  # of every linear that the exceptions do not name
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
EXCEPTIONS = "exceptions"  # phi4edge.exceptions: {linear: scheme} as JSON


def safe_name(name: str) -> str:
    """``name`` for general.name, without the spellings that llama.cpp takes for Phi-3."""
    return re.sub(r"(?i)(phi)-?(?=3)", r"\1 ", name)


def add_config(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """The model's shapes and constants."""
    rope = config.rope
    writer.add_context_length(config.context_length)
    writer.add_rope_scaling_orig_ctx_len(rope.original_context or config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(rope.dim)
    writer.add_rope_freq_base(rope.theta)
    writer.add_sliding_window(config.sliding_window or 0)
    if rope.is_longrope:
        writer.add_rope_scaling_attn_factors(rope.attention_factor)
    if config.raw:
        writer.add_string(CONFIG, json.dumps(config.raw, ensure_ascii=False, separators=(",", ":")))


def add_origin(writer: gguf.GGUFWriter, name: str, checkpoint: CheckpointIndex, provenance: Mapping[str, str]) -> None:
    """Who the model is, what it was made from, and under which licence."""
    config = checkpoint.config
    writer.add_type("model")
    writer.add_name(safe_name(name))
    writer.add_quantized_by(f"phi4edge {__version__}")
    licence = licence_name(checkpoint.folder)
    if licence is not None:
        writer.add_license(licence)
    base = provenance.get("base_model", name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, Path(base).name)
    hub = next((i for i in (base, config.raw.get("_name_or_path")) if HUB_ID.fullmatch(str(i))), None)
    if hub is not None:
        writer.add_base_model_organization(0, hub.split("/")[0])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{hub}")
    writer.add_size_label(gguf.size_label(config.parameters, 0, 0, 0))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in provenance.items():
        writer.add_string(f"phi4edge.{key}", value)


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that llama.cpp would not reproduce.

    Raises:
        InputError: an unknown split, or tokens that merging cannot make.
    """
    where = tokenizer.folder / "tokenizer.json"
    pre = tokenizer.gguf_pre
    if not tokenizer.merges:
        raise InputError(f"{where}: the vocabulary has no merges", "byte-level BPE in llama.cpp needs them")
    lost = tokenizer.unreachable
    if lost:
        raise InputError(
            f"{where}: ignore_merges, and {len(lost)} tokens such as {lost[0]!r} have no merges; "
            f"llama.cpp's pre-tokenizer {pre} always merges"
        )


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, rows: int) -> None:
    """Vocabulary of ``rows`` tokens, merges, special tokens and chat template of a tokenizer that was checked."""
    by_id = {number: token for token, number in tokenizer.ids.items()}
    tokens, types = [], []
    for number in range(rows):
        token = by_id.get(number)
        added = tokenizer.added.get(number)
        if token is None:
            tokens.append(f"[PAD{number}]")
            types.append(gguf.TokenType.UNUSED)
        elif added is None:
            tokens.append(token)
            types.append(gguf.TokenType.NORMAL)
        else:
            tokens.append(token)
            control = added.get("special") or (token.startswith("<|") and token.endswith("|>"))
            types.append(gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.gguf_pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # A merge is two words with a blank between; a blank inside a word is spelled as byte-level BPE spells it.
    writer.add_token_merges([f"{left} {right}" for left, right in (_unblank(pair) for pair in tokenizer.merges)])
    for add, special in (
        (writer.add_bos_token_id, tokenizer.bos_id),
        (writer.add_eos_token_id, tokenizer.eos_id),
        (writer.add_eot_token_id, tokenizer.eot_id),
        (writer.add_unk_token_id, tokenizer.unk_id),
        (writer.add_pad_token_id, tokenizer.pad_id),
    ):
        if special is not None:
            add(special)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(tokenizer.add_eos)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _unblank(pair: tuple[str, str]) -> tuple[str, str]:
    return pair[0].replace(" ", "\u0120"), pair[1].replace(" ", "\u0120")


def read_config(
    metadata: Mapping[str, Any], *, vocab_size: int, tied: bool, factors: Mapping[str, list[float]], where: str
) -> ModelConfig:
    """The model's configuration from a GGUF's keys; exact where ``phi4edge.config`` tells it.

    ``factors`` are longrope's, by config.json's names (empty for plain rope).

    Raises:
        InputError: another architecture, a key missing, or a ``phi4edge.config`` that says something else.
    """
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise InputError(f"{where}: architecture is {architecture!r}, not {ARCHITECTURE!r}")
    config = parse_config(_as_config_json(metadata, vocab_size, tied, factors, where), where)
    if CONFIG not in metadata:
        return config
    try:
        exact = parse_config(json.loads(metadata[CONFIG]), f"{where}: {CONFIG}")
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: {CONFIG} is not a JSON object", "the file is damaged") from error
    mine, theirs = _rounded(exact), _rounded(config)
    for field, value in mine.items():
        if theirs[field] != value:
            raise InputError(f"{where}: {field} is {theirs[field]} in the file's keys, but {value} in {CONFIG}")
    return exact


def _as_config_json(
    metadata: Mapping[str, Any], vocab_size: int, tied: bool, factors: Mapping[str, list[float]], where: str
) -> dict[str, Any]:
    """A config.json that says what the keys say."""

    def key(name: str, default: float | None = None, *, whole: bool = False) -> Any:
        value = metadata.get(f"{ARCHITECTURE}.{name}", default)
        if value is None:
            raise InputError(f"{where}: key {ARCHITECTURE}.{name} is missing", "not a complete GGUF of this family")
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not 0 < value < math.inf:
            kind = "whole number" if whole else "number"
            raise InputError(f"{where}: {ARCHITECTURE}.{name} is {value!r}, expected a positive {kind}")
        return value

    hidden, heads = key("embedding_length", whole=True), key("attention.head_count", whole=True)
    head_dim = key("attention.key_length", max(hidden // heads, 1), whole=True)
    context = key("context_length", whole=True)
    rotated = key("rope.dimension_count", head_dim, whole=True)
    partial = rotated / head_dim
    if int(head_dim * partial) != rotated:  # config.json tells the number as a share; a rounded one may fall short
        partial = (rotated + 0.5) / head_dim
    window = metadata.get(f"{ARCHITECTURE}.attention.sliding_window", 0)  # 0 for none
    scaling = None
    if factors:
        scaling = {"type": "longrope", "attention_factor": key("rope.scaling.attn_factor", 1), **factors}
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": key("feed_forward_length"),
        "num_hidden_layers": key("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": key("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "original_max_position_embeddings": key("rope.scaling.original_context_length", context, whole=True),
        "rms_norm_eps": key("attention.layer_norm_rms_epsilon"),
        "rope_theta": key("rope.freq_base", 10000),
        "partial_rotary_factor": partial,
        "rope_scaling": scaling,
        "sliding_window": window if isinstance(window, int) and window > 0 else None,
        "tie_word_embeddings": tied,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _rounded(config: ModelConfig) -> dict[str, Any]:
    """What a GGUF's keys tell of ``config``, reals as float32."""
    rope = config.rope
    fields = (
        "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
        "context_length", "sliding_window", "tie_word_embeddings",
    )  # fmt: skip
    real = {
        "rms_norm_eps": config.rms_norm_eps,
        "rope theta": rope.theta,
        "rope attention factor": rope.attention_factor,
    }
    return {
        **{name: getattr(config, name) for name in fields},
        "rope dim": rope.dim,
        "rope original context": rope.original_context,
        **{name: float(np.float32(value)) for name, value in real.items()},
        "rope short factors": tuple(map(np.float32, rope.short_factor or ())),
        "rope long factors": tuple(map(np.float32, rope.long_factor or ())),
    }
