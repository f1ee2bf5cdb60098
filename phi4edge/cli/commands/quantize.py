"""``phi4edge quantize MODEL --out RUN``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phi4edge.cli.options import common, corpus_options, dry_run_option
from phi4edge.cli.progress import progress_for
from phi4edge.cli.render import emit
from phi4edge.core.errors import InputError, UsageError
from phi4edge.core.jsonfile import read_object
from phi4edge.core.memory import format_bytes, parse_bytes
from phi4edge.core.recipe import ROTATIONS, CorpusRecipe, MixRecipe, Recipe, TuningRecipe
from phi4edge.core.registry import names
from phi4edge.quant.scheme import parse_scheme, scheme_from_options

CANDIDATES = "q4_0,q4_1,q5_0,q5_1,q4_k,q5_k,q6_k,q8_0"


def recipe_text(recipe: Recipe) -> str:
    """The recipe in a line."""
    corpus = recipe.corpus
    text = "data-free" if corpus is None else f"{corpus.corpus}, {corpus.samples} × {corpus.sequence_length} tokens"
    scaled = " with awq scales" if recipe.awq else ""
    turned = "" if recipe.rotation == "none" else f", rotation {recipe.rotation}"
    return f"{recipe.method} {recipe.scheme}{scaled}{turned}, calibration: {text}"


Pairs = tuple[tuple[str, str], ...]


def read_types(path: Path) -> tuple[Pairs, Pairs]:
    """The linears' schemes and the tables' types of a mix, from a manifest or from JSON of the same shape.

    Raises:
        InputError: something else is in the file.
    """
    document = read_object(path, "give the manifest.json of a run with a mix")
    data = document.get("data", document)
    allocation = data.get("allocation") or data
    found: list[Pairs] = []
    for key in ("types", "tables"):
        table = allocation.get(key, {})
        if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
            raise InputError(f"{path}: {key} is not a table of names")
        found.append(tuple(table.items()))
    if not found[0]:
        raise InputError(f"{path}: no types in it", "give the manifest.json of a run with a mix")
    return found[0], found[1]


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


@click.command("quantize")
@click.argument("model")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run directory to begin or to go on with.")
@click.option(
    "--method",
    type=click.Choice(names("phi4edge.solvers")),
    default="gptq",
    show_default=True,
    envvar="PHI4EDGE_METHOD",
    help="gptq compensates rounding errors; rtn rounds to nearest on searched scales; awq is rtn with --awq.",
)
@click.option("--bits", type=int, help="4 or 8.  [default: 4]")
@click.option("--scheme", envvar="PHI4EDGE_SCHEME", help="w4g32, w4g128-asym, w8row, q4_0, q5_1, q8_0, q4_k, q6_k, …")
@click.option("--target-bpw", type=float, help="Choose a scheme for each tensor: bits a parameter of the whole file.")
@click.option("--target-size", metavar="SIZE", help="The same by the size of all tensors, e.g. 2.3GiB.")
@click.option(
    "--candidates", metavar="SCHEMES", help=f"Schemes to choose from then, with commas.  [default: {CANDIDATES}]"
)
@click.option(
    "--types",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A mix given back: the manifest of a run, or JSON with `types` and `tables`.",
)
@click.option("--group-size", type=int, help="Input channels that share a scale; -1: a whole row.  [default: 32]")
@click.option("--symmetric/--asymmetric", default=None, help="Grid with or without zero points.  [default: symmetric]")
@click.option("--act-order", is_flag=True, help="Most excited columns first; groups stay in place (static groups).")
@click.option("--group-aware", is_flag=True, help="Most excited groups first; scales searched as each is reached.")
@click.option(
    "--damp-percent",
    type=float,
    default=0.01,
    show_default=True,
    help="Share of the mean of diag H added to the diagonal.",
)
@click.option(
    "--sink-share",
    type=float,
    default=Recipe.sink_share,
    show_default=True,
    help="Share of the Hessian given to first positions (attention sinks).",
)
@click.option(
    "--shrinkage",
    type=float,
    default=Recipe.shrinkage,
    show_default=True,
    help="How far H is drawn to its diagonal: more carries over better to other text.",
)
@click.option(
    "--refit/--no-refit", default=False, help="Least squares for the steps, given the codes.  [default: no-refit]"
)
@click.option(
    "--sweeps",
    type=click.IntRange(0),
    default=Recipe.sweeps,
    show_default=True,
    help="Passes of coordinate descent over the codes, at most.",
)
@click.option(
    "--full-precision-targets",
    metavar="ALPHA",
    type=float,
    default=Recipe.full_precision_targets,
    show_default=True,
    help="Aim at what full precision computes: 0 not at all, 1 wholly.",
)
@click.option(
    "--awq/--no-awq",
    default=False,
    help="Scale input channels by their activations before rounding, with any method.  [default: off]",
)
@click.option(
    "--rotation",
    type=click.Choice(ROTATIONS),
    default=Recipe.rotation,
    show_default=True,
    help="Rotate the residual stream, the value heads or both, folded into the weights.",
)
@click.option("--rotation-seed", type=int, default=Recipe.rotation_seed, show_default=True, help="Which rotation.")
@corpus_options
@click.option(
    "--guard/--no-guard", default=True, help="Compare each linear with rtn on samples kept aside.  [default: on]"
)
@click.option(
    "--tune-passes",
    type=float,
    default=0.0,
    show_default=True,
    help="Tune scales and norm gains on KLD to full precision, this often over the samples; 0: not at all.",
)
@click.option(
    "--tune-rate", type=float, default=TuningRecipe.learning_rate, show_default=True, help="Peak learning rate of it."
)
@click.option("--tune-batch", type=int, default=TuningRecipe.batch, show_default=True, help="Samples a step of it.")
@click.option(
    "--tune-codes",
    metavar="RATE",
    type=float,
    default=TuningRecipe.code_rate,
    show_default=True,
    help="Peak rate, in codes a step, at which tuning moves codes too; 0: they stay.",
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
@click.option(
    "--resume/--restart", default=True, help="Go on with a run begun before, or begin anew.  [default: resume]"
)
@dry_run_option
@common
def command(
    model: str,
    out: Path,
    method: str,
    bits: int | None,
    scheme: str | None,
    target_bpw: float | None,
    target_size: str | None,
    candidates: str | None,
    types: Path | None,
    group_size: int | None,
    symmetric: bool | None,
    act_order: bool,
    group_aware: bool,
    damp_percent: float,
    sink_share: float,
    shrinkage: float,
    refit: bool,
    sweeps: int,
    full_precision_targets: float,
    awq: bool,
    rotation: str,
    rotation_seed: int,
    corpus: str | None,
    samples: int | None,
    sequence_length: int | None,
    seed: int | None,
    chat_template: bool | None,
    guard: bool,
    tune_passes: float,
    tune_rate: float,
    tune_batch: int,
    tune_codes: float,
    ram_budget: str | None,
    device: str,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Solve integer codes for every linear of MODEL (a folder or hub id), block by block, into run directory --out.

    Killed at any instant, the same command goes on from the last finished block and gives the same bytes. With
    --method rtn and no --corpus no data is needed.
    """
    from phi4edge.stages.calibrate import corpus_of_run
    from phi4edge.stages.quantize import plan, quantize

    given = {"corpus": corpus, "samples": samples, "sequence_length": sequence_length, "seed": seed}
    given = {key: value for key, value in {**given, "chat_template": chat_template}.items() if value is not None}
    calibration: CorpusRecipe | None
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
    mix = None
    if target_bpw is not None or target_size is not None:
        names_ = tuple(parse_scheme(name.strip()).name for name in (candidates or CANDIDATES).split(","))
        mix = MixRecipe(names_, target_bpw, parse_bytes(target_size) if target_size else None)
    elif candidates is not None:
        raise UsageError("--candidates are for a mix", "give --target-bpw or --target-size too")
    given_types, given_tables = read_types(types) if types is not None else ((), ())
    recipe = Recipe(
        method=method,
        mix=mix,
        types=given_types,
        tables=given_tables,
        scheme=scheme_from_options(scheme, bits, group_size, symmetric).name,
        corpus=calibration,
        damp_percent=damp_percent,
        act_order=act_order,
        group_aware=group_aware,
        sink_share=sink_share,
        shrinkage=shrinkage,
        refit=refit,
        sweeps=sweeps,
        full_precision_targets=full_precision_targets,
        guard=guard,
        tuning=TuningRecipe(tune_passes, tune_rate, tune_batch, tune_codes) if tune_passes else None,
        awq=awq,
        rotation=rotation,
        rotation_seed=rotation_seed,
    )
    budget = parse_bytes(ram_budget) if ram_budget else None
    if dry_run:
        data = plan(model, recipe, ram_budget=budget, device=device)
        memory = data["memory"]
        text = (
            f"{recipe_text(recipe)}\n{data['linears']} linears in {data['blocks']} blocks, "
            f"{data['codes_bytes'] / 2**20:.0f} MiB of codes\nRAM: about {format_bytes(memory['expected'])} "
            f"(estimated), at least {format_bytes(memory['least'])}; activations "
            f"{'on disk' if memory['spill'] else 'in RAM'}; nothing was written"
        )
        emit("quantize", data, text, as_json=as_json)
        return
    summary = quantize(
        model, recipe, out, restart=not resume, ram_budget=budget, device=device, progress=progress_for(quiet)
    )
    data = {**summary.manifest["data"], "out": str(out), "performance": summary.performance}
    emit("quantize", data, _summary_text(data, str(out)), as_json=as_json)
