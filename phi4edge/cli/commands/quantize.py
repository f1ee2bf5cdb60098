"""``phi4edge quantize MODEL --out RUN``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from phi4edge.cli.executor_options import executor_options, refuse_lone_address, workers
from phi4edge.cli.options import common, corpus_options, dry_run_option
from phi4edge.cli.progress import progress_for
from phi4edge.cli.render import emit, time_text
from phi4edge.cli.solving_options import recipe_from_options, recipe_text, solving_options
from phi4edge.core.errors import UsageError
from phi4edge.core.hashing import sha256_file
from phi4edge.core.memory import format_bytes, parse_bytes
from phi4edge.core.recipe import CorpusRecipe


def _summary_text(data: dict[str, Any], out: str) -> str:
    lines = [
        f"{out}: {data['method']} {data['scheme']}, {len(data['linears'])} linears, "
        f"{100 * data['quantized_fraction']:.1f} % of the parameters",
        f"time {data['performance']['seconds']:.1f} s, peak RSS {format_bytes(data['performance']['peak_rss_bytes'])}",
    ]
    kinds: dict[str, int] = {}
    for event in data["events"]:
        kinds[event["kind"]] = kinds.get(event["kind"], 0) + 1
    if kinds:
        lines.append("events: " + ", ".join(f"{count} × {kind}" for kind, count in kinds.items()))
    return "\n".join(lines)


def _refuse_options(model: str) -> None:
    """Codes that are there already are not solved: whatever says how to solve was a mistake."""
    context = click.get_current_context()
    allowed = {"model", "out", "resume", "dry_run", "as_json", "verbose", "quiet"}
    given = [name for name in context.params if name not in allowed]
    asked = [name for name in given if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if asked:
        raise UsageError(
            f"{model} is quantized already and its codes are taken over as they are; "
            f"{', '.join('--' + name.replace('_', '-') for name in sorted(asked))} cannot change them",
            "leave that out, or give the full-precision model",
        )


@click.command("quantize")
@click.argument("model")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run directory to begin or to go on with.")
@solving_options
@corpus_options
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="llama.cpp's importance matrix (GGUF or .dat) in place of calibration text; with --method rtn.",
)
@click.option("--ram-budget", metavar="SIZE", envvar="PHI4EDGE_RAM_BUDGET", help="Peak RSS to keep to, e.g. 8GiB.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    envvar="PHI4EDGE_DEVICE",
    help="Where blocks are computed (cuda: not measured on hardware).",
)
@executor_options
@click.option(
    "--resume/--restart", default=True, help="Go on with a run begun before, or begin anew.  [default: resume]"
)
@dry_run_option
@common
def command(
    model: str,
    out: Path,
    corpus: str | None,
    samples: int | None,
    sequence_length: int | None,
    seed: int | None,
    chat_template: bool | None,
    imatrix: Path | None,
    ram_budget: str | None,
    device: str,
    executor: str | None,
    ray_address: str | None,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
    **options: Any,
) -> None:
    """Solve integer codes for every linear of MODEL (a folder or hub id), block by block, into run directory --out.

    Killed at any instant, the same command goes on from the last finished block and gives the same bytes. With
    --method rtn and no --corpus no data is needed.

    With --executor ray the calibration samples are spread over the workers of a cluster, and rows of linears are solved
    there; the codes are the same, and a lost worker's work is done again. --ram-budget is then that of this process:
    workers and Ray's object stores come on top.

    MODEL may also be a checkpoint that another tool quantized (GPTQ, AWQ, compressed-tensors): its codes are taken
    over as they are, to be exported to other formats.
    """
    from phi4edge.stages.adopt import adopt, declares_codes, plan_adoption
    from phi4edge.stages.calibrate import corpus_of_run
    from phi4edge.stages.quantize import plan, quantize

    executor = executor or "local"
    refuse_lone_address(executor)
    if declares_codes(model):
        _refuse_options(model)
        if dry_run:
            data = plan_adoption(model)
            text = (
                f"{data['linears']} linears of {data['scheme']} would be taken over from the {data['format']} "
                f"checkpoint, {data['codes_bytes'] / 2**20:.0f} MiB of codes; nothing was written"
            )
        else:
            taken = adopt(model, out, restart=not resume, progress=progress_for(quiet))
            data = {**taken.manifest["data"], "out": str(out), "performance": taken.performance}
            text = _summary_text(data, str(out))
        emit("quantize", data, text, as_json=as_json)
        return
    given = {"corpus": corpus, "samples": samples, "sequence_length": sequence_length, "seed": seed}
    given = {key: value for key, value in {**given, "chat_template": chat_template}.items() if value is not None}
    calibration: CorpusRecipe | None
    method, awq = options["method"], options["awq"]
    data_free = method == "rtn" and not awq
    if data_free and not given:
        calibration = None
    elif not given and (prepared := corpus_of_run(out)) is not None:
        calibration = prepared
    elif corpus == "none":
        if not data_free:
            asked = "--awq" if method == "rtn" else f"--method {method}"
            raise UsageError(f"{asked} needs calibration text", "use --method rtn, or name a --corpus")
        calibration = None
    else:
        calibration = CorpusRecipe(**given)  # type: ignore[arg-type]
    digest = sha256_file(imatrix) if imatrix is not None else None
    recipe = recipe_from_options({**options, "imatrix_sha256": digest}, calibration)
    budget = parse_bytes(ram_budget) if ram_budget else None
    if dry_run:
        data = plan(model, recipe, ram_budget=budget, device=device, imatrix=imatrix, out=out)
        with workers(executor, ray_address) as cluster:
            if cluster is not None:
                cluster.check_job(device, data["recipe"]["compute"])
        memory = data["memory"]
        text = (
            f"{recipe_text(recipe)}\n{data['linears']} linears in {data['blocks']} blocks, "
            f"{data['codes_bytes'] / 2**20:.0f} MiB of codes\nRAM: about {format_bytes(memory['expected'])} "
            f"(estimated), at least {format_bytes(memory['least'])}; activations "
            f"{'on disk' if memory['spill'] else 'in RAM'}\ntime: {time_text(data['time'])}; nothing was written"
        )
        emit("quantize", data, text, as_json=as_json)
        return
    with workers(executor, ray_address) as cluster:
        summary = quantize(
            model,
            recipe,
            out,
            restart=not resume,
            ram_budget=budget,
            device=device,
            progress=progress_for(quiet),
            imatrix=imatrix,
            cluster=cluster,
        )
    data = {**summary.manifest["data"], "out": str(out), "performance": summary.performance}
    emit("quantize", data, _summary_text(data, str(out)), as_json=as_json)
