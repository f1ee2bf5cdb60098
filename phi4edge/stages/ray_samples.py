"""The calibration samples before one block, dealt out to the workers of a Ray cluster.

The driver owns the residual streams between two blocks and the run directory. For a block it puts the shards of its
streams into Ray's object store; from there on a shard is the value of a task, made of the shard before it and of a
weight. A worker's or a machine's loss therefore costs what it held, and Ray makes that again from what it was made of.
Weights and first shards are the driver's own objects, so they are held until the samples stand behind the block.

Sums over shards are taken here, in the shards' order, so that a run has the same bytes as one in one process.
"""

from __future__ import annotations

__all__ = ["RaySamples", "stored_bytes"]

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from phi4edge.calibration.statistics import InputMoments, shards
from phi4edge.calibration.store import ActivationStore
from phi4edge.checkpoint.config import ModelConfig
from phi4edge.core.parts import PartTimes
from phi4edge.model.block import LINEARS
from phi4edge.model.compute import computing, decoded, prepared
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.stages.cluster import Cluster
from phi4edge.stages.guard import HeldOut, relative_errors
from phi4edge.stages.shard import BlockFacts, advanced, shard_energies, shard_moments

_LAST = len(LINEARS) - 1
_AHEAD = 1  # shards whose moments wait to be added, beside those in work


def stored_bytes(config: ModelConfig, tokens: int, streams: int) -> int:
    """The most that residual streams of so many tokens put into the workers' object stores, bytes.

    That is before down_proj: hidden as it came from the driver, behind attention and behind the block, and down_proj's
    inputs. What is more than there is room for, Ray writes to the workers' disks and reads again.
    """
    return 4 * streams * tokens * (3 * config.hidden_size + config.intermediate_size)


class _Stream:
    """Shards of one stream: references to what they are now."""

    def __init__(self, cluster: Cluster, facts: BlockFacts, store: ActivationStore, pieces: Sequence[range]) -> None:
        self._cluster, self._store, self._pieces = cluster, store, pieces
        self.facts = facts
        self._hidden: list[Any] = [None] * len(pieces)  # None: still the driver's own
        self._scratch: list[Any] = [None] * len(pieces)
        self._held: list[Any] = []  # what shards are made of
        self._begun: tuple[int, list[Any]] | None = None  # the linear ahead, and what shards will be behind it

    def state(self, shard: int) -> tuple[Any, Any]:
        """References to the shard's hidden and scratch."""
        if self._hidden[shard] is None:
            piece = self._pieces[shard]
            self._hidden[shard] = self._cluster.put(self._store.read(piece.start, piece.stop))
            self._held.append(self._hidden[shard])
        return self._hidden[shard], self._scratch[shard]

    def begin(self, stage: int, weight: Any) -> None:
        """Start to send every shard through a linear, and stand before it still."""
        facts = self._cluster.put(self.facts)
        self._held += [facts, weight]
        places = range(len(self._pieces))
        made = [self._cluster.start(advanced, facts, stage, weight, *self.state(i), place=i) for i in places]
        self._begun = stage, made

    def advance(self, stage: int) -> None:
        """Stand behind the linear that was begun. Behind the last one, :meth:`come_home` has to follow."""
        assert self._begun is not None
        (begun, made), self._begun = self._begun, None
        assert begun == stage
        if stage in (0, 2):
            self._scratch = made
        else:
            self._hidden, self._scratch = made, [None] * len(made)

    def come_home(self) -> None:
        """Wait for the shards and take them back into the driver's store."""
        for piece, reference in zip(self._pieces, self._hidden, strict=True):
            self._store.write(piece.start, self._cluster.look(reference))
        self._hidden, self._held = [None] * len(self._pieces), []


class RaySamples:
    """See :class:`phi4edge.stages.samples.BlockSamples`."""

    def __init__(
        self,
        cluster: Cluster,
        facts: BlockFacts,
        own: ActivationStore,
        exact: ActivationStore | None,
        kept: int,
        parts: PartTimes,
        *,
        ends: bool,
    ) -> None:
        """``own`` and ``exact`` are residual streams [samples, length, hidden]; the first ``kept`` are learned from.

        ``ends``: nobody asks for the outputs of this block.
        """
        self._cluster, self._parts, self._learning, self._ends = cluster, parts, shards(kept), ends
        rest = [range(kept + part.start, kept + part.stop) for part in shards(own.shape[0] - kept)]
        with parts.part("forward"):
            pieces = [*self._learning, *rest]
            self._own = _Stream(cluster, facts, own, pieces)
            self._exact = None if exact is None else _Stream(cluster, facts, exact, pieces)
        self._count = len(pieces)

    @property
    def norms(self) -> tuple[Tensor, Tensor]:
        """See :class:`BlockSamples`."""
        return self._own.facts.input_norm, self._own.facts.post_norm

    def regain(self, norms: tuple[Tensor, Tensor]) -> None:
        """See :class:`BlockSamples`."""
        self._own.facts = replace(self._own.facts, input_norm=norms[0], post_norm=norms[1])

    def moments(self, stage: int, weight: Tensor, *, full: bool) -> InputMoments:
        """See :class:`BlockSamples`."""
        with self._parts.part("moments"):
            reference = self._cluster.put(weight) if self._exact is not None else None
            task = _Task(self._cluster, shard_moments, (self._facts(), stage, weight.shape[1], full, reference))
            ahead = partial(self._send_ahead, stage, weight, reference)
            found = self._in_order(task, range(len(self._learning)), ahead)
            total: InputMoments = self._cluster.get(next(found))
            for part in found:
                total.merge(self._cluster.look(part))
            return total.belonging_to(weight if self._exact is not None else None)

    def advance(self, stage: int, linear: QuantizedLinear) -> None:
        """See :class:`BlockSamples`."""
        with self._parts.part("forward"):
            with computing(self._own.facts.compute):
                weight = self._cluster.put(decoded(linear))
            self._own.begin(stage, weight)
            self._own.advance(stage)
            if stage == _LAST:  # the exact ones, which were begun before, come while these are computed
                if self._exact is not None:
                    self._exact.come_home()
                self._own.come_home()

    def advance_exact(self, stage: int, weight: Tensor) -> None:
        """See :class:`BlockSamples`."""
        if self._exact is not None:
            with self._parts.part("forward"):
                self._exact.advance(stage)

    def held_out(
        self, stage: int, weight: Tensor, candidates: Sequence[Callable[[slice], Tensor]], factors: Tensor | None
    ) -> list[HeldOut]:
        """See :class:`BlockSamples`."""
        with self._parts.part("check"):
            fixed = (self._facts(), stage, self._cluster.put(weight), self._cluster.put(list(candidates)), factors)
            task = _Task(self._cluster, shard_energies, fixed)
            by_shard = [self._cluster.get(one) for one in self._in_order(task, range(len(self._learning), self._count))]
            # Of each shard: by rows of the weight, by sample. All samples of the first rows come first.
            by_rows = zip(*by_shard, strict=True)
            return relative_errors(([e for part in rows for e in part] for rows in by_rows), len(candidates))

    def _facts(self) -> Any:
        return self._cluster.put((self._own.facts, None if self._exact is None else self._exact.facts))

    def _send_ahead(self, stage: int, weight: Tensor, reference: Any) -> None:
        """Full precision's samples do not wait for a solution: workers have them to send on while one is found."""
        if self._exact is None or (self._ends and stage == _LAST):
            return
        with computing(self._own.facts.compute):
            rounded = prepared(weight)
        self._exact.begin(stage, reference if rounded is weight else self._cluster.put(rounded))

    def _in_order(self, task: _Task, numbers: range, then: Callable[[], None] | None = None) -> Iterator[Any]:
        """References to what ``task`` gives for each of these shards, in order, with only so many on their way.

        ``then`` is called when the last of them is.
        """
        window = sum(self._cluster.at_a_time(torch.get_num_threads()).values()) + _AHEAD
        started: list[Any] = []
        for number in numbers:
            own = self._own.state(number)
            exact = None if self._exact is None else self._exact.state(number)
            started.append(task.start(own, exact, number))
            if len(started) == window and number != numbers[-1]:
                yield started.pop(0)
        if then is not None:
            then()
        yield from started


@dataclass(frozen=True)
class _Task:
    """A function of a shard in both streams, and its other arguments."""

    cluster: Cluster
    function: Callable[..., Any]
    fixed: tuple[Any, ...]

    def start(self, own: tuple[Any, Any], exact: tuple[Any, Any] | None, place: int) -> Any:
        """A reference to what it gives."""
        states = (*own, *(exact if exact is not None else (None, None)))
        return self.cluster.start(self.function, *self.fixed, *states, place=place)
