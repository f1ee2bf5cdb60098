"""``phi4edge targets list | show | check | validate``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.checkpoint.published import model_shapes
from phi4edge.cli.options import common
from phi4edge.cli.render import emit, emit_failure, table
from phi4edge.cli.target_options import (
    bandwidth_note,
    fit_document,
    fit_options,
    fit_text,
    target_path_option,
    writable_formats,
)
from phi4edge.cli.target_text import describe, short
from phi4edge.core.errors import InputError, TargetError, UsageError
from phi4edge.quant.scheme import parse_scheme
from phi4edge.targets.catalog import Catalog, open_catalog
from phi4edge.targets.choice import DoesNotFitError, Wish, choose, context_for, process_bytes, refusal
from phi4edge.targets.fit import LAYOUTS, Fit, Request, layout_holds, memory_needed
from phi4edge.targets.profile import LOCAL, Profile, RuntimeOption
from phi4edge.targets.schema import read_profile


def _say_notes(catalog: Catalog, quiet: bool) -> None:
    for note in () if quiet else catalog.notes:
        click.echo(f"Note: {note}", err=True)


@click.group("targets")
def command() -> None:
    """The devices that artifacts are made for: what is known of them, and what fits.

    A target is a TOML file; targets/README.md tells how to add one in five minutes. Files of your own are found in
    --target-path FOLDER and in $PHI4EDGE_TARGET_PATH. `local` is this machine, detected.
    """


@command.command("list")
@target_path_option
@common
def list_targets(target_path: tuple[Path, ...], as_json: bool, verbose: int, quiet: bool) -> None:
    """List all targets: memory, bandwidth, the best runtime, how they are reached."""
    catalog = open_catalog(target_path)
    _say_notes(catalog, quiet)
    rows, data = [], []
    for entry in catalog.entries.values():
        profile = entry.profile()
        best = profile.runtimes[0]
        runtime = f"{best.name} {best.backend} {best.schemes[0]}"
        origin = "detected" if entry.path is None else "yours" if entry.user else ""
        memory = f"{profile.ram_gb:g} / {short(profile.usable_ram_gb)}"
        bandwidth = short(profile.bandwidth_gb_s)
        rows.append((entry.id, profile.name, memory, bandwidth, runtime, profile.transports[0], origin))
        data.append(_summary(profile, str(entry.path) if entry.path else None, entry.user, entry.replaces))
    headers = ("target", "device", "RAM / usable GB", "GB/s", "best runtime", "reached by", "")
    text = table(headers, rows, numeric=(2, 3)) + "\n\n~ estimated: `phi4edge targets show ID` says why"
    emit("targets", {"targets": data, "notes": list(catalog.notes)}, text, as_json=as_json)


def _summary(profile: Profile, path: str | None, user: bool, replaces: Path | None) -> dict[str, Any]:
    best = profile.runtimes[0]
    return {
        "id": profile.id,
        "name": profile.name,
        "kind": profile.kind,
        "ram_gb": profile.ram_gb,
        "usable_ram_gb": asdict(profile.usable_ram_gb),
        "bandwidth_gb_s": asdict(profile.bandwidth_gb_s),
        "best_runtime": {"name": best.name, "backend": best.backend, "format": best.formats[0]},
        "transports": list(profile.transports),
        "file": path,
        "user": user,
        "replaces": str(replaces) if replaces else None,
    }


@command.command("show")
@click.argument("target", metavar="ID")
@click.option(
    "--measure",
    is_flag=True,
    help="Of local: measure memory bandwidth and llama.cpp's rates first (half a minute), and keep them.",
)
@target_path_option
@common
def show(target: str, measure: bool, target_path: tuple[Path, ...], as_json: bool, verbose: int, quiet: bool) -> None:
    """Show all that is known of the target ID, every figure with its source or the reason of the guess."""
    if measure:
        _measure(target, quiet)
    catalog = open_catalog(target_path)
    _say_notes(catalog, quiet)
    entry = catalog.entry(target)
    profile = entry.profile()
    data = profile.as_dict() | {"file": str(entry.path) if entry.path else None, "user": entry.user}
    emit("targets", {"target": data, "notes": list(catalog.notes)}, describe(profile, entry.path), as_json=as_json)


def _measure(target: str, quiet: bool) -> None:
    """Measure this machine's speed with the threads that would compute, and keep it."""
    from phi4edge.runtimes._threads import physical_cores
    from phi4edge.targets.local import local_fingerprint
    from phi4edge.targets.measured import measure_machine, store

    if target != LOCAL:
        raise UsageError(
            f"--measure is for {LOCAL}, this machine, not {target}",
            f"bench ARTIFACT --target {target} --calibrate-target measures the device",
        )
    if not quiet:
        click.echo("measuring memory and llama.cpp, half a minute", err=True)
    speed = measure_machine(local_fingerprint(), physical_cores())
    path = store(speed)
    if quiet:
        return
    click.echo(f"kept in {path}", err=True)
    if speed.busy:
        click.echo(f"Note: {speed.source}", err=True)
    if "error" in speed.decode:
        click.echo(f"Note: no speed can be estimated, llama.cpp was not measured: {speed.decode['error']}", err=True)


@command.command("check")
@click.argument("target", metavar="ID")
@click.option("--model", required=True, help="A checkpoint folder, a hub id, or phi-4 / phi-4-mini (no download).")
@click.option("--scheme", help="What the weights are rounded to; by default the best that fits, by the target's file.")
@fit_options
@target_path_option
@common
def check(
    target: str,
    model: str,
    scheme: str | None,
    context: int | None,
    kv: str | None,
    head: str,
    embedding: str,
    target_path: tuple[Path, ...],
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Check whether MODEL fits the target ID: weights + KV cache + buffers, line by line.

    Exit code 4 when it does not, with the nearest thing that would.
    """
    catalog = open_catalog(target_path)
    _say_notes(catalog, quiet)
    profile = catalog.profile(target)
    name, config = model_shapes(model)
    wish = Wish(context, kv, head, embedding)
    if scheme is None:
        try:
            choice = choose(name, config, profile, wish, writable_formats() | set(LAYOUTS))  # made today or not
        except DoesNotFitError as error:
            data = fit_document(profile, name, error.fit)
            emit_failure("targets", {"check": data}, fit_text(profile, name, error.fit), error, as_json=as_json)
        data = fit_document(profile, name, choice.fit) | {"runtime": choice.runtime.name, "steps": list(choice.steps)}
        steps = "\n".join(f"  {step}" for step in (*choice.steps, *bandwidth_note(profile)))
        emit(
            "targets",
            {"check": data},
            f"{fit_text(profile, name, choice.fit)}\n\nWhy this one:\n{steps}",
            as_json=as_json,
        )
        return
    option, fit, note = _fit_of(profile, config, scheme, wish)
    data = fit_document(profile, name, fit) | {"runtime": option.name, "steps": [note] if note else []}
    text = fit_text(profile, name, fit) + (f"\n\nNote: {note}" if note else "")
    if not fit.fits:
        emit_failure("targets", {"check": data}, text, refusal(name, config, profile, option, fit), as_json=as_json)
    emit("targets", {"check": data}, text, as_json=as_json)


def _fit_of(
    profile: Profile, config: ModelConfig, scheme_name: str, wish: Wish
) -> tuple[RuntimeOption, Fit, str | None]:
    """The sum for one scheme, on the target's first runtime that lists it and loads a format that holds it."""
    scheme = parse_scheme(scheme_name)
    for name, (_, in_features) in config.linear_shapes.items():
        scheme.groups(in_features, name)
    held = [f for f in LAYOUTS if layout_holds(f, scheme)]
    options = [(option, f) for option in profile.runtimes for f in option.formats if f in held]
    if not options:
        formats = dict.fromkeys(f for option in profile.runtimes for f in option.formats)
        raise TargetError(
            f"{profile.id}: no format of its runtimes ({', '.join(formats)}) holds {scheme.name}, as far as known here",
            f"it runs {', '.join(dict.fromkeys(s for option in profile.runtimes for s in option.schemes))}",
        )
    listed = [pair for pair in options if scheme.name in pair[0].schemes]
    option, format_name = (listed or options)[0]
    note = None if listed else f"{profile.id}: its file does not list {scheme.name} as one that it runs well"
    kv = wish.kv or option.kv_types[0]
    if kv not in option.kv_types:
        raise TargetError(
            f"{profile.id}: {option.name} has no KV cache of type {kv}", f"it has {' and '.join(option.kv_types)}"
        )
    request = Request(scheme, context_for(profile, config, wish), format_name, kv, wish.head, wish.embedding)
    fit = memory_needed(config, request, usable_bytes=profile.usable_bytes, process_bytes=process_bytes(option))
    return option, fit, note


@command.command("validate")
@click.argument("path", type=click.Path(path_type=Path), required=False)
@target_path_option
@common
def validate(path: Path | None, target_path: tuple[Path, ...], as_json: bool, verbose: int, quiet: bool) -> None:
    """Check target files against the schema: PATH (a file or a folder), or all that are found.

    Exit code 3 when one is wrong; every file is looked at.
    """
    if path is None:
        catalog = open_catalog(target_path)
        files = [entry.path for entry in catalog.entries.values() if entry.path]
    elif path.is_dir():
        files = sorted(path.glob("*.toml"))
    else:
        files = [path]
    if not files:
        raise InputError(f"{path}: no *.toml in it", "name a target file, or a folder of them")
    results, errors = [], []
    for file in files:
        try:
            profile = read_profile(file)
        except InputError as error:
            errors.append(error)
            results.append({"file": str(file), "ok": False, "message": error.message, "hint": error.hint})
        else:
            guesses = len(profile.estimates())
            results.append({"file": str(file), "ok": True, "id": profile.id, "estimated_figures": guesses})
    lines = [
        f"ok     {r['file']} ({r['estimated_figures']} estimated)" if r["ok"] else f"wrong  {r['message']}"
        for r in results
    ]
    if errors:
        failure = InputError(
            f"{len(errors)} of {len(files)} target files are wrong: {errors[0].message}", errors[0].hint
        )
        emit_failure("targets", {"files": results}, "\n".join(lines), failure, as_json=as_json)
    emit("targets", {"files": results}, "\n".join(lines), as_json=as_json)
