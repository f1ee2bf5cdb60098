"""The calibration samples between two blocks: on disk after every committed block, recomputed if that is lost.

Where the recipe aims at full precision there are two streams: what the quantized blocks make of the samples, and what
the full-precision ones make of them.
"""

from __future__ import annotations

__all__ = ["CalibrationStream"]

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from phi4edge.calibration.blockpass import BlockPass, Stores
from phi4edge.calibration.store import ActivationStore
from phi4edge.calibration.streams import Streams
from phi4edge.core.events import Progress
from phi4edge.core.parts import PartTimes
from phi4edge.core.workdir import Workdir
from phi4edge.distillation.block import run_block
from phi4edge.model.block import LINEARS, Block, linear_name, load_norms
from phi4edge.model.compute import computing, decoded, prepared
from phi4edge.model.rope import rotary_table
from phi4edge.model.source import Overlay
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.stages.cluster import Cluster
from phi4edge.stages.job import Job
from phi4edge.stages.ray_samples import RaySamples
from phi4edge.stages.run_reader import read_block, read_norms
from phi4edge.stages.samples import BlockSamples, LocalSamples
from phi4edge.stages.shard import BlockFacts

HIDDEN, EXACT = "hidden", "exact"  # the two streams by their names in the journal


class CalibrationStream:
    """The calibration samples on their way through the blocks."""

    def __init__(
        self,
        job: Job,
        work: Workdir,
        done: int,
        progress: Progress,
        parts: PartTimes,
        cluster: Cluster | None = None,
    ) -> None:
        """Stand before block ``done``: from the file that was kept, or through the finished blocks once more.

        ``cluster`` takes the samples through the blocks that are still to be solved.
        """
        assert job.corpus is not None
        config, tokens = job.checkpoint.config, job.corpus.tokens
        samples, length = tokens.shape
        folder = work.path / "hidden"
        scratch = folder if job.memory.spill else None
        self.stores = Stores.create(config, samples, length, scratch)
        self._exact = Stores.create(config, samples, length, scratch) if job.recipe.full_precision_targets > 0 else None
        self._shape, self._scratch = (samples, length, config.hidden_size), scratch
        self.kept = samples - job.recipe.held_out  # the samples that Hessians are made of come first
        self._config, self._device, self._parts = config, job.device, parts
        self._compute, self._cluster = job.recipe.compute, cluster
        self._rotary = rotary_table(config.rope, length, job.device)
        self._folder = folder
        folder.mkdir(exist_ok=True)
        for partial in folder.glob("*.partial"):
            partial.unlink()
        self._restore(job, work, done, progress, HIDDEN, self.stores)
        if self._exact is not None:
            self._restore(job, work, done, progress, EXACT, self._exact)

    def _restore(self, job: Job, work: Workdir, done: int, progress: Progress, kind: str, stores: Stores) -> None:
        assert job.corpus is not None
        record = work.records[done - 1].get(kind) if done else None
        if record and stores.hidden.load(work.path / record["file"], record["sha256"]):
            return
        stores.fill(job.source, job.corpus.tokens)
        for layer in range(done):  # the residual stream was lost: send it through the finished blocks again
            progress.status(f"recomputing {kind} states, block {layer}")
            changed = read_norms(work.path, layer) if kind == HIDDEN else {}
            passing = self._pass(load_norms(Overlay(job.source, changed), layer), stores)
            if kind == EXACT:
                weights = (job.source.tensor(f"{linear_name(layer, stage)}.weight") for stage in range(len(LINEARS)))
            else:
                weights = (linear.dequantize() for linear in read_block(work.path, layer, job.scheme_of))
            with computing(self._compute):
                for stage, weight in enumerate(weights):
                    passing.advance(stage, weight)

    def before(self, norms: tuple[Tensor, Tensor], *, ends: bool) -> BlockSamples:
        """The samples before a block with these norms; ``ends``: nobody asks for its outputs."""
        if self._cluster is not None:
            facts = BlockFacts(*norms, self._config, self._rotary, self._compute)
            beside = self._exact.hidden if self._exact is not None else None
            return RaySamples(self._cluster, facts, self.stores.hidden, beside, self.kept, self._parts, ends=ends)
        own = self._pass(norms, self.stores)
        exact = replace(own, stores=self._exact) if self._exact is not None else None
        return LocalSamples(Streams(own, exact), self.kept, self._shape[0], self._parts, self._compute)

    def _pass(self, norms: tuple[Tensor, Tensor], stores: Stores) -> BlockPass:
        return BlockPass(*norms, self._config, self._rotary, stores, self._device, self.kept)

    def aims(self, block: Block, inputs: ActivationStore, strength: float) -> ActivationStore:
        """What ``block`` should put out for the quantized model's ``inputs``; the other stream stands at its outputs.

        ``strength`` is how far that is what full precision puts out of its own inputs, and not of these.
        """
        assert self._exact is not None
        aims, gains = self._like_hidden("aims"), (block.input_norm, block.post_norm)
        rotary = rotary_table(self._config.rope, self._shape[1])
        with computing(self._compute):
            weights = [prepared(weight) for weight in (block.qkv, block.o, block.gate_up, block.down)]
            for i in range(self._shape[0]):
                own = run_block(inputs.read(i, i + 1), weights, gains, rotary, self._config)
                aims.write(i, own.lerp_(self._exact.hidden.read(i, i + 1), strength))
        return aims

    def _like_hidden(self, name: str) -> ActivationStore:
        return ActivationStore(*self._shape, self._scratch / f"{name}.scratch" if self._scratch else None)

    def copy_of_inputs(self) -> ActivationStore:
        """The quantized model's residual stream as it stands, in RAM or in a file like the rest."""
        kept = self._like_hidden("before")
        for i in range(self._shape[0]):
            kept.write(i, self.stores.hidden.read(i, i + 1))
        return kept

    def send_again(
        self, norms: tuple[Tensor, Tensor], inputs: ActivationStore, linears: Sequence[QuantizedLinear]
    ) -> None:
        """Send the quantized model's samples through a block once more, from its ``inputs`` on."""
        for i in range(self._shape[0]):
            self.stores.hidden.write(i, inputs.read(i, i + 1))
        passing = self._pass(norms, self.stores)
        with computing(self._compute):
            for stage, linear in enumerate(linears):
                passing.advance(stage, decoded(linear))

    def save(self, layer: int) -> dict[str, dict[str, str]]:
        """Keep the residual streams that go into block ``layer``; what the journal says of each."""
        kept = {}
        for kind, stores in ((HIDDEN, self.stores), (EXACT, self._exact)):
            if stores is not None:
                path = self._folder / f"{layer:05d}.{kind}.bin"
                kept[kind] = {"file": f"hidden/{path.name}", "sha256": stores.hidden.save(path)}
        return kept

    def forget(self, layer: int) -> None:
        """Drop residual streams that no resume needs any more."""
        for path in self._folder.glob("*.bin"):
            if int(path.name.split(".")[0]) <= layer:
                path.unlink()
