"""What the commands that look at targets share: their options and how a sum is shown."""

from __future__ import annotations

__all__ = ["bandwidth_note", "fit_document", "fit_options", "fit_text", "target_path_option", "writable_formats"]

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

from phi4edge.cli.render import table
from phi4edge.core import registry
from phi4edge.targets.fit import HEAD_TYPES, KV_BYTES, Fit
from phi4edge.targets.profile import LOCAL, Profile

F = TypeVar("F", bound=Callable[..., Any])

target_path_option = click.option(
    "--target-path",
    "target_path",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FOLDER",
    help="A folder with target files of your own, before $PHI4EDGE_TARGET_PATH; may be repeated.",
)


def fit_options(function: F) -> F:
    """``--context``, ``--kv``, ``--head`` and ``--embedding``: what is asked to fit.

    The command receives ``context: int | None``, ``kv: str | None``, ``head: str`` and ``embedding: str``.
    """
    for decorator in (
        click.option(
            "--embedding",
            type=click.Choice(HEAD_TYPES),
            default="q8_0",
            show_default=True,
            help="Type of an embedding that is not the head too.",
        ),
        click.option(
            "--head", type=click.Choice(HEAD_TYPES), default="q8_0", show_default=True, help="Type of the head."
        ),
        click.option(
            "--kv", type=click.Choice(tuple(KV_BYTES)), help="Type of the KV cache; the runtime's first by default."
        ),
        click.option(
            "--context", type=click.IntRange(min=1), metavar="N", help="Tokens of context; the target's by default."
        ),
    ):
        function = decorator(function)
    return function


def bandwidth_note(profile: Profile) -> list[str]:
    """Of this machine, what its bandwidth rests on: when it was measured, or how to have it measured; else nothing."""
    if profile.id != LOCAL:
        return []
    figure = profile.bandwidth_gb_s
    said = figure.reason if figure.value is None else f"{figure.value:.1f} GB/s read, {figure.source}"
    return [f"bandwidth {said}"]


def fit_document(profile: Profile, model: str, fit: Fit) -> dict[str, Any]:
    """A sum as JSON; byte counts are whole numbers."""
    request = fit.request
    return {
        "target": profile.id,
        "model": model,
        "fits": fit.fits,
        "scheme": request.scheme.name,
        "format": request.format,
        "context": request.context,
        "kv": request.kv,
        "needed_bytes": fit.needed_bytes,
        "usable_bytes": fit.usable_bytes,
        "usable_estimated": profile.usable_ram_gb.estimated,
        "lines": [asdict(line) for line in fit.lines],
    }


def fit_text(profile: Profile, model: str, fit: Fit) -> str:
    """A sum as a table."""
    rows = [
        (line.label, f"{line.nbytes / 1e9:.3f}", line.how + (", estimated" if line.estimated else ""))
        for line in fit.lines
    ]
    figure, left = profile.usable_ram_gb, fit.usable_bytes - fit.needed_bytes
    rows.append(("needed", f"{fit.needed_bytes / 1e9:.3f}", ""))
    rows.append(
        (
            "usable VRAM" if profile.memory == "vram" else "usable",
            f"{fit.usable_bytes / 1e9:.3f}",
            figure.text("GB") if figure.estimated else figure.source or "",
        )
    )
    rows.append(("left" if left >= 0 else "missing", f"{abs(left) / 1e9:.3f}", "fits" if fit.fits else "does not fit"))
    title = f"{model} at {fit.request.text()}, {fit.request.format}, on {profile.id}"
    text = f"{title}\n\n" + table(("", "GB", ""), rows, numeric=(1,))
    if profile.memory == "vram":
        text += "\n\nNote: all layers are planned to be in video memory. llama.cpp leaves an embedding that is not the"
        text += "\nhead in the host's memory; it is counted here all the same."
    if fit.fits and figure.low is not None and fit.needed_bytes > figure.low * 1e9:
        text += f"\n\nNote: as little as {figure.low:g} GB may be usable, which would not do: {figure.reason}"
    return text


def writable_formats() -> frozenset[str]:
    """The formats that this version writes: the plug-ins in ``phi4edge/writers``, none of them imported."""
    return frozenset(registry.names("phi4edge.writers"))
