"""Limits that a measurement must keep, decided with its error in mind.

A value with standard error se is compared at 95 % one-sided confidence, z = 1.645:

    fail        the limit is missed even after z·se are given in the artifact's favour
    pass        the limit is kept even after z·se are counted against it
    undecided   the limit lies within z·se of the value: more text would tell; counts as failed unless it is allowed

se is the larger of the one over positions and the one between chunks (see :mod:`phi4edge.measurement.drift`). Limits on
tasks are held against intervals over pairs in the same way (see :mod:`phi4edge.measurement.tasks.pairing`).
"""

from __future__ import annotations

__all__ = ["Gate", "Limits", "evaluate", "gate_between", "gate_error"]

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from phi4edge.core.errors import GateError, UsageError
from phi4edge.measurement.result import Measurement

Z = 1.645
CONFIDENCE = 0.95
UNDECIDED = ("fail", "pass")


@dataclass(frozen=True)
class Limits:
    """What the user asked to be kept; None where nothing was asked."""

    max_kld: float | None = None  # nat
    max_ppl_ratio: float | None = None
    min_top1: float | None = None  # a fraction; values above 1 are per cent
    undecided: str = "fail"
    max_task_drop: float | None = None  # accuracy, a fraction
    min_reference_share: float | None = None  # of the reference's accuracy, a fraction
    target: str | None = None  # whose file asks for this; None: the user does

    def __post_init__(self) -> None:
        """Refuse limits that nothing could keep, or that everything does."""
        if self.max_kld is not None and not self.max_kld >= 0:
            raise UsageError(f"--max-kld {self.max_kld} is negative; a divergence never is")
        if self.max_ppl_ratio is not None and not self.max_ppl_ratio > 0:
            raise UsageError(f"--max-ppl-ratio {self.max_ppl_ratio} is not positive", "1.01 allows 1 % above")
        if self.min_top1 is not None and not 0 <= self.min_top1 <= 100:
            raise UsageError(f"--min-top1 {self.min_top1} is no share", "write 0.95 or 95 for 95 %")
        if self.max_task_drop is not None and not 0 <= self.max_task_drop <= 1:
            raise UsageError(f"--max-task-drop {self.max_task_drop} is no share", "0.02 allows two points in a hundred")
        if self.min_reference_share is not None and not 0 < self.min_reference_share <= 1:
            raise UsageError(
                f"--min-reference-share {self.min_reference_share} is no share",
                "0.99 asks for 99 % of the full-precision model's accuracy",
            )
        if self.undecided not in UNDECIDED:
            raise UsageError(f"--gate-undecided {self.undecided!r}", f"one of {', '.join(UNDECIDED)}")

    @property
    def asks_for_text(self) -> bool:
        """Whether any limit is on what only a text can tell."""
        return (self.max_kld, self.max_ppl_ratio, self.min_top1) != (None, None, None)

    @property
    def asks_for_tasks(self) -> bool:
        """Whether any limit is on what only tasks can tell."""
        return (self.max_task_drop, self.min_reference_share) != (None, None)


@dataclass(frozen=True)
class Gate:
    """One limit and how it was kept."""

    name: str  # "max_kld"
    metric: str
    limit: float
    value: float
    se: float
    lower: float  # value − z·se
    upper: float  # value + z·se
    outcome: str  # "pass", "fail" or "undecided"
    passed: bool
    confidence: float = CONFIDENCE
    domain: str | None = None  # the text it was held against, where there are several
    task: str | None = None  # the task it was held against
    share: float | None = None  # of the reference's accuracy that was asked for; ``limit`` is 0 then
    target: str | None = None  # whose file asks for it; None: the user does

    def as_dict(self) -> dict[str, Any]:
        """The gate as a JSON object."""
        optional = ("domain", "task", "share", "target")
        return {key: value for key, value in asdict(self).items() if key not in optional or value is not None}

    def sentence(self) -> str:
        """The gate in words."""
        sign = "≥" if self.name.startswith("min") else "≤"
        where = "".join(f"{place}: " for place in (self.target, self.domain) if place is not None)
        return (
            f"{where}{self.metric} {self.value:.6g} ± {self.se:.2g} {sign} {self.limit:g}: {self.outcome} "
            f"(95 % bounds {self.lower:.6g} … {self.upper:.6g})"
        )


def evaluate(
    limits: Limits,
    metrics: Mapping[str, Measurement],
    between_chunks: Mapping[str, float | None],
    domain: str | None = None,
) -> list[Gate]:
    """Hold ``metrics`` against ``limits``; ``domain`` says which text's they are."""
    gates = []
    if limits.max_kld is not None:
        gates.append(_gate("max_kld", metrics["kld"], between_chunks["kld"], limits.max_kld, limits))
    if limits.max_ppl_ratio is not None:
        ratio = metrics["ppl_ratio"]
        assert ratio.value is not None
        clustered = between_chunks["ln_ppl_ratio"]
        clustered = None if clustered is None else clustered * ratio.value
        gates.append(_gate("max_ppl_ratio", ratio, clustered, limits.max_ppl_ratio, limits))
    if limits.min_top1 is not None:
        share = limits.min_top1 / 100 if limits.min_top1 > 1 else limits.min_top1
        gates.append(_gate("min_top1", metrics["same_top_p"], between_chunks["same_top_p"], share, limits))
    return [replace(gate, domain=domain, target=limits.target) for gate in gates]


def _gate(name: str, metric: Measurement, clustered: float | None, limit: float, limits: Limits) -> Gate:
    assert metric.value is not None
    se = max(metric.se or 0.0, clustered or 0.0)
    assert math.isfinite(se)
    bounds = metric.value - Z * se, metric.value + Z * se
    return gate_between(name, metric.name, metric.value, se, bounds, limit, limits.undecided)


def gate_between(
    name: str, metric: str, value: float, se: float, bounds: tuple[float, float], limit: float, undecided: str
) -> Gate:
    """A gate on a value whose ``bounds`` (95 %, one-sided each) are known; ``undecided`` as in :class:`Limits`."""
    lower, upper = bounds
    if name.startswith("min"):
        outcome = "fail" if upper < limit else "pass" if lower >= limit else "undecided"
    else:
        outcome = "fail" if lower > limit else "pass" if upper <= limit else "undecided"
    passed = outcome == "pass" or (outcome == "undecided" and undecided == "pass")
    return Gate(name, metric, limit, value, se, lower, upper, outcome, passed)


def gate_error(gates: Sequence[Gate]) -> GateError | None:
    """The error to end with, or None when all gates passed."""
    missed = [gate for gate in gates if not gate.passed]
    if not missed:
        return None
    undecided = any(gate.outcome == "undecided" for gate in missed)
    return GateError(
        "; ".join(gate.sentence() for gate in missed),
        "measure more (--chunks, --limit) to decide, or pass --gate-undecided pass" if undecided else None,
    )
