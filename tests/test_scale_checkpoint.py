"""The full-size checkpoint that is drawn: laid out as the published ones, the same from a seed, sane inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scripts import load_script

from phi4edge.calibration.chunks import read_chunks
from phi4edge.checkpoint.config import parse_config
from phi4edge.checkpoint.index import open_index
from phi4edge.checkpoint.published import PUBLISHED
from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import InputError, TargetError
from phi4edge.model.forward import stream_logits
from phi4edge.stages.inputs import check_tokenizer

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """make_checkpoint.py with the published vocabulary and small blocks, in files of at most 60 MB."""
    module = load_script("benchmarks/scale/make_checkpoint.py")
    for name, raw in module.CONFIGS.items():
        monkeypatch.setitem(module.CONFIGS, name, raw | SMALL)
    monkeypatch.setattr(module, "_SHARD", 60_000_000)
    return module


@pytest.mark.parametrize(("name", "files", "total"), [("phi-4", 6, 29319014400), ("phi-4-mini", 2, 7672043520)])
def test_config_and_files_are_as_published(name: str, files: int, total: int) -> None:
    module = load_script("benchmarks/scale/make_checkpoint.py")
    config = parse_config(module.CONFIGS[name])
    published = PUBLISHED[name]
    assert config.tensor_shapes() == published.tensor_shapes()
    for field in ("context_length", "head_dim", "rms_norm_eps", "sliding_window", "tie_word_embeddings", "dtype"):
        assert getattr(config, field) == getattr(published, field)
    assert config.rope.attention_factor == pytest.approx(published.rope.attention_factor, abs=1e-6)
    assert (config.rope.dim, config.rope.original_context) == (published.rope.dim, published.rope.original_context)
    split = module.shards(config)
    assert len(split) == files
    assert {name for part in split for name in part} == set(config.tensor_shapes())
    assert 2 * config.parameters == total


@pytest.mark.parametrize("name", ["phi-4", "phi-4-mini"])
def test_a_drawn_checkpoint_opens_and_its_model_computes(script: Any, tmp_path: Path, name: str) -> None:
    made = script.make_checkpoint(tmp_path / "model", name)
    index = open_index(tmp_path / "model")
    assert len(index.shards) > 1
    assert (
        made["bytes"]
        == index.nbytes
        == json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    )
    assert {ref.dtype for ref in index.tensors.values()} == {"BF16"}
    for path in index.shards:  # the library reads them, and finds tensors in the order in which it would write them
        names = [ref.name for ref in sorted(index.tensors.values(), key=lambda r: r.offset) if ref.path == path]
        assert names == sorted(load_file(path))
    assert check_tokenizer(index).vocab_size <= index.config.vocab_size
    tokens = torch.randint(0, 1000, (1, 24), generator=torch.Generator().manual_seed(1))
    (logits,) = stream_logits(open_checkpoint(tmp_path / "model"), tokens)
    assert bool(torch.isfinite(logits).all())
    assert 0.2 < float(logits.std()) < 20


def test_the_same_seed_gives_the_same_bytes_and_a_cut_model_is_the_first_blocks(script: Any, tmp_path: Path) -> None:
    whole, again, cut, other = (
        script.make_checkpoint(tmp_path / out, "phi-4", layers, seed) and open_checkpoint(tmp_path / out)
        for out, layers, seed in (("whole", None, 5), ("again", None, 5), ("cut", 1, 5), ("other", 1, 6))
    )
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight")
    for name in names:
        assert torch.equal(whole.tensor(name), again.tensor(name))
        assert torch.equal(whole.tensor(name), cut.tensor(name))
        assert not torch.equal(cut.tensor(name), other.tensor(name))
    assert cut.config.num_layers == 1


def test_matrices_have_heavy_tails_and_channels_that_stand_out(script: Any, tmp_path: Path) -> None:
    script.make_checkpoint(tmp_path / "model", "phi-4", 1)
    checkpoint = open_checkpoint(tmp_path / "model")
    weight = checkpoint.tensor("model.layers.0.self_attn.qkv_proj.weight")
    values = weight / weight.std()
    assert 4 < float((values**4).mean()) < 12
    written = checkpoint.tensor("model.layers.0.mlp.down_proj.weight").square().mean(1).sqrt()
    assert 8 < float(written.max() / written.median()) < 60
    energy = torch.linalg.svdvals(checkpoint.tensor("model.embed_tokens.weight")[:2000] / written).square()
    assert float(energy[:32].sum() / energy.sum()) > 0.4


def test_chunks_follow_zipf_and_are_a_corpus(script: Any, tmp_path: Path) -> None:
    for path, seed in ((tmp_path / "a.safetensors", 0), (tmp_path / "b.safetensors", 1)):
        script.make_chunks(path, "phi-4", 40, 512, seed)
    first, second = (load_file(tmp_path / f"{n}.safetensors")["tokens"] for n in "ab")
    assert not torch.equal(first, second)
    rows = read_chunks(tmp_path / "a.safetensors", samples=40, sequence_length=512, vocab_size=100352)
    assert len(rows) == 40
    counts = torch.bincount(torch.cat([first, second]).flatten()).sort(descending=True).values
    assert 0.4 < float(counts[:1000].sum() / counts.sum()) < 0.7  # of Zipf's law: a half


def test_what_cannot_be_made_is_refused(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="has 3 blocks"):
        script.make_checkpoint(tmp_path / "model", "phi-4", 4)
    monkeypatch.setattr("phi4edge.core.disk.free_bytes", lambda path: 1 << 20)
    with pytest.raises(TargetError, match=r"needs 99.* MiB, but 1 MiB are free"):
        script.make_checkpoint(tmp_path / "model", "phi-4", 1)
    assert not list(tmp_path.iterdir())
