"""Which type for which tensor: least cost in total under a budget of bytes, by exact dynamic programming.

Minimise Σ cost over one option a tensor such that Σ bytes ≤ budget (the multiple-choice knapsack problem). Sizes of
tensors of a model share a large divisor, so the table over all reachable sizes is small; where it would not be, sizes
are rounded up to a coarser unit, and what the rounding may cost is said.
"""

from __future__ import annotations

__all__ = ["Choice", "Option", "choose_options"]

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_STATES = 400_000  # sizes in the table at most


@dataclass(frozen=True)
class Option:
    """One type that a tensor could have."""

    name: str
    nbytes: int
    cost: float


@dataclass(frozen=True)
class Choice:
    """The chosen option of every tensor, in order."""

    chosen: tuple[int, ...]
    nbytes: int
    cost: float
    slack: int  # bytes that rounding to units may have left unused; 0: the choice is optimal


def choose_options(tensors: Sequence[Sequence[Option]], budget: int) -> Choice | None:
    """The cheapest choice within ``budget`` bytes, or None where even the smallest options exceed it."""
    least = [min(o.nbytes for o in options) for options in tensors]
    room = budget - sum(least)
    if room < 0:
        return None
    extra = [[o.nbytes - low for o in options] for options, low in zip(tensors, least, strict=True)]
    most = sum(max(e) for e in extra)
    room = min(room, most)
    exact = math.gcd(*(e for options in extra for e in options)) or 1
    unit = max(exact, -(-room // _STATES))
    states = room // unit + 1
    best: NDArray[np.float64] = np.zeros(states)
    taken: list[NDArray[np.int8]] = []
    for options, sizes in zip(tensors, extra, strict=True):
        value = np.full(states, np.inf)
        pick = np.zeros(states, dtype=np.int8)
        for index, (option, size) in enumerate(zip(options, sizes, strict=True)):
            shift = -(-size // unit)
            if shift >= states:
                continue
            candidate = np.full(states, np.inf)
            candidate[shift:] = best[: states - shift] + option.cost
            better = candidate < value
            value[better], pick[better] = candidate[better], index
        best = value
        taken.append(pick)
    at = states - 1  # sizes up to this one: the table is cumulative, for a smaller option may always be taken
    chosen: list[int] = []
    for sizes, pick in zip(reversed(extra), reversed(taken), strict=True):
        index = int(pick[at])
        chosen.append(index)
        at -= -(-sizes[index] // unit)
    chosen.reverse()
    picked = [options[i] for options, i in zip(tensors, chosen, strict=True)]
    slack = 0 if unit == exact else unit * len(tensors)
    return Choice(tuple(chosen), sum(o.nbytes for o in picked), sum(o.cost for o in picked), slack)
