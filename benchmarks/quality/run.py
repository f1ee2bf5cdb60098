"""phi4edge beside its peers: one model, the same calibration tokens, the same grid, measured the same way.

    python benchmarks/quality/run.py --models s015=build/demo/model --out build/quality
    python benchmarks/quality/run.py --models easy=M1,hard=M2 --texts FOLDER --tools phi4edge,llama --grids q4_0

Rows come from candidates.toml (or ``--candidates``). Everything is kept under ``--out`` by what it was made of, so a
run that is started again makes only what is missing, and a table is always of one set of inputs. With ``--name`` the
figures go to results/NAME.json and into the README; with ``--add`` beside those that are there, of the same model,
chunks and texts, where a row of the same name is replaced. Every row says which commit made it.
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "benchmarks")]
from candidates import Candidate, Work, build, load_candidates  # noqa: E402
from evaluate import Domain, evaluate  # noqa: E402
from record import git, record, update_readme  # noqa: E402
from tables import Row, against_best_peer, table  # noqa: E402
from texts import Texts, builtin_texts, folder_texts, make_chunks  # noqa: E402

from phi4edge.core.errors import InputError, Phi4EdgeError, UsageError  # noqa: E402

SOURCES = ("benchmarks/quality", "benchmarks/peers")


def pairs(text: str) -> dict[str, Path]:
    """``name=folder,name=folder``.

    Raises:
        UsageError: a part without a name.
    """
    found = {}
    for part in text.split(","):
        name, equals, folder = part.partition("=")
        if not (name and equals and folder):
            raise UsageError(f"--models {part!r}", "write NAME=FOLDER,NAME=FOLDER")
        found[name] = Path(folder)
    return found


def chosen(candidates: Sequence[Candidate], a: argparse.Namespace) -> list[Candidate]:
    """The rows that the options leave.

    Raises:
        UsageError: an option names what no row has, or leaves nothing.
    """
    for option, asked, has in (
        ("--tools", a.tools, {c.tool for c in candidates}),
        ("--grids", a.grids, {c.grid for c in candidates}),
        ("--only", a.only, {c.name for c in candidates}),
    ):
        if unknown := set(asked or ()) - has:
            raise UsageError(
                f"{option} {', '.join(sorted(unknown))}: no such row", f"there are {', '.join(sorted(has))}"
            )
    rows = [
        c
        for c in candidates
        if (not a.tools or c.tool in a.tools)
        and (not a.grids or c.grid in a.grids)
        and (not a.only or c.name in a.only)
        and (a.slow or not c.slow)
    ]
    if not rows:
        raise UsageError("no row is left", "a slow one also needs --slow")
    return rows


def measure(work: Work, candidates: Sequence[Candidate], domains: Sequence[Domain]) -> list[Row]:
    """Make and measure every candidate on ``work``'s model."""
    rows = []
    for candidate in candidates:
        made = build(candidate, work)
        found = {domain.name: evaluate(made, work, domain) for domain in domains}
        row = {**asdict(candidate), "bytes": made.nbytes, "cost": dict(made.cost), "facts": dict(made.facts)}
        rows.append({**row, "commit": git(SOURCES)["commit"][:8], "domains": found})
        line = ", ".join(f"{name} {figures['kld']:.4f}" for name, figures in found.items())
        print(f"{work.folder.name}: {candidate.name}: KLD {line}", file=sys.stderr, flush=True)
    return rows


def kept_rows(path: Path, model: str, found: Mapping[str, Any], domains: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows of result file ``path`` beside which those of ``found`` may stand.

    Raises:
        InputError: they are of other inputs.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    before = document["results"]["models"].get(model)
    if before is None:
        raise InputError(f"{path}: has no model {model!r}", "leave out --add")
    theirs, ours = before | {"domains": document["results"]["domains"]}, found | {"domains": list(domains)}
    for part, what in (("chunks", "calibration chunks"), ("key", "weights"), ("domains", "texts")):
        if theirs.get(part) != ours[part]:
            raise InputError(f"{path}: its rows are of other {what}", "leave out --add, and make all rows")
    return [{"commit": document["git"]["commit"][:8], **row} for row in before["rows"]]


def joined(rows: Sequence[Row], kept: Sequence[Row], order: Sequence[Candidate]) -> list[Row]:
    """``rows`` and those of ``kept`` that have other names, in the order of the candidates."""
    by_name = {row["name"]: row for row in (*kept, *rows)}
    return [by_name[candidate.name] for candidate in order if candidate.name in by_name]


def parse() -> argparse.Namespace:
    """The command line."""

    def words(text: str) -> list[str]:
        return [word.strip() for word in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=pairs, required=True, help="NAME=FOLDER,… of full-precision checkpoints")
    parser.add_argument("--texts", type=Path, help="folder of texts, see texts.py; default: Python's own")
    parser.add_argument("--domains", type=words, help="evaluate on these only")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "quality", help="%(default)s")
    parser.add_argument("--candidates", type=Path, default=HERE / "candidates.toml")
    parser.add_argument("--tools", type=words, help="only rows of these tools")
    parser.add_argument("--grids", type=words, help="only rows of these grids")
    parser.add_argument("--only", type=words, help="only rows of these names")
    parser.add_argument("--slow", action="store_true", help="rows marked slow too (AutoRound's 200 iterations: hours)")
    parser.add_argument("--samples", type=int, default=64, help="calibration chunks; %(default)s")
    parser.add_argument("--length", type=int, default=512, help="tokens a chunk; %(default)s")
    parser.add_argument("--chunks", type=int, default=8, help="evaluation chunks a domain; %(default)s")
    parser.add_argument("--name", help="write results/NAME.json and the README's table")
    parser.add_argument("--add", action="store_true", help="keep the other rows that stand there")
    return parser.parse_args()


def evaluation_domains(texts: Texts, a: argparse.Namespace) -> list[Domain]:
    """What to evaluate on.

    Raises:
        UsageError: a domain that there is no text of.
    """
    names = a.domains or list(texts.evaluation)
    for name in names:
        if name not in texts.evaluation:
            raise UsageError(f"--domains {name}: no such text", f"there are {', '.join(texts.evaluation)}")
    return [Domain(name, texts.evaluation[name], a.chunks, 512) for name in names]


def main() -> int:
    """Everything, see the module's docstring; ends with a raised error's exit code."""
    try:
        a = parse()
        out = a.out.resolve()
        out.mkdir(parents=True, exist_ok=True)
        texts = folder_texts(a.texts.resolve()) if a.texts else builtin_texts(out)
        every = load_candidates(a.candidates)
        domains, candidates = evaluation_domains(texts, a), chosen(every, a)
        if a.add and not a.name:
            raise UsageError("--add keeps rows of a result file", "give its --name")
        described = [
            {
                "name": d.name,
                "chunks": d.chunks,
                "context": d.context,
                "calibrated": d.name not in texts.unseen,
                "key": d.key,
            }
            for d in domains
        ]
        models: dict[str, Any] = {}
        for name, model in a.models.items():
            chunks = out / name / "chunks.safetensors"
            made = make_chunks(model, texts, chunks, samples=a.samples, length=a.length)
            work = Work(model.resolve(), chunks, a.samples, a.length, out / name)
            models[name] = {"chunks": made, "key": work.key}
            kept = kept_rows(HERE / "results" / f"{a.name}.json", name, models[name], described) if a.add else []
            rows = joined(measure(work, candidates, domains), kept, every)
            models[name] |= {"rows": rows, "against_best_peer": against_best_peer(rows)}
    except Phi4EdgeError as error:
        print(f"Error: {error.message}" + (f"\nHint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    results = {"texts": texts.name, "domains": described, "models": models}
    if a.name:
        command = f"python {shlex.join(['benchmarks/quality/run.py', *sys.argv[1:]])}"
        record(HERE / "results" / f"{a.name}.json", command, results, SOURCES)
        update_readme(HERE / "README.md", a.name, table(results))
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
