"""The four linears of a block, one after the other, each solved on what the quantized ones before it feed it.

For each: read it, gather its inputs' moments over the calibration samples (but for those kept aside), scale its input
channels if asked, shift its target towards full precision if asked, solve, refine if asked, compare with rounding to
nearest on the samples kept aside, and send everything on through the weights that were chosen. One linear is in RAM at
a time; the system reads the next one into its page cache meanwhile.
"""

from __future__ import annotations

__all__ = ["BlockSolver", "SolvedBlock", "committed_behind", "rows_in_order"]

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor

from phi4edge.calibration.judging import judged_rows
from phi4edge.calibration.statistics import LayerStats
from phi4edge.checkpoint.rows_ahead import RowsAhead
from phi4edge.core.events import Event, Progress
from phi4edge.core.memory import format_bytes, release_memory, rss_bytes
from phi4edge.core.parts import PartTimes
from phi4edge.core.recipe import BFLOAT16
from phi4edge.core.registry import load as load_plugin
from phi4edge.distillation.rounding import resting_places
from phi4edge.model.block import LINEARS, linear_name, load_norms
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.parallel import RunPieces, read_pieces, run_parallel
from phi4edge.solvers import gptq, rtn
from phi4edge.solvers._api import Problem, Solution, SolverOptions
from phi4edge.solvers._coupled import solve_coupled
from phi4edge.solvers._refine import refine
from phi4edge.solvers._targets import shifted_target
from phi4edge.stages.curvature import Curvatures
from phi4edge.stages.guard import HeldOut
from phi4edge.stages.job import Job
from phi4edge.stages.rounding import round_block
from phi4edge.stages.samples import BlockSamples
from phi4edge.stages.scaling import scale_inputs
from phi4edge.stages.stream import CalibrationStream


@dataclass
class SolvedBlock:
    """What a block leaves behind."""

    tensors: dict[str, Tensor] = field(default_factory=dict)  # to store; a later entry replaces an earlier one
    records: list[dict[str, Any]] = field(default_factory=list)  # one a linear
    events: list[Event] = field(default_factory=list)
    rounding: dict[str, Any] | None = None  # what learned rounding did


@dataclass
class _Task:
    """One linear and what is known of its inputs; lets go of the largest arrays once they are used up."""

    problem: Problem
    stage: int
    stats: LayerStats | None  # None: no calibration text
    samples: BlockSamples | None  # standing before it
    factors: Tensor | None  # [in_features]: what the weight's columns were multiplied by, and inputs divided


class BlockSolver:
    """Solves block after block with the same recipe."""

    def __init__(
        self,
        job: Job,
        stream: CalibrationStream | None,
        progress: Progress,
        parts: PartTimes,
        curvatures: Curvatures | None = None,
        run: RunPieces = run_parallel,
        rows: RowsAhead | None = None,
    ) -> None:
        """``rows``: of all weights, as :func:`rows_in_order` names them, where the job rounds by rows."""
        assert (rows is not None) == job.by_rows
        self._rows = rows
        self._rooms: tuple[dict[str, rtn.Room], ...] = ({}, {})  # of the block in work, and of the one on its way
        self._curvatures, self._parts = curvatures, parts
        self._job, self._recipe, self._stream, self._progress = job, job.recipe, stream, progress
        self._solver: ModuleType = load_plugin("phi4edge.solvers", job.recipe.method)
        self._whole = bool(self._solver.NEEDS_HESSIAN) or job.recipe.whole_hessian or job.recipe.scales_inputs
        self._options = SolverOptions(
            self._recipe.damp_percent,
            self._recipe.act_order,
            refit=self._recipe.refit,
            sweeps=self._recipe.sweeps,
            group_aware=self._recipe.group_aware,
            on_units=self._recipe.compute == BFLOAT16,
            run=run,
        )

    def solve(self, layer: int, committed: Future[None] | None = None) -> SolvedBlock:
        """The codes of block ``layer``, as tensors to store; the streams are left at its outputs.

        ``committed`` is the block before on its way to the disk. It is waited for behind the first linear, before the
        samples that are stored with it change; where there are none, behind the third. So never much more than a
        block's work can be lost.
        """
        if self._rows is not None:
            return self._round_block(self._rows, layer, committed)
        out, stream = SolvedBlock(), self._stream
        ends, samples = self._is_last(layer, len(LINEARS) - 1), None
        if stream is not None:
            samples = stream.before(load_norms(self._job.source, layer), ends=ends)
        linear: QuantizedLinear | None = None
        inputs = stream.copy_of_inputs() if stream is not None and self._recipe.rounding is not None else None
        solved: list[QuantizedLinear] = []
        self._places: dict[str, Tensor] = {}
        for stage in range(len(LINEARS)):
            name = linear_name(layer, stage)
            self._progress.status(f"block {layer} {LINEARS[stage]} · RSS {format_bytes(rss_bytes())}")
            weight = self._read(layer, stage)
            stats = self._moments(stage, weight, samples)
            given, factors, scaling = weight, None, {}
            if self._recipe.scales_inputs and stats is not None and samples is not None:
                scaled = scale_inputs(self._job, layer, stage, given, stats, samples, linear)
                given, stats, factors = scaled.weight, scaled.stats, scaled.factors
                scaling = {"awq": scaled.record}
                out.tensors |= scaled.tensors
                del scaled  # it holds H too
            hessian, mean_square = (
                (stats.hessian, stats.mean_square) if stats is not None else (None, self._given(name))
            )
            problem = Problem(name, given, hessian, self._job.scheme_of(name), mean_square)
            task = _Task(problem, stage, stats, samples, factors)
            del problem, stats, hessian, given
            with self._parts.part("solve"):
                linear, record, events = self._choose(task)
            out.tensors |= linear.to("cpu").to_tensors()
            if inputs is not None:
                solved.append(linear)
            if mean_square is not None:
                out.tensors[f"{name}.imatrix"] = mean_square.cpu()
            out.records.append(record | scaling)
            out.events += events
            del task  # before the samples go on: the largest arrays of a run
            if samples is not None and not self._is_last(layer, stage):
                samples.advance_exact(stage, weight)
                del weight
                samples.advance(stage, linear)
                release_memory()  # what a linear leaves in the C library's arenas would add to the next one's peak
            if not self._recipe.scales_inputs:
                linear = None  # a byte a code; what is stored of it is packed
            self._reached(stage, committed)
        if inputs is not None and stream is not None:
            self._progress.status(f"block {layer} rounding · RSS {format_bytes(rss_bytes())}")
            with self._parts.part("round"):
                rounded, events = round_block(self._job, layer, solved, self._places, stream, inputs)
            inputs.close()
            for learned in rounded.block.linears:
                out.tensors |= learned.to_tensors()
            out.rounding = rounded.record
            out.events += events
        return out

    def _is_last(self, layer: int, stage: int) -> bool:
        """Whether nobody asks for what comes out of this linear."""
        ends = (layer, stage) == (self._job.checkpoint.config.num_layers - 1, len(LINEARS) - 1)
        return ends and self._recipe.rounding is None

    def _reached(self, stage: int, committed: Future[None] | None) -> None:
        self._progress.advance()
        if stage == committed_behind(by_rows=self._rows is not None) and committed is not None:
            with self._parts.part("write"):
                committed.result()

    def _round_block(self, rows: RowsAhead, layer: int, committed: Future[None] | None) -> SolvedBlock:
        """The same, rounded to nearest as it is read."""
        out = SolvedBlock()
        for place, name in enumerate(_as_stored(self._job, layer)):
            self._progress.status(f"block {layer} {name.split('.', 3)[3]} · RSS {format_bytes(rss_bytes())}")
            self._round(name, rows, self._rooms[layer % 2].setdefault(name.split(".", 3)[3], rtn.Room()), out)
            self._reached(place, committed)
        order = [linear_name(layer, stage) for stage in range(len(LINEARS))]
        out.records.sort(key=lambda record: order.index(record["name"]))
        return out

    def _round(self, name: str, rows: RowsAhead, room: rtn.Room, out: SolvedBlock) -> None:
        """Round a linear to nearest as it is read, a few rows at a time."""
        mean_square, opened = self._given(name), partial(rows.piece, f"{name}.weight")
        shape = self._job.checkpoint.config.linears[name]
        with self._parts.part("solve"):
            found = rtn.solve_rows(name, shape, opened, self._job.scheme_of(name), mean_square, self._options, room)
        out.tensors |= found.linear.to_tensors()
        if mean_square is not None:
            out.tensors[f"{name}.imatrix"] = mean_square
        out.records.append(self._record(name, found))

    def _read(self, layer: int, stage: int) -> Tensor:
        """One linear's weights, float32, on the device; the one after it is asked for."""
        with self._parts.part("read"):
            name = f"{linear_name(layer, stage)}.weight"
            weight = self._job.source.tensor(name).to(self._job.device)
            self._job.checkpoint.done_with(name)
            self._ask_for(layer, stage + 1)
        return weight

    def _ask_for(self, layer: int, stage: int) -> None:
        """Have the system read a linear meanwhile; the stage after a block's last is the next block's first."""
        following = layer * len(LINEARS) + stage
        if following < self._job.checkpoint.config.num_layers * len(LINEARS):
            self._job.checkpoint.will_need(f"{linear_name(*divmod(following, len(LINEARS)))}.weight")

    def _given(self, name: str) -> Tensor | None:
        """Mean squared inputs of a linear from the imatrix that the user gave, if there is one."""
        return None if self._job.imatrix is None else self._job.imatrix.values[name].to(self._job.device)

    def _moments(self, stage: int, weight: Tensor, samples: BlockSamples | None) -> LayerStats | None:
        if samples is None:
            return None
        moments = samples.moments(stage, weight, full=self._whole)
        with self._parts.part("moments"):
            return moments.result(self._recipe.sink_share, self._recipe.shrinkage)

    def _choose(self, task: _Task) -> tuple[QuantizedLinear, dict[str, Any], list[Event]]:
        """The solver's codes, or RTN's where these lose to them on samples that no Hessian has seen."""
        linear, record, events, problem = self._chosen(task)
        if self._recipe.rounding is not None:
            assert problem.hessian is not None
            self._places[problem.name] = resting_places(problem.weight, problem.hessian, linear).cpu()
        return linear, record, events

    def _chosen(self, task: _Task) -> tuple[QuantizedLinear, dict[str, Any], list[Event], Problem]:
        """The same, and the problem that it was chosen for."""
        recipe, problem, events = self._recipe, task.problem, list[Event]()
        aims = task.stats is not None and task.stats.hessian is not None and task.stats.shift is not None
        if self._solver.NEEDS_HESSIAN or aims:
            problem = self._factored(task)
        if aims and not self._solver.NEEDS_HESSIAN and problem.factor is not None:
            events += problem.factor.events  # else they are the solution's
        aimed = self._aim(problem, task) if aims else problem
        coupling = self._coupling(problem)
        solution = self._solve(aimed) if coupling is None else solve_coupled(aimed, coupling, self._options)
        record = self._record(problem.name, solution, task.stats)
        if solution.loss_unrefined is not None:
            record["loss_unrefined"] = solution.loss_unrefined
        if aimed is not problem:
            shift = (aimed.weight - problem.weight).norm() / problem.weight.norm().clamp_min(1e-30)
            record["target_shift"] = float(shift)
        events += solution.events
        plain = not self._solver.NEEDS_HESSIAN and not recipe.whole_hessian
        if plain or task.samples is None or not recipe.guard:
            return solution.linear, record, events, aimed
        if aimed is problem and coupling is None:  # nothing is solved again: the factor goes before outputs come
            aimed = problem = task.problem = replace(problem, factor=None)
        judged = judged_rows(len(problem.weight))
        nearest = self._nearest(problem, judged.step)
        ours, theirs = self._held_out(task, judged.step, [solution.linear.every(judged.step), nearest])
        record |= {"heldout_rows": len(judged), "heldout_error": asdict(ours), "heldout_error_rtn": asdict(theirs)}
        if not ours.loses_to(theirs):
            return solution.linear, record, events, aimed
        if aimed is not problem or coupling is not None:  # that may be what lost: the solver alone comes before RTN
            plain_solution = self._solve(problem)
            (again,) = self._held_out(task, judged.step, [plain_solution.linear.every(judged.step)])
            if not again.loses_to(theirs):
                who, taken = ("the shifted target", "unshifted") if coupling is None else ("coupled rows", "uncoupled")
                events.append(_fallback(f"fallback_to_{taken}", problem.name, who, taken, ours, theirs))
                record |= {"loss": plain_solution.loss, "heldout_error": asdict(again), "target_shift": 0.0}
                return plain_solution.linear, record, events, problem
        who = f"rtn and {'refinement' if recipe.refined else 'shift'}" if recipe.method == "rtn" else recipe.method
        events.append(_fallback("fallback_to_rtn", problem.name, who, "rtn's", ours, theirs))
        return nearest if judged.step == 1 else self._nearest(problem), record | {"method": "rtn"}, events, problem

    def _factored(self, task: _Task) -> Problem:
        """The task's problem with the factor of its H, which takes H's memory where nothing asks for H behind it."""
        made = gptq.factor(task.problem, self._options, in_place=self._recipe.hessian_used_up)
        task.problem = replace(task.problem, factor=made)
        if self._recipe.hessian_used_up:
            task.problem = replace(task.problem, hessian=None, mean_square=made.diagonal)
            task.stats = None if task.stats is None else replace(task.stats, hessian=None)
        return task.problem

    def _nearest(self, problem: Problem, step: int = 1) -> QuantizedLinear:
        """Every ``step``-th row of the problem's weight, rounded to nearest."""
        # Of H it takes the diagonal alone; what it loses under all of H would be a product as large as GPTQ's own.
        weight, known = problem.weight[::step], problem.importance
        return rtn.solve(replace(problem, weight=weight, hessian=None, mean_square=known), self._options).linear

    def _record(self, name: str, solution: Solution, stats: LayerStats | None = None) -> dict[str, Any]:
        return {
            "name": name,
            "method": self._recipe.method,
            "loss": solution.loss,
            "damp_percent": solution.damp_percent,
            "tokens": stats.tokens if stats is not None else 0,
        }

    def _solve(self, problem: Problem) -> Solution:
        """The solver's solution, refined if asked, of rows that know nothing of each other."""
        return refine(problem, self._solver.solve(problem, self._options), self._options)

    def _coupling(self, problem: Problem) -> Tensor | None:
        """F by which the linear's rows answer for each other's errors, where the recipe asks for it."""
        return None if self._curvatures is None else self._curvatures.of(problem.name, self._job.device)

    def _held_out(self, task: _Task, step: int, candidates: Sequence[QuantizedLinear]) -> list[HeldOut]:
        """Errors of candidates for every ``step``-th row of the weight, on the samples kept aside.

        They are against what full precision has there, if that is aimed at.
        """
        assert task.samples is not None
        values = [_values_of(linear) for linear in candidates]
        return task.samples.held_out(task.stage, task.problem.weight[::step], values, task.factors)

    def _aim(self, problem: Problem, task: _Task) -> Problem:
        """The problem with its target shifted towards full precision; the task's shift is used up."""
        assert task.stats is not None
        assert task.stats.shift is not None
        assert problem.factor is not None
        shift, task.stats = task.stats.shift, replace(task.stats, shift=None)
        target = shifted_target(
            problem.weight,
            problem.factor,
            shift.values,
            self._recipe.full_precision_targets,
            multiplied=shift.product,
            on_units=self._options.on_units,
        )
        return replace(problem, weight=target)


def rows_in_order(job: Job, first: int) -> list[tuple[str, slice]]:
    """What a job that rounds by rows reads from block ``first`` on: weights' names and rows, in that order."""
    config = job.checkpoint.config
    names = [name for layer in range(first, config.num_layers) for name in _as_stored(job, layer)]
    return [(f"{name}.weight", rows) for name in names for rows in read_pieces(*config.linears[name])]


def _as_stored(job: Job, layer: int) -> list[str]:
    """A block's linears in the order in which the checkpoint has them: nothing hangs on that of their use."""
    refs = {
        name: job.checkpoint.place(f"{name}.weight")
        for name in (linear_name(layer, stage) for stage in range(len(LINEARS)))
    }
    return sorted(refs, key=lambda name: (str(refs[name].path), refs[name].offset))


def committed_behind(*, by_rows: bool) -> int:
    """The linear of a block behind which the block before has to be on the disk.

    ``by_rows``: nobody waits for samples, and most of a block takes little longer than its file.
    """
    return 2 if by_rows else 0


def _values_of(linear: QuantizedLinear) -> Callable[[slice], Tensor]:
    """Rows of what a quantized linear stands for."""
    return lambda rows: linear.rows(rows.start, rows.stop).dequantize()


def _fallback(kind: str, name: str, who: str, taken: str, ours: HeldOut, theirs: HeldOut) -> Event:
    where = "first positions" if ours.first > theirs.first else "positions after the first"
    detail = f"{who} loses to rtn on held-out {where}; {taken} weights are taken"
    values = {"first": ours.first, "first_rtn": theirs.first, "rest": ours.rest, "rest_rtn": theirs.rest}
    return Event(kind, name, detail, {key: float(value) for key, value in values.items()})
