"""Make a folder of texts in four domains, as the tables of README.md have them, from public sets that the user has.

    python benchmarks/quality/development_texts.py DATA build/texts

DATA holds ``wikitext2_valid.txt`` (the raw validation split), ``gsm8k_train.jsonl`` (``question``, ``answer``) and
``mgsm/mgsm_<language>.tsv`` (question, tab, number). Each is cut in two by position, calibration first: prose by lines
at a heading, problems by number; code is the standard library of the Python that runs this, modules by a hash of their
names. MGSM in French is only evaluated on; so the four domains of evaluation are three that calibration has seen, in
other texts, and a language that it has not.
"""

from __future__ import annotations

__all__ = ["write_texts"]

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from phi4edge.calibration.installed import installed_documents

LANGUAGES = ("bn", "de", "es", "ja", "ru", "sw", "te", "th", "zh")
UNSEEN = "fr"


def write_texts(data: Path, out: Path) -> None:
    """Write ``out/calibration`` and ``out/evaluation``."""
    for folder in ("calibration", "evaluation"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    lines = (data / "wikitext2_valid.txt").read_text().splitlines(keepends=True)
    headings = [i for i, line in enumerate(lines) if line.startswith(" = ") and not line.startswith(" = =")]
    middle = next(i for i in headings if i >= len(lines) // 2)
    _halves(out, "prose", ["".join(lines[:middle])], ["".join(lines[middle:])])
    problems = [json.loads(line) for line in (data / "gsm8k_train.jsonl").read_text().splitlines()]
    worked = [f"Question: {problem['question']}\nAnswer: {problem['answer']}" for problem in problems]
    _halves(out, "math", worked[: len(worked) // 2], worked[len(worked) // 2 :])
    seen, unseen = (
        [document.text for document in installed_documents("python-sources", evaluation=half)] for half in (False, True)
    )
    _halves(out, "code", seen, [_beginning(text) for text in unseen])
    _write(out / "calibration" / "languages.jsonl", _mgsm(data, LANGUAGES))
    (out / "evaluation" / "french.txt").write_text("\n\n".join(_mgsm(data, (UNSEEN,))))


def _beginning(module: str, characters: int = 2000) -> str:
    """Whole lines: what is evaluated on is the first few thousand tokens, and shall not be a single module."""
    return module[:characters].rpartition("\n")[0] if len(module) > characters else module


def _mgsm(data: Path, languages: Iterable[str]) -> list[str]:
    """Questions, the languages taking turns."""
    tables = [(data / "mgsm" / f"mgsm_{language}.tsv").read_text().splitlines() for language in languages]
    return [row.rsplit("\t", 1)[0] for rows in zip(*tables, strict=True) for row in rows]


def _halves(out: Path, domain: str, calibration: list[str], evaluation: list[str]) -> None:
    _write(out / "calibration" / f"{domain}.jsonl", calibration)
    (out / "evaluation" / f"{domain}.txt").write_text("\n\n".join(evaluation))


def _write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    write_texts(arguments.data, arguments.out)


if __name__ == "__main__":
    main()
