"""Whether any of many values has a given exponent, compiled: as fast as they can be read."""

from __future__ import annotations

__all__ = ["has_exponent"]

from phi4edge.core.compiled import compiled


@compiled
def has_exponent(values, exponent):
    """Whether all bits of ``exponent`` are set in one of ``values`` [n], whole numbers of one width."""
    found = 0
    for value in values:
        found |= (value & exponent) == exponent
    return found != 0
