"""config.json of the Phi-4 family (architecture Phi3ForCausalLM) as one typed value.

Understands the two spellings in circulation: flat ``rope_theta`` / ``rope_scaling`` /
``partial_rotary_factor`` (as Microsoft published) and ``rope_parameters`` (as transformers 5 writes).
Starts without torch.
"""

from __future__ import annotations

__all__ = ["ModelConfig", "RopeConfig", "load_config", "parse_config"]

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phi4edge.core.errors import InputError
from phi4edge.core.jsonfile import read_object

ARCHITECTURE = "Phi3ForCausalLM"


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: which channels turn, how fast, and longrope's factors."""

    theta: float
    dim: int  # rotated channels a head; the rest pass through (partial rotary)
    short_factor: tuple[float, ...] | None = None  # [dim/2]; None: plain rope
    long_factor: tuple[float, ...] | None = None  # [dim/2], used past the original context
    original_context: int | None = None
    attention_factor: float = 1.0  # multiplies cos and sin

    @property
    def is_longrope(self) -> bool:
        """Whether frequencies depend on the context's length."""
        return self.short_factor is not None


@dataclass(frozen=True)
class ModelConfig:
    """The shapes and constants that every stage needs."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    context_length: int
    sliding_window: int | None
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    dtype: str  # as config.json names it, e.g. "bfloat16"
    raw: dict[str, Any] = field(repr=False, compare=False)

    @property
    def q_size(self) -> int:
        """Rows of the query part of qkv_proj."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key part (and of the value part) of qkv_proj."""
        return self.num_kv_heads * self.head_dim

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """[out_features, in_features] of a block's four linears, by name within the block, in order of use."""
        return {
            "self_attn.qkv_proj": (self.q_size + 2 * self.kv_size, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, self.q_size),
            "mlp.gate_up_proj": (2 * self.intermediate_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size),
        }

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """[out_features, in_features] of every linear of the blocks, by name without ".weight", in model order."""
        return {
            f"model.layers.{layer}.{name}": shape
            for layer in range(self.num_layers)
            for name, shape in self.linear_shapes.items()
        }

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the checkpoint must hold, with its shape."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            shapes[prefix + "input_layernorm.weight"] = (self.hidden_size,)
            for name, shape in self.linear_shapes.items():
                shapes[f"{prefix}{name}.weight"] = shape
            shapes[prefix + "post_attention_layernorm.weight"] = (self.hidden_size,)
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    @property
    def family(self) -> str:
        """The family member whose shapes these are, or a description of the shapes."""
        published = {
            (5120, 40): "Phi-4 / Phi-4-reasoning (14B)",
            (3072, 32): "Phi-4-mini (3.8B)" if self.vocab_size > 100_000 else "Phi-3-mini (3.8B)",
        }
        return published.get((self.hidden_size, self.num_layers), "Phi-3 architecture, own shapes")

    @property
    def parameters(self) -> int:
        """Number of parameters, a tied head counted once."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    @property
    def linear_parameters(self) -> int:
        """Number of parameters in the blocks' linears, those that are quantized."""
        return self.num_layers * sum(out * inp for out, inp in self.linear_shapes.values())

    def kv_bytes_per_token(self, bytes_per_value: float = 2.0) -> float:
        """Bytes of KV cache that one token of context takes."""
        return 2 * self.num_layers * self.kv_size * bytes_per_value


def load_config(folder: Path) -> ModelConfig:
    """Read and check ``folder/config.json``.

    Raises:
        InputError: no such file, not JSON, another architecture, or values that contradict each other.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such model folder", "give a folder with config.json and *.safetensors, or a hub id"
        )
    if not path.is_file():
        raise InputError(f"{folder}: no config.json in it", "give the folder of a Hugging Face checkpoint")
    return parse_config(read_object(path), str(path))


def parse_config(raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """Turn the JSON object of a config.json into a :class:`ModelConfig`; errors name ``where``."""
    architectures = raw.get("architectures") or []
    if architectures != [ARCHITECTURE] and not (not architectures and raw.get("model_type") == "phi3"):
        found = ", ".join(map(str, architectures)) or f"model_type {raw.get('model_type')!r}"
        raise InputError(
            f"{where}: architecture is {found}, not {ARCHITECTURE}",
            "phi4edge takes Phi-4, Phi-4-reasoning, Phi-4-mini and models of the same architecture",
        )
    if raw.get("attention_bias") or raw.get("mlp_bias"):
        raise InputError(f"{where}: biases in the linears are not part of {ARCHITECTURE} as published")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InputError(f"{where}: hidden_act {raw['hidden_act']!r} is not supported; the family uses silu")

    def count(key: str, default: int | None = None) -> int:
        value = raw.get(key, default)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise InputError(f"{where}: {key} is {value!r}, expected a positive whole number")
        return value

    hidden, heads = count("hidden_size"), count("num_attention_heads")
    kv_heads = count("num_key_value_heads", heads)
    if raw.get("head_dim") is None and hidden % heads:
        raise InputError(f"{where}: hidden_size {hidden} is not divisible by num_attention_heads {heads}")
    if heads % kv_heads:
        raise InputError(f"{where}: num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}")
    head_dim = count("head_dim", hidden // heads)
    context = count("max_position_embeddings")
    eos = raw.get("eos_token_id")
    window = raw.get("sliding_window")
    return ModelConfig(
        vocab_size=count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=count("intermediate_size"),
        num_layers=count("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-5)),
        rope=_parse_rope(raw, head_dim, context, where),
        context_length=context,
        sliding_window=int(window) if window else None,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        pad_token_id=raw.get("pad_token_id"),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        raw=raw,
    )


def _parse_rope(raw: dict[str, Any], head_dim: int, context: int, where: str) -> RopeConfig:
    merged = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta = float(merged.get("rope_theta", raw.get("rope_theta", 10000.0)))
    partial = float(merged.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)))
    dim = int(head_dim * partial)
    if dim <= 0 or dim > head_dim or dim % 2:
        raise InputError(f"{where}: partial_rotary_factor {partial} of head_dim {head_dim} rotates {dim} channels")
    kind = merged.get("rope_type", merged.get("type", "default")) or "default"
    if kind == "default":
        return RopeConfig(theta, dim)
    if kind not in ("longrope", "su"):
        raise InputError(f"{where}: rope type {kind!r} is not supported", "the family uses plain rope or longrope")
    factors: dict[str, tuple[float, ...]] = {}
    for key in ("short_factor", "long_factor"):
        values = merged.get(key)
        if not isinstance(values, list) or len(values) != dim // 2:
            length = len(values) if isinstance(values, list) else "none"
            raise InputError(
                f"{where}: rope {key} has {length} entries, expected {dim // 2} (half the rotated channels)"
            )
        factors[key] = tuple(map(float, values))
    original = int(
        merged.get("original_max_position_embeddings", raw.get("original_max_position_embeddings", 4096)) or 4096
    )
    scale = context / original
    attention = merged.get("attention_factor")
    if attention is None:
        attention = 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original))
    return RopeConfig(theta, dim, factors["short_factor"], factors["long_factor"], original, float(attention))
