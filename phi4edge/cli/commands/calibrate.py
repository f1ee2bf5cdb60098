"""``phi4edge calibrate MODEL --out RUN``."""

from __future__ import annotations

from pathlib import Path

import click

from phi4edge.cli.options import common, corpus_options, dry_run_option
from phi4edge.cli.progress import progress_for
from phi4edge.cli.render import emit
from phi4edge.core.memory import format_bytes, parse_bytes
from phi4edge.core.recipe import CorpusRecipe


@click.command("calibrate")
@click.argument("model")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run directory; goes to its calibration/.")
@corpus_options
@click.option("--ram-budget", metavar="SIZE", envvar="PHI4EDGE_RAM_BUDGET", help="Peak RSS to keep to, e.g. 8GiB.")
@click.option("--resume/--restart", default=True, help="Keep a finished calibration, or measure anew.")
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
    ram_budget: str | None,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Tokenize a corpus and measure the inputs of every linear of the full-precision MODEL.

    Writes tokens and imatrix to --out/calibration. A later `quantize` into the same --out takes the same corpus.
    With --corpus self the model writes the text first, which needs no data but llama.cpp; it is kept beside them.
    """
    from phi4edge.stages.calibrate import calibrate, plan

    given = {"corpus": corpus, "samples": samples, "sequence_length": sequence_length, "seed": seed}
    given = {key: value for key, value in {**given, "chat_template": chat_template}.items() if value is not None}
    recipe = CorpusRecipe(**given)  # type: ignore[arg-type]
    budget = parse_bytes(ram_budget) if ram_budget else None
    if dry_run:
        planned = plan(model, recipe, ram_budget=budget)
        expected = format_bytes(planned["memory"]["expected"])
        shown = f"{planned['tokens']} tokens of {recipe.corpus}; RAM about {expected} (estimated); nothing was written"
        emit("calibrate", planned, shown, as_json=as_json)
        return
    manifest = calibrate(model, recipe, out, restart=not resume, ram_budget=budget, progress=progress_for(quiet))
    data = {**manifest["data"], "out": str(out)}
    text = (
        f"{out}/calibration: {data['tokens']} tokens of {recipe.corpus}, imatrix of {len(data['imatrix'])} linears\n"
        f"time {data['seconds']:.1f} s, peak RSS {format_bytes(data['peak_rss_bytes'])}"
    )
    emit("calibrate", data, text, as_json=as_json)
