"""Which scheme a packed folder's configuration declares, in numbers and, where phi4edge wrote it, by name."""

from __future__ import annotations

__all__ = ["declared_scheme", "scheme_meta"]

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import phi4edge
from phi4edge.core.errors import InputError, UsageError
from phi4edge.quant.scheme import Scheme, parse_scheme, scheme_from_options


def scheme_meta(scheme: Scheme) -> dict[str, Any]:
    """The value of "meta": who wrote it, and the grid's name, which the numbers do not tell.

    Q4_0 and w4g32 are the same integers in every packed format, not in GGUF.
    """
    return {"quantizer": [f"phi4edge:{phi4edge.__version__}"], "scheme": scheme.name}


def declared_scheme(where: Path, raw: Mapping[str, Any], bits: object, group_size: object, symmetric: object) -> Scheme:
    """The scheme of these numbers; by the name in ``raw["meta"]`` where there is one, which must agree with them.

    ``symmetric`` is None where the format does not say it: then the name does, and without a name the grid has zero
    points.

    Raises:
        InputError: no such scheme, or a name that contradicts the numbers.
    """
    if type(bits) is not int or type(group_size) is not int or type(symmetric) not in (bool, type(None)):
        raise InputError(f"{where}: bits {bits!r}, group_size {group_size!r} and sym {symmetric!r} are no scheme")
    meta = raw.get("meta")
    name = meta.get("scheme") if isinstance(meta, dict) else None
    try:
        if name is None:
            return scheme_from_options(None, bits, group_size, symmetric is True)
        scheme = parse_scheme(str(name))
    except UsageError as error:
        raise InputError(f"{where}: {error.message}", error.hint) from error
    if symmetric is None:
        symmetric = scheme.symmetric
    if (scheme.bits, scheme.group_size, scheme.symmetric) != (bits, group_size, symmetric):
        raise InputError(
            f"{where}: meta.scheme {name} contradicts bits {bits}, group_size {group_size}, sym {symmetric}"
        )
    return scheme
