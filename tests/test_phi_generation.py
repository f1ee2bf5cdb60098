"""The rope of Phi-4 and of Phi-4-mini as published: llama.cpp and ONNX Runtime write what transformers writes.

Two small blocks with heads of 128, Phi-4's theta of 250,000 over all of a head, mini's longrope with 48 factors over
three quarters of it, original context 4,096 of 131,072. Which factors are used where is a choice of each runtime:

* transformers takes the short ones up to 4,096 tokens, and beyond computes the whole sequence again with the long ones;
* llama.cpp takes the long ones for every token as soon as the context that it was opened with exceeds 4,096;
* an ONNX graph of ours takes those of the text's length, as transformers does, whatever the context.

So llama.cpp and transformers agree below the boundary in a context of at most 4,096, beyond it in any larger one; and a
short text in a large context is computed with the long factors in llama.cpp, which transformers does not do.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
import torch
from gguf_support import Llama
from rounded import quantized_model
from safetensors.torch import load_file, save_file
from support import write_checkpoint
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.model.source import WeightSource
from phi4edge.writers import gguf, onnx
from phi4edge.writers._api import WriteOptions

COUNT, BOUNDARY = 64, 4096
SHAPE: dict[str, Any] = {
    "hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 256, "vocab_size": 512,
}  # fmt: skip
FACTORS = {
    "short_factor": [1.0 + 0.004 * i for i in range(48)],
    "long_factor": [1.0 + 0.02 * i**2 for i in range(48)],  # up to 45, as mini's
}
ROPE: dict[str, dict[str, Any]] = {
    "phi4": {"rope_theta": 250000.0, "max_position_embeddings": 16384, "original_max_position_embeddings": 16384},
    "mini": {
        "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "max_position_embeddings": 131072,
        "original_max_position_embeddings": BOUNDARY, "sliding_window": 262144,
        "rope_scaling": {"type": "longrope", **FACTORS},
    },
}  # fmt: skip


class Model:
    """A quantized model: its GGUF, the same weights as a float32 GGUF, and transformers on them."""

    def __init__(self, kind: str, folder: Path) -> None:
        base = write_checkpoint(folder / "base", kind, **SHAPE, **ROPE[kind])
        weights = load_file(base / "model.safetensors")
        for name, scale in (
            ("embed_tokens", 0.1),
            ("qkv_proj", 2.0),
        ):  # so that the next token is what attention finds,
            for each in (key for key in weights if name in key):  # and not the last one again
                weights[each] *= scale
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        model = quantized_model(base, "q4_0")
        self.q4_0 = gguf.write(model, folder / "q4_0.gguf", WriteOptions()).path
        exact = WriteOptions(accuracy_level=1, context=BOUNDARY + 256)  # float activations; tables are the GGUF's codes
        self.onnx = onnx.write(model, folder / "onnx", exact).path
        reader = gguf.read(self.q4_0)
        rounded = write_checkpoint(folder / "rounded", kind, **SHAPE, **ROPE[kind])
        names = reader.config.tensor_shapes()
        save_file({name: reader.tensor(name) for name in names}, rounded / "model.safetensors")
        self.f32 = gguf.write_f16(open_checkpoint(rounded), folder / "f32.gguf", WriteOptions(), "f32").path
        self.reference = transformers_model(reader)
        self.greedy = cache(self._greedy)

    def _greedy(self, length: int) -> list[int]:
        with torch.inference_mode():
            out = self.reference.generate(
                torch.tensor([prompt(length)]), max_new_tokens=COUNT, do_sample=False, use_cache=True,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        found: list[int] = out[0, length:].tolist()
        return found

    def logits(self, tokens: list[int]) -> Tensor:
        with torch.inference_mode():
            found: Tensor = self.reference(torch.tensor([tokens])).logits[0]
        return found


def transformers_model(source: WeightSource) -> Phi3ForCausalLM:
    config = Phi3Config(**{k: v for k, v in source.config.raw.items() if k != "torch_dtype"})
    config._attn_implementation = "sdpa"
    model = Phi3ForCausalLM(config).eval()
    missing = model.load_state_dict({n: source.tensor(n) for n in source.config.tensor_shapes()}, strict=False)
    assert missing.missing_keys == (["lm_head.weight"] if source.config.tie_word_embeddings else [])
    return model


def prompt(length: int) -> list[int]:
    ids: list[int] = torch.randint(4, 512, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return ids


@pytest.fixture(scope="module")
def phi4(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model("phi4", tmp_path_factory.mktemp("phi4"))


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model("mini", tmp_path_factory.mktemp("mini"))


def test_the_rope_is_the_published_one(phi4: Model, mini: Model) -> None:
    for model, theta, dim, context in ((phi4, 250000.0, 128, 16384), (mini, 10000.0, 96, 131072)):
        config = gguf.read(model.f32).config
        assert (config.head_dim, config.rope.theta, config.rope.dim) == (128, theta, dim)
        assert config.context_length == context
    rope = gguf.read(mini.f32).config.rope
    assert (len(rope.long_factor or ()), rope.original_context) == (48, BOUNDARY)
    assert rope.attention_factor == pytest.approx(1.190238, abs=1e-6)
    assert json.dumps(ROPE["mini"]["rope_scaling"]["long_factor"]) == json.dumps(list(rope.long_factor or ()))


def written_by_genai(folder: Path, length: int) -> list[int]:
    """The likeliest tokens by ONNX Runtime GenAI's logits behind a prompt, an end-of-text token like any other."""
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=length + COUNT + 1)
    generator = og.Generator(model, params)
    new, found = prompt(length), []
    for _ in range(COUNT):
        generator.append_tokens(np.array(new, dtype=np.int32))
        new = [int(np.asarray(generator.get_logits()).reshape(-1, SHAPE["vocab_size"])[-1].argmax())]
        found += new
    return found


def test_onnxruntime_writes_phi_4_s_64_tokens(phi4: Model) -> None:
    assert written_by_genai(phi4.onnx, 300) == phi4.greedy(300)


@pytest.mark.parametrize("length", [40, BOUNDARY - COUNT, BOUNDARY + 1])
def test_onnxruntime_writes_mini_s_64_tokens_on_both_sides_of_4096_whatever_its_context(
    mini: Model, length: int
) -> None:
    assert written_by_genai(mini.onnx, length) == mini.greedy(length)


@pytest.mark.parametrize("length", [40, 300])
def test_phi_4_writes_the_same_64_tokens(phi4: Model, length: int) -> None:
    with Llama(phi4.f32) as llama:
        found = llama.greedy(prompt(length), COUNT, 512)
    assert found == phi4.greedy(length)
    assert len(set(found)) > 8  # not one word over and over


@pytest.mark.parametrize(
    ("length", "context"),
    [
        (40, 256),
        (300, BOUNDARY),
        (BOUNDARY - COUNT, BOUNDARY),  # the last token is the last that the short factors are for
        (BOUNDARY + 1, 4352),  # the first that the long ones are for
    ],
)
def test_mini_writes_the_same_64_tokens_on_either_side_of_its_original_context(
    mini: Model, length: int, context: int
) -> None:
    with Llama(mini.f32) as llama:
        found = llama.greedy(prompt(length), COUNT, context)
    assert found == mini.greedy(length)
    assert len(set(found)) > 8


def test_crossing_the_original_context_agrees_once_it_is_crossed(mini: Model) -> None:
    """A prompt of 4,080 and 64 tokens behind it: transformers changes factors at token 4,097."""
    length, before = 4080, BOUNDARY - 4080
    expected = mini.greedy(length)
    whole = prompt(length) + expected
    with Llama(mini.f32) as llama:
        # In a context that holds all of it llama.cpp has the long factors from the start, so it begins otherwise …
        assert llama.greedy(prompt(length), 1, 4352) != expected[:1]
        # … and goes on as transformers does where that has computed everything again.
        rest = llama.greedy(whole[: BOUNDARY + 1], COUNT - before - 1, 4352)
        assert rest == expected[before + 1 :]
        # Up to the boundary a context of 4,096 gives transformers' tokens.
        assert llama.greedy(prompt(length), before, BOUNDARY) == expected[:before]


def test_a_short_text_in_a_large_context_has_the_long_factors_in_llama_cpp(mini: Model) -> None:
    tokens = prompt(200)
    expected = mini.logits(tokens)
    with Llama(mini.f32) as llama:
        small, large = (llama.logits(torch.tensor(tokens).numpy(), context) for context in (512, 4352))
    assert float((small - expected).norm() / expected.norm()) < 5e-5
    assert float((large - expected).norm() / expected.norm()) > 0.05


@pytest.mark.parametrize(("kind", "length", "context"), [("phi4", 300, 512), ("mini", 300, 512), ("mini", 4200, 4352)])
def test_the_quantized_file_chooses_the_same_tokens_but_for_near_ties(
    request: pytest.FixtureRequest, kind: str, length: int, context: int
) -> None:
    """llama.cpp rounds activations to 8 bits before it multiplies; that decides only where two tokens nearly tie.

    Random weights leave many ties: the largest of 512 logits is on average 0.3 σ above the next.
    """
    model: Model = request.getfixturevalue(kind)
    whole = prompt(length) + model.greedy(length)
    reference = model.logits(whole)[length - 1 : -1]
    with Llama(model.q4_0) as llama:
        found = llama.logits(torch.tensor(whole).numpy(), context)[length - 1 : -1]
    chosen = found.argmax(1)
    lost = reference.amax(1) - reference.gather(1, chosen[:, None])[:, 0]
    assert float((chosen == reference.argmax(1)).float().mean()) >= 0.75
    assert float((lost / reference.std(1)).max()) < 0.35
