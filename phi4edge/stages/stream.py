"""The calibration samples between two blocks: on disk after every committed block, recomputed if that is lost.

Where the recipe aims at full precision there are two streams: what the quantized blocks make of the samples, and what
the full-precision ones make of them.
"""

from __future__ import annotations

__all__ = ["CalibrationStream", "side_by_side"]

from collections.abc import Iterator, Sequence

from torch import Tensor

from phi4edge.calibration.blockpass import BlockPass, Stores
from phi4edge.calibration.store import ActivationStore
from phi4edge.core.events import Progress
from phi4edge.core.hashing import sha256_file
from phi4edge.core.workdir import Workdir
from phi4edge.model.block import Block, forward_block, load_block
from phi4edge.model.rope import rotary_table
from phi4edge.model.source import Overlay
from phi4edge.stages.job import Job
from phi4edge.stages.run_reader import read_block, read_norms

HIDDEN, EXACT = "hidden", "exact"  # the two streams by their names in the journal


def side_by_side(
    arriving: Iterator[tuple[int, Tensor]], exact: Iterator[tuple[int, Tensor]] | None
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Samples of both streams together: (sample, own, full-precision or None where there is no such stream)."""
    for sample, x in arriving:
        yield sample, x, next(exact)[1] if exact is not None else None


class CalibrationStream:
    """The calibration samples on their way through the blocks."""

    def __init__(self, job: Job, work: Workdir, done: int, progress: Progress) -> None:
        """Stand before block ``done``: from the file that was kept, or through the finished blocks once more."""
        assert job.corpus is not None
        config, tokens = job.checkpoint.config, job.corpus.tokens
        samples, length = tokens.shape
        folder = work.path / "hidden"
        scratch = folder if job.memory.spill else None
        self.stores = Stores.create(config, samples, length, scratch)
        self._exact = Stores.create(config, samples, length, scratch) if job.recipe.full_precision_targets > 0 else None
        self._shape, self._scratch = (samples, length, config.hidden_size), scratch
        self.kept = samples - job.recipe.held_out  # the samples that Hessians are made of come first
        self._config, self._device = config, job.device
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
            block = load_block(Overlay(job.source, changed), layer)
            passing = self._pass(block, stores)
            weights = (
                (block.qkv, block.o, block.gate_up, block.down)
                if kind == EXACT
                else (linear.dequantize() for linear in read_block(work.path, layer, job.scheme_of))
            )
            for stage, weight in enumerate(weights):
                for _ in passing.advance(stage, weight):
                    pass

    def block_pass(self, block: Block) -> BlockPass:
        """The pass through ``block``."""
        return self._pass(block, self.stores)

    def exact_pass(self, block: Block) -> BlockPass | None:
        """The pass of the full-precision stream, or None where the recipe does not ask for one."""
        return self._pass(block, self._exact) if self._exact is not None else None

    def _pass(self, block: Block, stores: Stores) -> BlockPass:
        return BlockPass(block.input_norm, block.post_norm, self._config, self._rotary, stores, self._device)

    def aims(self, block: Block, inputs: ActivationStore, strength: float) -> ActivationStore:
        """What ``block`` should put out for the quantized model's ``inputs``; the other stream stands at its outputs.

        ``strength`` is how far that is what full precision puts out of its own inputs, and not of these.
        """
        assert self._exact is not None
        aims = self._like_hidden("aims")
        rotary = rotary_table(self._config.rope, self._shape[1])
        for i in range(self._shape[0]):
            own = forward_block(block, inputs.read(i, i + 1), rotary, self._config)
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

    def send_again(self, block: Block, inputs: ActivationStore, weights: Sequence[Tensor]) -> None:
        """Send the quantized model's samples through ``block`` with other ``weights``, from its ``inputs`` on."""
        for i in range(self._shape[0]):
            self.stores.hidden.write(i, inputs.read(i, i + 1))
        passing = self.block_pass(block)
        for stage, weight in enumerate(weights):
            for _ in passing.advance(stage, weight):
                pass

    def save(self, layer: int) -> dict[str, dict[str, str]]:
        """Keep the residual streams that go into block ``layer``; what the journal says of each."""
        kept = {}
        for kind, stores in ((HIDDEN, self.stores), (EXACT, self._exact)):
            if stores is not None:
                path = self._folder / f"{layer:05d}.{kind}.bin"
                stores.hidden.save(path)
                kept[kind] = {"file": f"hidden/{path.name}", "sha256": sha256_file(path)}
        return kept

    def forget(self, layer: int) -> None:
        """Drop residual streams that no resume needs any more."""
        for path in self._folder.glob("*.bin"):
            if int(path.name.split(".")[0]) <= layer:
                path.unlink()
