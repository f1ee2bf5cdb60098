"""Curvature: how errors at the outputs of every linear act together on KLD, from one pass through the unrounded model.

Measured before the first block is solved, on the first of the calibration samples that Hessians are made of; what is
found, and what it is good for, say :mod:`phi4edge.distillation.fisher` and :mod:`phi4edge.solvers._coupled`.

    RUN/curvature/     a run directory of its own, a step a block, from the last back; gone when the run is whole
"""

from __future__ import annotations

__all__ = ["CURVATURE", "Curvatures", "forget_curvature", "measure_curvature"]

import shutil
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from phi4edge.core.events import Progress
from phi4edge.core.workdir import Workdir
from phi4edge.distillation.block import Observer
from phi4edge.distillation.fisher import OutputMoments, RowCurvature, row_groups
from phi4edge.model.block import LINEARS
from phi4edge.stages.backward import BackwardPass
from phi4edge.stages.job import Job
from phi4edge.stages.tuning_state import total_cost

CURVATURE = "curvature"
_DAMP_PERCENT = 0.01  # of the mean of diag F: a row that has no say would else be bent to make good all others


class Curvatures:
    """What was measured, a linear at a time."""

    def __init__(self, folder: Path, strength: float) -> None:
        self._folder, self._strength = folder, strength

    def groups(self, linear: str, rows: int, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
        """The coupled rows of ``linear``, and their F; see :func:`phi4edge.solvers._coupled.solve_coupled`."""
        layer = int(linear.split(".")[2])
        with safe_open(self._folder / f"{layer:05d}.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys() if key.startswith(f"{linear}.")}  # noqa: SIM118
        found = RowCurvature.from_tensors(linear, tensors)
        return [
            (group, found.group(i, self._strength, _DAMP_PERCENT, device)) for i, group in enumerate(row_groups(rows))
        ]


def measure_curvature(job: Job, run: Path, key: str, progress: Progress) -> tuple[Curvatures, dict[str, float]]:
    """Measure, or take up what was measured; also what it cost over all processes.

    Raises:
        ResumeError: another process works here.
    """
    assert job.corpus is not None
    samples = min(job.recipe.curvature_samples, job.recipe.kept)
    inputs = {"kind": CURVATURE, "run": key, "samples": samples}
    with Workdir.open(run / CURVATURE, inputs) as work:
        pass_ = _CurvaturePass(job, work, job.corpus.tokens[:samples], progress)
        if not pass_.finished:
            pass_.run()
        costs = total_cost([record["performance"] for record in work.records])
    return Curvatures(run / CURVATURE, job.recipe.output_curvature), costs


def forget_curvature(run: Path) -> None:
    """The run is whole: nothing asks for it any more."""
    shutil.rmtree(run / CURVATURE, ignore_errors=True)


class _CurvaturePass(BackwardPass):
    kind = CURVATURE

    def _observer(self, layer: int, found: dict[str, Tensor]) -> Observer:
        shapes = self._config.linear_shapes
        self._layer, self._moments = layer, [OutputMoments(shapes[name][0]) for name in LINEARS]

        def observe(index: int, inputs: Tensor, gradient: Tensor) -> None:
            self._moments[index].add(gradient)

        return observe

    def _end_block(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, moments in zip(LINEARS, self._moments, strict=True):
            linear = f"model.layers.{self._layer}.{name}"
            found |= moments.result().to_tensors(linear)
        return found
