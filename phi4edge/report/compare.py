"""Results side by side: joined by what the artifact's bytes hash to, kept apart where conditions differ.

Two drift results stand in one table only if they were measured against the same reference logits, on the same text,
cut into the same chunks. Speeds stand in one table only for the same device, runtime and settings.

Ratio of mean KLD to a baseline, r = Ā / B̄ over the same n chunks: the errors of both share their chunks (a hard
chunk is hard for both), so with d_i = a_i − r b_i (its mean is 0) the delta method gives
SE(r) = sd(d) / (√n · B̄), with n − 1 in sd. Without chunks, the two standard errors are propagated as if independent.
"""

from __future__ import annotations

__all__ = ["Comparison", "Condition", "Ratio", "Row", "SpeedGroup", "SpeedRow", "compare_drift", "compare_speed"]

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from phi4edge.report.documents import Artifact, Bench, Drift, Reference, Text
from phi4edge.report.fields import Metric
from phi4edge.report.labels import Labels


@dataclass(frozen=True)
class Ratio:
    """Mean KLD divided by the baseline's."""

    value: float | None
    se: float | None
    method: str  # how the standard error came about, or why there is no ratio
    is_baseline: bool = False


@dataclass(frozen=True)
class Condition:
    """What makes drift figures comparable."""

    reference: Reference
    text: Text

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for results that may share a table."""
        r, t = self.reference, self.text
        return (r.fingerprint, r.dtype, r.encoding, t.sha256, t.context, t.chunks, t.positions)

    def differences(self, other: Condition) -> list[str]:
        """In words, what differs from ``other``."""
        names = ("reference", "reference dtype", "reference encoding", "text", "context", "chunks", "positions")
        shown = [
            (r.model, r.dtype, r.encoding, t.name, t.context, t.chunks, t.positions)
            for r, t in ((self.reference, self.text), (other.reference, other.text))
        ]
        found = []
        for i, name in enumerate(names):
            if self.key[i] != other.key[i]:
                ours, theirs = shown[0][i], shown[1][i]
                if ours == theirs:  # one name, two contents
                    ours, theirs = f"{ours} {str(self.key[i])[:8]}", f"{theirs} {str(other.key[i])[:8]}"
                found.append(f"{name} ({ours} against {theirs})")
        return found


@dataclass(frozen=True)
class Row:
    """One measured artifact in a comparison."""

    label: str
    short: str  # for plots
    artifact: Artifact
    file: str
    runtime: str  # name, version, and the settings in which the rows differ
    metrics: dict[str, Metric]
    per_chunk_kld: tuple[float, ...]
    gates: tuple[dict[str, Any], ...]
    ratio: Ratio | None = None

    def metric(self, name: str) -> Metric:
        """A metric; one that the result lacks has that as its reason."""
        return self.metrics.get(name) or Metric.missing("not in the result")

    @property
    def kld(self) -> float | None:
        """Mean KLD, nat."""
        return self.metrics["kld"].value

    @property
    def kld_se_by_chunk(self) -> float | None:
        """Standard error of the mean KLD from the spread between chunks, whose positions need not be independent."""
        chunks = self.per_chunk_kld
        return statistics.stdev(chunks) / math.sqrt(len(chunks)) if len(chunks) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """Results under one condition, lowest mean KLD first."""

    condition: Condition
    rows: tuple[Row, ...]
    baseline: Row | None
    notes: tuple[str, ...]

    def at_noise_floor(self, row: Row) -> bool:
        """Whether a row's KLD cannot be told from that of the full-precision model itself."""
        floor = self.condition.reference.noise_floor_kld
        return row.kld is not None and row.kld <= (floor or 0.0)


@dataclass(frozen=True)
class SpeedRow:
    """One timed artifact."""

    label: str
    short: str
    artifact: Artifact
    file: str
    metrics: dict[str, Metric]
    implausible: str | None = None  # why its decode speed cannot be right

    def metric(self, name: str) -> Metric:
        """A metric; one that the result lacks has that as its reason."""
        return self.metrics.get(name) or Metric.missing("not in the result")


@dataclass(frozen=True)
class SpeedGroup:
    """Speeds that may be compared: one device, one runtime, the same settings."""

    target: str
    transport: str | None
    machine: str | None
    runtime: str
    settings: dict[str, Any]
    rows: tuple[SpeedRow, ...]

    @property
    def place(self) -> str:
        """Where, in a few words."""
        threads = self.settings.get("threads")
        return (self.machine or self.target) + (f", {threads} threads" if threads else "")

    @property
    def title(self) -> str:
        """Where and how, in a line."""
        shown = {"prompt_tokens": "prompt {}", "gen_tokens": "generation {} tokens", "threads": "{} threads"}
        shown |= {"kv_type": "KV cache {}"}
        parts = [text.format(self.settings[key]) for key, text in shown.items() if self.settings.get(key) is not None]
        place = f"{self.target} over {self.transport}" if self.transport not in (None, "local") else self.target
        return ", ".join([f"{place} ({self.machine})" if self.machine else place, self.runtime, *parts])


def compare_drift(results: Sequence[Drift], labels: Labels, baseline: str | None) -> tuple[Comparison, ...]:
    """Drift results in comparisons, the largest first; ``baseline`` is the sha256 of an artifact.

    Rows of one artifact keep what tells them apart in their label.
    """
    grouped: dict[tuple[object, ...], list[Drift]] = {}
    for result in results:
        grouped.setdefault(Condition(result.reference, result.text).key, []).append(result)
    ordered = sorted(grouped.values(), key=lambda group: -len(group))
    return tuple(_comparison(group, labels, baseline) for group in ordered)


def _comparison(results: list[Drift], labels: Labels, baseline: str | None) -> Comparison:
    condition = Condition(results[0].reference, results[0].text)
    runtimes = _runtime_texts(results)
    several = {r.artifact.sha256 for r in results if sum(r.artifact.sha256 == o.artifact.sha256 for o in results) > 1}
    rows: list[Row] = []
    taken: dict[str, int] = {}
    for result, runtime in zip(results, runtimes, strict=True):
        artifact = result.artifact
        suffix = f", {runtime}" if artifact.sha256 in several and len(set(runtimes)) > 1 else ""
        label = labels.full[artifact.sha256] + suffix
        taken[label] = taken.get(label, 0) + 1
        if taken[label] > 1:
            suffix += f" (result {taken[label]})"
        rows.append(
            Row(
                label=labels.full[artifact.sha256] + suffix,
                short=labels.short[artifact.sha256] + suffix,
                artifact=labels.artifacts[artifact.sha256],
                file=result.file,
                runtime=runtime,
                metrics=result.metrics,
                per_chunk_kld=result.per_chunk_kld,
                gates=result.gates,
            )
        )
    rows.sort(key=lambda row: (row.kld is None, row.kld or 0.0, row.label))
    base = next((row for row in rows if row.artifact.sha256 == baseline), None)
    notes = list(_notes(condition, rows, runtimes))
    if base is not None:
        rows = [replace(row, ratio=_ratio(row, base, condition)) for row in rows]
        base = next(row for row in rows if row.label == base.label)
    elif baseline is not None:
        notes.append(f"The baseline {labels.full[baseline]} was not measured under these conditions: no ratios.")
    return Comparison(condition, tuple(rows), base, tuple(notes))


def _runtime_texts(results: Iterable[Drift]) -> list[str]:
    """Runtime of each result, with the settings in which they differ."""
    runtimes = [result.runtime for result in results]
    settings = [runtime.conditions for runtime in runtimes]
    keys = list(dict.fromkeys(key for known in settings for key in known))
    varying = [k for k in keys if len({json.dumps(known.get(k), sort_keys=True) for known in settings}) > 1]
    return [
        ", ".join([runtime.label, *(f"{k} {known[k]}" for k in varying if k in known)])
        for runtime, known in zip(runtimes, settings, strict=True)
    ]


def _notes(condition: Condition, rows: Sequence[Row], runtimes: Sequence[str]) -> Iterable[str]:
    if len(set(runtimes)) > 1:
        yield "The rows were not all measured in the same runtime or with the same settings; the details say which."
    references = {row.metrics["ppl_reference"].value for row in rows if "ppl_reference" in row.metrics} - {None}
    if len(references) > 1:
        low, high = min(v for v in references if v is not None), max(v for v in references if v is not None)
        yield f"The results disagree on the reference's perplexity ({low:.6g} to {high:.6g}): look into it."
    for row in rows:
        chunks, kld, wanted = row.per_chunk_kld, row.kld, condition.text.chunks
        if chunks and wanted is not None and len(chunks) != wanted:
            yield f"{row.label}: {len(chunks)} KLD values for {wanted} chunks."
        elif chunks and kld and abs(math.fsum(chunks) / len(chunks) / kld - 1) > 0.01:
            mean = math.fsum(chunks) / len(chunks)
            yield f"{row.label}: the mean over its chunks is {mean:.4g}, its mean KLD {kld:.4g}; look into it."


def _ratio(row: Row, base: Row, condition: Condition) -> Ratio:
    if row is base:
        return Ratio(1.0, None, "the baseline itself", is_baseline=True)
    ours, theirs = row.metrics["kld"], base.metrics["kld"]
    if ours.value is None or theirs.value is None:
        return Ratio(None, None, "a mean KLD is missing")
    if theirs.value <= (condition.reference.noise_floor_kld or 0.0):
        return Ratio(None, None, "the baseline's KLD is at the noise floor")
    value = ours.value / theirs.value
    a, b = row.per_chunk_kld, base.per_chunk_kld
    if len(a) == len(b) >= 2 and math.fsum(b) > 0:
        mean = math.fsum(b) / len(b)
        r = math.fsum(a) / math.fsum(b)
        spread = math.fsum((x - r * y) ** 2 for x, y in zip(a, b, strict=True)) / (len(a) - 1)
        return Ratio(value, math.sqrt(spread / len(a)) / mean, f"paired over {len(a)} chunks")
    if ours.se is None or theirs.se is None:
        return Ratio(value, None, "no standard error: one of the two has none")
    return Ratio(
        value,
        math.hypot(ours.se / theirs.value, value * theirs.se / theirs.value),
        "propagated from both standard errors as if independent",
    )


def compare_speed(results: Sequence[Bench], labels: Labels) -> tuple[SpeedGroup, ...]:
    """Speed results in groups, the largest first; rows in the order of the results."""
    grouped: dict[str, list[Bench]] = {}
    for result in results:
        settings = {key: value for key, value in result.settings.items() if key not in ("repetitions", "seed")}
        key = [result.target, result.transport, result.runtime.label, settings, _machine(result.environment)]
        grouped.setdefault(json.dumps(key, sort_keys=True), []).append(result)
    groups = []
    for group in sorted(grouped.values(), key=lambda g: -len(g)):
        taken: dict[str, int] = {}
        rows = []
        for result in group:
            sha = result.artifact.sha256
            taken[sha] = taken.get(sha, 0) + 1
            suffix = f" (result {taken[sha]})" if taken[sha] > 1 else ""
            full, short, artifact = labels.full[sha] + suffix, labels.short[sha] + suffix, labels.artifacts[sha]
            rows.append(SpeedRow(full, short, artifact, result.file, result.metrics, result.implausible))
        first = group[0]
        machine = _machine(first.environment)
        groups.append(
            SpeedGroup(first.target, first.transport, machine, first.runtime.label, first.settings, tuple(rows))
        )
    return tuple(groups)


def _machine(environment: dict[str, Any]) -> str | None:
    """What names the machine in an environment: its processor."""
    cpu = environment.get("cpu")
    if isinstance(cpu, dict):
        cpu = next((cpu[k] for k in ("model", "name", "model_name", "brand") if isinstance(cpu.get(k), str)), None)
    return cpu if isinstance(cpu, str) else None
