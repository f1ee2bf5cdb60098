"""A quantization job: everything that can be refused is refused before the first weight is read."""

from __future__ import annotations

__all__ = ["Job", "prepare"]

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from phi4edge.calibration.budget import MemoryPlan, plan_memory
from phi4edge.calibration.corpus import Corpus
from phi4edge.checkpoint.config import ModelConfig
from phi4edge.checkpoint.reader import CheckpointReader
from phi4edge.core.errors import InputError, MissingToolError, UsageError
from phi4edge.core.events import SILENT, Progress
from phi4edge.core.jsonfile import read_object
from phi4edge.core.memory import give_large_arrays_back
from phi4edge.core.recipe import BFLOAT16, FLOAT32, Recipe
from phi4edge.core.registry import load as load_plugin
from phi4edge.core.workdir import RUN_FILE
from phi4edge.model.compute import choose_compute, has_bfloat16_units
from phi4edge.model.source import WeightSource
from phi4edge.quant.scheme import Scheme, parse_scheme
from phi4edge.stages.inputs import check_tokenizer
from phi4edge.stages.room import check_room
from phi4edge.stages.selftext import SelfText, load_corpus_of
from phi4edge.transforms.rotation import foldable, rotated
from phi4edge.writers._imatrix import Imatrix, read_imatrix


@dataclass(frozen=True)
class Job:
    """One quantization: what goes in, checked."""

    checkpoint: CheckpointReader
    source: WeightSource  # the checkpoint's weights as they are rounded
    recipe: Recipe
    scheme: Scheme
    corpus: Corpus | None
    memory: MemoryPlan
    device: str
    types: Mapping[str, Scheme] = field(default_factory=dict)  # linears on another scheme
    imatrix: Imatrix | None = None  # given in place of calibration text
    self_text: SelfText | None = None  # what the model wrote, where the corpus asks for it
    by_rows: bool = False  # weights are rounded as their rows are read

    def scheme_of(self, linear: str) -> Scheme:
        """The scheme of one linear."""
        return self.types.get(linear, self.scheme)


def prepare(
    checkpoint: CheckpointReader,
    recipe: Recipe,
    ram_budget: int | None,
    device: str,
    run: Path | None = None,
    progress: Progress = SILENT,
    imatrix: Path | None = None,
    *,
    spread: bool = False,
) -> Job:
    """Check model, scheme, tokenizer, device, RAM, disk, corpus and imatrix.

    ``run`` is where the work will be done; without it, a corpus that the model must write first is not made.
    ``spread``: weights go to other machines.

    Raises:
        InputError, UsageError: the model, the scheme or the corpus is not usable, or the model cannot be rotated.
        TargetError: ``ram_budget`` cannot be kept, or there is no room for the run.
        MissingToolError: no such device.
    """
    config, scheme = checkpoint.config, parse_scheme(recipe.scheme)
    load_plugin("phi4edge.solvers", recipe.method)
    for name, (_, columns) in config.linear_shapes.items():
        scheme.groups(columns, f"model.layers.0.{name}")
    if device == "cuda" and not torch.cuda.is_available():
        raise MissingToolError("no CUDA device, or torch was installed without CUDA", "use --device cpu")
    begun = _compute_of_run(run) if recipe.compute == "auto" else None
    compute = choose_compute(begun or recipe.compute, device)
    recipe = replace(recipe, rotation=foldable(recipe.rotation, config), compute=compute)
    source = rotated(checkpoint, recipe.rotation, recipe.rotation_seed)
    tokenizer = check_tokenizer(checkpoint.index)
    by_rows = recipe.by_rows and device == "cpu" and not spread
    memory = plan_memory(config, recipe, ram_budget, by_rows)
    if ram_budget is not None:
        give_large_arrays_back()
    types = _types(config, recipe)
    if run is not None:
        check_room(run, config, recipe, memory, lambda linear: types.get(linear, scheme))
    corpus, own = None, None
    if recipe.corpus is not None:
        held_out = recipe.held_out
        corpus, own = load_corpus_of(
            checkpoint, tokenizer, recipe.corpus, run, held_out=held_out, ram_budget=ram_budget, progress=progress
        )
    given = None
    if imatrix is not None:
        given = read_imatrix(imatrix)
        shapes = {name.removesuffix(".weight"): shape for name, shape in config.tensor_shapes().items()}
        linears = {name: shape for name, shape in shapes.items() if ".layers." in name and len(shape) == 2}
        given.check(linears, str(imatrix))
    return Job(checkpoint, source, recipe, scheme, corpus, memory, device, types, given, own, by_rows)


def _compute_of_run(run: Path | None) -> str | None:
    """What a run that is gone on with was begun with, where this machine can do it too."""
    begun = run / RUN_FILE if run is not None else None
    if begun is None or not begun.is_file():
        return None
    try:
        found = read_object(begun)["inputs"]["recipe"]["compute"]
    except (InputError, KeyError, TypeError):
        return None  # damaged, or of another kind: opening the run directory refuses it, unless it is begun anew
    return found if found == FLOAT32 or (found == BFLOAT16 and has_bfloat16_units()) else None


def _types(config: ModelConfig, recipe: Recipe) -> dict[str, Scheme]:
    """The schemes that the recipe names for single linears, each held against its shape."""
    shapes = config.tensor_shapes()
    found = {}
    for name, scheme_name in recipe.types:
        shape = shapes.get(f"{name}.weight")
        if shape is None or ".layers." not in name or len(shape) != 2:
            raise UsageError(f"types: {name!r} is not a linear of this model")
        found[name] = parse_scheme(scheme_name)
        found[name].groups(shape[1], name)
    return found
