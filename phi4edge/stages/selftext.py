"""``--corpus self``: calibration text that the model writes itself, which needs no data.

The model is sampled in llama.cpp, from weights as good as RAM allows: float16, or rounded to q8_0 or q4_0 without data.
Sequences go in groups that are computed together. A finished group is committed, so a process that starts again goes
on with the next, and a longer text begins with the shorter one. The text is kept in the cache, by what it depends on:

    CACHE/self/<key>/groups/00000.jsonl   {"text", "domain", "seed", "sequence"}, one line a document
    CACHE/self/<key>/first-00003.jsonl    the first three groups, what a corpus of that length reads
    CACHE/self/<key>/model.gguf           while it is needed
"""

from __future__ import annotations

__all__ = ["SelfText", "load_corpus_of"]

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

from phi4edge import __version__
from phi4edge.calibration.corpus import Corpus, load_corpus, look_into, whole_samples
from phi4edge.calibration.parts import SELF, read_parts, share_of_self
from phi4edge.calibration.seeds import Seed, SeedDomain, load_seeds, seeds_of
from phi4edge.checkpoint.config import ModelConfig
from phi4edge.checkpoint.reader import CheckpointReader
from phi4edge.checkpoint.rows_ahead import RowsAhead
from phi4edge.core.atomic import write_bytes
from phi4edge.core.errors import MissingToolError, TargetError
from phi4edge.core.events import SILENT, Progress
from phi4edge.core.hashing import sha256_file, sha256_json
from phi4edge.core.memory import format_bytes
from phi4edge.core.recipe import CorpusRecipe
from phi4edge.core.workdir import RUN_FILE, Workdir
from phi4edge.measurement.reference import cache_folder
from phi4edge.model.source import QuantizedModel
from phi4edge.model.tokenizer import Tokenizer
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.parallel import read_pieces
from phi4edge.quant.scheme import parse_scheme
from phi4edge.runtimes import llama_cpp
from phi4edge.runtimes._api import Settings
from phi4edge.runtimes._sampling import SampleRequest, Written
from phi4edge.solvers import rtn
from phi4edge.solvers._api import SolverOptions
from phi4edge.stages.inputs import hash_checkpoint
from phi4edge.stages.run_reader import read_json
from phi4edge.targets.local import cgroup_limit
from phi4edge.writers import gguf
from phi4edge.writers._api import WriteOptions

MODEL = "model.gguf"
CODE = 1  # raised when the same inputs would give another text
TOGETHER = 16  # sequences of a group
TEMPERATURE, TOP_P = 1.0, 0.95
WEIGHTS = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 20 / 32}  # bytes a parameter (q4_0: with tables in q8_0), best first
_SHARE_OF_RAM = 0.6  # that weights, KV cache and buffers may take
_BUFFERS = 300 * 2**20


@dataclass(frozen=True)
class SelfText:
    """The text that a model wrote."""

    path: Path  # JSONL
    sha256: str
    weights: str  # that wrote it
    sequences: int
    tokens: int  # that were fed to the model, prompts included

    def as_dict(self) -> dict[str, Any]:
        """What a manifest keeps: nothing that differs from one machine's folders to another's."""
        return {key: value for key, value in asdict(self).items() if key != "path"}


def load_corpus_of(
    checkpoint: CheckpointReader,
    tokenizer: Tokenizer,
    recipe: CorpusRecipe,
    run: Path | None,
    *,
    held_out: int = 0,
    ram_budget: int | None = None,
    progress: Progress = SILENT,
) -> tuple[Corpus | None, SelfText | None]:
    """The corpus of ``recipe``; the model's own text is written first where it is asked for and not yet there.

    ``run`` None only checks: a corpus with text that the model would first have to write is then None.

    Raises:
        InputError, UsageError: the corpus is not usable.
        MissingToolError: own text is asked for, and llama.cpp is not installed.
        TargetError: RAM holds no weights to write it with, or llama.cpp fails.
    """
    own = None
    share = share_of_self(recipe.corpus)
    if share > 0:
        unwritten = Path(SELF)
        for part in read_parts(recipe.corpus, recipe.chat_template, unwritten):
            if part.path not in (None, unwritten):
                look_into(part, tokenizer, recipe.sequence_length)  # what cannot be read is refused before writing
        if run is None:
            _choose_weights(checkpoint.config, recipe.sequence_length, ram_budget)
            return None, None
        samples = math.ceil(recipe.samples * share)
        own = _write(checkpoint, tokenizer, recipe, samples, run, ram_budget, progress)
    corpus = load_corpus(
        recipe.corpus,
        tokenizer,
        samples=recipe.samples,
        sequence_length=recipe.sequence_length,
        seed=recipe.seed,
        chat=recipe.chat_template,
        held_out=held_out,
        sampled=own.path if own is not None else None,
    )
    return corpus, own


def _choose_weights(config: ModelConfig, length: int, ram_budget: int | None) -> str:
    """The best weights that fit into RAM with the KV cache of a group.

    What the machine has decides, not what is free at the moment, so that the choice is the same tomorrow.
    """
    reason = llama_cpp.available()
    if reason:
        raise MissingToolError(f"corpus self: {reason}", llama_cpp.INSTALL)
    group = cgroup_limit()
    total = min(psutil.virtual_memory().total, group.limit if group is not None else sys.maxsize)
    limit = ram_budget or int(total * _SHARE_OF_RAM)
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2 * length * TOGETHER
    needed = {kind: int(config.parameters * width) + cache + _BUFFERS for kind, width in WEIGHTS.items()}
    for kind, nbytes in needed.items():
        if nbytes <= limit:
            return kind
    raise TargetError(
        f"corpus self: sampling the model from q4_0 weights takes about {format_bytes(needed['q4_0'])} (estimated), "
        f"but {format_bytes(limit)} may be used",
        "calibrate with another --corpus, or on a machine with more RAM",
    )


def _write(
    checkpoint: CheckpointReader,
    tokenizer: Tokenizer,
    recipe: CorpusRecipe,
    samples: int,
    run: Path,
    ram_budget: int | None,
    progress: Progress,
) -> SelfText:
    """As many groups as give ``samples`` whole samples; those that are there already are not written again."""
    domains = load_seeds()
    inputs: dict[str, Any] = {
        "kind": "self",
        "code": f"{__version__}/{CODE}",
        "checkpoint": hash_checkpoint(checkpoint.index, run),
        "seeds": sha256_json([asdict(domain) for domain in domains]),
        "sampling": {"temperature": TEMPERATURE, "top_p": TOP_P, "together": TOGETHER, "seed": recipe.seed},
        "length": recipe.sequence_length,
        "llama_cpp": llama_cpp.version(),
    }
    folder = cache_folder() / "self" / sha256_json(inputs)[:16]
    # A text that was begun is gone on with from the same weights, whatever the budget is now.
    begun = read_json(folder / RUN_FILE)["inputs"]["weights"] if (folder / RUN_FILE).is_file() else None
    weights = begun or _choose_weights(checkpoint.config, recipe.sequence_length, ram_budget)
    count = math.ceil(samples / TOGETHER)
    with Workdir.open(folder, {**inputs, "weights": weights}) as work:
        _check_committed(work)
        with _Author(checkpoint, tokenizer, recipe, folder / MODEL, weights, progress) as author:
            while True:
                if len(work.records) < count:
                    author.load()
                    progress.start("sample", count, "group", len(work.records))
                for number in range(len(work.records), count):
                    file = _group_file(number)
                    write_bytes(folder / file, _lines(author.write(domains, number)))
                    work.commit({"group": number}, [file])
                    progress.advance()
                path = folder / f"first-{count:05d}.jsonl"
                write_bytes(path, b"".join((folder / _group_file(n)).read_bytes() for n in range(count)))
                if whole_samples(path, tokenizer, recipe.sequence_length) >= samples:
                    break
                count += 1  # tokens that fill no sample are lost, a few of every domain
        progress.finish()
        (folder / MODEL).unlink(missing_ok=True)
    tokens = count * TOGETHER * recipe.sequence_length
    return SelfText(path, sha256_file(path), weights, count * TOGETHER, tokens)


def _group_file(number: int) -> str:
    return f"groups/{number:05d}.jsonl"


def _lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def _check_committed(work: Workdir) -> None:
    """Groups from the first damaged one on are written again."""
    for count, record in enumerate(work.records):
        for name, digest in record["files"].items():
            if not (work.path / name).is_file() or sha256_file(work.path / name) != digest:
                work.drop_after(count, f"{name} is missing or damaged; it and what follows is written again")
                return


class _Author:
    """The model in llama.cpp. Use as a context manager."""

    def __init__(
        self,
        checkpoint: CheckpointReader,
        tokenizer: Tokenizer,
        recipe: CorpusRecipe,
        path: Path,
        weights: str,
        progress: Progress,
    ) -> None:
        self._checkpoint, self._tokenizer, self._recipe = checkpoint, tokenizer, recipe
        self._path, self._weights, self._progress = path, weights, progress
        self._session: llama_cpp.LlamaSession | None = None

    def write(self, domains: Sequence[SeedDomain], number: int) -> list[dict[str, Any]]:
        """The documents of group ``number``, one sequence after the other."""
        assert self._session is not None, "load comes first"
        first = number * TOGETHER
        seeds = seeds_of(domains, first + TOGETHER, self._recipe.seed)[first:]
        prompts = [[self._prompt(seed) for seed in sequence] for sequence in seeds]
        ends = [token for token in (self._tokenizer.eos_id, self._tokenizer.eot_id) if token is not None]
        request = SampleRequest(
            prompts=prompts,
            seeds=[[self._recipe.seed, first + i] for i in range(TOGETHER)],
            length=self._recipe.sequence_length,
            ends=ends,
            temperature=TEMPERATURE,
            top_p=TOP_P,
        )
        return [
            self._record(seeds[i][text.prompt], text, first + i)
            for i, texts in enumerate(self._session.sample(request))
            for text in texts
            if len(text.tokens) > len(prompts[i][text.prompt])  # otherwise the model added nothing
        ]

    def _prompt(self, seed: Seed) -> list[int]:
        tokenizer = self._tokenizer
        if seed.chat:
            question = [{"role": "user", "content": seed.text}]
            return tokenizer.encode(tokenizer.apply_chat_template(question, add_generation_prompt=True))
        head = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        return head + tokenizer.encode(seed.text)

    def _record(self, seed: Seed, text: Written, sequence: int) -> dict[str, Any]:
        tokens = text.tokens
        if not seed.chat:
            start = int(self._tokenizer.add_bos and self._tokenizer.bos_id is not None)
            tokens = tokens[start : len(tokens) - text.ended]
        # A sequence may be full in the middle of a character.
        words = self._tokenizer.decode(tokens).rstrip("\ufffd") + ("\n" if seed.chat else "\n\n")
        return {"text": words, "domain": seed.domain, "seed": seed.id, "sequence": sequence}

    def load(self) -> None:
        """Have the weights written and the model loaded, once."""
        if self._session is not None:
            return
        self._progress.note(
            f"corpus self: the model writes from its {self._weights} weights, {TOGETHER} sequences at a time"
        )
        if not self._path.is_file():
            options = WriteOptions(progress=self._progress)
            if self._weights == "f16":
                gguf.write_f16(self._checkpoint, self._path, options)
            else:
                gguf.write(_rounded(self._checkpoint, self._weights), self._path, options)
        self._session = llama_cpp.open(self._path, self._recipe.sequence_length, Settings(), TOGETHER)

    def __enter__(self) -> _Author:
        return self

    def __exit__(self, kind: object, error: object, trace: TracebackType | None) -> None:
        if self._session is not None:
            self._session.close()


def _rounded(checkpoint: CheckpointReader, scheme_name: str) -> QuantizedModel:
    """The model rounded to nearest without data, one linear at a time as a writer asks for it."""
    scheme = parse_scheme(scheme_name)
    names = tuple(checkpoint.config.linears)

    def load(name: str) -> QuantizedLinear:
        shape = checkpoint.config.linears[name]
        wanted = [(f"{name}.weight", rows) for rows in read_pieces(*shape)]
        with RowsAhead(checkpoint, wanted, torch.get_num_threads()) as rows:
            opened = partial(rows.piece, f"{name}.weight")
            return rtn.solve_rows(name, shape, opened, scheme, None, SolverOptions()).linear

    provenance = {"version": __version__, "base_model": checkpoint.index.name, "method": "rtn", "calibration": "none"}
    return QuantizedModel(checkpoint, scheme, names, load, provenance)
