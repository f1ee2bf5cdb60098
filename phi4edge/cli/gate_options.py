"""The limits that ``drift`` and ``run`` hold a measurement against: their options, and one line for each outcome."""

from __future__ import annotations

__all__ = ["GATES", "gate_line", "gate_options"]

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
GATES = ("max_kld", "max_ppl_ratio", "min_top1", "max_task_drop", "min_reference_share")
_OPTIONS = (
    click.option("--max-kld", type=float, metavar="X", help="Gate: mean KLD at most X nat (exit 6)."),
    click.option("--max-ppl-ratio", type=float, metavar="Y", help="Gate: PPL at most Y times the reference's."),
    click.option("--min-top1", type=float, metavar="P", help="Gate: same top token in at least P, 0.95 or 95."),
    click.option(
        "--max-task-drop", type=float, metavar="X",
        help="Gate: accuracy at most X below the reference's in every task, 0.02 for two points. It fails where even "
        "the favourable 95 % bound of the difference over pairs lies beyond X.",
    ),
    click.option(
        "--min-reference-share", type=float, metavar="S",
        help="Gate: accuracy at least S of the reference's in every task, 0.99 as MLPerf asks. It fails where even the "
        "favourable 95 % bound of (accuracy less S times the reference's), over pairs, is below 0.",
    ),
    click.option(
        "--gate-undecided", type=click.Choice(["fail", "pass"]), default=None,
        help="What a limit counts as that lies between the 95 % bounds of the value.  [default: fail]",
    ),
)  # fmt: skip


def gate_options(function: F) -> F:
    """One option a limit of :data:`GATES`, and ``gate_undecided: str | None``."""
    for decorator in reversed(_OPTIONS):
        function = decorator(function)
    return function


def gate_line(gate: Mapping[str, Any]) -> str:
    """A gate of a document, on the terminal."""
    on = [gate[key] for key in ("task", "domain") if key in gate]
    where = f" on {', '.join(on)}" if on else ""
    asked = f" (asked by {gate['target']})" if "target" in gate else ""
    return f"gate {gate['name']} {gate.get('share', gate['limit']):g}{where}{asked}: {gate['outcome']}"
