"""What a drift document may hold beside its figures: domains, positions, attribution, greedy text; read strictly."""

from __future__ import annotations

__all__ = [
    "Attribution",
    "Domain",
    "Greedy",
    "PositionBin",
    "Stage",
    "TensorCost",
    "read_attribution",
    "read_domains",
    "read_greedy",
    "read_positions",
]

from dataclasses import dataclass

from phi4edge.report.fields import Field, Metric, read_metric


@dataclass(frozen=True)
class PositionBin:
    """Mean drift of a run of positions in a chunk."""

    first: int
    last: int
    kld: float
    kld_se: float | None
    same_top_p: float  # a fraction
    same_top_p_se: float | None


@dataclass(frozen=True)
class Domain:
    """Drift on one of several texts."""

    name: str
    chunks: int
    metrics: dict[str, Metric]


@dataclass(frozen=True)
class Stage:
    """One step from full precision to the serving runtime."""

    name: str
    title: str
    kld: Metric  # to the reference
    added: Metric  # to that of the stage before
    step: Metric  # KLD of the stage before to this one


@dataclass(frozen=True)
class TensorCost:
    """What one tensor costs."""

    name: str
    output_error: float
    alone: Metric  # KLD of the full-precision model with this tensor
    saved: Metric  # how much lower the artifact's KLD is without it


@dataclass(frozen=True)
class Attribution:
    """Where an artifact's drift comes from."""

    positions: int
    stages: tuple[Stage, ...]
    not_measured: dict[str, str]  # stage → why
    tensors: tuple[TensorCost, ...]
    tensors_reason: str | None  # why there are none
    tensor_positions: int | None
    output_errors: dict[str, float]  # of every tensor
    findings: tuple[str, ...]


@dataclass(frozen=True)
class Greedy:
    """After how many tokens greedy texts part; intervals are of 95 %."""

    prompts: int
    source: str
    tokens: int
    median: float
    median_interval: tuple[float, float]
    at_least: bool  # the median is a lower bound
    quantiles: dict[str, float]
    identical: float  # a fraction
    identical_interval: tuple[float, float]


def read_positions(field: Field | None) -> tuple[PositionBin, ...]:
    """``per_position``; results of earlier versions have no errors there."""
    if field is None:
        return ()

    def error(item: Field, key: str) -> float | None:
        found = item.get(key)
        return found.number(0.0) if found else None

    return tuple(
        PositionBin(
            item["first"].integer(),
            item["last"].integer(),
            item["kld"].number(),
            error(item, "kld_se"),
            item["same_top_p"].number(0.0),
            error(item, "same_top_p_se"),
        )
        for item in field.items()
    )


def read_domains(field: Field | None) -> tuple[Domain, ...]:
    """``domains``."""
    return tuple(
        Domain(
            item["name"].text(),
            item["text"]["chunks"].integer(1),
            {name: read_metric(metric) for name, metric in item["metrics"].entries()},
        )
        for item in (field.items() if field else ())
    )


def read_attribution(field: Field | None) -> Attribution | None:
    """``attribution``."""
    if field is None:
        return None
    tensors, why = field.get("tensors"), field.get("tensors_reason")
    findings = [item.text() for item in field["findings"].items()]
    if tensors:
        findings += [item.text() for item in tensors["findings"].items()]
    return Attribution(
        positions=field["positions"].integer(1),
        stages=tuple(
            Stage(
                item["stage"].text(),
                item["title"].text(),
                *(read_metric(item[key]) for key in ("kld", "added_kld", "step_kld")),
            )
            for item in field["stages"].items()
        ),
        not_measured={name: reason.text() for name, reason in field["not_measured"].entries()},
        tensors=tuple(
            TensorCost(
                item["name"].text(),
                item["output_error"].number(0.0),
                read_metric(item["alone_kld"]),
                read_metric(item["saved_kld"]),
            )
            for item in (tensors["measured"].items() if tensors else ())
        ),
        tensors_reason=why.text() if why else None,
        tensor_positions=tensors["positions"].integer(1) if tensors else None,
        output_errors={name: v.number(0.0) for name, v in tensors["output_errors"].entries()} if tensors else {},
        findings=tuple(findings),
    )


def read_greedy(field: Field | None) -> Greedy | None:
    """``greedy``."""
    if field is None:
        return None
    median, identical = field["median"], field["identical"]
    return Greedy(
        prompts=field["prompts"].integer(1),
        source=field["source"].text(),
        tokens=field["tokens"].integer(1),
        median=median["value"].number(0.0),
        median_interval=_interval(median["interval"]),
        at_least=median["at_least"].value is True,
        quantiles={name: value.number(0.0) for name, value in field["quantiles"].entries()},
        identical=identical["value"].number(0.0),
        identical_interval=_interval(identical["interval"]),
    )


def _interval(field: Field) -> tuple[float, float]:
    found = [item.number(0.0) for item in field.items()]
    if len(found) != 2:
        field.fail(f"has {len(found)} ends, expected 2")
    return found[0], found[1]
