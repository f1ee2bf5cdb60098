"""Tasks: what both models answered rightly, pair by pair, as a table for each reference and way of asking."""

from __future__ import annotations

__all__ = ["score_section"]

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from phi4edge.report.documents import TaskScore
from phi4edge.report.labels import Labels
from phi4edge.report.numbers import figure
from phi4edge.report.page import ABSENT, Cell, Column, Section, Table

_COLUMNS = (
    Column("Artifact", numeric=False),
    Column("Task", numeric=False),
    Column("Questions"),
    Column("Full precision", "%"),
    Column("Artifact", "%"),
    Column("Difference", "points, 95 %"),
    Column("Lost"),
    Column("Gained"),
    Column("McNemar p"),
)


def score_section(scores: Sequence[TaskScore], labels: Labels) -> Section | None:
    """One table for each way of asking, since only its rows compare; None where nothing was asked."""
    groups: dict[tuple[str, ...], list[TaskScore]] = {}
    for score in scores:
        groups.setdefault((score.reference, *_asked(score)), []).append(score)
    return Section("Tasks", tuple(_table(rows, labels) for rows in groups.values())) if groups else None


def _asked(score: TaskScore) -> Iterable[str]:
    for key, value in score.conditions.items():
        said = ("yes" if value else "no") if isinstance(value, bool) else "none" if value is None else str(value)
        yield f"{key.replace('_', ' ')} {said}"


def _table(scores: Sequence[TaskScore], labels: Labels) -> Table:
    gated = any(score.gates for score in scores)
    columns = (*_COLUMNS, *([Column("Gate", numeric=False)] if gated else []))
    rows = tuple((*_row(score, labels), *([_gates(score)] if gated else [])) for score in scores)
    notes = (
        f"Reference: {scores[0].reference}; {', '.join(_asked(scores[0]))}.",
        "Lost: right in full precision alone; gained: right in the artifact alone. The interval of the difference is "
        "Newcombe's for pairs, p is McNemar's exact one of lost against gained.",
        *_gate_notes(scores),
    )
    return Table(columns, rows, "Answers of both models to the same questions.", notes)


def _gates(score: TaskScore) -> Cell:
    """The outcome, with the gate's name where there are several."""
    if len(score.gates) < 2:
        return Cell(str(score.gates[0]["outcome"])) if score.gates else ABSENT
    return Cell("; ".join(f"{_named(gate)}: {gate['outcome']}" for gate in score.gates))


def _named(gate: Mapping[str, Any]) -> str:
    asked = f" of {gate['target']}" if "target" in gate else ""
    return f"{gate['name']} {gate.get('share', gate['limit']):g}{asked}"


def _gate_notes(scores: Sequence[TaskScore]) -> Iterable[str]:
    named = list(dict.fromkeys(_named(gate) for score in scores for gate in score.gates))
    if named:
        yield (
            f"Gates: {', '.join(named)}; decided at 95 % confidence over pairs. min_reference_share asks for that "
            "share of full precision's accuracy."
        )


def _row(score: TaskScore, labels: Labels) -> tuple[Cell, ...]:
    def points(value: float) -> str:
        return f"{100 * value:+.1f}".replace("-", "\u2212")

    return (
        Cell(labels.full[score.artifact.sha256]),
        Cell(score.task),
        Cell(f"{score.n:,}"),
        Cell(f"{100 * score.accuracy_reference:.1f}"),
        Cell(f"{100 * score.accuracy:.1f}"),
        Cell(f"{points(score.difference)} [{points(score.low)}, {points(score.high)}]"),
        Cell(str(score.lost)),
        Cell(str(score.gained)),
        Cell(str(figure(score.mcnemar_p))),
    )
