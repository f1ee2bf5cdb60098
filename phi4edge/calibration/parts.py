"""What ``--corpus`` names: a corpus by name, a recipe, a file, or several of them mixed by share.

builtin                                   a recipe in calibration/
builtin:eval                              its evaluation half
notes.jsonl                               one file
chunks.safetensors                        tokens that are cut already
builtin=0.5,notes.jsonl=0.3,self=0.2      samples of each in that proportion
self                                      text that the model wrote itself (made by phi4edge.stages.selftext)
"""

from __future__ import annotations

__all__ = ["SELF", "Part", "documents", "read_parts", "share_of_self"]

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from phi4edge.calibration.installed import KINDS, installed_documents
from phi4edge.calibration.seeds import SEEDS
from phi4edge.calibration.sources import Document, file_documents
from phi4edge.core.errors import InputError, UsageError, closest
from phi4edge.core.resources import data_folder
from phi4edge.core.settings import Table, read_toml

SELF = "self"
_PART_KEYS = ("kind", "path", "share", "chat", "domain")


@dataclass(frozen=True)
class Part:
    """One source of a corpus and its share of the samples."""

    kind: str
    path: Path | None
    share: float
    chat: bool
    domain: str  # of the documents that name none of their own
    evaluation: bool = False  # the evaluation half is meant


def read_parts(spec: str, chat: bool | None, sampled: Path | None = None) -> list[Part]:
    """The parts of corpus ``spec``; ``sampled`` is where the model's own text lies, if it was made.

    Raises:
        InputError, UsageError: no such corpus, a bad recipe, or shares that are none.
    """
    entries = _entries(spec)
    parts: list[Part] = []
    for name, share in entries:
        found = _named(name, chat, sampled)
        whole = sum(part.share for part in found) if len(entries) > 1 else 1.0
        parts += [replace(part, share=part.share * share / whole) for part in found]
    return parts


def share_of_self(spec: str) -> float:
    """Which share of the samples of ``spec`` the model's own text has; 0 where it is not named."""
    entries = _entries(spec)
    return sum(share for name, share in entries if name == SELF) / sum(share for _, share in entries)


def documents(part: Part) -> Iterator[Document]:
    """The documents of a part, in a fixed order."""
    if part.path is not None:
        yield from file_documents(part.path)
    else:
        yield from installed_documents(part.kind, evaluation=part.evaluation)


def _entries(spec: str) -> list[tuple[str, float]]:
    """``NAME=SHARE,…`` as pairs; a spec without a comma or a share, or the name of a file, is one entry."""
    if Path(spec).exists() or not ("," in spec or "=" in spec):
        return [(spec, 1.0)]
    entries: list[tuple[str, float]] = []
    for item in spec.split(","):
        name, equals, text = item.strip().rpartition("=")
        if not equals:
            raise UsageError(f"corpus {spec!r}: {item.strip()!r} has no share", "write NAME=SHARE,NAME=SHARE")
        try:
            share = float(text)
        except ValueError:
            share = math.nan
        if not name or not 0 < share < math.inf:
            raise UsageError(
                f"corpus {spec!r}: {item.strip()!r} is no name with a share above 0",
                "write NAME=SHARE,NAME=SHARE, for example builtin=0.7,notes.jsonl=0.3",
            )
        if name in dict(entries):
            raise UsageError(f"corpus {spec!r}: names {name!r} twice")
        entries.append((name, share))
    return entries


def _named(spec: str, chat: bool | None, sampled: Path | None) -> list[Part]:
    """The parts of one name or path."""
    if spec == SELF:
        if sampled is None:
            raise InputError(
                f"corpus {SELF!r}: the model's own text is made by `phi4edge calibrate` and `phi4edge quantize` alone",
                "give a text, a JSONL file or the name of a corpus",
            )
        return [Part("file", sampled, 1.0, chat=False, domain=SELF)]  # its chats are in the template already
    name, _, half = spec.partition(":") if not Path(spec).exists() else (spec, "", "")
    if half not in ("", "eval", "calibration"):
        raise UsageError(f"corpus {spec!r}: no half called {half!r}", "write NAME, NAME:calibration or NAME:eval")
    recipe = Path(name) if name.endswith(".toml") else data_folder("calibration") / f"{name}.toml"
    looks_like_name = "/" not in name and "." not in name
    if not recipe.is_file() or name == SEEDS:
        if looks_like_name and not Path(name).exists():
            known = sorted({*(p.stem for p in data_folder("calibration").glob("*.toml")), SELF} - {SEEDS})
            near = closest(name, known)
            hint = f"did you mean {near!r}?" if near else f"known corpora: {', '.join(known)}; or give a file"
            raise InputError(f"no corpus {name!r}", hint)
        if half:
            raise UsageError(f"corpus {spec!r}: a file has no halves", "evaluate on another file")
        return [Part("file", Path(name), 1.0, bool(chat), Path(name).stem)]
    table = Table(read_toml(recipe), ("description", "part"), str(recipe))
    tables = table.tables("part", _PART_KEYS, required=True)
    return [replace(_part(part, recipe.parent, chat), evaluation=half == "eval") for part in tables]


def _part(table: Table, folder: Path, chat: bool | None) -> Part:
    """One [[part]] of a recipe in ``folder``."""
    kind = table.choice("kind", ("file", *KINDS), "file")
    path = folder / table.string("path") if kind == "file" else None
    share = table.number("share") if "share" in table else 1.0
    said = table.boolean("chat", False)
    domain = table.string("domain", path.stem if path is not None else kind)
    return Part(kind, path, share, said if chat is None else chat, domain)
