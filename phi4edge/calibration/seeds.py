"""What a model is given to go on with when it writes its own calibration text: ``calibration/seeds.toml``.

Which seeds a sequence begins with depends on its number alone, so that a longer text begins like a shorter one.
"""

from __future__ import annotations

__all__ = ["SEEDS", "Seed", "SeedDomain", "load_seeds", "seeds_of"]

import random
from collections.abc import Sequence
from dataclasses import dataclass

from phi4edge.core.errors import InputError
from phi4edge.core.resources import data_folder
from phi4edge.core.settings import Table, read_toml

SEEDS = "seeds"  # the file's name in calibration/, which is no corpus


@dataclass(frozen=True)
class Seed:
    """One beginning."""

    id: str  # language and domain, kind and number: "en.prose.opener.3"
    domain: str
    text: str
    chat: bool  # a question to be answered, not a text to go on with


@dataclass(frozen=True)
class SeedDomain:
    """One domain: its share of the sequences, and its seeds by language, in the order of the file."""

    name: str
    share: float
    voices: tuple[tuple[Seed, ...], ...]


def load_seeds() -> tuple[SeedDomain, ...]:
    """The seeds that travel with phi4edge."""
    path = data_folder("calibration") / f"{SEEDS}.toml"
    table = Table(read_toml(path), ("domain", "seeds"), str(path))
    voices: dict[str, list[tuple[Seed, ...]]] = {}
    for entry in table.tables("seeds", ("domain", "language", "openers", "questions"), required=True):
        domain, language = entry.string("domain"), entry.string("language")
        found = [
            Seed(f"{language}.{domain}.{key[:-1]}.{number}", domain, text, key == "questions")
            for key in ("openers", "questions")
            for number, text in enumerate(entry.strings(key, default=()))
        ]
        voices.setdefault(domain, []).append(tuple(found))
    domains = [(t.string("name"), t.number("share")) for t in table.tables("domain", ("name", "share"), required=True)]
    if {name for name, _ in domains} != set(voices):
        raise InputError(f"{path}: seeds are of {sorted(voices)}, shares of {sorted(name for name, _ in domains)}")
    return tuple(SeedDomain(name, share, tuple(voices[name])) for name, share in domains)


def seeds_of(domains: Sequence[SeedDomain], sequences: int, seed: int) -> list[list[Seed]]:
    """The seeds of the first ``sequences`` sequences, each in the order in which it takes them.

    Every sequence is of one domain, the one furthest below its share, and of one of its languages, which take turns;
    it begins with the seed after the one that the last such sequence began with.
    """
    whole = sum(domain.share for domain in domains)
    given = [0] * len(domains)
    chosen: list[list[Seed]] = []
    for number in range(sequences):
        turn = max(range(len(domains)), key=lambda d: domains[d].share / whole * (number + 1) - given[d])
        voices = domains[turn].voices
        round_, language = divmod(given[turn], len(voices))
        voice = list(voices[language])
        random.Random(f"{seed} {domains[turn].name} {language}").shuffle(voice)
        first = round_ % len(voice)
        chosen.append(voice[first:] + voice[:first])
        given[turn] += 1
    return chosen
