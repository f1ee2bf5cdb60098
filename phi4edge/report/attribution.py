"""The part of the page about what drift is made of: domains, positions, greedy text, stages and tensors."""

from __future__ import annotations

__all__ = ["attribution_section", "drift_part_data", "parts_section"]

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from phi4edge.report.documents import Drift, GreedyText
from phi4edge.report.drift_parts import Attribution, Greedy, PositionBin
from phi4edge.report.drift_plots import OutputErrorPlot, PositionLine, PositionPlot, TensorPlot
from phi4edge.report.fields import Metric
from phi4edge.report.labels import Labels
from phi4edge.report.numbers import plain
from phi4edge.report.page import (
    Block,
    Cell,
    Column,
    Heading,
    Items,
    Paragraph,
    Plots,
    Section,
    Table,
    metric_cell,
)
from phi4edge.report.plots import Plot

_LINEAR = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.weight")
_MOST_LINES = 6  # artifacts in a plot by position


def drift_part_data(drifts: Sequence[Drift], labels: Labels) -> list[dict[str, Any]]:
    """What report.json holds of these parts, one object for each result that has any."""
    return [
        {
            "label": labels.full[drift.artifact.sha256],
            "file": drift.file,
            "domains": [asdict(domain) for domain in drift.domains],
            "per_position": [asdict(part) for part in drift.per_position],
            "greedy": asdict(drift.greedy) if drift.greedy else None,
            "attribution": asdict(drift.attribution) if drift.attribution else None,
        }
        for drift in drifts
        if drift.domains or drift.per_position or drift.greedy or drift.attribution
    ]


def parts_section(drifts: Sequence[Drift], greedy: Sequence[GreedyText], labels: Labels) -> Section | None:
    """Domains, greedy text and positions; None where no result has any of them."""
    blocks: list[Block] = []
    divided = [drift for drift in drifts if drift.domains]
    if divided:
        blocks.append(_domains(divided, labels))
    written = [(labels.full[d.artifact.sha256], d.greedy) for d in drifts if d.greedy is not None]
    written += [(labels.full[text.artifact.sha256], text.greedy) for text in greedy]
    if written:
        blocks.append(_greedy(written))
    plots = tuple(_positions(drifts, labels))
    if plots:
        blocks.append(Plots(plots))
    title = "Domains, positions, greedy text" if divided or plots else "Greedy text"
    return Section(title, tuple(blocks)) if blocks else None


def _domains(drifts: Sequence[Drift], labels: Labels) -> Table:
    columns = (
        Column("Artifact", numeric=False),
        Column("Domain", numeric=False),
        Column("Chunks"),
        Column("PPL ratio"),
        Column("Mean KLD", "nat"),
        Column("99 % KLD", "nat"),
        Column("Same top-1", "%"),
    )

    def cells(metrics: Mapping[str, Metric]) -> list[Cell]:
        found = [metrics.get(name) or Metric.missing("not in the result") for name in ("ppl_ratio", "kld", "kld_p99")]
        same = metrics.get("same_top_p") or Metric.missing("not in the result")
        return [*map(metric_cell, found), metric_cell(same.percent())]

    rows = []
    for drift in drifts:
        label, whole = labels.full[drift.artifact.sha256], Cell(str(drift.text.chunks or "–"))
        rows += [(Cell(label), Cell(d.name), Cell(str(d.chunks)), *cells(d.metrics)) for d in drift.domains]
        rows.append((Cell(label), Cell("all"), whole, *cells(drift.metrics)))
    return Table(columns, tuple(rows), 'Drift by domain; "all" counts every position of every domain the same.')


def _greedy(written: Sequence[tuple[str, Greedy]]) -> Table:
    columns = (
        Column("Artifact", numeric=False),
        Column("Prompts"),
        Column("Tokens"),
        Column("Median"),
        Column("95 % interval"),
        Column("10 %"),
        Column("25 %"),
        Column("Identical", "%"),
        Column("95 % interval", "%"),
    )
    rows = [
        (
            Cell(label),
            Cell(str(greedy.prompts)),
            Cell(str(greedy.tokens)),
            Cell(f"{'≥ ' if greedy.at_least else ''}{greedy.median:g}"),
            Cell("{:g} to {:g}".format(*greedy.median_interval)),
            *(Cell(f"{greedy.quantiles[q]:g}" if q in greedy.quantiles else "–") for q in ("p10", "p25")),
            Cell(f"{100 * greedy.identical:.1f}"),
            Cell("{:.1f} to {:.1f}".format(*(100 * end for end in greedy.identical_interval))),
        )
        for label, greedy in written
    ]
    caption = (
        "Greedy text: the full-precision model writes, the artifact reads along; counted are the tokens before the "
        "first at which the artifact's most likely token is another. Up to there both would have written the same."
    )
    return Table(columns, tuple(rows), caption)


def _positions(drifts: Sequence[Drift], labels: Labels) -> Iterable[Plot]:
    curved = [drift for drift in drifts if len(drift.per_position) > 1]
    shown, left = curved[:_MOST_LINES], len(curved) - _MOST_LINES
    if not shown:
        return
    more = f" {left} further artifacts are in report.json." if left > 0 else ""
    caption = f"Mean over runs of positions, bars are one standard error.{more}"

    several = len({drift.text.sha256 for drift in shown}) > 1

    def lines(value: str, scale: float) -> tuple[PositionLine, ...]:
        return tuple(
            PositionLine(
                labels.short[drift.artifact.sha256] + (f", {drift.text.name}" if several else ""),
                tuple(_point(part, value, scale) for part in drift.per_position),
            )
            for drift in shown
        )

    yield PositionPlot("Mean KLD by position", "nat", lines("kld", 1.0), caption)
    yield PositionPlot("Same top-1 by position", "%", lines("same_top_p", 100.0), caption)


def _point(part: PositionBin, value: str, scale: float) -> tuple[float, float, float | None]:
    se = getattr(part, f"{value}_se")
    return (part.first + part.last) / 2, scale * getattr(part, value), None if se is None else scale * se


def attribution_section(drifts: Sequence[Drift], labels: Labels) -> Section | None:
    """Stages and tensors of every artifact whose drift was attributed; None where none was."""
    blocks: list[Block] = []
    for drift in drifts:
        if drift.attribution is not None:
            blocks.append(Heading(f"{labels.full[drift.artifact.sha256]}, on {drift.text.name}"))
            blocks += _attribution(drift.attribution)
    return Section("Where drift comes from", tuple(blocks)) if blocks else None


def _attribution(found: Attribution) -> Iterable[Block]:
    yield Items(tuple((f"{number}.", sentence) for number, sentence in enumerate(found.findings, 1)))
    columns = (
        Column("Stage", numeric=False),
        Column("KLD to reference", "nat"),
        Column("Added", "nat"),
        Column("Step's own KLD", "nat"),
    )
    rows = tuple((Cell(s.title), metric_cell(s.kld), metric_cell(s.added), metric_cell(s.step)) for s in found.stages)
    notes = (
        "Added: to the KLD of the stage before, paired position by position; these add up to the whole. "
        "Step's own KLD: of the stage before to this one, 0 only where their logits are bit for bit the same. "
        "± is the larger of the errors over positions and between chunks.",
        *(f"{name}: not measured ({reason})." for name, reason in found.not_measured.items()),
    )
    yield Table(columns, rows, f"From full precision to the runtime, {found.positions:,} positions.", notes)
    if not found.tensors:
        reason = found.tensors_reason or "no tensor differs from full precision"
        yield Paragraph(f"Single tensors were not measured: {reason}.")
        return
    columns = (
        Column("Tensor", numeric=False),
        Column("Output error"),
        Column("KLD alone", "nat"),
        Column("KLD saved", "nat"),
    )
    rows = tuple(
        (Cell(t.name), Cell(plain(t.output_error)), metric_cell(t.alone), metric_cell(t.saved)) for t in found.tensors
    )
    caption = (
        f"Tensors that err most in the residual stream, {found.tensor_positions or 0:,} positions. Alone: the "
        "full-precision model with this one tensor of the artifact. Saved: how much lower the KLD of the "
        "artifact's weights is with this one tensor in full precision."
    )
    yield Table(columns, rows, caption)
    plots: list[Plot] = [
        TensorPlot(
            tuple(
                (t.name.removeprefix("model.").removesuffix(".weight"), t.alone.value or 0.0, t.alone.se,
                 t.saved.value or 0.0, t.saved.se)
                for t in found.tensors[:16]
            ),
            "Mean KLD of one tensor alone, and saved by restoring it; bars are one standard error.",
        )
    ]  # fmt: skip
    by_kind: dict[str, list[tuple[int, float]]] = {}
    for name, error in found.output_errors.items():
        match = _LINEAR.fullmatch(name)
        if match and error > 0:
            by_kind.setdefault(match[2], []).append((int(match[1]), error))
    if by_kind:
        series = tuple((kind, tuple(sorted(points))) for kind, points in sorted(by_kind.items()))
        plots.append(
            OutputErrorPlot(series, "‖(Ŵ − W)x‖² ÷ ‖Wx‖², mean over positions, activations of full precision.")
        )
    yield Plots(tuple(plots))
