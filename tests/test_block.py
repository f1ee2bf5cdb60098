"""The block on plain tensors is transformers' Phi3ForCausalLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import write_checkpoint
from transformers import Phi3ForCausalLM

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.model.forward import stream_logits


def logits_of(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        return model(tokens).logits


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def tokens_of(length: int, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 512, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("length", [1, 7, 96])
def test_phi4_logits_equal_transformers(phi4_checkpoint: Path, length: int) -> None:
    tokens = tokens_of(length)
    ours = torch.stack(list(stream_logits(open_checkpoint(phi4_checkpoint), tokens)))
    assert relative_error(ours, logits_of(phi4_checkpoint, tokens)) <= 1e-5


@pytest.mark.parametrize("length", [40, 64, 65, 200])
def test_mini_logits_equal_transformers_on_both_sides_of_the_original_context(
    mini_checkpoint: Path, length: int
) -> None:
    tokens = tokens_of(length)
    ours = torch.stack(list(stream_logits(open_checkpoint(mini_checkpoint), tokens)))
    assert relative_error(ours, logits_of(mini_checkpoint, tokens)) <= 1e-5


def test_long_factors_change_the_result(mini_checkpoint: Path) -> None:
    source, tokens = open_checkpoint(mini_checkpoint), tokens_of(65)
    short = next(stream_logits(source, tokens[:1, :64]))
    long = next(stream_logits(source, tokens[:1]))[:64]
    assert relative_error(long, short) > 1e-3


def test_sliding_window_shorter_than_the_sequence_equals_transformers(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "windowed", "phi4", sliding_window=16)
    tokens = tokens_of(50)
    ours = torch.stack(list(stream_logits(open_checkpoint(folder), tokens)))
    assert relative_error(ours, logits_of(folder, tokens)) <= 1e-5


def test_rope_parameters_as_transformers_5_writes_them_are_understood(mini_checkpoint: Path, tmp_path: Path) -> None:
    again = tmp_path / "resaved"
    Phi3ForCausalLM.from_pretrained(mini_checkpoint, dtype=torch.float32).save_pretrained(again)
    tokens = tokens_of(80, 1)
    ours = torch.stack(list(stream_logits(open_checkpoint(again), tokens)))
    assert relative_error(ours, logits_of(mini_checkpoint, tokens)) <= 1e-5


def test_first_position_is_honoured(phi4_checkpoint: Path) -> None:
    source, tokens = open_checkpoint(phi4_checkpoint), tokens_of(12)
    whole = list(stream_logits(source, tokens))
    part = list(stream_logits(source, tokens, first=5))
    assert all(torch.equal(a[5:], b) for a, b in zip(whole, part, strict=True))
