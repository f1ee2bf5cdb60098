"""The calibration samples between two blocks: on disk after every committed block, recomputed if that is lost."""

from __future__ import annotations

__all__ = ["CalibrationStream"]

from phi4edge.calibration.blockpass import BlockPass, Stores
from phi4edge.core.events import Progress
from phi4edge.core.hashing import sha256_file
from phi4edge.core.workdir import Workdir
from phi4edge.model.block import Block, load_block
from phi4edge.model.rope import rotary_table
from phi4edge.stages.job import Job
from phi4edge.stages.run_reader import read_block


class CalibrationStream:
    """The calibration samples on their way through the blocks."""

    def __init__(self, job: Job, work: Workdir, done: int, progress: Progress) -> None:
        """Stand before block ``done``: from the file that was kept, or through the finished blocks once more."""
        assert job.corpus is not None
        config, tokens = job.checkpoint.config, job.corpus.tokens
        samples, length = tokens.shape
        folder = work.path / "hidden"
        self.stores = Stores.create(config, samples, length, folder if job.memory.spill else None)
        self.kept = samples - job.recipe.held_out  # the samples that Hessians are made of come first
        self._config, self._device = config, job.device
        self._rotary = rotary_table(config.rope, length, job.device)
        self._folder = folder
        folder.mkdir(exist_ok=True)
        for partial in folder.glob("*.partial"):
            partial.unlink()
        record = work.records[done - 1].get("hidden") if done else None
        if record and self.stores.hidden.load(work.path / record["file"], record["sha256"]):
            return
        self.stores.fill(job.checkpoint, tokens)
        for layer in range(done):  # the residual stream was lost: send it through the finished blocks again
            progress.status(f"recomputing hidden states, block {layer}")
            self._replay(job, work, layer)

    def block_pass(self, block: Block) -> BlockPass:
        """The pass through ``block``."""
        return BlockPass(block.input_norm, block.post_norm, self._config, self._rotary, self.stores, self._device)

    def _replay(self, job: Job, work: Workdir, layer: int) -> None:
        passing = self.block_pass(load_block(job.checkpoint, layer))
        for stage, linear in enumerate(read_block(work.path, layer, job.scheme)):
            for _ in passing.advance(stage, linear.dequantize()):
                pass

    def save(self, layer: int) -> dict[str, str]:
        """Keep the residual stream that goes into block ``layer``."""
        path = self._folder / f"{layer:05d}.bin"
        self.stores.hidden.save(path)
        return {"file": f"hidden/{path.name}", "sha256": sha256_file(path)}

    def forget(self, layer: int) -> None:
        """Drop residual streams that no resume needs any more."""
        for path in self._folder.glob("*.bin"):
            if int(path.stem) <= layer:
                path.unlink()
