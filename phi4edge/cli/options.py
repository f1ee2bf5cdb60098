"""Options that several commands share, each defined once."""

from __future__ import annotations

__all__ = ["common", "corpus_options", "dry_run_option", "force_option"]

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def common(function: F) -> F:
    """``--json``, ``-v/-vv`` and ``--quiet``: the options that every command has.

    The command receives ``as_json: bool``, ``verbose: int`` and ``quiet: bool``.
    """
    for decorator in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, on failure too."),
        click.option("-v", "--verbose", count=True, help="Say more on stderr; -vv adds a traceback to errors."),
        click.option("-q", "--quiet", is_flag=True, help="No progress on stderr."),
    ):
        function = decorator(function)
    return function


dry_run_option = click.option("--dry-run", is_flag=True, help="Check everything and print the plan; write nothing.")
force_option = click.option("--force", is_flag=True, help="Replace what already lies at --out.")


def corpus_options(function: F) -> F:
    """``--corpus``, ``--samples``, ``--sequence-length``, ``--seed``, ``--chat-template``; None where not given."""
    for decorator in (
        click.option(
            "--chat-template/--no-chat-template",
            default=None,
            help="Run text through the model's chat template.  [default: as the corpus says]",
        ),
        click.option(
            "--seed", type=int, envvar="PHI4EDGE_SEED", help="Order of documents, and of self's text.  [default: 0]"
        ),
        click.option(
            "--sequence-length",
            type=int,
            envvar="PHI4EDGE_SEQUENCE_LENGTH",
            help="Tokens a sample.  [default: 512]",
        ),
        click.option("--samples", type=int, envvar="PHI4EDGE_SAMPLES", help="Calibration samples.  [default: 128]"),
        click.option(
            "--corpus",
            metavar="PATH|NAME|MIX",
            envvar="PHI4EDGE_CORPUS",
            help="Text, JSONL, recipe or token file; builtin; self (the model writes it); or a mix, "
            "builtin=0.7,self=0.3.  [default: builtin]",
        ),
    ):
        function = decorator(function)
    return function
