"""What a worker does with a few calibration samples: pure functions from values to values.

The same passes as in one process, on the same code and in the same order within a shard, so the bytes are the same
wherever a shard is computed. A shard is samples [count, length, width] of one stream, float32: its residual stream,
``hidden``, and before o_proj and down_proj their inputs, ``scratch``.
"""

from __future__ import annotations

__all__ = ["BlockFacts", "advanced", "shard_energies", "shard_moments"]

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from phi4edge.calibration.blockpass import BlockPass, Stores
from phi4edge.calibration.statistics import InputMoments
from phi4edge.calibration.store import ActivationStore
from phi4edge.calibration.streams import Arrival, Streams
from phi4edge.checkpoint.config import ModelConfig
from phi4edge.model.compute import computing
from phi4edge.model.rope import Rotary
from phi4edge.stages.guard import output_energies


@dataclass(frozen=True)
class BlockFacts:
    """What passes through one block need beside samples and weights."""

    input_norm: Tensor  # [hidden]
    post_norm: Tensor  # [hidden]
    config: ModelConfig
    rotary: Rotary
    compute: str  # see phi4edge.model.compute


def advanced(facts: BlockFacts, stage: int, weight: Tensor, hidden: Tensor, scratch: Tensor | None) -> Tensor:
    """The shard behind the linear of ``stage`` (0 … 3): scratch after stages 0 and 2, hidden after 1 and 3."""
    changes_hidden = stage in (1, 3)
    passing = _pass(facts, stage, hidden.clone() if changes_hidden else hidden, scratch)
    with computing(facts.compute):
        passing.advance(stage, weight)
    stores = passing.stores
    changed = stores.hidden if changes_hidden else stores.attention if stage == 0 else stores.activation
    return changed.read(0, hidden.shape[0])


def shard_moments(
    facts: tuple[BlockFacts, BlockFacts | None],
    stage: int,
    width: int,
    full: bool,
    weight: Tensor | None,
    hidden: Tensor,
    scratch: Tensor | None,
    exact_hidden: Tensor | None,
    exact_scratch: Tensor | None,
) -> InputMoments:
    """Moments of the inputs of the linear of ``stage`` over this shard, to be merged with those of the others.

    ``weight`` is there where full precision's shard is, ``exact_hidden`` and ``exact_scratch``.
    """
    moments = InputMoments(width, full=full, exact=weight)
    streams = _streams(facts, stage, (hidden, scratch), (exact_hidden, exact_scratch))
    with computing(facts[0].compute):
        streams.add_moments(stage, range(hidden.shape[0]), moments)
    return moments.apart()


def shard_energies(
    facts: tuple[BlockFacts, BlockFacts | None],
    stage: int,
    weight: Tensor,
    candidates: Sequence[Callable[[slice], Tensor]],
    factors: Tensor | None,
    hidden: Tensor,
    scratch: Tensor | None,
    exact_hidden: Tensor | None,
    exact_scratch: Tensor | None,
) -> list[list[Tensor]]:
    """What :func:`phi4edge.stages.guard.output_energies` says of this shard, by rows of the weight and sample."""
    streams = _streams(facts, stage, (hidden, scratch), (exact_hidden, exact_scratch))

    def inputs() -> Iterator[Arrival]:
        for sample, x, beside in streams.inputs(stage, range(hidden.shape[0])):
            yield sample, x, beside if beside is None or factors is None else beside / factors

    with computing(facts[0].compute):
        return [list(by_sample) for by_sample in output_energies(inputs, weight, candidates)]


def _streams(
    facts: tuple[BlockFacts, BlockFacts | None],
    stage: int,
    own: tuple[Tensor, Tensor | None],
    exact: tuple[Tensor | None, Tensor | None],
) -> Streams:
    if exact[0] is None or facts[1] is None:
        return Streams(_pass(facts[0], stage, *own), None)
    return Streams(_pass(facts[0], stage, *own), _pass(facts[1], stage, exact[0], exact[1]))


def _pass(facts: BlockFacts, stage: int, hidden: Tensor, scratch: Tensor | None) -> BlockPass:
    """A pass over this shard that stands before the linear of ``stage``."""
    count, length, _ = hidden.shape
    attention = scratch if stage == 1 else None
    activation = scratch if stage == 3 else None
    stores = Stores(
        ActivationStore.of(hidden),
        ActivationStore(count, length, facts.config.q_size) if attention is None else ActivationStore.of(attention),
        ActivationStore(count, length, facts.config.intermediate_size)
        if activation is None
        else ActivationStore.of(activation),
    )
    return BlockPass(facts.input_norm, facts.post_norm, facts.config, facts.rotary, stores)
