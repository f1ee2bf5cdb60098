"""Learned rounding in a run: a block that was solved is moved towards full precision's outputs before it is committed.

The calibration streams stand at the block's outputs when its linears are solved. What went into the block is kept for
that long; once the codes are final, the samples go through the block again from there.
"""

from __future__ import annotations

__all__ = ["round_block"]

from collections.abc import Sequence

import torch
from torch import Tensor

from phi4edge.calibration.store import ActivationStore
from phi4edge.core.events import Event
from phi4edge.core.memory import release_memory
from phi4edge.distillation.parameters import QuantizedBlock
from phi4edge.distillation.rounding import BlockSamples, Rounded, learn_rounding
from phi4edge.model.block import load_block, load_norms
from phi4edge.model.compute import computing
from phi4edge.model.rope import rotary_table
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.stages.job import Job
from phi4edge.stages.stream import CalibrationStream


def round_block(
    job: Job,
    layer: int,
    linears: Sequence[QuantizedLinear],
    places: dict[str, Tensor],
    stream: CalibrationStream,
    inputs: ActivationStore,
) -> tuple[Rounded, list[Event]]:
    """Learn the rounding of a solved block, whose ``inputs`` [samples, length, hidden] were kept; on the CPU.

    ``places`` are used up. The stream of the quantized model is left at the outputs of what came of it.
    """
    assert job.recipe.rounding is not None
    aims = stream.aims(load_block(job.source, layer), inputs, job.recipe.full_precision_targets)
    release_memory()  # the full-precision weights are gone before the gradients come
    norms = load_norms(job.source, layer)
    prefix = f"model.layers.{layer}."
    names = (f"{prefix}input_layernorm.weight", f"{prefix}post_attention_layernorm.weight")
    gains = dict(zip(names, norms, strict=True))
    solved = QuantizedBlock(tuple(linear.to("cpu") for linear in linears), gains, torch.float32)

    def of(store: ActivationStore, samples: list[int]) -> Tensor:
        return torch.cat([store.read(i, i + 1) for i in samples])

    samples = BlockSamples(
        lambda chosen: of(inputs, chosen), lambda chosen: of(aims, chosen), stream.kept, inputs.shape[0]
    )
    with torch.inference_mode(False), torch.no_grad(), computing(job.recipe.compute):
        rotary = rotary_table(job.checkpoint.config.rope, inputs.shape[1])  # one that gradients may go through
        # Copies, one at a time, that may be moved outside the solver's inference mode.
        own = {name: places.pop(name).clone() for name in list(places)}
        rounded = learn_rounding(solved, own, samples, rotary, job.checkpoint.config, job.recipe.rounding)
    aims.close()
    stream.send_again(norms, inputs, rounded.block.linears)
    release_memory()
    if rounded.record["kept_step"]:
        return rounded, []
    detail = "error on held-out samples did not fall by learned rounding; the solver's codes are taken"
    return rounded, [Event("rounding_without_gain", f"model.layers.{layer}", detail)]
