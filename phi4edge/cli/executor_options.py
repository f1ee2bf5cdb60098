"""Options that say where the work is done: in this process, or by a Ray cluster."""

from __future__ import annotations

__all__ = ["EXECUTORS", "executor_options", "refuse_lone_address", "workers"]

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from phi4edge.core.errors import UsageError

if TYPE_CHECKING:
    from phi4edge.stages.cluster import Cluster

F = TypeVar("F", bound=Callable[..., Any])
EXECUTORS = ("local", "ray")


def executor_options(function: F) -> F:
    """``--executor`` and ``--ray-address``; None where not given."""
    for decorator in (
        click.option(
            "--ray-address",
            metavar="HOST:PORT|auto",
            envvar="PHI4EDGE_RAY_ADDRESS",
            help="The cluster; auto: the one on this machine.  [default: RAY_ADDRESS, else one is started here]",
        ),
        click.option(
            "--executor",
            type=click.Choice(EXECUTORS),
            envvar="PHI4EDGE_EXECUTOR",
            help="Where blocks are solved: in this process, or by the workers of a Ray cluster; the codes are the same."
            "  [default: local]",
        ),
    ):
        function = decorator(function)
    return function


def refuse_lone_address(executor: str) -> None:
    """Raises UsageError where the command line names a cluster that nothing would be asked of."""
    source = click.get_current_context().get_parameter_source("ray_address")
    if executor != "ray" and source is ParameterSource.COMMANDLINE:
        raise UsageError("--ray-address names a cluster, and the executor is local", "give --executor ray too")


def workers(executor: str, address: str | None) -> AbstractContextManager[Cluster | None]:
    """The cluster that ``executor`` asks for, connected to inside the ``with``; None for this process alone."""
    if executor == "local":
        return nullcontext()
    from phi4edge.stages.cluster import connect

    return connect(address)
