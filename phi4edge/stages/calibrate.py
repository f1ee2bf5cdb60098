"""Calibrate: what several runs share, measured on the full-precision model.

Tokenizes the corpus and sends it through the model block by block, keeping the mean square of every linear's
inputs: the imatrix, as llama.cpp's own tool measures it. It goes to ``RUN/calibration``, a run directory of its own,
so that `quantize` into the same RUN takes the same corpus. What the model wrote for itself lies there as self.jsonl.
"""

from __future__ import annotations

__all__ = ["calibrate", "corpus_of_run", "plan"]

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from phi4edge.calibration.blockpass import BlockPass, Stores
from phi4edge.calibration.budget import MemoryPlan, plan_memory
from phi4edge.calibration.corpus import Corpus
from phi4edge.calibration.statistics import InputMoments
from phi4edge.checkpoint.reader import CheckpointReader, open_checkpoint
from phi4edge.core.atomic import write_bytes, write_json
from phi4edge.core.events import SILENT, Progress
from phi4edge.core.hashing import sha256_json
from phi4edge.core.memory import give_large_arrays_back, peak_rss_bytes
from phi4edge.core.recipe import CorpusRecipe, Recipe
from phi4edge.core.workdir import CALIBRATION, Workdir
from phi4edge.model.block import LINEARS, load_block
from phi4edge.model.rope import rotary_table
from phi4edge.stages.inputs import check_tokenizer, hash_checkpoint, note_location, open_inputs
from phi4edge.stages.run_reader import IMATRIX, MANIFEST, read_json
from phi4edge.stages.selftext import SelfText, load_corpus_of

TOKENS, SELF_TEXT = "tokens.safetensors", "self.jsonl"


def corpus_of_run(run: Path) -> CorpusRecipe | None:
    """The corpus that ``calibrate`` prepared in ``run``, or None where it did not."""
    manifest = run / CALIBRATION / MANIFEST
    return CorpusRecipe(**read_json(manifest)["data"]["recipe"]) if manifest.is_file() else None


def calibrate(
    model: str | Path,
    recipe: CorpusRecipe,
    out: Path,
    *,
    restart: bool = False,
    ram_budget: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Tokenize the corpus and measure the imatrix of ``model`` into ``out/calibration``; returns its manifest.

    Raises:
        InputError: the model or the corpus is not usable.
        ResumeError: begun with other inputs.
    """
    folder = out / CALIBRATION
    checkpoint, corpus, own, memory = _prepare(model, recipe, ram_budget, folder, progress)
    assert corpus is not None
    hashes = hash_checkpoint(checkpoint.index, folder)
    inputs = {"kind": "calibrate", "recipe": asdict(recipe), **open_inputs(recipe, corpus.sha256, hashes)}
    with Workdir.open(folder, inputs, restart=restart) as work:
        note_location(checkpoint.index, folder, hashes)
        if (folder / MANIFEST).is_file() and (folder / IMATRIX).is_file():
            return read_json(folder / MANIFEST)
        started = time.monotonic()
        write_bytes(folder / TOKENS, save({"tokens": corpus.tokens.to(torch.int32)}))
        with torch.inference_mode():
            imatrix = _measure(checkpoint, corpus.tokens, memory, folder, progress)
        write_bytes(folder / IMATRIX, save(imatrix))
        files = [TOKENS, IMATRIX]
        if own is not None:
            write_bytes(folder / SELF_TEXT, own.path.read_bytes())
            files.append(SELF_TEXT)
        work.commit({"performance": {"seconds": time.monotonic() - started}}, files)
        manifest = {
            "schema": "phi4edge/calibrate/1",
            "ok": True,
            "data": {
                "model": checkpoint.index.name,
                "recipe": asdict(recipe),
                "key": sha256_json(inputs),
                "tokens": recipe.tokens,
                "corpus_sha256": corpus.sha256,
                "domains": corpus.domain_counts(),
                **({"self": own.as_dict()} if own is not None else {}),
                "imatrix": {name: float(values.mean()) for name, values in imatrix.items()},
                "peak_rss_bytes": peak_rss_bytes(),
                "seconds": time.monotonic() - started,
            },
        }
        write_json(folder / MANIFEST, manifest)
        return manifest


def plan(model: str | Path, recipe: CorpusRecipe, *, ram_budget: int | None = None) -> dict[str, Any]:
    """The same checks as :func:`calibrate`, and what it would do; writes nothing and reads no weight."""
    checkpoint, corpus, _, memory = _prepare(model, recipe, ram_budget)
    return {
        "model": checkpoint.index.name,
        "recipe": asdict(recipe),
        "tokens": recipe.tokens,
        "corpus_sha256": None if corpus is None else corpus.sha256,  # None: the model writes it first
        "memory": asdict(memory),
    }


def _prepare(
    model: str | Path,
    recipe: CorpusRecipe,
    ram_budget: int | None,
    run: Path | None = None,
    progress: Progress = SILENT,
) -> tuple[CheckpointReader, Corpus | None, SelfText | None, MemoryPlan]:
    """Everything that can be refused is refused here, before the first weight is read."""
    checkpoint = open_checkpoint(model)
    tokenizer = check_tokenizer(checkpoint.index)
    memory = plan_memory(checkpoint.config, Recipe(method="rtn", corpus=recipe, guard=False), ram_budget)
    if ram_budget is not None:
        give_large_arrays_back()
    corpus, own = load_corpus_of(checkpoint, tokenizer, recipe, run, ram_budget=ram_budget, progress=progress)
    return checkpoint, corpus, own, memory


def _measure(
    checkpoint: CheckpointReader, tokens: Tensor, memory: MemoryPlan, folder: Path, progress: Progress
) -> dict[str, Tensor]:
    """``<linear>.imatrix`` [in_features] float32 for every linear: means of squared inputs, full precision."""
    config = checkpoint.config
    samples, length = tokens.shape
    stores = Stores.create(config, samples, length, folder / "hidden" if memory.spill else None)
    rotary = rotary_table(config.rope, length)
    stores.fill(checkpoint, tokens)
    imatrix: dict[str, Tensor] = {}
    progress.start("calibrate", config.num_layers, "block")
    for layer in range(config.num_layers):
        block = load_block(checkpoint, layer)
        passing = BlockPass(block.input_norm, block.post_norm, config, rotary, stores)
        for stage, (name, weight) in enumerate(
            zip(LINEARS, (block.qkv, block.o, block.gate_up, block.down), strict=True)
        ):
            progress.status(f"block {layer} {name}")
            moments = InputMoments(weight.shape[1], full=False)
            for _, x in passing.inputs(stage):
                moments.add(x)
            imatrix[f"model.layers.{layer}.{name}.imatrix"] = moments.result().mean_square
            passing.advance(stage, weight)
        progress.advance()
    progress.finish()
    return imatrix


def read_imatrix(path: Path) -> dict[str, Tensor]:
    """The imatrix file of a run or a calibration: linear name to mean squared inputs."""
    return {name.removesuffix(".imatrix"): values for name, values in load_file(path).items()}
