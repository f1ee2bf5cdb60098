"""Options that several commands share, each defined once."""

from __future__ import annotations

__all__ = ["common", "force_option"]

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


force_option = click.option("--force", is_flag=True, help="Replace what already lies at --out.")
