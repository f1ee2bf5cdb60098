"""``phi4edge report RESULT… --out DIR``."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import click

from phi4edge.cli.options import common
from phi4edge.cli.render import emit, table
from phi4edge.report.build import Report, build_report, write_report
from phi4edge.report.card import fill_card
from phi4edge.report.numbers import mebibytes, with_error


def _text(report: Report, page: Path) -> str:
    parts = [report.data["summary"]]
    for comparison in report.comparisons:
        rows = []
        for row in comparison.rows:
            kld, top, ratio = row.metric("kld"), row.metric("same_top_p").percent(), row.ratio
            rows.append(
                (
                    row.label,
                    mebibytes(row.artifact.bytes) if row.artifact.bytes else "–",
                    "not measured" if kld.value is None else with_error(kld.value, kld.se),
                    "–" if ratio is None or ratio.value is None else with_error(ratio.value, ratio.se),
                    "not measured" if top.value is None else with_error(top.value, top.se),
                )
            )
        headers = ("artifact", "MiB", "mean KLD (nat)", "÷ baseline", "same top-1 (%)")
        kept = (0, 1, 2, 3, 4) if comparison.baseline else (0, 1, 2, 4)
        parts.append(table([headers[i] for i in kept], [[r[i] for i in kept] for r in rows], range(1, len(kept))))
    return "\n\n".join([*parts, f"report: {page}"])


@click.command("report")
@click.argument("results", metavar="RESULT…", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for the report.")
@click.option("--title", help="Title of the page.  [default: the model's name]")
@click.option("--baseline", metavar="NAME", help="Artifact that mean KLDs are divided by.")
@click.option(
    "--card",
    "cards",
    multiple=True,
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Put an artifact's drift into its model card too; may be repeated.",
)
@click.option("--open", "open_page", is_flag=True, help="Show the page in a browser.")
@common
def command(
    results: tuple[Path, ...],
    out: Path,
    title: str | None,
    baseline: str | None,
    cards: tuple[Path, ...],
    open_page: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Put results side by side: report.json, report.md and one self-contained report.html in folder --out.

    RESULT is a JSON document of `drift`, `bench`, `quantize` or `export`, or a folder that is searched for them.
    Artifacts are joined by SHA-256; what was measured under different conditions stands in different tables.
    """
    report = build_report(results, title=title, baseline=baseline)
    for card in cards:
        fill_card(card, results)
    files = write_report(report, out)
    for note in () if quiet else report.notes:
        click.echo(f"Note: {note}", err=True)
    if open_page and not webbrowser.open(files["html"].resolve().as_uri()):
        click.echo(f"Note: no browser to open {files['html']} with", err=True)
    written = {kind: str(path) for kind, path in files.items()}
    data = report.data | {"out": str(out), "cards": [str(card) for card in cards], "files": written}
    emit("report", data, _text(report, files["html"]), as_json=as_json)
