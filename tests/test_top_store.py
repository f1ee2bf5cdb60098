"""A store of the most likely tokens: small, exact about what it keeps, and honest about what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import write_checkpoint

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.cli.main import main
from phi4edge.core.errors import ResumeError, UsageError
from phi4edge.measurement.drift import PositionFigures, compare_chunk
from phi4edge.measurement.encoding import STEP, chunk_bytes, encode, read_chunk_file, write_chunk
from phi4edge.measurement.reference import build_store, open_store
from phi4edge.measurement.texts import Chunks

VOCAB, TOP = 6000, 1000  # 2 bytes a token kept and a bit a token of the vocabulary, against 4 bytes: 8.6 times smaller


def language_like(chunks: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of next tokens as language has them, ln p of rank r about −1.8 ln r, and an artifact's beside them."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.arange(1, VOCAB + 1).float()
    rows = [(-1.8 * ranks.log())[torch.randperm(VOCAB, generator=generator)] for _ in range(chunks * positions)]
    reference = torch.stack(rows).reshape(chunks, positions, VOCAB)
    reference += 0.5 * torch.randn(reference.shape, generator=generator)
    return reference, reference + 0.2 * torch.randn(reference.shape, generator=generator)


def test_twenty_chunks_are_an_eighth_of_float32_and_mean_kld_moves_by_less_than_a_hundredth(tmp_path: Path) -> None:
    reference, artifact = language_like(20, 8)
    following = torch.zeros(8, dtype=torch.int64)
    found: dict[int | None, list[PositionFigures]] = {None: [], TOP: []}
    written, tails = 0, []
    for number, (theirs, ours) in enumerate(zip(reference, artifact, strict=True)):
        for keep, figures in found.items():
            stored = encode(theirs, following, keep)
            figures.append(compare_chunk(ours, stored, following))
        path = tmp_path / f"{number}"
        write_chunk(path, stored)
        written += path.stat().st_size
        tails.append(stored.tail_mass)
    assert written * 8 <= reference.numel() * 4
    whole, top = (PositionFigures.stack(figures) for figures in found.values())
    lost = 1 - top.kld.mean() / whole.kld.mean()
    assert 0 < lost < 0.01
    assert lost < 3 * float(np.mean(tails))
    np.testing.assert_allclose(top.nll, whole.nll, rtol=1e-5)
    np.testing.assert_array_equal(top.nll_reference, whole.nll_reference)
    np.testing.assert_array_equal(top.same_top, whole.same_top)


def test_what_is_measured_is_the_divergence_with_the_tail_made_one() -> None:
    reference, artifact = (logits[0] for logits in language_like(1, 30))
    following = torch.zeros(30, dtype=torch.int64)
    stored = encode(reference, following, 40)
    assert stored.tokens is not None
    kept = torch.from_numpy(stored.tokens).long()
    assert torch.equal(kept.sort(1).values, reference.topk(40).indices.sort(1).values)
    p, q = torch.log_softmax(reference.double(), 1), torch.log_softmax(artifact.double(), 1)
    inside = (p.gather(1, kept).exp() * (p.gather(1, kept) - q.gather(1, kept))).sum(1)
    tail_p, tail_q = (torch.logsumexp(x.scatter(1, kept, -torch.inf), 1) for x in (p, q))
    exact = (inside + tail_p.exp() * (tail_p - tail_q)).numpy()
    np.testing.assert_allclose(compare_chunk(artifact, stored, following).kld[0], exact, rtol=1e-3)
    np.testing.assert_allclose(stored.tail_mass, tail_p.exp().numpy(), rtol=1e-4)
    assert (exact < (p.exp() * (p - q)).sum(1).numpy()).all()


def test_the_noise_floor_is_the_one_that_the_store_has() -> None:
    reference, _ = (logits[0] for logits in language_like(1, 30))
    stored = encode(reference, torch.zeros(30, dtype=torch.int64), 40)
    assert stored.tail is not None
    assert stored.tokens is not None
    kept = torch.from_numpy(stored.tokens).long()
    below = reference.amax(1, keepdim=True).double() - reference.double()
    tail = torch.from_numpy(stored.tail).double()[:, None]
    exact = torch.log_softmax(torch.cat((-below.gather(1, kept), tail), 1), 1)
    held = torch.log_softmax(torch.cat((-torch.from_numpy(stored.codes).double() * STEP, tail), 1), 1)
    noise = (exact.exp() * (exact - held)).sum(1).numpy()
    np.testing.assert_allclose(stored.noise, noise, rtol=0.02, atol=2e-10)
    itself = compare_chunk(reference, stored, torch.zeros(30, dtype=torch.int64)).kld
    assert itself.mean() < 2e-8


@pytest.mark.parametrize(("keep", "named"), [(17, 4 * 17), (1000, 750)], ids=["list", "bits"])
def test_a_chunk_comes_back_from_its_file(tmp_path: Path, keep: int, named: int) -> None:
    reference, _ = (logits[0] for logits in language_like(1, 5))
    stored = encode(reference, torch.arange(5), keep)
    write_chunk(tmp_path / "chunk", stored)
    data = np.fromfile(tmp_path / "chunk", dtype=np.uint8)
    assert data.size == chunk_bytes(5, VOCAB, keep) == 5 * (20 + named + 2 * keep)
    found = read_chunk_file(data, 5, VOCAB, keep)
    for name in ("top", "log_prob", "maximum", "noise", "tail", "tokens", "codes"):
        np.testing.assert_array_equal(getattr(found, name), getattr(stored, name))


def test_a_store_says_what_it_leaves_out_and_is_no_other_s(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "model", "phi4"))
    tokens = np.random.default_rng(0).integers(0, 512, (2, 32))
    text = Chunks("words", "0" * 64, 100, tokens)
    whole, top = (build_store(checkpoint, text, tmp_path / str(keep), top=keep) for keep in (None, 40))
    assert (top.top, whole.top) == (40, None)
    assert open_store(top.path).header["encoding"] == "u16-fixed-32-top40"
    assert whole.header["tail_mass"] == 0
    assert 0 < top.header["tail_mass"] < top.header["tail_mass_max"] < 1
    sizes = [sum(path.stat().st_size for path in store.path.glob("*.logits")) for store in (whole, top)]
    assert sizes[0] > 3 * sizes[1]
    with pytest.raises(ResumeError, match="encoding"):
        build_store(checkpoint, text, top.path)
    with pytest.raises(UsageError, match="not between 1 and 511"):
        build_store(checkpoint, text, tmp_path / "all", top=512)


def test_the_command_prints_the_mass_that_was_left_out(
    capfd: pytest.CaptureFixture[str], phi4_checkpoint: Path, tmp_path: Path
) -> None:
    text = tmp_path / "words.txt"
    text.write_text("Every good thing is 3 or 4 things, said the fox. " * 40)
    common = ["drift", str(phi4_checkpoint), "--reference", str(phi4_checkpoint), "--text", str(text)]
    common += ["--context", "64", "--chunks", "2", "--threads", "1", "-q", "--store-top", "100"]
    assert main(common) == 0
    assert "of the probability: KLD is a lower bound" in capfd.readouterr().out
    assert main([*common, "--json"]) == 0
    data = json.loads(capfd.readouterr().out)["data"]
    assert data["reference"]["encoding"] == "u16-fixed-32-top100"
    assert 0 < data["reference"]["tail_mass"] < 1
    assert data["metrics"]["kld"]["value"] < 1e-7
