"""Learned rounding in a run: a block that was solved is moved towards full precision's outputs before it is committed.

The calibration streams stand at the block's outputs when its linears are solved. What went into the block is kept for
that long; once the codes are final, the samples go through the block again from there.
"""

from __future__ import annotations

__all__ = ["round_block"]

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from phi4edge.calibration.store import ActivationStore
from phi4edge.core.events import Event
from phi4edge.core.memory import release_memory
from phi4edge.distillation.parameters import QuantizedBlock
from phi4edge.distillation.rounding import BlockSamples, Rounded, learn_rounding
from phi4edge.model.block import Block
from phi4edge.model.rope import rotary_table
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.stages.job import Job
from phi4edge.stages.stream import CalibrationStream


def round_block(
    job: Job,
    block: Block,
    layer: int,
    linears: Sequence[QuantizedLinear],
    places: Mapping[str, Tensor],
    stream: CalibrationStream,
    inputs: ActivationStore,
) -> tuple[Rounded, list[Event]]:
    """Learn the rounding of a solved block, whose ``inputs`` [samples, length, hidden] were kept; on the CPU.

    The stream of the quantized model is left at the outputs of what came of it.
    """
    assert job.recipe.rounding is not None
    aims = stream.aims(block, inputs, job.recipe.full_precision_targets)
    prefix = f"model.layers.{layer}."
    gains = {
        f"{prefix}input_layernorm.weight": block.input_norm,
        f"{prefix}post_attention_layernorm.weight": block.post_norm,
    }
    solved = QuantizedBlock(tuple(linear.to("cpu") for linear in linears), gains, torch.float32)

    def of(store: ActivationStore, samples: list[int]) -> Tensor:
        return torch.cat([store.read(i, i + 1) for i in samples])

    samples = BlockSamples(
        lambda chosen: of(inputs, chosen), lambda chosen: of(aims, chosen), stream.kept, inputs.shape[0]
    )
    with torch.inference_mode(False), torch.no_grad():
        rotary = rotary_table(job.checkpoint.config.rope, inputs.shape[1])  # one that gradients may go through
        rounded = learn_rounding(solved, places, samples, rotary, job.checkpoint.config, job.recipe.rounding)
    aims.close()
    stream.send_again(block, inputs, [linear.dequantize() for linear in rounded.block.linears])
    release_memory()
    if rounded.record["kept_step"]:
        return rounded, []
    detail = "error on held-out samples did not fall by learned rounding; the solver's codes are taken"
    return rounded, [Event("rounding_without_gain", f"model.layers.{layer}", detail)]
