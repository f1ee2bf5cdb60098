"""Calibration: corpora, input moments, and the pass through a block."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from phi4edge.calibration.arithmetic import PROBLEMS, problems
from phi4edge.calibration.blockpass import BlockPass, Stores
from phi4edge.calibration.corpus import load_corpus, load_texts
from phi4edge.calibration.installed import KINDS, installed_documents
from phi4edge.calibration.parts import share_of_self
from phi4edge.calibration.statistics import InputMoments, summed_values
from phi4edge.calibration.store import ActivationStore
from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import InputError, UsageError
from phi4edge.core.hashing import sha256_file
from phi4edge.model.block import LINEARS, forward_block, load_block
from phi4edge.model.rope import rotary_table
from phi4edge.model.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(phi4_checkpoint: Path) -> Tokenizer:
    return load_tokenizer(phi4_checkpoint)


def test_the_halves_of_the_builtin_corpus_share_no_document() -> None:
    for kind in KINDS:
        calibration = {d.text for d in installed_documents(kind, evaluation=False)}
        evaluation = {d.text for d in installed_documents(kind, evaluation=True)}
        assert min(len(calibration), len(evaluation)) > 50
        # The same words may stand in two files (a licence header); the same piece of 4,000 characters may not.
        assert not {t for t in calibration & evaluation if len(t) > 2000}


def test_the_builtin_corpus_is_the_same_in_another_process(tokenizer: Tokenizer, phi4_checkpoint: Path) -> None:
    ours = load_corpus("builtin", tokenizer, samples=6, sequence_length=64, seed=3)
    code = (
        "from phi4edge.calibration.corpus import load_corpus; from phi4edge.model.tokenizer import load_tokenizer;"
        f"from pathlib import Path; t = load_tokenizer(Path({str(phi4_checkpoint)!r}));"
        "print(load_corpus('builtin', t, samples=6, sequence_length=64, seed=3).sha256)"
    )
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert theirs.stdout.strip() == ours.sha256
    other = load_corpus("builtin", tokenizer, samples=6, sequence_length=64, seed=4)
    assert other.sha256 != ours.sha256


def test_the_builtin_corpus_has_prose_code_mathematics_and_chats(tokenizer: Tokenizer) -> None:
    corpus = load_corpus("builtin", tokenizer, samples=40, sequence_length=64, held_out=5)
    counts = corpus.domain_counts()
    assert {domain: count["samples"] for domain, count in counts.items()} == {
        "prose": 10,
        "docstrings": 6,
        "code": 8,
        "mathematics": 10,
        "chat": 6,
    }
    assert all(count["held_out"] == 1 for count in counts.values())
    start = tokenizer.encode("<|im_start|>")[0]
    with_chat = {d for d, row in zip(corpus.domains, corpus.tokens, strict=True) if bool((row == start).any())}
    assert with_chat == {"chat", "mathematics"}


def test_every_step_of_a_worked_problem_is_true() -> None:
    number = r"-?\d+(?:/\d+)?"
    equation = re.compile(rf"({number}(?: [-+*/] {number})+) = ({number})")
    for kind in PROBLEMS:
        for document in problems(kind):
            found = equation.findall(document.text)
            assert found, document.text
            for left, right in found:
                terms = re.sub(r"(\d+)(?:/(\d+))?", lambda m: f"Fraction({m[1]}, {m[2] or 1})", left)
                assert eval(terms) == Fraction(right), document.text
            steps, _, answer = document.text.rpartition("The answer is ")
            assert {int(value) for value in re.findall(r"\d+", answer)} <= set(map(int, re.findall(r"\d+", steps)))


def test_several_corpora_are_mixed_by_share(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("aaaa bbbb " * 4000)
    (tmp_path / "own.jsonl").write_text(json.dumps({"text": "cccc dddd " * 4000, "domain": "languages"}) + "\n")
    spec = f"builtin=0.5,{tmp_path / 'a.txt'}=0.25,self=0.25"
    own = tmp_path / "own.jsonl"
    corpus = load_corpus(spec, tokenizer, samples=80, sequence_length=32, sampled=own)
    counts = {domain: count["samples"] for domain, count in corpus.domain_counts().items()}
    assert counts == {"prose": 10, "docstrings": 6, "code": 8, "mathematics": 10, "chat": 6, "a": 20, "languages": 20}
    assert share_of_self(spec) == 0.25
    assert share_of_self("builtin") == 0
    assert share_of_self("self") == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("builtin,self=0.5", "'builtin' has no share"),
        ("builtin=much,self=0.5", "'builtin=much' is no name with a share above 0"),
        ("builtin=-1,self=0.5", "no name with a share above 0"),
        ("=0.5,self=0.5", "no name with a share above 0"),
        ("self=0.5,self=0.5", "names 'self' twice"),
    ],
)
def test_a_mix_that_is_none_is_refused(tokenizer: Tokenizer, spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_corpus(spec, tokenizer, samples=4, sequence_length=64)


def test_the_models_own_text_is_no_text_to_measure_on() -> None:
    with pytest.raises(InputError, match="the model's own text"):
        list(load_texts("self"))


def test_a_text_file_is_reproduced_piece_by_piece(tmp_path: Path) -> None:
    text = "".join(f"line {i} of a text\n" for i in range(2000))
    (tmp_path / "text.txt").write_text(text)
    assert "".join(load_texts(str(tmp_path / "text.txt"))) == text


def test_chat_records_go_through_the_template_only_when_asked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{i} ?" * 20, "answer": "yes " * 20}) + "\n" for i in range(40)))
    start = tokenizer.encode("<|im_start|>")[0]
    with_chat = load_corpus(str(path), tokenizer, samples=4, sequence_length=64, chat=True)
    without = load_corpus(str(path), tokenizer, samples=4, sequence_length=64, chat=False)
    assert (with_chat.tokens == start).any()
    assert not (without.tokens == start).any()


def test_a_mixed_recipe_keeps_its_shares(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("aaaa bbbb " * 4000)
    (tmp_path / "mix.toml").write_text(
        '[[part]]\npath = "a.txt"\nshare = 3\n[[part]]\nkind = "python-docs"\nshare = 1\n'
    )
    corpus = load_corpus(str(tmp_path / "mix.toml"), tokenizer, samples=8, sequence_length=32)
    letters = set(tokenizer.encode("aaaa bbbb " * 10))
    from_file = sum(set(row.tolist()) <= letters for row in corpus.tokens)
    assert from_file == 6


def test_samples_put_aside_hold_every_domain_and_come_last(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name, words in (("a", "aaaa bbbb "), ("b", "cccc dddd "), ("c", "eeee ffff ")):
        (tmp_path / f"{name}.txt").write_text(words * 4000)
    (tmp_path / "mix.toml").write_text(
        '[[part]]\npath = "a.txt"\nshare = 0.7\n[[part]]\npath = "b.txt"\nshare = 0.2\ndomain = "second"\n'
        '[[part]]\npath = "c.txt"\nshare = 0.1\n'
    )
    spec = str(tmp_path / "mix.toml")
    for held_out, aside in ((8, {"a": 5, "second": 2, "c": 1}), (3, {"a": 1, "second": 1, "c": 1}), (1, {"a": 1})):
        corpus = load_corpus(spec, tokenizer, samples=40, sequence_length=32, held_out=held_out)
        assert corpus.held_out == held_out
        assert Counter(corpus.domains[-held_out:]) == aside
        assert corpus.domain_counts()["second"] == {"samples": 8, "held_out": aside.get("second", 0)}
        letters = {"a": "aaaa bbbb ", "second": "cccc dddd ", "c": "eeee ffff "}
        for row, domain in zip(corpus.tokens, corpus.domains, strict=True):
            assert set(row.tolist()) <= set(tokenizer.encode(letters[domain] * 10))
    plain = load_corpus(spec, tokenizer, samples=40, sequence_length=32)
    assert sorted(plain.tokens.tolist()) == sorted(corpus.tokens.tolist())


def test_a_domain_of_one_sample_is_kept_where_others_have_more(tmp_path: Path, tokenizer: Tokenizer) -> None:
    many, one = "aaaa bbbb " * 300, "cccc dddd " * 12
    records = [{"text": many, "domain": "many"}, {"text": one, "domain": "one"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    length = len(tokenizer.encode(one))
    samples = 1 + len(tokenizer.encode(many)) // length
    corpus = load_corpus(
        str(tmp_path / "x.jsonl"), tokenizer, samples=samples, sequence_length=length, held_out=samples - 2
    )
    assert Counter(corpus.domains[:2]) == {"many": 1, "one": 1}


def test_a_part_that_is_used_up_leaves_its_share_to_the_others(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("aaaa bbbb " * 20)
    (tmp_path / "mix.toml").write_text('[[part]]\npath = "a.txt"\n[[part]]\nkind = "python-docs"\n')
    assert load_corpus(str(tmp_path / "mix.toml"), tokenizer, samples=8, sequence_length=32).tokens.shape == (8, 32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty or shorter than one sample of 64"),
        ("a few words " * 10, r"has \d+ tokens in whole samples, but 4 samples of 64 need 256"),
    ],
)
def test_an_empty_or_short_corpus_is_refused(tmp_path: Path, tokenizer: Tokenizer, content: str, message: str) -> None:
    (tmp_path / "text.txt").write_text(content)
    with pytest.raises(InputError, match=message):
        load_corpus(str(tmp_path / "text.txt"), tokenizer, samples=4, sequence_length=64)


def test_bad_corpora_name_the_place(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "none.jsonl").write_text('{"words": "fine"}\n')
    (tmp_path / "key.toml").write_text('[[part]]\nkind = "python-docs"\nshares = 1\n')
    (tmp_path / "share.toml").write_text('[[part]]\nkind = "python-docs"\nshare = "half"\n')
    (tmp_path / "bare.toml").write_text('description = "nothing"\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, message in (
        ("bad.jsonl", r"bad\.jsonl:2: not valid JSON"),
        ("none.jsonl", r"none\.jsonl:1: record has no text"),
        ("key.toml", r"part\[0\]\.shares: unknown key"),
        ("share.toml", r"part\[0\]\.share: is a string, expected a number"),
        ("bare.toml", r"part: missing"),
        ("latin.txt", "not UTF-8 at byte 3"),
        ("absent.txt", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            load_corpus(str(tmp_path / name), tokenizer, samples=4, sequence_length=64)
    with pytest.raises(InputError, match="no corpus 'bultin'") as caught:
        load_corpus("bultin", tokenizer, samples=4, sequence_length=64)
    assert "builtin" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="a file has no halves"):
        load_corpus(str(tmp_path / "bad.jsonl") + ":eval", tokenizer, samples=4, sequence_length=64)


@pytest.mark.parametrize("width", [48, 300, 2100])
def test_moments_equal_the_plain_product(width: int) -> None:
    x = torch.randn(6, 20, width, generator=torch.Generator().manual_seed(0))
    moments = InputMoments(width, full=True)
    for i in range(0, 6, 2):
        moments.add(x[i : i + 2])
    stats = moments.result()
    rows = x.reshape(-1, width).double()
    assert stats.tokens == 120
    assert stats.hessian is not None
    assert torch.allclose(stats.hessian.double(), rows.T @ rows / 120, atol=1e-5)
    assert torch.equal(stats.hessian, stats.hessian.T)
    assert torch.allclose(stats.mean_square.double(), rows.pow(2).mean(0), rtol=1e-5)


def test_moments_are_summed_in_little_more_than_half_of_their_hessian() -> None:
    moments = InputMoments(2048, full=True)
    kept = sum(sums.numel() for sums in moments._sums)
    assert kept == summed_values(2048) == 2048**2 * 9 // 16
    assert summed_values(48) == 48**2
    other = moments.empty()
    x = torch.randn(2, 5, 2048, generator=torch.Generator().manual_seed(0))
    moments.add(x[:1])
    other.add(x[1:])
    moments.merge(other)
    rows, H = x.reshape(-1, 2048).double(), moments.result().hessian
    assert H is not None
    assert torch.allclose(H.double(), rows.T @ rows / 10, atol=1e-5)


def test_first_positions_get_the_share_of_the_trace_that_was_asked_for() -> None:
    x = torch.randn(4, 50, 16, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 100  # an attention sink: nearly all of the energy
    moments = InputMoments(16, full=True)
    moments.add(x)
    stats = moments.result(sink_share=0.1)
    rest = x[:, 1:].reshape(-1, 16)
    assert stats.hessian is not None
    assert float((rest.T @ rest).trace() / 200 / stats.hessian.trace()) == pytest.approx(0.9, abs=1e-4)
    # The imatrix stays the plain mean, as llama.cpp defines it.
    assert torch.allclose(stats.mean_square, x.reshape(-1, 16).pow(2).mean(0), rtol=1e-4)


def test_shrinkage_scales_what_is_off_the_diagonal_and_nothing_else() -> None:
    x = torch.randn(4, 50, 16, generator=torch.Generator().manual_seed(0))

    def hessian(shrinkage: float) -> torch.Tensor:
        moments = InputMoments(16, full=True)
        moments.add(x)
        found = moments.result(shrinkage=shrinkage).hessian
        assert found is not None
        return found

    whole, shrunk = hessian(0.0), hessian(0.25)
    off = ~torch.eye(16, dtype=torch.bool)
    assert torch.equal(shrunk.diagonal(), whole.diagonal())
    assert torch.allclose(shrunk[off], 0.75 * whole[off])


@pytest.mark.parametrize(
    ("kept", "tokens", "counts"), [(0, 1024, [5]), (3, 1024, [3, 2]), (3, 60, [2, 1, 2]), (3, 20, [1] * 5)]
)
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_pass_with_unchanged_weights_is_the_block(
    phi4_checkpoint: Path, tmp_path: Path, on_disk: bool, kept: int, tokens: int, counts: list[int]
) -> None:
    """Samples to learn from and samples kept aside are never computed together, and no more than so many tokens."""
    source = open_checkpoint(phi4_checkpoint)
    config, block = source.config, load_block(source, 1)
    x = torch.randn(5, 24, config.hidden_size, generator=torch.Generator().manual_seed(0))
    stores = Stores.create(config, 5, 24, tmp_path if on_disk else None)
    stores.hidden.write(0, x)
    rotary = rotary_table(config.rope, 24)
    passing = BlockPass(block.input_norm, block.post_norm, config, rotary, stores, kept=kept)
    for stage, weight in enumerate((block.qkv, block.o, block.gate_up, block.down)):
        found = [(first, *value.shape) for first, value in passing.inputs(stage, tokens=tokens)]
        firsts = [sum(counts[:i]) for i in range(len(counts))]
        assert found == [(f, c, 24, weight.shape[1]) for f, c in zip(firsts, counts, strict=True)], LINEARS[stage]
        passing.advance(stage, weight)
    outputs = stores.hidden.read(0, 5)
    expected = forward_block(block, x, rotary, config)
    assert float((outputs - expected).norm() / expected.norm()) < 1e-6


def test_a_store_on_disk_holds_what_one_in_ram_holds(tmp_path: Path) -> None:
    values = torch.randn(5, 3, 7)
    for path in (None, tmp_path / "scratch"):
        store = ActivationStore(5, 3, 7, path)
        store.write(0, values)
        store.write(2, values[:1])
        assert store.save(tmp_path / "saved.bin") == sha256_file(tmp_path / "saved.bin")
        assert torch.equal(store.read(1, 4), torch.stack([values[1], values[0], values[3]]))
        other = ActivationStore(5, 3, 7, None)
        assert other.load(tmp_path / "saved.bin", sha256_file(tmp_path / "saved.bin"))
        assert torch.equal(other.read(0, 5), store.read(0, 5))
        assert not other.load(tmp_path / "saved.bin", "0" * 64)
        store.close()
        halves = ActivationStore(5, 3, 7, path, torch.bfloat16)
        halves.write(0, values)
        assert torch.equal(halves.read(1, 4), values[1:4].bfloat16())
        assert halves.nbytes == 5 * 3 * 7 * 2
        halves.close()
