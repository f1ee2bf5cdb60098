"""Curvature: how errors at the outputs of every linear act together on KLD, from one pass through the unrounded model.

Of the linears that write into the residual stream: there every position's error goes the same way, as F takes it. At
qkv_proj and gate_up_proj the way depends on the position (by rotary angles and by gates), and a mean over positions
predicted a third less KLD where it was not less at all (benchmarks/quality).

Measured before the first block is solved, on the first of the calibration samples that Hessians are made of; what is
found, and what it is good for, say :mod:`phi4edge.distillation.fisher` and :mod:`phi4edge.solvers._coupled`.

    RUN/curvature/     a run directory of its own, a step a block, from the last back; gone when the run is whole

It takes 8 · hidden² bytes a block there: 8.4 GB for Phi-4.
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
from phi4edge.distillation.fisher import OutputMoments
from phi4edge.model.block import LINEARS
from phi4edge.stages.backward import BackwardPass
from phi4edge.stages.job import Job
from phi4edge.stages.tuning_state import total_cost

CURVATURE = "curvature"
_WRITERS = (1, 3)  # among LINEARS: o_proj and down_proj, whose outputs are the residual stream
_DAMP_PERCENT = 0.01


class Curvatures:
    """What was measured, a linear at a time."""

    def __init__(self, folder: Path, strength: float) -> None:
        self._folder, self._strength = folder, strength

    def of(self, linear: str, device: str = "cpu") -> Tensor | None:
        """F [out_features, out_features] of ``linear``, all beside its diagonal times the strength, or None: no writer.

        A hundredth of the mean of its diagonal is added to it: a row that has no say would else be bent to make good
        what all others do.
        """
        with safe_open(self._folder / f"{int(linear.split('.')[2]):05d}.safetensors", "pt") as file:
            if linear not in file.keys():  # noqa: SIM118  not a mapping
                return None
            F: Tensor = file.get_tensor(linear).to(device)
        diagonal = F.diagonal().clone()
        F.mul_(self._strength).diagonal().copy_(diagonal + _DAMP_PERCENT * diagonal.mean())
        return F


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
        rows = self._config.hidden_size
        self._moments = {index: (f"model.layers.{layer}.{LINEARS[index]}", OutputMoments(rows)) for index in _WRITERS}

        def observe(index: int, inputs: Tensor, gradient: Tensor) -> None:
            if index in self._moments:
                self._moments[index][1].add(gradient)

        return observe

    def _end_block(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        return found | {name: moments.result() for name, moments in self._moments.values()}
