"""``phi4edge run RECIPE.toml | MODEL --target ID…``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phi4edge.cli.drift_recipe import DRIFT_KEYS, read_drift
from phi4edge.cli.executor_options import EXECUTORS, executor_options, refuse_lone_address, workers
from phi4edge.cli.gate_options import GATES, gate_line, gate_options
from phi4edge.cli.options import common, dry_run_option
from phi4edge.cli.progress import progress_for
from phi4edge.cli.render import emit, emit_failure
from phi4edge.cli.target_options import target_path_option
from phi4edge.cli.task_options import task_options, task_request
from phi4edge.core.errors import InputError, UsageError
from phi4edge.core.memory import parse_bytes
from phi4edge.core.recipe import EFFORTS
from phi4edge.core.registry import names
from phi4edge.core.settings import Table, read_toml

_MACHINE = ("ram_budget", "device", "compute", "executor", "ray_address")
_SECTIONS = {
    "quantize": (
        "method",
        "effort",
        "scheme",
        "damp_percent",
        "act_order",
        "group_aware",
        "sink_share",
        "shrinkage",
        "guard",
        "full_precision_targets",
        "refit",
        "sweeps",
        "awq",
        "rotation",
        "rotation_seed",
        "output_curvature",
        "curvature_samples",
        "round_passes",
        "round_rate",
        "tune_passes",
        "tune_rate",
        "tune_batch",
        "tune_codes",
        *_MACHINE,
    ),
    "calibration": ("corpus", "samples", "sequence_length", "seed", "chat_template"),
    "export": ("context", "head", "embedding"),
    "drift": DRIFT_KEYS,
    "bench": ("prompt_tokens", "gen_tokens", "repetitions"),
}


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The recipe's sections; every key is known, paths are relative to the recipe."""
    whole = read_toml(path)
    top = Table(whole, ("model", "targets", *_SECTIONS), str(path))
    found: dict[str, dict[str, Any]] = {"": {"model": top.string("model")}}
    if "targets" in top:
        found[""]["targets"] = top.strings("targets")
    for section, keys in _SECTIONS.items():
        table = whole.get(section, {})
        if not isinstance(table, dict):
            raise InputError(f"{path}: {section}: expected a table, [{section}]")
        known = Table(table, keys, str(path), section)
        found[section] = read_drift(known, path.parent) if section == "drift" else dict(known.data)
    for section, key in (("", "model"), ("calibration", "corpus")):
        value = found[section].get(key)
        if isinstance(value, str) and (path.parent / value).exists():
            found[section][key] = str(path.parent / value)
    return found


def _places(addresses: tuple[str, ...]) -> dict[str, str]:
    """``ID=PLACE`` of each --address."""
    found: dict[str, str] = {}
    for text in addresses:
        target, equals, place = text.partition("=")
        if not (target and equals and place):
            raise UsageError(f"--address {text}: is not ID=PLACE", "for example --address my-phone=R5CT20ABCDE")
        if target in found:
            raise UsageError(f"--address names {target} twice: {found[target]} and {place}")
        found[target] = place
    return found


@click.command("run")
@click.argument("what", metavar="RECIPE.toml|MODEL")
@click.option("--target", "targets", multiple=True, metavar="ID", help="A target; may be repeated.  [default: local]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("phi4edge-out"),
    show_default=True,
    help="Folder for runs, artifacts, results and the report.",
)
@click.option("--method", type=click.Choice(names("phi4edge.solvers")), help="[default: gptq]")
@click.option("--effort", type=click.Choice(list(EFFORTS)), help="[default: default]")
@click.option("--scheme", help="One scheme for all targets.  [default: what suits each]")
@click.option("--corpus", metavar="PATH|NAME|MIX", help="Calibration text, as quantize takes it.  [default: builtin]")
@click.option("--samples", type=int, help="Calibration samples.  [default: 128]")
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="[NAME=]PATH",
    help="Evaluation text; several are domains.  [default: builtin:eval]",
)
@click.option("--chunks", type=int, help="Chunks of it.  [default: all of a file, 32 of a corpus]")
@click.option(
    "--address",
    "addresses",
    multiple=True,
    metavar="ID=PLACE",
    help="Where the device of target ID is: a host for ssh, a serial for adb; stronger than [connection] in its file.",
)
@click.option("--ram-budget", metavar="SIZE", envvar="PHI4EDGE_RAM_BUDGET", help="Peak RSS to keep to, e.g. 8GiB.")
@executor_options
@click.option("--resume/--restart", default=True, help="Go on with a run, or begin it anew.  [default: resume]")
@target_path_option
@gate_options
@task_options
@dry_run_option
@common
def command(
    what: str,
    targets: tuple[str, ...],
    out: Path,
    method: str | None,
    effort: str | None,
    scheme: str | None,
    corpus: str | None,
    samples: int | None,
    texts: tuple[str, ...],
    chunks: int | None,
    addresses: tuple[str, ...],
    ram_budget: str | None,
    executor: str | None,
    ray_address: str | None,
    target_path: tuple[Path, ...],
    resume: bool,
    dry_run: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
    **asked: Any,
) -> None:
    """The whole pipeline: plan, quantize, export, verify, drift, bench and report, into folder --out.

    Takes a MODEL (folder or hub id) with --target, or a RECIPE.toml; a flag given here is stronger than the recipe.
    Each target gets the scheme and format that its profile calls for. A target's device is timed where its file's
    [connection] or --address says how it is reached: different machines at the same time, and one that fails or
    vanishes leaves the others alone (exit code 4 or 5, all else written; run again, only what is missing is measured).
    What is not measured is said to be so. [drift] of a recipe takes what `phi4edge drift` takes, tasks and domains too,
    by the same names with _ for -. Questions that were answered are not asked again when a run is started again.

    With --executor ray the runs of several schemes are independent tasks, each solved whole by one worker, which must
    see --out, MODEL and the corpus at the same paths; the samples of a single one are spread over all workers.

    Exit code 6 when a gate fails, with all results written. Gates come from the targets' files, the recipe, or the
    options here; of the same name the recipe's is stronger than a target's, and the option's than both. A gate fails
    where the limit is missed beyond the error of the value, 95 % one-sided; see --gate-undecided.
    """
    from phi4edge.core.recipe import CorpusRecipe, solving_recipe
    from phi4edge.measurement.gates import Limits
    from phi4edge.pipeline import Order, plan, run
    from phi4edge.runtimes._api import SpeedRequest
    from phi4edge.targets.choice import Wish

    settings: dict[str, dict[str, Any]] = {"": {"model": what}} | {section: {} for section in _SECTIONS}
    if what.endswith(".toml"):
        settings = _read(Path(what))
    asked |= {key: asked[key] or None for key in ("allow_code_execution", "shots_files")}  # absent: overrules nothing
    flags: dict[str, dict[str, Any]] = {
        "": {"targets": list(targets) or None},
        "quantize": {"method": method, "effort": effort, "scheme": scheme, "ram_budget": ram_budget}
        | {"executor": executor, "ray_address": ray_address},
        "calibration": {"corpus": corpus, "samples": samples},
        "drift": {"texts": texts or None, "chunks": chunks, **asked},
    }
    for section, values in flags.items():
        settings[section] |= {key: value for key, value in values.items() if value is not None}
    solving, drift = dict(settings["quantize"]), settings["drift"]
    tasks = dict.fromkeys(asked) | {"allow_code_execution": False, "shots_files": ()} | drift
    budget, device = solving.pop("ram_budget", None), solving.pop("device", "cpu")
    executor, ray_address = solving.pop("executor", "local"), solving.pop("ray_address", None)
    if executor not in EXECUTORS:
        raise UsageError(f"{what}: executor {executor!r} is not known", f"one of {', '.join(EXECUTORS)}")
    refuse_lone_address(executor)
    try:
        limits = Limits(**{key: drift.get(key) for key in GATES}, undecided=drift.get("gate_undecided", "fail"))
        calibrated = solving.get("method") != "rtn" or solving.get("awq") or settings["calibration"]
        order = Order(
            model=str(settings[""]["model"]),
            targets=tuple(settings[""].get("targets") or ("local",)),
            out=out,
            recipe=solving_recipe(solving, CorpusRecipe(**settings["calibration"]) if calibrated else None),
            scheme_given="scheme" in solving,
            wish=Wish(**settings["export"]),
            texts=drift.get("texts", ("builtin:eval",)),
            drift_context=drift.get("context", 512),
            chunks=drift.get("chunks"),
            store_top=drift.get("store_top"),
            greedy=drift.get("greedy"),
            greedy_tokens=drift.get("greedy_tokens", 64),
            tasks=task_request(tasks),
            limits=limits,
            speed=SpeedRequest(**settings["bench"]),
            places=_places(addresses),
            target_folders=target_path,
            ram_budget=parse_bytes(budget) if budget else None,
            device=device,
            restart=not resume,
        )
    except TypeError as error:
        raise UsageError(f"{what}: a value has the wrong type ({error})") from error
    if dry_run:
        planned = plan(order)
        shown = "\n".join(f"{row['target']}: {row['scheme']} in {row['format']}" for row in planned)
        emit("run", {"targets": planned}, f"{shown}\nnothing was written", as_json=as_json)
        return
    with workers(executor, ray_address) as cluster:
        outcome = run(order, progress_for(quiet), cluster)
    lines = [
        f"{row['target']}: {row['artifact']}"
        + ("" if row["speed"]["measured"] else f" (speed not measured: {row['speed']['reason']})")
        for row in outcome.data["targets"]
    ]
    lines += [f"{Path(row['artifact']).name}: {gate_line(row)}" for row in outcome.data["gates"]]
    shown = "\n".join([*lines, "", outcome.data["summary"], f"report: {outcome.data['report']['html']}"])
    if outcome.failure is not None:
        emit_failure("run", outcome.data, shown, outcome.failure, as_json=as_json)
    emit("run", outcome.data, shown, as_json=as_json)
