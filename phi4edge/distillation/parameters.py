"""What of a quantized block stays continuous: group scales, minima and norm gains; its codes are frozen
unless rounding is learned as well (:mod:`phi4edge.distillation.codes`).

Every continuous value v starts at v₀ and is moved by a dimensionless θ, in a unit u that makes one step mean much the
same everywhere:

    v = round(v₀ + u·θ)                 u = |v₀| for scales and gains
    m = round(m₀ + m₀·θ_s + u·θ)        a minimum beside a scale s of b-bit codes: u = |s|·2^(b−3);
                                        in super-blocks |m₀|/4

A scale takes its minimum along: a step of θ_s makes all weights of a group larger or smaller, as it does where there is
no minimum. Alone it would move them all to one side as well, by more than twice as far; and so does a minimum, which
gets a smaller unit.

``round`` is the type in which the value is stored (float16, or the checkpoint's dtype for a gain). It is part of the
forward pass, and the backward pass goes straight through it, so what is tuned is what an artifact will hold.
"""

from __future__ import annotations

__all__ = [
    "Continuous",
    "QuantizedBlock",
    "continuous_of",
    "gradients_of_steps",
    "gradients_of_theta",
    "values_of",
]

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from phi4edge.distillation._gradient_kernels import reduce_groups
from phi4edge.quant.grid import grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.parallel import run_parallel

_WEIGHTS = 2**22  # of a gradient that a core reduces at a time


@dataclass(frozen=True)
class Continuous:
    """One tensor that is tuned."""

    start: Tensor  # v₀, float32
    unit: Tensor  # u, float32, of the same shape
    dtype: torch.dtype  # in which it is stored
    lead: str | None = None  # the name of the scale that takes it along

    def value(self, theta: Tensor, leading: Tensor | None = None) -> Tensor:
        """What is stored for ``theta``, float32; finite, as a step that overflows the type stays at its edge.

        ``leading`` is the θ of what takes it along.
        """
        limit = torch.finfo(self.dtype).max
        moved = self.start + self.unit * theta
        if leading is not None:
            moved += self.start * leading
        return moved.clamp_(-limit, limit).to(self.dtype).float()


def values_of(continuous: Mapping[str, Continuous], theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is stored for every ``theta``, by name."""
    return {n: c.value(theta[n], None if c.lead is None else theta[c.lead]) for n, c in continuous.items()}


def gradients_of_theta(continuous: Mapping[str, Continuous], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of every θ, from those of the values."""
    found = {name: gradients[name] * c.unit for name, c in continuous.items()}
    for name, c in continuous.items():
        if c.lead is not None:
            found[c.lead].addcmul_(gradients[name], c.start)
    return found


@dataclass(frozen=True)
class QuantizedBlock:
    """A block as the run holds it: four linears in order of use, two norm gains, and the names of all of them."""

    linears: tuple[QuantizedLinear, ...]
    gains: Mapping[str, Tensor]  # input norm, post-attention norm, by checkpoint name, float32
    gain_dtype: torch.dtype

    @property
    def continuous(self) -> dict[str, Continuous]:
        """Everything that is tuned, by the name under which it is stored."""
        found = {name: continuous_of(gain, self.gain_dtype) for name, gain in self.gains.items()}
        for linear in self.linears:
            for field in grid_for(linear.scheme).tunable:
                values, lead = linear.params[field], f"{linear.name}.scales" if field == "mins" else None
                found[f"{linear.name}.{field}"] = Continuous(values.float(), _unit(linear, field), values.dtype, lead)
        return found

    def with_values(self, values: Mapping[str, Tensor], codes: Mapping[str, Tensor]) -> QuantizedBlock:
        """The block with tuned ``values`` (as :meth:`Continuous.value` gives them) in place of its own.

        ``codes`` by the linear's name, where they were tuned too.
        """
        linears = []
        for linear in self.linears:
            fields = grid_for(linear.scheme).tunable
            tuned = {f: values[f"{linear.name}.{f}"].to(linear.params[f].dtype) for f in fields}
            linears.append(
                QuantizedLinear(
                    linear.name, linear.scheme, codes.get(linear.name, linear.codes), {**linear.params, **tuned}
                )
            )
        return QuantizedBlock(tuple(linears), {name: values[name] for name in self.gains}, self.gain_dtype)


def continuous_of(gain: Tensor, dtype: torch.dtype) -> Continuous:
    """A norm's gain as something to tune; a gain of zero moves in the mean's unit."""
    size = gain.abs()
    return Continuous(gain, torch.where(size > 0, size, size.mean()), dtype)


def _unit(linear: QuantizedLinear, field: str) -> Tensor:
    own = linear.params[field].float().abs()
    if field != "mins":
        return own
    return own / 4 if linear.scheme.nested else linear.params["scales"].float().abs() * 2.0 ** (linear.scheme.bits - 3)


def gradients_of_steps(linear: QuantizedLinear, dW: Tensor) -> dict[str, Tensor]:
    """Gradients of a linear's continuous parameters, from that of its weight ``dW`` [out, in] float32.

    W = a·q + b a group: ∂a = Σ dW·q and ∂b = Σ dW over the group, and on to what is stored by the grid's own formula.
    """
    rows, n = dW.shape
    da, db = torch.empty(2, rows, linear.scheme.groups(n, linear.name)).unbind()
    step = max(1, _WEIGHTS // n)

    def reduce(start: int) -> None:
        some = slice(start, start + step)
        codes = linear.rows(start, start + step).codes
        reduce_groups(dW[some].numpy(), codes.numpy(), da[some].numpy(), db[some].numpy())

    run_parallel([partial(reduce, start) for start in range(0, rows, step)])
    fields = grid_for(linear.scheme).tunable
    with torch.enable_grad():
        leaves = {field: linear.params[field].float().requires_grad_() for field in fields}
        a, b = grid_for(linear.scheme).steps({**linear.params, **leaves})
        found = torch.autograd.grad([a, b], list(leaves.values()), [da, db])
    return {f"{linear.name}.{field}": gradient for field, gradient in zip(fields, found, strict=True)}
