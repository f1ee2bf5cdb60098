"""Two models on the same questions: accuracies, their difference, and which answers flipped.

    ────────────  artifact right  artifact wrong
    reference right      a               b (lost)         p = (a + b)/n of the reference
    reference wrong      c (gained)      d                q = (a + c)/n of the artifact

    accuracy        Wilson's interval: (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n)
    q − p           Newcombe's square-and-add interval for pairs (Statist. Med. 17, 2635 (1998), method 10): it joins
                    the two Wilson intervals and takes φ, the correlation of the two columns, into account
    q − s p         the same construction with s times the reference's column, for "at least s of the reference's
                    accuracy": q/p itself has no bounds where few answers are right
    se of q − p     √(b + c − (b − c)²/n) / n, which is 0 where nothing flipped; so gates use the interval
    McNemar         of b + c flips, min(b, c) or fewer one way: exact binomial(b + c, ½), two-sided

The interval of Newcombe keeps a width where no answer flipped: five equal answers are no proof of equality.
"""

from __future__ import annotations

__all__ = ["Pairing", "mcnemar", "pair", "paired_interval", "wilson"]

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Z = 1.959964  # two-sided 95 %


@dataclass(frozen=True)
class Pairing:
    """The four cells."""

    both: int  # a
    lost: int  # b: right in the reference alone
    gained: int  # c: right in the artifact alone
    neither: int  # d

    @property
    def n(self) -> int:
        """Questions."""
        return self.both + self.lost + self.gained + self.neither

    @property
    def difference(self) -> float:
        """Accuracy of the artifact less the reference's."""
        return (self.gained - self.lost) / self.n

    @property
    def se(self) -> float:
        """Standard error of :attr:`difference`."""
        flips, net = self.lost + self.gained, self.gained - self.lost
        return math.sqrt(flips - net * net / self.n) / self.n

    def surplus(self, share: float) -> float:
        """Accuracy of the artifact less ``share`` of the reference's."""
        return ((self.both + self.gained) - share * (self.both + self.lost)) / self.n

    def surplus_se(self, share: float) -> float:
        """Standard error of :meth:`surplus`."""
        one = 1 - share
        squares = self.both * one * one + self.gained + self.lost * share * share
        return math.sqrt(max(squares / self.n - self.surplus(share) ** 2, 0.0) / self.n)

    def as_dict(self) -> dict[str, Any]:
        """Everything that is reported of it."""
        low, high = paired_interval(self)
        return {
            "n": self.n,
            "artifact": _share(self.both + self.gained, self.n),
            "reference": _share(self.both + self.lost, self.n),
            "difference": {"value": self.difference, "se": self.se, "low": low, "high": high, "confidence": 0.95},
            "flips": {"lost": self.lost, "gained": self.gained},
            "mcnemar_p": mcnemar(self.lost, self.gained),
        }


def pair(artifact: Sequence[bool], reference: Sequence[bool]) -> Pairing:
    """Count the cells of answers to the same questions in the same order."""
    cells = list(zip(reference, artifact, strict=True))
    assert cells, "there are no answers"
    return Pairing(
        cells.count((True, True)), cells.count((True, False)), cells.count((False, True)), cells.count((False, False))
    )


def _share(correct: int, n: int) -> dict[str, float | int]:
    low, high = wilson(correct, n)
    return {"correct": correct, "accuracy": correct / n, "low": low, "high": high}


def wilson(correct: int, n: int, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of a share (JASA 22, 209 (1927))."""
    p, square = correct / n, z * z
    middle, half = p + square / (2 * n), z * math.sqrt(p * (1 - p) / n + square / (4 * n * n))
    low, high = (middle - half) / (1 + square / n), (middle + half) / (1 + square / n)
    return 0.0 if correct == 0 else low, 1.0 if correct == n else high  # exact there, but for rounding


def paired_interval(cells: Pairing, z: float = Z, share: float = 1.0) -> tuple[float, float]:
    """Bounds of :meth:`Pairing.surplus` over ``share``; with 1, of the difference: Newcombe's method 10."""
    a, b, c, d, n = cells.both, cells.lost, cells.gained, cells.neither, cells.n
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    cross = a * d - b * c
    cross_corrected = max(cross - n / 2, 0.0) if cross > 0 else cross
    phi = cross_corrected / math.sqrt(margins) if margins else 0.0
    q, p = (a + c) / n, (a + b) / n
    (q_low, q_high), (p_low, p_high) = wilson(a + c, n, z), wilson(a + b, n, z)

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    low = cells.surplus(share) - reach(q - q_low, share * (p_high - p))
    high = cells.surplus(share) + reach(q_high - q, share * (p - p_low))
    return max(low, -share), min(high, 1.0)


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p of McNemar's test (Psychometrika 12, 153 (1947)); 1 where nothing flipped."""
    flips, fewer = lost + gained, min(lost, gained)
    return min(1.0, 2 * sum(math.comb(flips, k) for k in range(fewer + 1)) / float(2**flips))
