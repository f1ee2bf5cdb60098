"""The texts of a comparison: one file of token chunks that every tool calibrates on, and evaluation texts by domain.

A folder of texts has ``calibration/*.txt`` or ``*.jsonl``, a domain each with an equal share of the chunks, and
``evaluation/<domain>.txt``. Without one, the kinds of text that every Python carries are the domains, calibrated on
one half and evaluated on the other, but for one kind that is only evaluated on. A domain that calibration did not see
is told by its name.

The chunks are safetensors, ``tokens`` [samples, length] int64, with the samples' ``domains`` in the metadata.

    python benchmarks/quality/texts.py MODEL chunks.safetensors --texts FOLDER --samples 64 --length 512
"""

from __future__ import annotations

__all__ = ["Texts", "builtin_texts", "folder_texts", "make_chunks"]

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from phi4edge.calibration.corpus import load_corpus
from phi4edge.calibration.installed import KINDS
from phi4edge.core.atomic import write_bytes
from phi4edge.core.errors import InputError
from phi4edge.core.hashing import sha256_bytes
from phi4edge.model.tokenizer import load_tokenizer

UNSEEN = "python-questions"  # of the builtin kinds, the one that is only evaluated on


@dataclass(frozen=True)
class Texts:
    """What to calibrate on and what to evaluate on, by domain; values are what ``--corpus`` and ``--text`` take."""

    name: str
    calibration: Mapping[str, str]
    evaluation: Mapping[str, str]

    @property
    def unseen(self) -> list[str]:
        """Domains that are evaluated and have no text of their own in calibration."""
        return [domain for domain in self.evaluation if domain not in self.calibration]


def folder_texts(folder: Path) -> Texts:
    """The texts in ``folder``.

    Raises:
        InputError: no calibration or no evaluation text in it.
    """
    calibration = [p for p in sorted((folder / "calibration").glob("*")) if p.suffix in (".txt", ".jsonl")]
    evaluation = sorted((folder / "evaluation").glob("*.txt"))
    for kind, found in (("calibration/*.txt or *.jsonl", calibration), ("evaluation/*.txt", evaluation)):
        if not found:
            raise InputError(f"{folder}: has no {kind}")
    return Texts(folder.name, {p.stem: str(p) for p in calibration}, {p.stem: str(p) for p in evaluation})


def builtin_texts(scratch: Path) -> Texts:
    """What an installed Python carries, a domain a kind; recipes of one part each are written into ``scratch``."""
    recipes = {kind: scratch / f"{kind}.toml" for kind in KINDS}
    for kind, recipe in recipes.items():
        write_bytes(recipe, f'[[part]]\nkind = "{kind}"\n'.encode())
    calibration = {kind: str(recipe) for kind, recipe in recipes.items() if kind != UNSEEN}
    return Texts("builtin", calibration, {kind: f"{recipe}:eval" for kind, recipe in recipes.items()})


def make_chunks(model: Path, texts: Texts, out: Path, *, samples: int, length: int, seed: int = 0) -> dict[str, Any]:
    """Cut ``samples`` chunks from the calibration texts, in equal shares, mixed, into ``out``; what they are.

    Raises:
        InputError: the model has no tokenizer, or a text is too short for its share.
    """
    tokenizer = load_tokenizer(model)
    share, rest = divmod(samples, len(texts.calibration))
    pieces, domains = [], []
    for number, (domain, spec) in enumerate(texts.calibration.items()):
        count = share + (number < rest)
        if count:
            pieces.append(load_corpus(spec, tokenizer, samples=count, sequence_length=length, seed=seed).tokens)
            domains += [domain] * count
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    tokens = torch.cat(pieces)[order].contiguous()
    domains = [domains[i] for i in order.tolist()]
    write_bytes(out, save({"tokens": tokens}, metadata={"domains": json.dumps(domains)}))
    return {
        "texts": texts.name,
        "samples": samples,
        "length": length,
        "seed": seed,
        "chunks_by_domain": {domain: domains.count(domain) for domain in texts.calibration},
        "sha256": sha256_bytes(tokens.numpy().tobytes()),
    }


def main() -> None:
    """The command line; prints what was made as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--texts", type=Path, help="folder of texts; default: Python's own")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    texts = folder_texts(a.texts) if a.texts else builtin_texts(a.out.parent)
    print(json.dumps(make_chunks(a.model, texts, a.out, samples=a.samples, length=a.length, seed=a.seed), indent=2))


if __name__ == "__main__":
    main()
