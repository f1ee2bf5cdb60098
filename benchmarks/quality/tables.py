"""From measured rows to what a reader wants to know: the figures by domain, and ours against the best peer."""

from __future__ import annotations

__all__ = ["Row", "against_best_peer", "table"]

from collections.abc import Mapping, Sequence
from typing import Any

from evaluate import paired_ratio

Row = dict[str, Any]


def against_best_peer(rows: Sequence[Row]) -> list[Row]:
    """For every row of ours and every domain: the best peer on the same grid, and the paired ratio to it."""
    found = []
    for ours in (row for row in rows if row["tool"] == "phi4edge"):
        peers = [row for row in rows if row["grid"] == ours["grid"] and row["tool"] != "phi4edge"]
        ratios = {}
        for domain, figures in ours["domains"].items() if peers else ():
            best = min(peers, key=lambda row: row["domains"][domain]["kld"])
            ratio, se = paired_ratio(figures["per_chunk_kld"], best["domains"][domain]["per_chunk_kld"])
            ratios[domain] = {"peer": best["name"], "ratio": ratio, "se": se}
        if ratios:
            found.append({"name": ours["name"], "grid": ours["grid"], "domains": ratios})
    return found


def plus_minus(value: float, se: float | None, digits: int = 4) -> str:
    """``0.1234 ± 0.0012``."""
    return f"{value:.{digits}f}" + ("" if se is None else f" ± {se:.{digits}f}")


def made_by(rows: Sequence[Row]) -> str:
    """Which commit made which of our rows, in words, if there are any; peers are what their pins say."""
    commits: dict[str, list[str]] = {}
    for row in rows:
        if row["tool"] == "phi4edge":
            commits.setdefault(row.get("commit", "unknown"), []).append(row["name"])
    parts = [f"{commit}: {', '.join(names)}" for commit, names in commits.items()]
    return "phi4edge at " + "; ".join(parts) + "." if parts else ""


def table(results: Mapping[str, Any]) -> str:
    """The README's tables of a result file."""
    domains = results["domains"]
    heads = [f"{d['name']}{'' if d['calibrated'] else ' (not calibrated on)'}" for d in domains]
    lines: list[str] = []
    for model, found in results["models"].items():
        lines += [
            f"### {model}",
            "",
            f"Mean KLD to the full-precision model ± standard error, by {domains[0]['chunks']} chunks.",
            "",
        ]
        lines += [
            "| grid | tool | MiB | CPU s | peak RSS, MiB | " + " | ".join(heads) + " |",
            "|---" * (5 + len(heads)) + "|",
        ]
        for row in sorted(found["rows"], key=lambda row: [r["grid"] for r in found["rows"]].index(row["grid"])):
            cost, size = row["cost"], row["bytes"]
            klds = " | ".join(plus_minus(f["kld"], f["kld_se"]) for f in row["domains"].values())
            name = f"**{row['name']}**" if row["tool"] == "phi4edge" else row["name"]
            mib = "–" if size is None else f"{size / 2**20:.1f}"
            spent = f"{cost['cpu_seconds']:.0f} | {cost['peak_rss_bytes'] / 2**20:.0f}"
            if row["facts"].get("resumed"):
                spent = "not measured (resumed) | not measured"
            lines.append(f"| {row['grid']} | {name} | {mib} | {spent} | {klds} |")
        if by := made_by(found["rows"]):
            lines += ["", by]
        if found["against_best_peer"]:
            lines += ["", "Ratio of ours to the best peer of the same grid in that domain, chunks paired:", ""]
            lines += ["| grid | ours | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]
            for row in found["against_best_peer"]:
                cells = " | ".join(
                    f"{plus_minus(r['ratio'], r['se'], 2)} ({r['peer']})" for r in row["domains"].values()
                )
                lines.append(f"| {row['grid']} | {row['name']} | {cells} |")
        lines.append("")
    return "\n".join(lines)
