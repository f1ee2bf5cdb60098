"""The ``quantization_config`` of an AWQ checkpoint: written, and read back with what is not understood named."""

from __future__ import annotations

__all__ = ["declares_awq", "parse_quantization", "quantization_config"]

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi4edge.core.errors import InputError
from phi4edge.core.jsonfile import read_object
from phi4edge.quant.scheme import Scheme
from phi4edge.writers._declared_scheme import declared_scheme, scheme_meta


def quantization_config(scheme: Scheme) -> dict[str, Any]:
    """The object that stands in config.json.

    ``zero_point`` is true on a symmetric grid too: kernels that take AWQ's layout subtract a stored zero point, and
    false sends some readers to layouts without one.
    """
    return {
        "quant_method": "awq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
        "meta": scheme_meta(scheme),
    }


def declares_awq(folder: Path) -> bool:
    """Whether ``folder`` claims to be an AWQ checkpoint; one that is damaged otherwise still does."""
    try:
        declared = read_object(folder / "config.json").get("quantization_config")
    except (InputError, OSError):
        return False
    return isinstance(declared, dict) and declared.get("quant_method") == "awq"


def parse_quantization(folder: Path, config: Mapping[str, Any]) -> tuple[Scheme, Mapping[str, Any]]:
    """The scheme of ``folder``, whose config.json holds ``config``, and the object that declares it.

    Raises:
        InputError: no such object, or one that is not understood.
    """
    where, raw = folder / "config.json", config.get("quantization_config")
    if not isinstance(raw, dict) or raw.get("quant_method") != "awq":
        method = raw.get("quant_method") if isinstance(raw, dict) else None
        raise InputError(f"{where}: quant_method is {method!r}, not 'awq'")
    if raw.get("zero_point", True) is not True:
        raise InputError(f"{where}: zero_point {raw['zero_point']!r} is not supported", "only true is")
    version = raw.get("version", "gemm")  # AutoAWQ writes GEMM as well
    if not isinstance(version, str) or version.lower() != "gemm":
        raise InputError(f"{where}: version {version!r} has another layout", "only 'gemm' is read")
    return declared_scheme(where, raw, raw.get("bits"), raw.get("group_size"), None), raw
