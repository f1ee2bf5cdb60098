"""The first section of the page: everything about an artifact in one row, a table for each condition."""

from __future__ import annotations

__all__ = ["drift_tables", "result_section"]

from collections.abc import Iterable, Sequence

from phi4edge.report.compare import Comparison, Row, SpeedGroup, SpeedRow
from phi4edge.report.details import condition_text, drift_plots
from phi4edge.report.documents import Artifact
from phi4edge.report.numbers import figure, mebibytes, plain
from phi4edge.report.page import ABSENT, Block, Cell, Column, Heading, Paragraph, Plots, Section, Table, absent
from phi4edge.report.page import metric_cell as cell
from phi4edge.report.speeds import COLUMNS, speed_cell

_FLOOR_MARK = "†"
_UNKNOWN = Cell("not known", muted=True)
_SPEEDS = ("prefill_tps", "decode_tps", "peak_rss_bytes")


def result_section(comparisons: Sequence[Comparison], speeds: Sequence[SpeedGroup]) -> Section | None:
    """Main tables and the plots of drift; None where nothing was measured."""
    blocks = tuple(_blocks(comparisons, speeds))
    return Section("Results", blocks) if blocks else None


def _blocks(comparisons: Sequence[Comparison], speeds: Sequence[SpeedGroup]) -> Iterable[Block]:
    shown = {row.artifact.sha256 for comparison in comparisons for row in comparison.rows}
    undrifted = {row.artifact.sha256: row for group in speeds for row in group.rows if row.artifact.sha256 not in shown}
    if len(comparisons) > 1:
        yield _kept_apart(comparisons)
    for number, comparison in enumerate(comparisons, 1):
        if len(comparisons) > 1:
            yield Heading(f"Table {number}: {comparison.condition.text.name}, {comparison.condition.reference.model}")
        yield _main_table(comparison, _fitting(comparison, speeds), list(undrifted.values()) if number == 1 else [])
        plots = drift_plots(comparison)
        if plots:
            yield Plots(tuple(plots))
    if not comparisons and undrifted:
        yield Paragraph("No drift was measured for these artifacts.")
        yield _speed_table(list(undrifted.values()), speeds[0])


def drift_tables(comparisons: Sequence[Comparison]) -> list[Table]:
    """The main table of each comparison, without speeds."""
    return [_main_table(comparison, None, []) for comparison in comparisons]


def _kept_apart(comparisons: Sequence[Comparison]) -> Paragraph:
    first = comparisons[0].condition
    apart = ["; ".join(other.condition.differences(first)) for other in comparisons[1:]]
    listed = " ".join(f"Table {i} differs from table 1 in {text}." for i, text in enumerate(apart, 2))
    return Paragraph(
        f"The drift results were measured under {len(comparisons)} different conditions and stand in as many tables: "
        f"figures of one table must not be set against those of another. {listed}"
    )


def _fitting(comparison: Comparison, speeds: Sequence[SpeedGroup]) -> SpeedGroup | None:
    """The speeds that cover most of a comparison's artifacts."""
    shas = {row.artifact.sha256 for row in comparison.rows}
    return max(speeds, key=lambda group: sum(row.artifact.sha256 in shas for row in group.rows), default=None)


def _sizes(artifact: Artifact) -> list[Cell]:
    bits = artifact.bits_per_weight
    return [
        Cell(mebibytes(artifact.bytes)) if artifact.bytes else _UNKNOWN,
        Cell(plain(bits) + (" (linears)" if artifact.bits_of_linears else "")) if bits else _UNKNOWN,
    ]


def _speeds(row: SpeedRow | None, group: SpeedGroup | None) -> list[Cell]:
    if group is None:
        return []
    return [speed_cell(row, name) if row else absent(None) for name in _SPEEDS]


def _timed(group: SpeedGroup | None) -> dict[str, SpeedRow]:
    """By sha256; the first result of each."""
    return {row.artifact.sha256: row for row in reversed(group.rows)} if group else {}


def _main_table(comparison: Comparison, group: SpeedGroup | None, undrifted: Sequence[SpeedRow]) -> Table:
    base, timed = comparison.baseline, _timed(group)
    columns = (
        Column("Artifact", numeric=False),
        Column("Size", "MiB"),
        Column("Bits / weight"),
        Column("PPL"),
        Column("Mean KLD", "nat"),
        *([Column("KLD ÷ baseline")] if base else []),
        Column("99 % KLD", "nat"),
        Column("Same top-1", "%"),
        *(COLUMNS[name] for name in _SPEEDS if group),
    )
    rows = [_reference_cells(comparison, len(columns))]
    for row in comparison.rows:
        kld = cell(row.metric("kld"))
        if comparison.at_noise_floor(row):
            kld = Cell(f"{kld.text} {_FLOOR_MARK}", kld.se)
        rows.append(
            [
                Cell(row.label, tag="baseline" if row is base else ""),
                *_sizes(row.artifact),
                cell(row.metric("ppl")),
                kld,
                *([_ratio_cell(row)] if base else []),
                cell(row.metric("kld_p99")),
                cell(row.metric("same_top_p").percent()),
                *_speeds(timed.get(row.artifact.sha256), group),
            ]
        )
    for extra in undrifted:
        blanks = [absent(None)] * (4 + (base is not None))
        rows.append(
            [Cell(extra.label), *_sizes(extra.artifact), *blanks, *_speeds(timed.get(extra.artifact.sha256), group)]
        )
    return Table(columns, tuple(map(tuple, rows)), condition_text(comparison), tuple(_notes(comparison, group)))


def _reference_cells(comparison: Comparison, width: int) -> list[Cell]:
    """The full-precision model's own row: its perplexity, and a divergence of zero from itself."""
    ppl = next((row.metrics["ppl_reference"] for row in comparison.rows if "ppl_reference" in row.metrics), None)
    lead = [Cell("full precision", muted=True), ABSENT, ABSENT]
    lead += [cell(ppl) if ppl else absent("not in the results"), Cell("0", muted=True)]
    return lead + [ABSENT] * (width - len(lead))


def _ratio_cell(row: Row) -> Cell:
    ratio = row.ratio
    if ratio is None or ratio.value is None:
        return Cell(f"none ({ratio.method})" if ratio else "none", muted=True)
    if ratio.is_baseline:
        return Cell("1")
    printed = figure(ratio.value, ratio.se)
    return Cell(printed.value, printed.se)


def _notes(comparison: Comparison, group: SpeedGroup | None) -> Iterable[str]:
    yield "Rows by mean KLD. ± is one standard error; for drift, over scored positions."
    if comparison.baseline:
        methods = {row.ratio.method for row in comparison.rows if row.ratio and row.ratio.se is not None}
        how = f"; error {', or '.join(sorted(methods))}" if methods else ""
        yield f"KLD ÷ baseline: mean KLD over that of {comparison.baseline.label}{how}."
    if any(comparison.at_noise_floor(row) for row in comparison.rows):
        floor = comparison.condition.reference.noise_floor_kld or 0.0
        yield f"{_FLOOR_MARK} At or below the reference's noise floor ({plain(floor)} nat): not to be told from zero."
    tail = comparison.condition.reference.tail_mass
    if tail:
        yield (
            f"KLD is a lower bound: the reference keeps the most likely tokens only, and those that it left out, "
            f"{plain(100 * tail)} % of the probability, count as one."
        )
    known = [row.artifact.bits_of_linears for row in comparison.rows if row.artifact.bits_per_weight]
    if not all(known):
        yield "Bits / weight: bits of all tensors of the file divided by the model's parameters."
    if any(known):
        yield "(linears): bits of the linears' scheme, scales included; the file's embedding and head are not in it."
    yield from _dependence(comparison)
    if group:
        yield f"Speed and memory: {group.title}."
    runtimes = {row.runtime for row in comparison.rows}
    if len(runtimes) == 1:
        yield f"Drift measured in {next(iter(runtimes))}."
    yield from comparison.notes


def _dependence(comparison: Comparison) -> Iterable[str]:
    """How much larger the standard errors are when neighbouring positions are not taken as independent."""
    ratios = [
        row.kld_se_by_chunk / se
        for row in comparison.rows
        if row.kld_se_by_chunk and (se := row.metrics["kld"].se) and not comparison.at_noise_floor(row)
    ]
    if ratios and max(ratios) > 1.1:
        low, high = f"{min(ratios):.1f}", f"{max(ratios):.1f}"
        yield (
            "Positions of a chunk are not independent: taken from the spread between chunks, standard errors of the "
            f"mean KLD are {low if low == high else f'{low} to {high}'} times those shown."
        )


def _speed_table(rows: Sequence[SpeedRow], group: SpeedGroup) -> Table:
    columns = (Column("Artifact", numeric=False), Column("Size", "MiB"), Column("Bits / weight"))
    timed = _timed(group)
    cells = [(Cell(r.label), *_sizes(r.artifact), *_speeds(timed.get(r.artifact.sha256), group)) for r in rows]
    heads = (*columns, *(COLUMNS[name] for name in _SPEEDS))
    return Table(heads, tuple(cells), f"Speed and memory: {group.title}.")
