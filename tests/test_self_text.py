"""Text that the model writes for its own calibration: sampled rightly, reproducibly, and resumed without a trace."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from phi4edge.calibration.corpus import load_corpus
from phi4edge.calibration.seeds import load_seeds, seeds_of
from phi4edge.checkpoint.reader import CheckpointReader, open_checkpoint
from phi4edge.core.errors import InputError, TargetError
from phi4edge.core.recipe import CorpusRecipe, Recipe
from phi4edge.model.forward import stream_logits
from phi4edge.model.tokenizer import load_tokenizer
from phi4edge.runtimes import llama_cpp as runtime
from phi4edge.runtimes._api import Settings
from phi4edge.runtimes._sampling import SampleRequest, Stream, Written, nucleus
from phi4edge.stages.calibrate import SELF_TEXT, calibrate
from phi4edge.stages.calibrate import plan as plan_calibration
from phi4edge.stages.inputs import check_tokenizer
from phi4edge.stages.quantize import quantize
from phi4edge.stages.selftext import TOGETHER, load_corpus_of
from phi4edge.writers._api import WriteOptions
from phi4edge.writers.gguf import write_f16

with_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
OWN = CorpusRecipe("self", samples=24, sequence_length=64)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHI4EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files_of(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*.jsonl"))}


def test_the_nucleus_is_sampled_in_the_models_proportions() -> None:
    p = np.array([0.05, 0.4, 0.3, 0.2, 0.05])
    logits = np.log(p).astype(np.float32)
    uniform = np.random.default_rng(0).random(20000)
    counts = Counter(nucleus(logits, 1.0, 0.85, u) for u in uniform)
    assert set(counts) == {1, 2, 3}  # .4 + .3 is below .85, with .2 it is reached
    for token in counts:
        assert counts[token] / 20000 == pytest.approx(p[token] / 0.9, abs=0.01)
    assert {nucleus(logits, 1.0, 1e-9, u) for u in uniform[:50]} == {1}
    sharper = Counter(nucleus(logits, 0.5, 1.0, u) for u in uniform)
    assert sharper[1] / 20000 == pytest.approx(0.16 / (p**2).sum(), abs=0.01)


def test_a_flat_distribution_over_a_large_vocabulary_has_a_large_nucleus() -> None:
    logits = np.zeros(4096, dtype=np.float32)
    assert nucleus(logits, 1.0, 0.75, 0.0) == 0
    assert nucleus(logits, 1.0, 0.75, 1.0 - 1e-12) == 3071


def test_a_stream_takes_its_prompts_in_turn_and_starts_each_in_an_empty_cache() -> None:
    prompts = [[5, 6], [7]]
    stream = Stream(prompts, [0], SampleRequest([prompts], [[0]], 7, [9], top_p=1e-9))
    certain = {token: np.eye(10, dtype=np.float32)[token] * 50 for token in (1, 2, 9)}
    fed = []
    for token in (1, 1, 2, 9, 1, 2, 1):  # what the model is certain of after each token that is fed
        fed.append((stream.token, stream.position))
        stream.take(certain[token])
    stream.close()
    assert fed == [(5, 0), (6, 1), (1, 2), (2, 3), (7, 0), (1, 1), (2, 2)]
    assert stream.written == [Written(0, [5, 6, 1, 2, 9], True), Written(1, [7, 1, 2], False)]


def test_more_sequences_begin_with_the_fewer_and_cover_domains_and_languages() -> None:
    domains = load_seeds()
    chosen = seeds_of(domains, 160, 0)
    assert seeds_of(domains, 16, 0) == chosen[:16]
    assert seeds_of(domains, 16, 1) != chosen[:16]
    counts = Counter(sequence[0].domain for sequence in chosen)
    assert counts == {"prose": 40, "mathematics": 32, "code": 32, "chat": 32, "languages": 24}
    languages = {seed.id.split(".")[0] for sequence in chosen for seed in sequence}
    assert len(languages) >= 13
    assert {"en", "es", "fr", "de", "it", "pt", "ru", "zh", "ja", "ko", "ar", "hi", "th", "sw"} <= languages
    every = [seed for domain in domains for voice in domain.voices for seed in voice]
    assert len({seed.id for seed in every}) == len({seed.text for seed in every}) == len(every)
    assert all(len(voice) >= 4 for domain in domains for voice in domain.voices)


def check_greedy(source: CheckpointReader, text: Written, prompt: list[int]) -> None:
    """Every token after the prompt is the reference's most likely one; a near tie may go either way."""
    start = min(len(prompt), len(text.tokens))
    assert text.tokens[:start] == prompt[:start]
    (logits,) = stream_logits(source, torch.tensor([text.tokens]))
    top = logits.topk(2).values
    clear = (top[:, 0] - top[:, 1] > 1e-3)[start - 1 : -1]
    expected = logits.argmax(-1)[start - 1 : -1]
    assert torch.equal(expected[clear], torch.tensor(text.tokens[start:])[clear])
    assert start == len(text.tokens) or clear.float().mean() > 0.8


@with_llama
def test_streams_side_by_side_write_what_each_would_write_alone(phi4_checkpoint: Path, tmp_path: Path) -> None:
    """Greedy, so that the reference forward pass says what must come."""
    source = open_checkpoint(phi4_checkpoint)
    path = write_f16(source, tmp_path / "f32.gguf", WriteOptions(), dtype="f32").path
    prompts = [[[7, 8, 9, 10]], [[30]], [[50, 60, 70, 80, 90, 100, 110]]]
    request = SampleRequest(prompts, [[0], [1], [2]], length=16, ends=[], top_p=1e-9)
    with runtime.open(path, 16, Settings(threads=1, kv_type="f32", flash_attention="off"), 3) as session:
        written = session.sample(request)
        assert session.sample(request) == written
        end = written[0][0].tokens[8]  # now an ending token, after which the next prompt begins in an empty cache
        several = [[prompts[0][0], [200, 201]], *prompts[1:]]
        after_end = session.sample(SampleRequest(several, [[0], [1], [2]], length=16, ends=[end], top_p=1e-9))
    assert len(after_end[0]) > 1
    for texts, given in [*zip(written, prompts, strict=True), (after_end[0], several[0])]:
        assert sum(len(text.tokens) - text.ended for text in texts) == 16
        for text in texts:
            check_greedy(source, text, given[text.prompt])


@with_llama
def test_the_same_seed_writes_the_same_text_and_another_seed_another(
    phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(phi4_checkpoint)
    tokenizer = check_tokenizer(checkpoint.index)
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        monkeypatch.setenv("PHI4EDGE_CACHE", str(tmp_path / name))
        recipe = CorpusRecipe("self", samples=8, sequence_length=64, seed=seed)
        corpus, own = load_corpus_of(checkpoint, tokenizer, recipe, tmp_path / "run")
        assert corpus is not None
        assert own is not None
        assert own.weights == "f16"
        assert not list((tmp_path / name).rglob("*.gguf"))
        found.append((own.sha256, corpus.sha256))
    assert found[0] == found[1]
    assert found[0] != found[2]


@with_llama
def test_a_longer_text_begins_with_the_shorter_one(cache: Path, phi4_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(phi4_checkpoint)
    tokenizer = check_tokenizer(checkpoint.index)
    _, short = load_corpus_of(checkpoint, tokenizer, CorpusRecipe("self", 4, 64), tmp_path)
    before = files_of(cache)
    _, longer = load_corpus_of(checkpoint, tokenizer, CorpusRecipe("self", 40, 64), tmp_path)
    assert short is not None
    assert longer is not None
    assert longer.sequences > short.sequences
    assert longer.path.read_bytes().startswith(short.path.read_bytes())
    after = files_of(cache)
    assert {name: after[name] for name in before if "groups/" in name} == {
        name: data for name, data in before.items() if "groups/" in name
    }


@with_llama
def test_a_run_on_own_text_says_so_and_calibrate_keeps_the_text(
    cache: Path, phi4_checkpoint: Path, tmp_path: Path
) -> None:
    assert plan_calibration(phi4_checkpoint, OWN)["corpus_sha256"] is None
    assert not cache.exists()
    data = calibrate(phi4_checkpoint, OWN, tmp_path / "run")["data"]
    kept = tmp_path / "run" / "calibration" / SELF_TEXT
    records = [json.loads(line) for line in kept.read_text().splitlines()]
    assert {"prose", "mathematics", "code", "chat", "languages"} == {record["domain"] for record in records}
    assert data["self"]["sequences"] >= TOGETHER
    assert sum(count["samples"] for count in data["domains"].values()) == 24
    chats = [record["text"] for record in records if ".question." in record["seed"]]
    assert chats
    assert all(text.startswith("<|im_start|>user<|im_sep|>") for text in chats)
    summary = quantize(phi4_checkpoint, Recipe(scheme="w4g32", corpus=OWN), tmp_path / "run")
    corpus = summary.manifest["data"]["corpus"]
    assert corpus["self"] == data["self"]
    assert corpus["sha256"] == data["corpus_sha256"]
    assert sum(count["held_out"] for count in corpus["domains"].values()) == 3
    # The file is a corpus like any other.
    same = load_corpus(str(kept), load_tokenizer(phi4_checkpoint), samples=24, sequence_length=64)
    assert same.sha256 == corpus["sha256"]


KILLED = """
import os, signal, sys
from pathlib import Path
from phi4edge.core.workdir import Workdir
commit, moment = Workdir.commit, sys.argv[1]
def dying(self, record, files):
    if record.get("group") == 1 and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    commit(self, record, files)
    if record.get("group") == 1:
        os.kill(os.getpid(), signal.SIGKILL)
Workdir.commit = dying
from phi4edge.core.recipe import CorpusRecipe
from phi4edge.stages.calibrate import calibrate
calibrate(sys.argv[2], CorpusRecipe("self", samples=40, sequence_length=64), Path(sys.argv[3]))
"""


@with_llama
@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_and_started_again_the_text_is_the_same(
    moment: str, phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(phi4_checkpoint)
    tokenizer = check_tokenizer(checkpoint.index)
    recipe = CorpusRecipe("self", samples=40, sequence_length=64)

    def write(cache: Path) -> dict[str, bytes]:
        monkeypatch.setenv("PHI4EDGE_CACHE", str(cache))
        load_corpus_of(checkpoint, tokenizer, recipe, tmp_path / "run")
        return files_of(cache)

    whole = write(tmp_path / "whole")
    monkeypatch.setenv("PHI4EDGE_CACHE", str(tmp_path / "killed"))
    arguments = [sys.executable, "-c", KILLED, moment, str(phi4_checkpoint), str(tmp_path / "run")]
    ended = subprocess.run(arguments, env=os.environ, check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    (journal,) = (tmp_path / "killed").rglob("journal.jsonl")
    assert journal.read_bytes().count(b"\n") == (1 if moment == "before" else 2)
    assert write(tmp_path / "killed") == whole


@with_llama
def test_what_ram_does_not_hold_is_rounded_or_refused(cache: Path, phi4_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(phi4_checkpoint)
    tokenizer = check_tokenizer(checkpoint.index)
    parameters = checkpoint.config.parameters
    cells = 2 * 2 * 2 * 16 * 2 * 64 * TOGETHER  # k and v, layers, kv heads, head_dim, bytes, tokens, sequences
    base = cells + 300 * 2**20
    with pytest.raises(TargetError, match="corpus self: sampling the model from q4_0 weights takes about"):
        load_corpus_of(checkpoint, tokenizer, OWN, tmp_path, ram_budget=base)
    for width, weights in ((0.7, "q4_0"), (1.2, "q8_0")):
        recipe = CorpusRecipe("self", samples=4, sequence_length=64, seed=int(10 * width))
        budget = base + int(width * parameters)
        _, own = load_corpus_of(checkpoint, tokenizer, recipe, tmp_path, ram_budget=budget)
        assert own is not None
        assert own.weights == weights
        _, again = load_corpus_of(checkpoint, tokenizer, recipe, tmp_path)  # more RAM now: the text stays
        assert again == own


@with_llama
@pytest.mark.parametrize(
    ("name", "message"),
    [("absent.txt", r"absent\.txt: no such file"), ("short.safetensors", "has chunks of 32 tokens")],
)
def test_a_bad_part_of_a_mix_is_refused_before_the_model_writes(
    cache: Path, phi4_checkpoint: Path, tmp_path: Path, name: str, message: str
) -> None:
    save_file({"tokens": torch.zeros(4, 32, dtype=torch.int64)}, tmp_path / "short.safetensors")
    recipe = CorpusRecipe(f"self=0.5,{tmp_path / name}=0.5", samples=8, sequence_length=64)
    with pytest.raises(InputError, match=message):
        calibrate(phi4_checkpoint, recipe, tmp_path / "run")
    assert not cache.exists()
    assert not (tmp_path / "run").exists()


@with_llama
def test_own_text_is_mixed_with_another_corpus(cache: Path, phi4_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("aaaa bbbb " * 4000)
    recipe = CorpusRecipe(f"self=0.25,{tmp_path / 'a.txt'}=0.75", samples=16, sequence_length=64)
    data = calibrate(phi4_checkpoint, recipe, tmp_path / "run")["data"]
    assert data["domains"].pop("a")["samples"] == 12
    assert sum(count["samples"] for count in data["domains"].values()) == 4


def test_seeds_are_no_corpus(phi4_checkpoint: Path) -> None:
    with pytest.raises(InputError, match="no corpus 'seeds'"):
        load_corpus("seeds", load_tokenizer(phi4_checkpoint), samples=4, sequence_length=64)
