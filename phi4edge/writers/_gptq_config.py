"""The ``quantization_config`` of a GPTQ checkpoint: written, and read back with every contradiction named."""

from __future__ import annotations

__all__ = ["QUANTIZE_CONFIG", "ZERO_OFFSET", "GptqFormat", "declares_gptq", "parse_quantization", "quantization_config"]

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4edge.core.errors import InputError
from phi4edge.core.jsonfile import read_object
from phi4edge.quant.scheme import Scheme, parse_scheme
from phi4edge.writers._declared_scheme import declared_scheme, scheme_meta

ZERO_OFFSET = {"gptq": 1, "gptq_v2": 0}  # what a stored zero point lacks, by checkpoint_format
QUANTIZE_CONFIG = "quantize_config.json"
HEAD_RULE, HEAD_FORMAT = "+:^lm_head", {"bits": 8, "group_size": 32, "sym": True, "desc_act": False}  # q8_0


@dataclass(frozen=True)
class GptqFormat:
    """What a folder's configuration says of its packed tensors."""

    scheme: Scheme
    checkpoint_format: str  # a key of ZERO_OFFSET
    raw: Mapping[str, Any]
    exceptions: Mapping[str, Scheme]  # the head, where it is packed


def quantization_config(scheme: Scheme, checkpoint_format: str, *, head: bool) -> dict[str, Any]:
    """The object that stands in config.json and is quantize_config.json; with ``head`` it announces one on q8_0."""
    dynamic = {"dynamic": {HEAD_RULE: HEAD_FORMAT}} if head else {}
    return {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "desc_act": False,
        "sym": scheme.symmetric,
        "lm_head": head,
        **dynamic,
        "checkpoint_format": checkpoint_format,
        "pack_dtype": "int32",
        "meta": scheme_meta(scheme),
    }


def declares_gptq(folder: Path) -> bool:
    """Whether ``folder`` claims to be a GPTQ checkpoint; one that is damaged otherwise still does."""
    if (folder / QUANTIZE_CONFIG).is_file():
        return True
    try:
        declared = read_object(folder / "config.json").get("quantization_config")
    except (InputError, OSError):
        return False
    return isinstance(declared, dict) and declared.get("quant_method") == "gptq"


def parse_quantization(folder: Path, config: Mapping[str, Any]) -> GptqFormat:
    """The format of ``folder``, whose config.json holds ``config``; quantize_config.json must agree with it.

    Raises:
        InputError: no such configuration, two that differ, or one that is not understood.
    """
    where, raw = folder / "config.json", config.get("quantization_config")
    beside = folder / QUANTIZE_CONFIG
    if beside.is_file():
        other = read_object(beside)
        for key in ("bits", "group_size", "desc_act", "sym", "checkpoint_format"):
            if isinstance(raw, dict) and key in raw and key in other and raw[key] != other[key]:
                raise InputError(f"{folder}: {key} is {raw[key]!r} in config.json, {other[key]!r} in {QUANTIZE_CONFIG}")
        if raw is None:
            where, raw = beside, {"quant_method": "gptq", **other}
    if not isinstance(raw, dict) or raw.get("quant_method") != "gptq":
        method = raw.get("quant_method") if isinstance(raw, dict) else None
        raise InputError(f"{where}: quant_method is {method!r}, not 'gptq'")
    head = raw.get("lm_head", False) is True
    expected: dict[str, tuple[Any, ...]] = {
        "desc_act": (False, True), "pack_dtype": ("int32",), "lm_head": (False, True),
        "dynamic": ({HEAD_RULE: HEAD_FORMAT},) if head else (None, {}),
    }  # fmt: skip
    for key, known in expected.items():
        if raw.get(key, known[0]) not in known:
            raise InputError(f"{where}: {key} {raw[key]!r} is not supported", f"only {known[0]!r} is")
    declared = raw.get("checkpoint_format", "gptq")
    if declared not in ZERO_OFFSET:
        raise InputError(f"{where}: checkpoint_format {declared!r} is unknown", f"known: {', '.join(ZERO_OFFSET)}")
    scheme = declared_scheme(where, raw, raw.get("bits"), raw.get("group_size"), raw.get("sym", True))
    return GptqFormat(scheme, declared, raw, {"lm_head": parse_scheme("q8_0")} if head else {})
