"""What a linear's inputs look like: the Hessian H = XᵀX / tokens and its diagonal, the imatrix.

H is symmetric, so only blocks at or right of the diagonal are multiplied and kept (a blocked rank-k update: half the
work of a full product for wide layers, and little more than half the memory) and mirrored once at the end. Sums are
float32. Samples are summed by shards of :data:`SHARD`, and the shards' sums are added in their order, so that the bytes
of a sum do not depend on how many machines made it.

Beside H there may be D = (X − X̃)ᵀX̃ / tokens: how far the inputs of the full-precision model, X, lie from those that
H is made of, X̃, and in which directions of them. Weights and shrinkage are those of H, so that X = cX̃ gives (c − 1)H.
All that is asked of D is W D; for a linear with far fewer outputs than inputs that is gathered in its place, from
(X − X̃) Wᵀ: fewer products, and a third of the memory for Phi-4's down_proj.
"""

from __future__ import annotations

__all__ = ["SHARD", "InputMoments", "LayerStats", "Shift", "shards", "summed_values", "takes_product"]

from copy import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from phi4edge.model.compute import prepared, product
from phi4edge.model.crossed import Packed, Part, add_products, over_tokens, upper_rows
from phi4edge.quant.parallel import run_parallel

SHARD = 8  # consecutive samples whose moments are summed apart


def shards(samples: int) -> list[range]:
    """The samples 0 … ``samples`` − 1 in shards; they depend on nothing else."""
    return [range(start, min(start + SHARD, samples)) for start in range(0, samples, SHARD)]


def takes_product(out_features: int, in_features: int) -> bool:
    """Whether W D [out, in] is gathered for such a linear, and not D [in, in]."""
    return 2 * out_features <= in_features


def summed_values(width: int) -> int:
    """Values that the moments of ``width`` inputs are summed in."""
    return sum((here.stop - here.start) * (width - here.start) for here in upper_rows(width))


@dataclass(frozen=True)
class Shift:
    """D [in_features, in_features], or the product W D [out_features, in_features], float32."""

    values: Tensor
    product: bool


@dataclass(frozen=True)
class LayerStats:
    """Second moments of the inputs of one (fused) projection, means over tokens."""

    mean_square: Tensor  # [in_features] float32: the imatrix, the diagonal of H
    hessian: Tensor | None  # [in_features, in_features] float32, where it was asked for
    tokens: int
    shift: Shift | None = None  # where full-precision inputs were given


class InputMoments:
    """Accumulates XᵀX, or its diagonal alone, over samples; first positions are kept apart until the end."""

    def __init__(
        self, width: int, *, full: bool, exact: Tensor | None = None, device: torch.device | str = "cpu"
    ) -> None:
        """``exact`` is W [out_features, width] where samples come with what full precision has in their place."""
        assert full or exact is None
        self._weight = exact
        self._prepared: Tensor | None = None  # the same for products of what arrives, once there are any
        self._product = exact is not None and takes_product(*exact.shape)
        self._shift: Tensor | None = None
        if exact is not None:
            self._shift = torch.zeros((exact.shape[0] if self._product else width, width), device=device)
        self._shift_diagonal = torch.zeros(width, device=device) if self._product else None
        self._first_shift: list[Tensor] = []  # [count, width] of each batch, full-precision less own
        self._width, self._device = width, torch.device(device)
        # Of H: its rows of a block, from the diagonal on. Or its diagonal alone.
        self._sums = [
            torch.zeros((here.stop - here.start, width - here.start) if full else (width,), device=device)
            for here in (upper_rows(width) if full else [slice(0, width)])
        ]
        self._first: list[Tensor] = []  # [count, width] of each batch
        self._full = full
        self._tokens = 0  # after the first positions

    def empty(self) -> InputMoments:
        """Moments of the same linear with nothing added: for the next shard."""
        other = InputMoments(self._width, full=self._full, exact=self._weight, device=self._device)
        other._prepared = self._prepared
        return other

    def clear(self) -> None:
        """Forget what was added, and keep the memory."""
        for sums in (*self._sums, self._shift, self._shift_diagonal):
            if sums is not None:
                sums.zero_()
        self._first, self._first_shift, self._tokens = [], [], 0

    def add(self, x: Tensor, exact: Tensor | None = None) -> None:
        """Add samples ``x`` [count, length, width] float32; ``exact`` is what full precision has in their place."""
        assert (exact is None) == (self._shift is None)
        rows = x[:, 1:].reshape(-1, x.shape[-1])
        self._first.append(x[:, 0].clone())
        self._tokens += rows.shape[0]
        if not self._full:
            self._sums[0].add_(rows.pow(2).sum(0))
            return
        factor = over_tokens(rows)
        if exact is not None:
            self._add_shift(exact - x, rows, factor)
        parts = [Part(s, here.start, here.start) for here, s in zip(upper_rows(self._width), self._sums, strict=True)]
        add_products(parts, factor, factor, symmetric=True)

    def _add_shift(self, shift: Tensor, rows: Tensor, factor: Tensor | Packed) -> None:
        assert self._shift is not None
        self._first_shift.append(shift[:, 0].clone())
        away = shift[:, 1:].reshape(-1, shift.shape[-1])
        if self._shift_diagonal is None:
            add_products([Part(self._shift)], over_tokens(away), factor)
            return
        assert self._weight is not None
        self._shift_diagonal.add_((away * rows).sum(0))
        if self._prepared is None:
            self._prepared = prepared(self._weight)
        add_products([Part(self._shift)], over_tokens(product(away, self._prepared)), factor)

    def apart(self) -> InputMoments:
        """The same sums without the weight: all that :meth:`merge` asks of a shard made elsewhere."""
        light = copy(self)
        light._weight = light._prepared = None
        return light

    def belonging_to(self, weight: Tensor | None) -> InputMoments:
        """The inverse: the same sums, of the linear with that weight."""
        whole = copy(self)
        whole._weight = weight
        return whole

    def merge(self, later: InputMoments) -> None:
        """Add the moments of later samples of the same linear; nothing of theirs is held on to."""
        for sums, more in zip(self._sums, later._sums, strict=True):
            sums.add_(more)
        self._first += [first.clone() for first in later._first]
        self._first_shift += [first.clone() for first in later._first_shift]
        self._tokens += later._tokens
        if self._shift is not None:
            assert later._shift is not None
            self._shift.add_(later._shift)
        if self._shift_diagonal is not None:
            assert later._shift_diagonal is not None
            self._shift_diagonal.add_(later._shift_diagonal)

    def result(self, sink_share: float | None = None, shrinkage: float = 0.0) -> LayerStats:
        """Means over all rows added; ends the accumulation.

        ``sink_share`` is the share of H's trace that first positions get; None leaves them what they have.
        ``shrinkage`` scales all that is off the diagonal by one less it: what channels have in common on this text
        is believed that much less.
        """
        first = torch.cat(self._first)
        tokens = self._tokens + first.shape[0]
        blocks = upper_rows(self._width)
        rest_diagonal = torch.cat([sums.diagonal() for sums in self._sums]) if self._full else self._sums[0]
        first_diagonal = first.pow(2).sum(0)
        mean_square = (rest_diagonal + first_diagonal) / max(tokens, 1)
        if not self._full:
            return LayerStats(mean_square, None, tokens)
        rest_energy, first_energy = float(rest_diagonal.sum()), float(first_diagonal.sum())
        weight = 1.0
        if sink_share is not None and rest_energy > 0 and first_energy > 0:
            weight = sink_share / (1 - sink_share) * rest_energy / first_energy
        H = torch.empty(self._width, self._width, device=self._device)
        for here in blocks:  # each block goes as its place in H is filled: never are both there as a whole
            sums = self._sums.pop(0)
            sums.addmm_(first[:, here].T, first[:, here.start :], alpha=weight).div_(max(tokens, 1))
            H[here, here.start :] = sums
            del sums
        run_parallel([partial(_mirror, H, here) for here in blocks])
        _shrink(H, shrinkage)
        return LayerStats(mean_square, H, tokens, self._finished_shift(first, weight, max(tokens, 1), shrinkage))

    def _finished_shift(self, first: Tensor, weight: float, tokens: int, shrinkage: float) -> Shift | None:
        if self._shift is None or self._weight is None:
            return None
        away = torch.cat(self._first_shift)
        if self._shift_diagonal is None:
            self._shift.addmm_(away.T, first, alpha=weight).div_(tokens)
            _shrink(self._shift, shrinkage)
            return Shift(self._shift, product=False)
        diagonal = self._shift_diagonal.add_((away * first).sum(0), alpha=weight).div_(tokens)
        self._shift.addmm_((away @ self._weight.T).T, first, alpha=weight).div_(tokens)
        if shrinkage > 0:
            self._shift.mul_(1 - shrinkage).addcmul_(self._weight, diagonal, value=shrinkage)
        return Shift(self._shift, product=True)


def _mirror(H: Tensor, here: slice) -> None:
    """Below the diagonal, in columns ``here`` of H, what lies above it."""
    H[here.stop :, here] = H[here, here.stop :].T
    square = H[here, here]
    square.copy_(square.triu() + square.triu(1).T)


def _shrink(moments: Tensor, shrinkage: float) -> None:
    if shrinkage > 0:
        diagonal = moments.diagonal().clone()
        moments.mul_(1 - shrinkage)
        moments.diagonal().copy_(diagonal)
