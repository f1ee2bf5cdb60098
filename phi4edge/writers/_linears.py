"""Whether a format can hold every linear of a model's blocks: asked alike by all writers."""

from __future__ import annotations

__all__ = ["linears_refusal"]

from collections.abc import Callable

from phi4edge.model.source import QuantizedModel
from phi4edge.quant.scheme import Scheme


def linears_refusal(
    model: QuantizedModel, refuses: Callable[[Scheme, int, int], str | None], *, one_scheme: bool
) -> str | None:
    """Why a format cannot hold ``model``'s linears, or None when it can.

    ``refuses`` is asked for each, with its scheme, out_features and in_features. ``one_scheme``: a mix is refused too.
    """
    for name, (out_features, in_features) in model.config.linears.items():
        scheme = model.scheme_of(name)
        reason = refuses(scheme, out_features, in_features)
        if reason is not None:
            return f"{name}: {reason}"
        if one_scheme and scheme != model.scheme:
            return f"{name}: is {scheme.name}, others {model.scheme.name}; this writer holds one scheme"
        if name not in model.linears:
            return f"{name}: is not quantized, and this writer stores every linear of a block from codes"
    return None
