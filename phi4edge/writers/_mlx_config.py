"""What config.json of an MLX folder says: the packing of every module, and the rope in the words that mlx-lm reads.

mlx-lm's phi3 knows ``rope_scaling``, ``rope_theta``, ``partial_rotary_factor`` and
``original_max_position_embeddings`` only: transformers 5 writes ``rope_parameters``, which it would pass over without a
word, so these are always spelled out. It computes longrope's attention factor itself.
"""

from __future__ import annotations

__all__ = ["HEAD", "architecture_refusal", "declares_mlx", "mlx_config", "parse_quantization"]

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.core.errors import InputError, UsageError
from phi4edge.core.jsonfile import read_object
from phi4edge.quant.scheme import Scheme, parse_scheme
from phi4edge.writers._declared_scheme import declared_scheme, scheme_meta

HEAD = "lm_head"
MODE = "affine"


def architecture_refusal(config: ModelConfig) -> str | None:
    """Why mlx-lm's phi3 would compute something else than this model, or None when it would not."""
    rope = config.rope
    if config.head_dim * config.num_heads != config.hidden_size:
        return f"head_dim {config.head_dim} is not hidden_size / heads, which mlx-lm's phi3 takes it for"
    if config.sliding_window is not None and config.sliding_window < config.context_length:
        return f"sliding_window {config.sliding_window} is below the context, and mlx-lm's phi3 has none"
    if rope.original_context is not None:
        scale, original = config.context_length / rope.original_context, rope.original_context
        computed = 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original))
        if not math.isclose(computed, rope.attention_factor, rel_tol=1e-6):
            return f"attention_factor {rope.attention_factor:.6g} is not {computed:.6g}, which mlx-lm computes"
    return None


def _entry(scheme: Scheme) -> dict[str, Any]:
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": MODE}


def mlx_config(config: ModelConfig, scheme: Scheme, exceptions: Mapping[str, Scheme]) -> dict[str, Any]:
    """The keys of config.json that are MLX's; ``exceptions`` are modules on another scheme.

    ``quantization_config`` is a copy that mlx-lm leaves alone where ``quantization`` stands; ``meta`` in it has the
    schemes' names.
    """
    others = {name: other for name, other in exceptions.items() if other != scheme}
    quantization = {**_entry(scheme), **{name: _entry(other) for name, other in others.items()}}
    meta = scheme_meta(scheme) | {"exceptions": {name: other.name for name, other in others.items()}}
    rope = config.rope
    scaling = None
    if rope.short_factor is not None and rope.long_factor is not None:
        scaling = {
            "type": "longrope",
            "short_factor": list(rope.short_factor),
            "long_factor": list(rope.long_factor),
        }
    return {
        "quantization": quantization,
        "quantization_config": {**quantization, "meta": meta},
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope.theta,
        "partial_rotary_factor": rope.dim / config.head_dim,
        "rope_scaling": scaling,
        "original_max_position_embeddings": rope.original_context or config.context_length,
    }


def declares_mlx(folder: Path) -> bool:
    """Whether ``folder`` claims to be MLX's; one that is damaged otherwise still does."""
    try:
        declared = read_object(folder / "config.json").get("quantization")
    except (InputError, OSError):
        return False
    return isinstance(declared, dict) and "group_size" in declared


def parse_quantization(folder: Path, config: Mapping[str, Any]) -> tuple[Scheme, dict[str, Scheme], Mapping[str, Any]]:
    """The scheme of ``folder``, whose config.json holds ``config``, those of modules on another, and the declaration.

    Raises:
        InputError: no such object, one that is not understood, or another tool's: its scales and biases say which
            numbers it stores, not which grid they were found on.
    """
    where, raw = folder / "config.json", config.get("quantization")
    if not isinstance(raw, dict):
        raise InputError(f"{where}: has no quantization, which MLX folders have")
    copy = config.get("quantization_config")
    meta = copy.get("meta") if isinstance(copy, dict) else None
    if not isinstance(meta, dict) or "scheme" not in meta:
        raise InputError(f"{where}: quantization_config names no scheme", "MLX folders of other tools are not read")
    scheme = _scheme(where, raw, meta["scheme"])
    named = meta.get("exceptions", {})
    modules = {name: value for name, value in raw.items() if isinstance(value, dict)}
    if not isinstance(named, dict) or named.keys() != modules.keys():
        raise InputError(f"{where}: quantization has entries for {list(modules)}, meta for {list(named)}")
    return scheme, {name: _scheme(where, entry, named[name]) for name, entry in modules.items()}, raw


def _scheme(where: Path, entry: Mapping[str, Any], name: object) -> Scheme:
    if entry.get("mode", MODE) != MODE:
        raise InputError(f"{where}: mode {entry['mode']!r} is not supported", f"only {MODE!r} is")
    try:
        symmetric = parse_scheme(str(name)).symmetric
    except UsageError as error:
        raise InputError(f"{where}: {error.message}", error.hint) from error
    return declared_scheme(where, {"meta": {"scheme": name}}, entry.get("bits"), entry.get("group_size"), symmetric)
