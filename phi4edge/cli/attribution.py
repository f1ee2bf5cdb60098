"""The options of ``phi4edge drift`` for attribution and greedy text, and what they print on the terminal."""

from __future__ import annotations

__all__ = ["attribution_options", "attribution_text", "greedy_options", "greedy_text", "tensor_count"]

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from phi4edge.cli.measure_options import plus_minus, table
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
            help="Of the tensors that err most in the residual stream, measure so many one by one.",
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


def greedy_options(function: F) -> F:
    """``--greedy`` and ``--greedy-tokens``; the command receives ``greedy: str | None`` and ``greedy_tokens: int``."""
    for decorator in (
        click.option(
            "--greedy-tokens", type=click.IntRange(min=1), default=64, show_default=True, metavar="N",
            help="Tokens that the full-precision model writes after each prompt.",
        ),
        click.option(
            "--greedy", metavar="chunks|FILE",
            help="After how many tokens greedy texts part: from the first 32 tokens of each chunk, or prompts of a "
            "file, one a line. The full-precision model writes once and is cached; the artifact reads.",
        ),
    ):  # fmt: skip
        function = decorator(function)
    return function


def greedy_text(data: Mapping[str, Any]) -> list[str]:
    """Where greedy texts part, in a few lines."""
    median, share, q = data["median"], data["identical"], data["quantiles"]
    least = "at least " if median["at_least"] else ""
    return [
        "",
        f"greedy text after {data['prompts']} prompts ({data['source']}), {data['tokens']} tokens each; 95 % intervals",
        f"first other token after  {least}{median['value']:g} tokens (median; {_range(median['interval'], 1)}); "
        f"10 % {q['p10']:g}, 25 % {q['p25']:g}, 75 % {q['p75']:g}, 90 % {q['p90']:g}",
        f"identical throughout     {100 * share['value']:.1f} % ({_range(share['interval'], 100)})",
    ]


def _range(interval: list[float], scale: float) -> str:
    low, high = (value * scale for value in interval)
    return f"{low:.3g} to {high:.3g}"


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
    lines += table(head, [[row["title"], *(_cell(row[key]) for _, key in _COLUMNS)] for row in data["stages"]])
    lines += [f"{name}: not measured ({reason})" for name, reason in data["not_measured"].items()]
    tensors = data["tensors"]
    said = list(data["findings"])
    if tensors is None:
        lines.append(f"tensors: not measured ({data['tensors_reason']})")
    else:
        lines += ["", f"tensors that err most in the residual stream, {tensors['positions']:,} positions, nat"]
        rows = [
            [row["name"], f"{row['output_error']:.2e}", _cell(row["alone_kld"]), _cell(row["saved_kld"])]
            for row in tensors["measured"]
        ]
        lines += table(["", "output error", "KLD alone", "KLD saved if restored"], rows)
        said += tensors["findings"]
    return [*lines, "", *(f"- {sentence}" for sentence in said)]


def _cell(metric: Mapping[str, Any]) -> str:
    return " ".join(plus_minus(metric, "kld")).strip() if metric["value"] != 0 else "0"
