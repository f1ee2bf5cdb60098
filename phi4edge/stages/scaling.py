"""AWQ within a run: the input channels of a linear are scaled before it is solved, and what feeds them gives way.

Behind a norm, the gain is divided. Behind a linear, that one has been solved already, and its rows are divided by
dividing their steps: the codes of a row do not depend on its size. So the inputs that scales are searched on are those
that the quantized producer gives, and their Hessian serves the solver too, divided as the inputs are. The price is one
more pass of the samples through the producer, for its steps, rounded to float16 again, give other inputs in the last
bits, and a run that is resumed sees those.
"""

from __future__ import annotations

__all__ = ["Scaled", "scale_inputs"]

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from phi4edge.calibration.statistics import LayerStats
from phi4edge.model.topology import LINKS
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.stages.job import Job
from phi4edge.stages.samples import BlockSamples
from phi4edge.transforms.awq import divide_rows, fold_gain, search_scales


@dataclass(frozen=True)
class Scaled:
    """One linear with its input channels scaled."""

    weight: Tensor  # [out_features, in_features] float32
    stats: LayerStats  # of the inputs that arrive now
    tensors: dict[str, Tensor]  # what the run stores of the producer from now on
    factors: Tensor  # [in_features] float32: columns of the weight were multiplied by, inputs divided
    record: dict[str, float]  # α and what it did, for the manifest


def scale_inputs(
    job: Job,
    layer: int,
    stage: int,
    weight: Tensor,
    stats: LayerStats,
    samples: BlockSamples,
    producer: QuantizedLinear | None,
) -> Scaled:
    """Search scales for the linear of ``stage`` and fold them: ``samples`` arrive scaled from then on.

    The moments of its inputs are divided in place.

    ``producer`` is the linear solved before, and None before the first.
    """
    link, config = LINKS[stage], job.source.config
    assert stats.hessian is not None, "scales are searched with H"
    channels = link.channels(config).to(weight.device)
    scheme = job.scheme_of(f"model.layers.{layer}.{link.consumer}")
    found = search_scales(weight, stats.hessian, scheme, channels)
    record = {"alpha": found.alpha, "error": found.error, "error_unscaled": found.error_unscaled}
    if found.alpha == 0:
        return Scaled(weight, stats, {}, torch.ones(weight.shape[1], device=weight.device), record)
    if link.from_norm:
        name = f"model.layers.{layer}.{link.producer}.weight"
        dtype = job.checkpoint.stored_dtype(name)
        before, behind = samples.norms
        first = link.producer == "input_layernorm"
        gain, factors = fold_gain(before if first else behind, found.scales.cpu(), dtype)
        samples.regain((gain, behind) if first else (before, gain))
        tensors = {name: gain.to(dtype)}
    else:
        assert producer is not None, "a linear comes before"
        factors, rows = found.scales[channels], link.rows(config)
        # Steps are the parameters in float16; zero points and other whole numbers have no size.
        params = {
            field: divide_rows(values, rows, found.scales) if values.is_floating_point() else values
            for field, values in producer.params.items()
        }
        divided = replace(producer, params=params)
        samples.advance(stage - 1, divided)
        tensors = divided.to("cpu").to_tensors()
    factors = factors.to(weight.device)
    stats.hessian.div_(factors).div_(factors[:, None])  # the largest arrays of a run: no copy
    if stats.shift is not None:
        stats.shift.values.div_(factors)
        if not stats.shift.product:
            stats.shift.values.div_(factors[:, None])
    stats = replace(stats, mean_square=stats.mean_square / factors.square())
    return Scaled(weight * factors, stats, tensors, factors, record)
