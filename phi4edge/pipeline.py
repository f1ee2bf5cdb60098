"""The whole flow on one screen: checkpoint → plan → codes → artifacts → measurements → report.

Each stage takes what the one before returns. A run directory makes quantization resumable; what follows it is quick,
and done again from the codes, bit for bit the same.

    OUT/runs/<scheme>/           one run directory a scheme
    OUT/artifacts/               one artifact a scheme and format
    OUT/results/                 a drift document an artifact, its answers, a quantize document a run,
                                 a bench document a target
    OUT/report/                  report.html, report.md, report.json
"""

from __future__ import annotations

__all__ = ["Order", "Outcome", "plan", "run"]

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from phi4edge.checkpoint.hub import resolve_model
from phi4edge.checkpoint.index import open_index
from phi4edge.core import registry
from phi4edge.core.atomic import write_json
from phi4edge.core.errors import Phi4EdgeError, TargetError, UsageError
from phi4edge.core.events import SILENT, Progress
from phi4edge.core.recipe import Recipe
from phi4edge.measurement.drift_run import measure_domains, measure_greedy
from phi4edge.measurement.gates import Gate, Limits, gate_error
from phi4edge.measurement.reference import ReferenceStore
from phi4edge.measurement.references import resolve_domains
from phi4edge.measurement.tasks.run import TaskRequest, check_tasks, measure_tasks, task_gates
from phi4edge.quant.scheme import parse_scheme
from phi4edge.report.build import build_report, write_report
from phi4edge.report.card import fill_card
from phi4edge.runtimes._api import SpeedRequest
from phi4edge.stages.cluster import Cluster
from phi4edge.stages.export import export
from phi4edge.stages.quantize import QuantizeSummary, quantize
from phi4edge.stages.speeds import SpeedOrder, check_places, measure_speeds
from phi4edge.stages.sweep import Wanted, solve_all
from phi4edge.stages.verify import verify
from phi4edge.targets.catalog import open_catalog
from phi4edge.targets.choice import Wish, choose, process_bytes, refusal
from phi4edge.targets.fit import LAYOUTS, ROUNDED_TABLES, Request, memory_needed
from phi4edge.targets.profile import Profile
from phi4edge.writers._api import Artifact, WriteOptions


@dataclass(frozen=True)
class Order:
    """What the whole pipeline was asked for."""

    model: str
    targets: tuple[str, ...]
    out: Path
    recipe: Recipe  # its scheme is used where ``scheme_given``, otherwise each target gets the one that suits it
    scheme_given: bool = False
    wish: Wish = field(default_factory=Wish)
    texts: tuple[str, ...] = ("builtin:eval",)  # as ``drift --text``: a path, or NAME=PATH for each domain
    drift_context: int = 512
    chunks: int | None = None
    store_top: int | None = None  # as ``drift --store-top``
    greedy: str | None = None  # as ``drift --greedy``
    greedy_tokens: int = 64
    tasks: TaskRequest | None = None
    limits: Limits = field(default_factory=Limits)  # each stronger than a target's of the same name
    speed: SpeedRequest = field(default_factory=SpeedRequest)
    places: Mapping[str, str] = field(default_factory=dict)  # target → where its device is, as --address
    target_folders: tuple[Path, ...] = ()  # as --target-path
    ram_budget: int | None = None
    device: str = "cpu"
    restart: bool = False


@dataclass(frozen=True)
class Outcome:
    """Where everything lies, and what failed: a device, or else a gate."""

    data: dict[str, Any]
    failure: Phi4EdgeError | None


@dataclass(frozen=True)
class _Planned:
    target: str
    scheme: str
    format: str
    gates: Limits  # of the target's file, those that the order has none of its own for


def run(order: Order, progress: Progress = SILENT, cluster: Cluster | None = None) -> Outcome:
    """From a checkpoint to a report, for every target of ``order``; ``cluster`` solves what is quantized.

    Raises:
        InputError, TargetError, ResumeError: as the stages say; finished work is kept.
    """
    planned = _plan(order)
    artifacts = _make(order, planned, progress, cluster)
    stores = resolve_domains(
        order.model,
        texts=order.texts,
        context=order.drift_context,
        chunks=order.chunks,
        top=order.store_top,
        progress=progress,
    )
    gates: dict[Path, list[Gate]] = {}
    for made, artifact in artifacts.items():
        limits = [order.limits, *(plan.gates for plan in planned if (plan.scheme, plan.format) == made)]
        gates[artifact.path] = _measure_drift(order, artifact, stores, limits, progress)
        if artifact.path.is_dir():
            fill_card(artifact.path, [order.out / "results"])
    paths = {plan.target: artifacts[plan.scheme, plan.format].path for plan in planned}
    timed = SpeedOrder(paths, open_catalog(order.target_folders), order.speed, order.places)
    measured, lost = measure_speeds(timed, order.out / "results", anew=order.restart, progress=progress)
    report = build_report([order.out / "results"])
    files = write_report(report, order.out / "report")
    data = {
        "model": order.model,
        "targets": [
            {
                "target": plan.target,
                "scheme": plan.scheme,
                "format": plan.format,
                "artifact": str(artifacts[plan.scheme, plan.format].path),
                "speed": measured[plan.target],
            }
            for plan in planned
        ],
        "gates": [{"artifact": str(path)} | gate.as_dict() for path, found in gates.items() for gate in found],
        "report": {kind: str(path) for kind, path in files.items()},
        "summary": report.data["summary"],
    }
    return Outcome(data, lost or gate_error([gate for found in gates.values() for gate in found]))


def plan(order: Order) -> list[dict[str, str]]:
    """What :func:`run` would make for each target; the same checks, nothing written."""
    return [{"target": p.target, "scheme": p.scheme, "format": p.format} for p in _plan(order)]


def _plan(order: Order) -> list[_Planned]:
    """Scheme and format for every target, before any work; the catalog's rule, or the recipe's scheme if it fits."""
    index = open_index(resolve_model(order.model))
    catalog, writable = open_catalog(order.target_folders), frozenset(registry.names("phi4edge.writers"))
    planned = []
    for target in dict.fromkeys(order.targets):
        profile = catalog.profile(target)
        if order.scheme_given:
            scheme, layout = _fixed(order, profile, index.name, writable)
        else:
            request = choose(index.name, index.config, profile, order.wish, writable).fit.request
            scheme, layout = request.scheme.name, request.format
        planned.append(_Planned(target, scheme, layout, _target_limits(order.limits, profile)))
    _check_tasks(order, planned)
    check_places(catalog, [plan.target for plan in planned], order.places)
    return planned


def _target_limits(asked: Limits, profile: Profile) -> Limits:
    own = {name: limit for name, limit in profile.gates.given().items() if getattr(asked, name) is None}
    return Limits(**own, undecided=asked.undecided, target=profile.id)


def _check_tasks(order: Order, planned: Sequence[_Planned]) -> None:
    """Refuse questions that could not be asked, and limits that nothing would be held against."""
    if order.tasks is not None:
        check_tasks(order.tasks, str(resolve_model(order.model)))
        return
    for limits in (order.limits, *(plan.gates for plan in planned)):
        if limits.asks_for_tasks:
            raise UsageError(
                f"{limits.target or 'the recipe'} limits what tasks may lose, and no task is asked",
                "name them: tasks and task_data in the recipe's [drift], or --tasks and --task-data",
            )


def _fixed(order: Order, profile: Profile, name: str, writable: frozenset[str]) -> tuple[str, str]:
    """The recipe's scheme and the format that it takes on a target."""
    config = open_index(resolve_model(order.model)).config
    scheme = parse_scheme(order.recipe.scheme)
    context = order.wish.context or min(profile.default_context, config.context_length)
    for option in profile.runtimes:
        for layout in option.formats:
            if layout not in writable or layout not in LAYOUTS:
                continue
            kv = order.wish.kv or option.kv_types[0]
            request = Request(scheme, context, layout, kv, order.wish.head, order.wish.embedding)
            fit = memory_needed(config, request, usable_bytes=profile.usable_bytes, process_bytes=process_bytes(option))
            if not fit.fits:
                raise refusal(name, config, profile, option, fit)
            return scheme.name, layout
    raise TargetError(f"{profile.id}: phi4edge makes nothing yet that it runs", "see phi4edge plan")


def _make(
    order: Order, planned: list[_Planned], progress: Progress, cluster: Cluster | None
) -> dict[tuple[str, str], Artifact]:
    """One run a scheme, one artifact a scheme and format, each read back and compared with its run."""
    made: dict[tuple[str, str], Artifact] = {}
    options = WriteOptions(force=True, progress=progress)
    tables = replace(options, head=order.wish.head, embedding=order.wish.embedding, context=order.wish.context)
    schemes = list(dict.fromkeys(plan.scheme for plan in planned))
    for scheme, summary in zip(schemes, _solve(order, schemes, progress, cluster), strict=True):
        folder = summary.path
        document = {**summary.manifest, "data": {**summary.manifest["data"], **summary.performance}}
        write_json(order.out / "results" / f"{scheme}.quantize.json", document)
        for layout in dict.fromkeys(plan.format for plan in planned if plan.scheme == scheme):
            name = f"{summary.manifest['data']['model']}-{scheme}-{order.recipe.method}"
            path = order.out / "artifacts" / (f"{name}.gguf" if layout == "gguf" else f"{name}-{layout}")
            made[scheme, layout] = export(folder, layout, path, tables if layout in ROUNDED_TABLES else options)
            verify(path, folder, progress=progress)
    return made


def _solve(
    order: Order, schemes: Sequence[str], progress: Progress, cluster: Cluster | None
) -> Iterator[QuantizeSummary]:
    """One run a scheme: one after the other, or each as a task of the cluster where there are several."""
    runs = [Wanted(replace(order.recipe, scheme=scheme), order.out / "runs" / scheme) for scheme in schemes]
    if cluster is not None and len(runs) > 1:
        cluster.check_job(order.device, order.recipe.compute)
        yield from solve_all(
            order.model,
            runs,
            cluster,
            order.out,
            restart=order.restart,
            ram_budget=order.ram_budget,
            progress=progress,
        )
        return
    for run in runs:
        yield quantize(
            order.model,
            run.recipe,
            run.out,
            restart=order.restart,
            ram_budget=order.ram_budget,
            device=order.device,
            progress=progress,
            cluster=cluster,
        )


def _document(order: Order, artifact: Artifact, kind: str, data: Mapping[str, Any]) -> None:
    path = order.out / "results" / f"{artifact.path.name}.{kind}.json"
    write_json(path, {"schema": f"phi4edge/{kind}/1", "ok": True, "data": data})


def _measure_drift(
    order: Order,
    artifact: Artifact,
    stores: Mapping[str, ReferenceStore],
    limits: Sequence[Limits],
    progress: Progress,
) -> list[Gate]:
    """Drift on the texts, then what else was asked for; written before the long questions and again behind them."""
    path = artifact.path
    data = measure_domains(path, stores, chunks=order.chunks, limits=limits, progress=progress)
    if order.greedy is not None:
        data["greedy"] = measure_greedy(
            path, stores, order.model, order.greedy, count=order.greedy_tokens, chunks=order.chunks, progress=progress
        )
    _document(order, artifact, "drift", data)
    if order.tasks is not None:
        answers = order.out / "results" / f"{path.name}.answers.jsonl"
        data["tasks"] = measure_tasks(path, order.model, order.tasks, answers=answers, progress=progress)
        gates = [gate for each in limits for gate in task_gates(data["tasks"]["results"], each)]
        data["gates"] += [gate.as_dict() for gate in gates]
        _document(order, artifact, "drift", data)
    return [Gate(**gate) for gate in data["gates"]]
