"""How far an artifact's distributions lie from the reference's, position by position, with llama-perplexity's figures.

For the scored positions t of all chunks, with P the reference's and Q the artifact's next-token distribution and x the
token that follows in the text:

    PPL          exp(mean −ln Q(x))                  SE = PPL · SE(mean)
    ln ratio     mean(−ln Q(x)) − mean(−ln P(x))     SE from both variances and their covariance
    KLD          mean Σ_v P(v) (ln P(v) − ln Q(v))
    Δp           Q(x) − P(x); RMS Δp = √mean Δp²,    SE = SE(mean Δp²) / (2 RMS)
    same top     share of positions where P and Q have the same most likely token
    SE(mean)     √((E[a²] − E[a]²) / (n − 1)), as if positions were independent; quantiles interpolate linearly

llama-perplexity leaves out tokens with P(v) < e⁻¹⁶ from the sum of KLD, because its base file cannot hold them; here
they are in. Positions of one chunk are not independent, so :func:`between_chunks` gives the standard error of chunk
means as well, and gates use the larger one.
"""

from __future__ import annotations

__all__ = [
    "PositionFigures",
    "between_chunks",
    "compare_chunk",
    "divergence",
    "mean_with_error",
    "position_curve",
    "summarize",
]

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phi4edge.core.errors import InputError
from phi4edge.measurement.encoding import STEP, StoredChunk, row_blocks
from phi4edge.measurement.result import Measurement

Array = NDArray[np.float64]
_KLD_QUANTILES = {
    "p999": 0.999, "p99": 0.99, "p95": 0.95, "p90": 0.9, "median": 0.5,
    "p10": 0.1, "p05": 0.05, "p01": 0.01, "p001": 0.001,
}  # fmt: skip
_DELTA_QUANTILES = {
    "p999": 0.999, "p99": 0.99, "p95": 0.95, "p90": 0.9, "p75": 0.75, "median": 0.5,
    "p25": 0.25, "p10": 0.1, "p05": 0.05, "p01": 0.01, "p001": 0.001,
}  # fmt: skip


@dataclass(frozen=True)
class PositionFigures:
    """One value a scored position, each array [chunks, positions]."""

    nll: Array  # −ln Q(x), nat
    nll_reference: Array  # −ln P(x), nat
    kld: Array  # KLD(P ‖ Q), nat
    same_top: NDArray[np.bool_]

    @property
    def delta_p(self) -> Array:
        """Q(x) − P(x)."""
        difference: Array = np.exp(-self.nll) - np.exp(-self.nll_reference)
        return difference

    @classmethod
    def stack(cls, chunks: Sequence[PositionFigures]) -> PositionFigures:
        """Figures of single chunks, each [1, positions], together."""
        return cls(
            np.concatenate([c.nll for c in chunks]),
            np.concatenate([c.nll_reference for c in chunks]),
            np.concatenate([c.kld for c in chunks]),
            np.concatenate([c.same_top for c in chunks]),
        )


@torch.inference_mode()
def compare_chunk(logits: Tensor, reference: StoredChunk, following: Tensor) -> PositionFigures:
    """Compare ``logits`` [positions, vocab] float32 of an artifact with the reference's, some rows at a time.

    ``following`` [positions] int64 are the next tokens. With d the reference's distance below its maximum, y the
    artifact's logit less its maximum, g = −d − y and a = Σ e⁻ᵈ(e⁻ᵍ − 1)/Σ e⁻ᵈ,

        KLD = Σ e⁻ᵈ (e⁻ᵍ − 1 + g) / Σ e⁻ᵈ − (a − ln(1 + a))        ln Σ eʸ = ln Σ e⁻ᵈ + ln(1 + a)

    The terms of the first sum are ≥ 0 and vanish with g, so float32 is enough: errors are 1e-9 nat where the
    difference of two log-sums would leave 1e-7.

    Raises:
        InputError: a logit of the artifact that is not finite; the row is named.
    """
    positions, vocab = logits.shape
    codes = torch.from_numpy(reference.codes)
    nll, kld = torch.empty(positions, dtype=torch.float64), torch.empty(positions, dtype=torch.float64)
    same = torch.empty(positions, dtype=torch.bool)
    top = torch.from_numpy(reference.top.astype(np.int64))
    blocks = list(row_blocks(positions, vocab))
    # Made once: allocated for every block, their pages went back to the kernel and cost as much as the arithmetic.
    held_y, held_d = (torch.empty(blocks[0].stop, columns) for columns in (vocab, codes.shape[1]))
    for rows in blocks:
        x = logits[rows]
        maximum = x.amax(dim=1, keepdim=True)
        same[rows] = (x.gather(1, top[rows, None]) == maximum).squeeze(1)
        y = torch.sub(x, maximum, out=held_y[: len(x)])
        minus_d = held_d[: len(x)].copy_(codes[rows]).mul_(-STEP)
        chosen = y.gather(1, following[rows, None]).squeeze(1).double()
        if reference.tokens is not None and reference.tail is not None:
            minus_d, y = _with_tail(minus_d, y, reference.tokens[rows], reference.tail[rows])
        kld[rows], log_sum = _convex(minus_d, y)
        nll[rows] = log_sum - chosen
    bad = (~(torch.isfinite(kld) & torch.isfinite(nll))).nonzero()
    if bad.numel():
        raise InputError(f"scored position {int(bad[0])}: logits are NaN or infinite", "the artifact is damaged")
    reference_nll = -reference.log_prob.astype(np.float64)
    return PositionFigures(nll.numpy()[None], reference_nll[None], kld.numpy()[None], same.numpy()[None])


def _with_tail(
    minus_d: Tensor, y: Tensor, tokens: NDArray[np.int32], tail: NDArray[np.float32]
) -> tuple[Tensor, Tensor]:
    """Both distributions with all tokens but ``tokens`` [rows, top] made one, which comes last."""
    places = torch.from_numpy(tokens.astype(np.int64))
    rest = torch.logsumexp(y.scatter(1, places, -torch.inf), dim=1, keepdim=True).clamp_(min=-80)
    held = torch.from_numpy(np.ascontiguousarray(tail))[:, None].clamp(min=-80)
    return torch.cat((minus_d, held), dim=1), torch.cat((y.gather(1, places), rest), dim=1)


def _convex(minus_d: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """KLD and ln Σ eʸ of every row, as :func:`compare_chunk` has them; both [rows, vocab] are overwritten."""
    minus_gap = y.sub_(minus_d)
    weight = minus_d.exp_()
    total = weight.sum(dim=1).double()
    excess = torch.expm1(minus_gap)
    mean_excess = torch.linalg.vecdot(weight, excess).double() / total
    correction = torch.log1p(mean_excess)
    convex = torch.linalg.vecdot(weight, excess.sub_(minus_gap)).double() / total
    return convex - (mean_excess - correction), total.log() + correction


@torch.inference_mode()
def divergence(before: Tensor, after: Tensor) -> Array:
    """KLD(before ‖ after) [positions] of logits [positions, vocab] float32, both finite; 0 where they are equal.

    Nothing is stored in between, so there is no noise floor but float32's. What lies more than 80 nats below the
    maximum of ``before`` counts as 80, which keeps e⁸⁰ within float32.
    """
    positions, vocab = before.shape
    kld = torch.zeros(positions, dtype=torch.float64)
    for rows in row_blocks(positions, vocab):
        if torch.equal(before[rows], after[rows]):
            continue
        minus_d = (before[rows] - before[rows].amax(dim=1, keepdim=True)).clamp_(min=-80)
        kld[rows], _ = _convex(minus_d, after[rows] - after[rows].amax(dim=1, keepdim=True))
    found: Array = kld.numpy()
    return found


def mean_with_error(name: str, unit: str, values: Array) -> Measurement:
    """Mean of ``values`` [chunks, positions]; its error is the larger of those over positions and between chunks."""
    mean, se = _mean(values.reshape(-1))
    errors = [error for error in (se, _clustered(values.mean(axis=1))) if error is not None]
    return Measurement(name, mean, unit, values.size, max(errors, default=None))


def _mean(values: Array) -> tuple[float, float | None]:
    """Mean and its standard error, positions taken as independent."""
    n = values.size
    mean = float(values.mean())
    return mean, float(np.sqrt(values.var() / (n - 1))) if n > 1 else None


def _clustered(values: Array) -> float | None:
    """Standard error of the mean from the spread of chunk means [chunks]; None for a single chunk."""
    n = values.size
    return float(np.sqrt(values.var() / (n - 1))) if n > 1 else None


def between_chunks(figures: PositionFigures) -> dict[str, float | None]:
    """Standard errors of what gates look at, from the spread between chunks."""
    ratio = figures.nll.mean(axis=1) - figures.nll_reference.mean(axis=1)
    return {
        "kld": _clustered(figures.kld.mean(axis=1)),
        "ln_ppl_ratio": _clustered(ratio),
        "same_top_p": _clustered(figures.same_top.mean(axis=1)),
    }


def summarize(figures: PositionFigures) -> dict[str, Measurement]:
    """All figures of a drift measurement, by name; shares and Δp are fractions, not per cent."""
    n = figures.nll.size
    found: list[Measurement] = []

    def add(name: str, value: float, unit: str, se: float | None = None) -> None:
        found.append(Measurement(name, float(value), unit, n, se))

    nll, reference = figures.nll.reshape(-1), figures.nll_reference.reshape(-1)
    (mean_q, se_q), (mean_p, se_p) = _mean(nll), _mean(reference)
    ln_ratio, se_ratio = _mean(nll - reference)  # the paired difference has the covariance in it
    add("ppl", np.exp(mean_q), "1", _times(se_q, np.exp(mean_q)))
    add("ppl_reference", np.exp(mean_p), "1", _times(se_p, np.exp(mean_p)))
    add("ln_ppl_ratio", ln_ratio, "nat", se_ratio)
    add("ppl_ratio", np.exp(ln_ratio), "1", _times(se_ratio, np.exp(ln_ratio)))
    spread = float(nll.std() * reference.std())
    if spread > 0:
        covariance = float(((nll - mean_q) * (reference - mean_p)).mean())
        add("ln_ppl_correlation", covariance / spread, "1")
    else:
        found.append(Measurement.missing("ln_ppl_correlation", "1", "all positions have the same log-probability"))

    kld = figures.kld.reshape(-1)
    add("kld", *_value_unit_se(_mean(kld), "nat"))
    add("kld_max", kld.max(), "nat")
    for name, quantile in _KLD_QUANTILES.items():
        add(f"kld_{name}", np.quantile(kld, quantile), "nat")
    add("kld_min", kld.min(), "nat")

    delta = figures.delta_p.reshape(-1)
    add("mean_delta_p", *_value_unit_se(_mean(delta), "fraction"))
    square, se_square = _mean(delta**2)
    rms = np.sqrt(square)
    add("rms_delta_p", rms, "fraction", _times(se_square, 0.5 / rms) if rms > 0 else se_square)
    add("delta_p_max", delta.max(), "fraction")
    for name, quantile in _DELTA_QUANTILES.items():
        add(f"delta_p_{name}", np.quantile(delta, quantile), "fraction")
    add("delta_p_min", delta.min(), "fraction")
    add("same_top_p", *_value_unit_se(_mean(figures.same_top.reshape(-1).astype(np.float64)), "fraction"))
    return {measurement.name: measurement for measurement in found}


def _times(se: float | None, factor: float) -> float | None:
    return None if se is None else float(se * factor)


def _value_unit_se(pair: tuple[float, float | None], unit: str) -> tuple[float, str, float | None]:
    return pair[0], unit, pair[1]


def position_curve(figures: PositionFigures, first: int, bins: int = 16) -> list[dict[str, Any]]:
    """Means over runs of positions in a chunk: how drift depends on the length of the context before it.

    ``kld_se`` and ``same_top_p_se`` are as in :func:`mean_with_error`, None where a single position was scored.
    """
    edges = np.linspace(0, figures.nll.shape[1], min(bins, figures.nll.shape[1]) + 1).astype(int)
    return [
        {
            "first": int(first + start),
            "last": int(first + stop - 1),
            "kld": float(figures.kld[:, start:stop].mean()),
            "kld_se": mean_with_error("kld", "nat", figures.kld[:, start:stop]).se,
            "nll": float(figures.nll[:, start:stop].mean()),
            "nll_reference": float(figures.nll_reference[:, start:stop].mean()),
            "same_top_p": float(figures.same_top[:, start:stop].mean()),
            "same_top_p_se": mean_with_error(
                "same_top_p", "fraction", figures.same_top[:, start:stop].astype(np.float64)
            ).se,
        }
        for start, stop in pairwise(edges)
    ]
