"""Drift beyond the main table: its spread over positions, what was not put in that table, gates, and the plots."""

from __future__ import annotations

__all__ = ["condition_text", "detail_section", "drift_plots", "gate_section", "role"]

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from phi4edge.report.compare import Comparison, Row
from phi4edge.report.numbers import plain, with_error
from phi4edge.report.page import ABSENT, Block, Cell, Column, Section, Table
from phi4edge.report.page import metric_cell as cell
from phi4edge.report.plots import Plot, QuantilePlot, QuantileRow, SizePlot, SizePoint
from phi4edge.report.summary import headline

_QUANTILES = {"kld_median": "50 %", "kld_p90": "90", "kld_p95": "95", "kld_p99": "99", "kld_p999": "99.9"}
_MAIN = {"ppl", "ppl_reference", "kld", "kld_p99", "same_top_p"}  # columns of the main table
_COLUMNS = {
    "ppl_ratio": Column("PPL ratio"),
    "ln_ppl_ratio": Column("ln PPL ratio"),
    "kld_max": Column("Max KLD", "nat"),
    "kld_p999": Column("99.9 %", "nat"),
    "kld_p95": Column("95 %", "nat"),
    "kld_p90": Column("90 %", "nat"),
    "kld_median": Column("Median", "nat"),
    "rms_delta_p": Column("RMS Δp", "%"),
    "mean_delta_p": Column("Mean Δp", "%"),
}
_PERCENT = {"rms_delta_p", "mean_delta_p"}
_JSON_ONLY = re.compile(r"(kld|delta_p)_(p\d+|median|min|max)|ln_ppl_correlation")
_GATE_COLUMNS = ("name", "limit", "value", "outcome", "passed")
_GATE_INNER = {"metric", "se", "lower", "upper", "confidence"}  # said elsewhere in the table, or derived from it


def condition_text(comparison: Comparison) -> str:
    """Reference, text and extent in a sentence."""
    r, t = comparison.condition.reference, comparison.condition.text
    dtype = f", {r.dtype}" if r.dtype else ""
    extent = f"chunks of {t.context:,} tokens"
    if t.chunks is not None:
        extent = f"{t.chunks:,} {extent}"
    if t.positions is not None:
        extent += f", {t.positions:,} positions scored"
    return f"Against {r.model} at full precision{dtype}; text {t.name}, {extent}."


def role(row: Row, comparison: Comparison) -> str:
    """How a plot marks a row: the baseline, the best of its size, or one of the others."""
    if row is comparison.baseline:
        return "baseline"
    return "best" if comparison.baseline is not None and row is headline(comparison) else "other"


def drift_plots(comparison: Comparison) -> list[Plot]:
    """Mean KLD against size, and the spread of KLD over positions."""
    points, left_out, spreads = [], [], []
    for row in comparison.rows:
        mark, kld = role(row, comparison), row.metrics["kld"]
        if row.artifact.bytes and kld.value is not None and kld.value > 0:
            points.append(SizePoint(row.short, row.artifact.bytes / 2**20, kld.value, kld.se, mark))
        else:
            left_out.append(row.short)
        values = {text: row.metric(name).value for name, text in _QUANTILES.items()}
        positive = {text: value for text, value in values.items() if value is not None and value > 0}
        if len(positive) >= 2:
            spreads.append(QuantileRow(row.short, positive, kld.value if kld.value and kld.value > 0 else None, mark))
    floor = comparison.condition.reference.noise_floor_kld
    plots: list[Plot] = []
    if points:
        plots.append(SizePlot(tuple(points), floor if floor and floor > 0 else None, tuple(left_out)))
    if spreads:
        plots.append(QuantilePlot(tuple(spreads)))
    return plots


def detail_section(comparisons: Sequence[Comparison]) -> Section | None:
    """A table for each comparison; None where there is none."""
    blocks: list[Block] = []
    for number, comparison in enumerate(comparisons, 1):
        lead = f"Table {number}: " if len(comparisons) > 1 else ""
        blocks.append(_details(comparison, f"{lead}{condition_text(comparison)} Further quantiles are in report.json."))
    return Section("Drift in detail", tuple(blocks)) if blocks else None


def _details(comparison: Comparison, caption: str) -> Table:
    present = list(dict.fromkeys(name for row in comparison.rows for name in row.metrics))
    names = [name for name in _COLUMNS if name in present]
    others = [n for n in present if n not in {*_COLUMNS, *_MAIN} and not _JSON_ONLY.fullmatch(n)]
    units = {n: next((r.metrics[n].unit for r in comparison.rows if n in r.metrics), None) or "" for n in others}
    several = len({row.runtime for row in comparison.rows}) > 1
    chunked = any(row.kld_se_by_chunk for row in comparison.rows)
    columns = [Column("Artifact", numeric=False), *(_COLUMNS[name] for name in names)]
    columns += [Column(name, units[name]) for name in others]
    columns += [Column("SE of mean KLD by chunk", "nat")] if chunked else []
    columns += [Column("Runtime", numeric=False)] if several else []
    rows = []
    for row in comparison.rows:
        cells = [Cell(row.label)]
        cells += [cell(row.metric(n).percent() if n in _PERCENT else row.metric(n)) for n in (*names, *others)]
        if chunked:
            cells.append(Cell(plain(row.kld_se_by_chunk)) if row.kld_se_by_chunk else ABSENT)
        rows.append((*cells, Cell(row.runtime)) if several else tuple(cells))
    return Table(tuple(columns), tuple(rows), caption)


def gate_section(comparisons: Sequence[Comparison]) -> Section | None:
    """Limits that were asked for, and whether they were kept; None where none was asked for."""
    gates = [(row, gate) for comparison in comparisons for row in comparison.rows for gate in row.gates]
    if not gates:
        return None
    present = list(dict.fromkeys(key for _, gate in gates for key in gate))
    keys = [key for key in _GATE_COLUMNS if key in present]
    keys += [key for key in present if key not in (*_GATE_COLUMNS, *_GATE_INNER)]
    rows = [(Cell(row.label), *(_gate_cell(gate, key) for key in keys)) for row, gate in gates]
    heads = ("gate" if key == "name" else key.replace("_", " ") for key in keys)
    columns = (Column("Artifact", numeric=False), *(Column(head.capitalize(), numeric=False) for head in heads))
    caption = "Limits that were asked for, in the metric's own unit, and whether they were kept."
    return Section("Gates", (Table(columns, tuple(rows), caption, tuple(_gate_notes([g for _, g in gates]))),))


def _gate_notes(gates: Sequence[dict[str, Any]]) -> Iterable[str]:
    levels = {gate["confidence"] for gate in gates if isinstance(gate.get("confidence"), float)}
    for level in sorted(levels):
        yield f"Decided at {100 * level:g} % confidence; undecided: the limit lies within the error of the value."


def _gate_cell(gate: dict[str, Any], key: str) -> Cell:
    value, se = gate.get(key), gate.get("se")
    if isinstance(value, bool):
        return Cell("yes" if value else "NO")
    if isinstance(value, int | float) and math.isfinite(value):
        if key == "limit":
            return Cell(f"{value:g}")
        error = float(se) if key == "value" and isinstance(se, int | float) else None
        return Cell(with_error(float(value), error))
    return ABSENT if value is None else Cell(str(value))
