"""The options of ``phi4edge drift --attribute``, and its tables on the terminal."""

from __future__ import annotations

__all__ = ["attribution_options", "attribution_text", "tensor_count"]

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from phi4edge.cli.measure_options import plus_minus
from phi4edge.core.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])
_COLUMNS = (("KLD to reference", "kld"), ("added", "added_kld"), ("step's own KLD", "step_kld"))


def attribution_options(function: F) -> F:
    """``--attribute``, ``--against``, ``--attribute-tensors`` and ``--attribute-chunks``.

    The command receives ``attribute: bool``, ``against: Path | None``, ``attribute_tensors: str`` and
    ``attribute_chunks: int | None``.
    """
    for decorator in (
        click.option(
            "--attribute-chunks", type=click.IntRange(min=1), metavar="N",
            help="Chunks to attribute on.  [default: all that are measured; 4 for single tensors]",
        ),
        click.option(
            "--attribute-tensors", default="4", show_default=True, metavar="N|all",
            help="Of the tensors with the largest output error, measure so many one by one.",
        ),
        click.option(
            "--against", type=click.Path(path_type=Path), metavar="RUN",
            help="With --attribute: the run that ARTIFACT was written from, to tell its share from the format's.",
        ),
        click.option(
            "--attribute", is_flag=True,
            help="Split the drift into weights, configuration, runtime and KV cache, and name the costliest tensors.",
        ),
    ):  # fmt: skip
        function = decorator(function)
    return function


def tensor_count(asked: str) -> int | None:
    """The number that was asked for, None for all.

    Raises:
        UsageError: neither a number nor "all".
    """
    if asked == "all":
        return None
    if not asked.isascii() or not asked.isdigit():
        raise UsageError(f"--attribute-tensors {asked!r} is no number", "a whole number, 0 for none, or all")
    return int(asked)


def attribution_text(data: Mapping[str, Any]) -> list[str]:
    """The tables of an attribution, and what they come to, line by line."""
    lines = ["", f"where it comes from, {data['positions']:,} positions; ± is one standard error, nat"]
    head = ["", *(title for title, _ in _COLUMNS)]
    lines += _table(head, [[row["title"], *(_cell(row[key]) for _, key in _COLUMNS)] for row in data["stages"]])
    lines += [f"{name}: not measured ({reason})" for name, reason in data["not_measured"].items()]
    tensors = data["tensors"]
    said = list(data["findings"])
    if tensors is None:
        lines.append(f"tensors: not measured ({data['tensors_reason']})")
    else:
        lines += ["", f"tensors with the largest output error, {tensors['positions']:,} positions, nat"]
        rows = [
            [row["name"], f"{row['output_error']:.2e}", _cell(row["alone_kld"]), _cell(row["saved_kld"])]
            for row in tensors["measured"]
        ]
        lines += _table(["", "output error", "KLD alone", "KLD saved if restored"], rows)
        said += tensors["findings"]
    return [*lines, "", *(f"- {sentence}" for sentence in said)]


def _cell(metric: Mapping[str, Any]) -> str:
    return " ".join(plus_minus(metric, "kld")).strip() if metric["value"] != 0 else "0"


def _table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()
