"""``phi4edge plan MODEL --target ID…``."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import click

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.checkpoint.published import model_shapes
from phi4edge.cli.options import common
from phi4edge.cli.render import emit, emit_failure, time_text
from phi4edge.cli.target_options import (
    bandwidth_note,
    fit_document,
    fit_options,
    target_path_option,
    writable_formats,
)
from phi4edge.core.errors import TargetError
from phi4edge.targets.catalog import open_catalog
from phi4edge.targets.choice import Choice, Wish, choose, gb
from phi4edge.targets.profile import Profile


@click.command("plan")
@click.argument("model")
@click.option("--target", "targets", multiple=True, metavar="ID", help="A target; may be repeated.  [default: local]")
@click.option("--min-decode-tps", type=click.FloatRange(min=0.0, min_open=True), help="Decode speed to keep, tok/s.")
@click.option(
    "--time", "asks_time", is_flag=True, help="Also say how long `quantize` takes here; measures for some seconds."
)
@fit_options
@target_path_option
@common
def command(
    model: str,
    targets: tuple[str, ...],
    min_decode_tps: float | None,
    asks_time: bool,
    context: int | None,
    kv: str | None,
    head: str,
    embedding: str,
    target_path: tuple[Path, ...],
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Say which runtime, format and scheme MODEL gets on each target, and why, before any work.

    MODEL is a checkpoint folder, a hub id, or phi-4 / phi-4-mini (no download). The rule: runtimes in the order of
    the target's file; of each one's schemes the largest that fits the usable memory at the context and keeps the
    decode speed. Speeds are estimated, never measured here. With --time also how long `quantize` takes on this machine
    with its defaults (estimated); its --dry-run says so for any recipe. Exit code 4 when nothing fits any of the
    targets.
    """
    catalog = open_catalog(target_path)
    for note in () if quiet else catalog.notes:
        click.echo(f"Note: {note}", err=True)
    profiles = [catalog.profile(target) for target in dict.fromkeys(targets or ("local",))]
    name, config = model_shapes(model)
    wish = Wish(context, kv, head, embedding, min_decode_tps)
    documents: list[dict[str, Any]] = []
    paragraphs: list[str] = []
    failures: list[TargetError] = []
    for profile in profiles:
        try:
            choice = choose(name, config, profile, wish, writable_formats())
        except TargetError as error:
            failures.append(error)
            documents.append({"target": profile.id, "fits": False, "message": error.message, "hint": error.hint})
            paragraphs.append(f"{profile.id}: nothing fits\n  {error.message}\n  {error.hint}")
        else:
            documents.append(_document(profile, name, choice))
            paragraphs.append(_paragraph(profile, config, choice))
            if asks_time:
                estimated = _time(config, choice.fit.request.scheme.name)
                documents[-1]["quantize_time"] = estimated
                paragraphs[-1] += f"\n  quantize: {time_text(estimated)}"
    text = "\n\n".join(paragraphs)
    if len(failures) == len(profiles):
        emit_failure("plan", {"model": name, "targets": documents}, text, failures[0], as_json=as_json)
    emit("plan", {"model": name, "targets": documents}, text, as_json=as_json)


@cache
def _time(config: ModelConfig, scheme: str) -> dict[str, Any]:
    """How long quantizing to ``scheme`` with the defaults takes on this machine, estimated."""
    from phi4edge.core.recipe import CorpusRecipe, solving_recipe
    from phi4edge.stages.rates import estimate_shapes

    recipe = solving_recipe({"scheme": scheme}, CorpusRecipe())
    return estimate_shapes(config, recipe, Path()).as_dict()


def _document(profile: Profile, model: str, choice: Choice) -> dict[str, Any]:
    decode, prefill = choice.decode.as_dict(), choice.prefill.as_dict()
    return fit_document(profile, model, choice.fit) | {
        "runtime": choice.runtime.name,
        "backend": choice.runtime.backend,
        "decode_tps_estimated": decode,
        "decode_tps_estimated_missing": None if decode else choice.decode.basis,
        "prefill_tps_estimated": prefill,
        "prefill_tps_estimated_missing": None if prefill else choice.prefill.basis,
        "steps": list(choice.steps),
    }


def _paragraph(profile: Profile, config: ModelConfig, choice: Choice) -> str:
    request = choice.fit.request
    head = f"{profile.id}: {request.scheme.name} in {request.format}, {choice.runtime.name} on {choice.runtime.backend}"
    lines = [
        f"context {request.context:,} of the model's {config.context_length:,} tokens, KV cache {request.kv}",
        f"memory {gb(choice.fit.needed_bytes)} of {profile.usable_ram_gb.text('GB')} usable",
        *(
            f"{name} {estimate.text()}" + (f" ({estimate.basis})" if estimate.low is not None else "")
            for name, estimate in (("decode", choice.decode), ("prefill", choice.prefill))
        ),
        *bandwidth_note(profile),
        "how it was chosen:",
        *(f"  {step}" for step in choice.steps),
    ]
    return "\n".join([head, *(f"  {line}" for line in lines)])
