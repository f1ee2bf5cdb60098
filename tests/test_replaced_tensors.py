"""Norm gains that a run changed reach every format, and nothing else of the checkpoint changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rounded import quantized_model

from phi4edge.model.source import Overlay
from phi4edge.writers import gguf, gptq
from phi4edge.writers._api import WriteOptions

GAIN = "model.layers.1.post_attention_layernorm.weight"


@pytest.mark.parametrize("writer", [gguf, gptq], ids=["gguf", "gptq"])
def test_replaced_norm_gain_is_what_the_artifact_holds(writer: object, phi4_checkpoint: Path, tmp_path: Path) -> None:
    model = quantized_model(phi4_checkpoint, "q4_0")
    gain = (model.checkpoint.tensor(GAIN) * 1.25).to(torch.bfloat16).float()
    changed = replace(model, replaced={GAIN: gain})
    out = tmp_path / ("model.gguf" if writer is gguf else "folder")
    writer.write(changed, out, WriteOptions())  # type: ignore[attr-defined]
    reader = writer.read(out)  # type: ignore[attr-defined]
    assert torch.equal(reader.tensor(GAIN), gain)
    other = GAIN.replace("layers.1", "layers.0")
    assert torch.equal(reader.tensor(other), model.checkpoint.tensor(other))


def test_overlay_gives_rows_of_a_replaced_tensor(phi4_checkpoint: Path) -> None:
    checkpoint = quantized_model(phi4_checkpoint, "q4_0").checkpoint
    name = "lm_head.weight"
    values = torch.arange(512 * 64, dtype=torch.float32).reshape(512, 64)
    overlay = Overlay(checkpoint, {name: values})
    assert torch.equal(overlay.tensor(name, slice(3, 5)), values[3:5])
    assert torch.equal(overlay.tensor(GAIN), checkpoint.tensor(GAIN))
