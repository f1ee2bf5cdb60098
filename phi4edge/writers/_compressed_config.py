"""The ``quantization_config`` of a compressed-tensors folder: written, and read back with what is not understood named.

Fields as compressed-tensors 0.20 dumps them; it and vLLM forbid fields of ``weights`` that they do not know, so those
that are only defaults (``observer``, ``actorder``, ``scale_dtype``, ``zp_dtype``) are left out, as that package does.
"""

from __future__ import annotations

__all__ = ["METHOD", "declares_compressed", "parse_quantization", "quantization_config"]

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi4edge.core.errors import InputError
from phi4edge.core.jsonfile import read_object
from phi4edge.quant.scheme import Scheme
from phi4edge.writers._declared_scheme import declared_scheme, scheme_meta

METHOD = "compressed-tensors"
LAYOUT = "pack-quantized"


def quantization_config(scheme: Scheme) -> dict[str, Any]:
    """The object that stands in config.json: every Linear but the head, one strategy."""
    channel = scheme.group_size < 0
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "group_size": None if channel else scheme.group_size,
        "strategy": "channel" if channel else "group",
        "dynamic": False,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": LAYOUT,
    }
    return {
        "quant_method": METHOD,
        "format": LAYOUT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "meta": scheme_meta(scheme),
    }


def declares_compressed(folder: Path) -> bool:
    """Whether ``folder`` claims to be of compressed-tensors; one that is damaged otherwise still does."""
    try:
        declared = read_object(folder / "config.json").get("quantization_config")
    except (InputError, OSError):
        return False
    return isinstance(declared, dict) and declared.get("quant_method") == METHOD


def parse_quantization(folder: Path, config: Mapping[str, Any]) -> tuple[Scheme, Mapping[str, Any]]:
    """The scheme of ``folder``, whose config.json holds ``config``, and the object that declares it.

    Raises:
        InputError: no such object, or one that is not understood.
    """
    where, raw = folder / "config.json", config.get("quantization_config")
    if not isinstance(raw, dict) or raw.get("quant_method") != METHOD:
        method = raw.get("quant_method") if isinstance(raw, dict) else None
        raise InputError(f"{where}: quant_method is {method!r}, not {METHOD!r}")
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise InputError(f"{where}: config_groups holds {groups!r}", "folders with one group are read")
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise InputError(f"{where}: config_groups says nothing of weights")
    for place, values, expected in (
        ("quantization_config", raw, {"format": LAYOUT, "quantization_status": "compressed"}),
        ("config_groups", group, {"targets": ["Linear"], "input_activations": None, "output_activations": None}),
        ("weights", weights, {"type": "int", "dynamic": False}),
    ):
        for key, known in expected.items():
            if values.get(key, known) != known:
                raise InputError(f"{where}: {key} {values[key]!r} in {place} is not supported", f"only {known!r} is")
    strategy, group_size = weights.get("strategy"), weights.get("group_size")
    if strategy == "channel" and group_size in (None, -1):
        group_size = -1
    elif strategy != "group":
        raise InputError(f"{where}: strategy {strategy!r} with group_size {group_size!r} is not supported")
    return declared_scheme(where, raw, weights.get("num_bits"), group_size, weights.get("symmetric", True)), raw
