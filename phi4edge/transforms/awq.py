"""AWQ: channels that are excited most get finer steps, by a factor that what feeds them takes back.

Source: Lin et al., "AWQ", arXiv 2306.00978, section 3.2. For one linear, over a grid of α in 0 … 0.95,

    min tr(E H Eᵀ),  E = W − Ŵ,  Ŵ = round(W·diag s)·diag(1/s),  s = (m / geometric mean of m)^α

    W [out, in]  weights         H [in, in]  XᵀX / tokens, so that the objective is ‖X(W − Ŵ)ᵀ‖² / tokens
    m [channels] rms of a channel's inputs, √diag H

α = 0 leaves the weights as they are and is in the grid, so on the calibration text no linear gets worse by it.

What differs from the reference on purpose: the error is taken with H, and no activations are kept for it; m is the
root mean square, not the mean of absolute values; rounding is the run's own, on its own grid with searched scales,
which do the work of AWQ's clip search (candidate steps below the absmax one clip), so there is none beside it. A
channel that arrives at several columns (values under GQA) has one scale, from the mean over them. AutoAWQ's pairing
for this architecture divides the last rows of the fused projection, whatever they are; here only those rows are
divided that make the channel (:mod:`phi4edge.model.topology`), so queries, keys and gates stay as they are.
"""

from __future__ import annotations

__all__ = ["ALPHAS", "Scaling", "divide_rows", "fold_gain", "search_scales"]

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from phi4edge.quant.grid import grid_for
from phi4edge.quant.parallel import run_parallel
from phi4edge.quant.scheme import Scheme
from phi4edge.quant.search import search

ALPHAS = tuple(step / 20 for step in range(20))
_ROWS = 1024  # of W that the error is taken over, evenly spread; its product with H is what the search costs
_FLOOR = 1e-3  # of the mean of m: a channel that was never excited is taken to be excited that much


@dataclass(frozen=True)
class Scaling:
    """The best scales of one linear's input channels."""

    alpha: float
    scales: Tensor  # [channels] float32
    error: float  # tr(E H Eᵀ) / rows looked at
    error_unscaled: float  # the same with all scales 1


def search_scales(weight: Tensor, hessian: Tensor, scheme: Scheme, channels: Tensor) -> Scaling:
    """The α that loses least when ``weight`` [out, in] float32 is rounded to nearest on the grid of ``scheme``.

    ``hessian`` [in, in] float32; ``channels`` [in] int64 says which producer's channel each column reads.

    Raises:
        InputError: the group size does not divide in_features.
    """
    stride = -(-weight.shape[0] // _ROWS) | 1  # odd: an even one would see few of a head's channels
    W = weight[::stride]
    channels = channels.to(weight.device)
    logs = _log_magnitude(hessian.diagonal(), channels)
    errors = run_parallel([partial(_error, W, hessian, scheme, (alpha * logs).exp()[channels]) for alpha in ALPHAS])
    best = min(range(len(ALPHAS)), key=errors.__getitem__)
    return Scaling(ALPHAS[best], (ALPHAS[best] * logs).exp(), errors[best] / W.shape[0], errors[0] / W.shape[0])


def _log_magnitude(mean_square: Tensor, channels: Tensor) -> Tensor:
    """log m less its mean, [channels]: a column's mean square, averaged over the columns that read the channel."""
    count = int(channels.max()) + 1
    total = torch.zeros(count, device=mean_square.device).index_add_(0, channels, mean_square)
    m = (total / torch.bincount(channels, minlength=count)).sqrt()
    if not bool((m > 0).any()):
        return torch.zeros_like(m)
    logs = m.clamp_min(float(m.mean()) * _FLOOR).log()
    return logs - logs.mean()


def _error(W: Tensor, H: Tensor, scheme: Scheme, factors: Tensor) -> float:
    """tr(E H Eᵀ) with columns rounded after multiplication with ``factors`` [in]."""
    rows, columns = W.shape
    groups, grid = scheme.groups(columns), grid_for(scheme)
    scaled = (W * factors).reshape(rows, groups, -1)
    h = H.diagonal() / factors / factors  # as it comes out of H for scaled inputs, to the last bit
    params = search(grid, scaled, h.reshape(groups, -1))
    a, b = (step[:, :, None] for step in grid.steps(params))
    E = (scaled - (a * grid.encode(scaled, a, b) + b)).reshape(rows, columns) / factors
    return float(((E @ H) * E).sum(dtype=torch.float64))


def fold_gain(gain: Tensor, scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A norm's gain divided by ``scales``, and the factors of the columns behind it, both [hidden] float32.

    The gain is rounded to ``dtype``, in which it is stored, and the factors are what that leaves to be made good, so
    that the product is the old gain to float32's last bit. A gain that ``dtype`` cannot hold stays as it was.
    """
    folded = (gain / scales).to(dtype).float()
    folded = torch.where(torch.isfinite(folded) & (folded != 0), folded, gain)
    return folded, torch.where(folded == 0, torch.ones_like(gain), gain / folded)


def divide_rows(values: Tensor, rows: slice, scales: Tensor) -> Tensor:
    """A copy of ``values`` [out, n] in which the rows ``rows`` are divided by ``scales`` [their number] float32.

    Serves weights and, since a row's steps are proportional to it, the steps that codes were solved for.
    """
    divided = values.clone()
    divided[rows] = (values[rows].float() / scales[:, None]).to(values.dtype)
    return divided
