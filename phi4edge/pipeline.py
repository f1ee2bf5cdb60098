"""The whole flow on one screen: checkpoint → plan → codes → artifacts → measurements → report.

Each stage takes what the one before returns. A run directory makes quantization resumable; what follows it is quick,
and done again from the codes, bit for bit the same.

    OUT/runs/<scheme>/           one run directory a scheme
    OUT/artifacts/               one artifact a scheme and format
    OUT/results/                 a drift and a bench document an artifact, a quantize document a run
    OUT/report/                  report.html, report.md, report.json
"""

from __future__ import annotations

__all__ = ["Order", "Outcome", "plan", "run"]

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from phi4edge.checkpoint.hub import resolve_model
from phi4edge.checkpoint.index import open_index
from phi4edge.core import registry
from phi4edge.core.atomic import write_json
from phi4edge.core.errors import GateError, TargetError
from phi4edge.core.events import SILENT, Progress
from phi4edge.core.recipe import Recipe
from phi4edge.measurement.artifact import default_runtime
from phi4edge.measurement.drift_run import measure_drift, resolve_reference
from phi4edge.measurement.gates import Gate, Limits, gate_error
from phi4edge.measurement.reference import ReferenceStore
from phi4edge.measurement.speed import measure_speed
from phi4edge.quant.scheme import parse_scheme
from phi4edge.report.build import build_report, write_report
from phi4edge.runtimes._api import SpeedRequest
from phi4edge.stages.export import export, verify
from phi4edge.stages.quantize import quantize
from phi4edge.targets.catalog import open_catalog
from phi4edge.targets.choice import Wish, choose, process_bytes, refusal
from phi4edge.targets.fit import Request, memory_needed
from phi4edge.targets.profile import LOCAL, Profile
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
    text: str = "builtin:eval"
    drift_context: int = 512
    chunks: int | None = None
    limits: Limits = field(default_factory=Limits)
    speed: SpeedRequest = field(default_factory=SpeedRequest)
    ram_budget: int | None = None
    device: str = "cpu"
    restart: bool = False


@dataclass(frozen=True)
class Outcome:
    """Where everything lies, and the first gate that failed."""

    data: dict[str, Any]
    failure: GateError | None


@dataclass(frozen=True)
class _Planned:
    target: str
    scheme: str
    format: str


def run(order: Order, progress: Progress = SILENT) -> Outcome:
    """From a checkpoint to a report, for every target of ``order``.

    Raises:
        InputError, TargetError, ResumeError: as the stages say; finished work is kept.
    """
    planned = _plan(order)
    artifacts = _make(order, planned, progress)
    store = resolve_reference(
        order.model, text=order.text, context=order.drift_context, chunks=order.chunks, progress=progress
    )
    failure = None
    for artifact in artifacts.values():
        failure = _measure_drift(order, artifact, store, progress) or failure
    measured = _measure_speed(order, planned, artifacts, progress)
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
        "report": {kind: str(path) for kind, path in files.items()},
        "summary": report.data["summary"],
    }
    return Outcome(data, failure)


def plan(order: Order) -> list[dict[str, str]]:
    """What :func:`run` would make for each target; the same checks, nothing written."""
    return [asdict(planned) for planned in _plan(order)]


def _plan(order: Order) -> list[_Planned]:
    """Scheme and format for every target, before any work; the catalog's rule, or the recipe's scheme if it fits."""
    index = open_index(resolve_model(order.model))
    catalog, writable = open_catalog(), frozenset(registry.names("phi4edge.writers"))
    planned = []
    for target in dict.fromkeys(order.targets):
        profile = catalog.profile(target)
        if order.scheme_given:
            planned.append(_fixed(order, profile, index.name, writable))
        else:
            request = choose(index.name, index.config, profile, order.wish, writable).fit.request
            planned.append(_Planned(target, request.scheme.name, request.format))
    return planned


def _fixed(order: Order, profile: Profile, name: str, writable: frozenset[str]) -> _Planned:
    config = open_index(resolve_model(order.model)).config
    scheme = parse_scheme(order.recipe.scheme)
    context = order.wish.context or min(profile.default_context, config.context_length)
    for option in profile.runtimes:
        for layout in option.formats:
            if layout not in writable:
                continue
            kv = order.wish.kv or option.kv_types[0]
            request = Request(scheme, context, layout, kv, order.wish.head, order.wish.embedding)
            fit = memory_needed(config, request, usable_bytes=profile.usable_bytes, process_bytes=process_bytes(option))
            if not fit.fits:
                raise refusal(name, config, profile, option, fit)
            return _Planned(profile.id, scheme.name, layout)
    raise TargetError(f"{profile.id}: phi4edge makes nothing yet that it runs", "see phi4edge plan")


def _make(order: Order, planned: list[_Planned], progress: Progress) -> dict[tuple[str, str], Artifact]:
    """One run a scheme, one artifact a scheme and format, each read back and compared with its run."""
    made: dict[tuple[str, str], Artifact] = {}
    wish = order.wish
    options = WriteOptions(wish.head, wish.embedding, context=wish.context, force=True, progress=progress)
    for scheme in dict.fromkeys(plan.scheme for plan in planned):
        folder = order.out / "runs" / scheme
        summary = quantize(
            order.model,
            replace(order.recipe, scheme=scheme),
            folder,
            restart=order.restart,
            ram_budget=order.ram_budget,
            device=order.device,
            progress=progress,
        )
        document = {**summary.manifest, "data": {**summary.manifest["data"], **summary.performance}}
        write_json(order.out / "results" / f"{scheme}.quantize.json", document)
        for layout in dict.fromkeys(plan.format for plan in planned if plan.scheme == scheme):
            name = f"{summary.manifest['data']['model']}-{scheme}-{order.recipe.method}"
            path = order.out / "artifacts" / (f"{name}.gguf" if layout == "gguf" else f"{name}-{layout}")
            made[scheme, layout] = export(folder, layout, path, options)
            verify(path, folder, progress=progress)
    return made


def _document(order: Order, artifact: Artifact, kind: str, data: Mapping[str, Any]) -> None:
    path = order.out / "results" / f"{artifact.path.name}.{kind}.json"
    write_json(path, {"schema": f"phi4edge/{kind}/1", "ok": True, "data": data})


def _measure_drift(order: Order, artifact: Artifact, store: ReferenceStore, progress: Progress) -> GateError | None:
    data = measure_drift(artifact.path, store, chunks=order.chunks, limits=order.limits, progress=progress)
    _document(order, artifact, "drift", data)
    return gate_error([Gate(**gate) for gate in data["gates"]])


def _measure_speed(
    order: Order, planned: list[_Planned], artifacts: dict[tuple[str, str], Artifact], progress: Progress
) -> dict[str, dict[str, Any]]:
    """Speed on this machine where it is a target; of every other target, why it was not measured."""
    measured: dict[str, dict[str, Any]] = {}
    for plan in planned:
        artifact = artifacts[plan.scheme, plan.format]
        if plan.target != LOCAL:
            reason = f"this version measures only the machine that it runs on, not {plan.target}"
            measured[plan.target] = {"measured": False, "reason": reason}
        elif default_runtime(artifact.path) == "torch_ref":
            measured[plan.target] = {"measured": False, "reason": f"no runtime here serves {plan.format}"}
        else:
            progress.note(f"measuring speed of {artifact.path.name}")
            data = measure_speed(artifact.path, target=plan.target, request=order.speed)
            _document(order, artifact, "bench", data)
            measured[plan.target] = {"measured": True, "metrics": data["metrics"]}
    return measured
