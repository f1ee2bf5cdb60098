"""The demo's checkpoint is SmolLM2 under another name: same logits, same tokens, off the 4-bit grid."""

from __future__ import annotations

import gc
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from scripts import load_script
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from phi4edge.checkpoint.index import open_index
from phi4edge.core.errors import InputError

# Of all tensors by name. Figures of one machine stand beside those of another only while this holds.
WEIGHTS = "e9d24a8ec62e9a4d36a1d9534dc2ca0df7791b1deab74c15d2740ec4ad9c7535"

smollm2 = load_script("benchmarks/demo/smollm2.py")
same_function = load_script("benchmarks/demo/same_function.py")
make_model = load_script("benchmarks/demo/make_model.py")

TEXTS = {
    "prose": "The quick brown fox, it's said, didn't jump — “not today!” it'd have told the lazy dog.  \n\n\tNew line.",
    "code": "def f(xs: list[int]) -> int:\n    return sum(x**2 for x in xs if x != 0)  # squares\n\n\n\tif a&&b{c++;}",
    "digits": "In 1984 and 2024: 3.14159, 1,000,000 and 0x1F; room 007 costs $12.50, or 5 6  7.",
    "unicode": "naïve Ünïcödé größer 東京タワー Привет мир שלום عربى हिन्दी 한국어 👩‍👩‍👧 🏳️‍🌈 𝔘𝔫𝔦 \u00a0\u2003 ½ ² Ⅷ ٣٤",
    "chat": "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
    "white space": "   a  b\r\nc \t d\n \n  e   ",
}


class Source(NamedTuple):
    arch: Any
    weights: dict[str, Tensor]
    metadata: dict[str, Any]
    ids: Tensor  # [1, n] tokens to compare logits on
    reference: Tensor  # [n, vocab] logits of an independently built Llama


def llama_from_gguf(path: Path) -> LlamaForCausalLM:
    """The GGUF in transformers' own Llama, its rows put in order by index instead of by reshape."""
    reader = gguf.GGUFReader(path)
    meta = {k.removeprefix("llama."): f.contents() for k, f in reader.fields.items() if k.startswith("llama.")}
    heads, kv_heads, layers = meta["attention.head_count"], meta["attention.head_count_kv"], meta["block_count"]
    config = LlamaConfig(
        vocab_size=meta["vocab_size"],
        hidden_size=meta["embedding_length"],
        intermediate_size=meta["feed_forward_length"],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-5,
        max_position_embeddings=meta["context_length"],
        rope_parameters={"rope_type": "default", "rope_theta": meta["rope.freq_base"]},
        tie_word_embeddings=True,
    )
    half = meta["rope.dimension_count"] // 2
    # Row 2·pair + side of a head is where llama.cpp keeps row side·half + pair.
    order = [2 * (row % half) + row // half for row in range(2 * half)]
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        **{
            f"blk.{i}.{theirs}.weight": f"model.layers.{i}.{ours}.weight"
            for i in range(layers)
            for theirs, ours in (
                ("attn_norm", "input_layernorm"),
                ("attn_q", "self_attn.q_proj"),
                ("attn_k", "self_attn.k_proj"),
                ("attn_v", "self_attn.v_proj"),
                ("attn_output", "self_attn.o_proj"),
                ("ffn_norm", "post_attention_layernorm"),
                ("ffn_gate", "mlp.gate_proj"),
                ("ffn_up", "mlp.up_proj"),
                ("ffn_down", "mlp.down_proj"),
            )
        },
    }
    state = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        for kind, count in (("attn_q", heads), ("attn_k", kv_heads)):
            if f".{kind}." in tensor.name:
                values = values[np.concatenate([np.array(order) + 2 * half * head for head in range(count)])]
        state[names[tensor.name]] = torch.from_numpy(values.copy())
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    return settle(model)


def settle(model: Any) -> Any:
    """Recompute what a model built on the meta device lacks: the rotary frequencies, a buffer not in any file."""
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(config=model.config)
    return model.eval()


@torch.inference_mode()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits[0]


@pytest.fixture(scope="module")
def source() -> Source:
    path = smollm2.find_gguf()
    arch, weights, metadata = smollm2.read_gguf(path)
    ids = smollm2.build_tokenizer(metadata).encode(TEXTS["chat"] + TEXTS["prose"] + TEXTS["code"]).ids
    tokens = torch.tensor([ids])
    reference = logits(llama_from_gguf(path), tokens)
    gc.collect()
    return Source(arch, weights, metadata, tokens, reference)


@pytest.fixture(scope="module")
def scaled(source: Source) -> dict[str, Tensor]:
    """The weights as the demo scales them."""
    weights: dict[str, Tensor] = same_function.rescale(source.arch, source.weights, 0.15, seed=0)
    return weights


def deviation(source: Source, arch: Any, weights: dict[str, Tensor], *, tied: bool = False) -> float:
    """max |logits − reference| over max |reference| of transformers' Phi3ForCausalLM with these weights."""
    options = make_model.ModelOptions(tied=tied, dtype=torch.float32)
    config = Phi3Config(**make_model.phi3_config(arch, source.metadata, options))
    state = same_function.fuse(arch, weights, tied=tied)
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = Phi3ForCausalLM(config)
    model.load_state_dict(state, assign=True)
    difference = logits(settle(model), source.ids) - source.reference
    return float(difference.abs().max() / source.reference.abs().max())


def test_fused_weights_give_the_logits_of_an_independent_llama(source: Source) -> None:
    assert deviation(source, source.arch, source.weights) <= 1e-5


def test_scalings_leave_the_logits_unchanged(source: Source, scaled: dict[str, Tensor]) -> None:
    assert deviation(source, source.arch, scaled) <= 1e-5


def test_hard_scalings_and_a_wider_model_give_the_same_logits(source: Source) -> None:
    hard = same_function.rescale(source.arch, source.weights, 0.7, seed=1)
    arch, wide = same_function.pad(source.arch, hard, 768)
    assert (arch.hidden, arch.heads, arch.kv_heads, arch.head_dim) == (768, 12, 4, 64)
    assert deviation(source, arch, wide) <= 1e-5
    group = 3 * 64
    assert not wide["0.q"][-group:].any()
    assert not wide["0.o"][:, -group:].any()
    zero = (wide["embed"] == 0).all(0)
    assert int(zero.sum()) == 768 - 576
    assert max(np.diff(np.flatnonzero(zero.numpy()))) <= 4, "zero channels are spread, none of them bunched"


def test_tied_model_gives_the_same_logits(source: Source) -> None:
    tied = same_function.rescale(source.arch, source.weights, 0.15, seed=0, tied=True)
    assert deviation(source, source.arch, tied, tied=True) <= 1e-5
    assert "lm_head.weight" not in same_function.fuse(source.arch, tied, tied=True)


def test_every_tensor_but_the_embedding_is_scaled_and_the_seed_decides_how(
    source: Source, scaled: dict[str, Tensor]
) -> None:
    again, other = (same_function.rescale(source.arch, source.weights, 0.15, seed) for seed in (0, 1))
    for name, value in source.weights.items():
        assert torch.equal(scaled[name], again[name]), name
        assert torch.equal(scaled[name], value) == (name == "embed"), name
        assert torch.equal(scaled[name], other[name]) == (name == "embed"), name


@pytest.mark.parametrize("name", ["q", "k", "v", "o", "gate", "up", "down"])
def test_scaled_weights_lie_on_no_four_bit_grid(source: Source, scaled: dict[str, Tensor], name: str) -> None:
    key = f"17.{name}"
    before, after = source.weights[key].bfloat16(), scaled[key].bfloat16()
    assert same_function.shared_grid_fraction(before) > 0.99, "the detector sees the grid that is there"
    assert same_function.shared_grid_fraction(after) < 0.01


def test_width_that_is_no_multiple_of_a_head_group_is_refused(source: Source) -> None:
    with pytest.raises(InputError, match="--pad-hidden 700: not a multiple of 192"):
        same_function.pad(source.arch, source.weights, 700)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model.make_model(tmp_path_factory.mktemp("demo") / "model")


@pytest.fixture(scope="module")
def vocabulary() -> llama_cpp.Llama:
    return llama_cpp.Llama(str(smollm2.find_gguf()), vocab_only=True, verbose=False)


@pytest.mark.parametrize("kind", TEXTS)
def test_tokens_equal_those_of_llama_cpp_on_the_original(folder: Path, vocabulary: llama_cpp.Llama, kind: str) -> None:
    expected = vocabulary.tokenize(TEXTS[kind].encode(), add_bos=False, special=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode(TEXTS[kind]).ids == expected
    assert AutoTokenizer.from_pretrained(folder)(TEXTS[kind])["input_ids"] == expected
    assert tokenizer.decode(expected, skip_special_tokens=False) == TEXTS[kind]


def test_checkpoint_folder_is_a_bf16_phi3_model_that_phi4edge_reads(folder: Path) -> None:
    index = open_index(folder)  # checks every tensor's presence and shape
    assert {ref.dtype for ref in index.tensors.values()} == {"BF16"}
    config = index.config
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.rope.theta, config.rms_norm_eps, config.context_length) == (100000.0, 1e-5, 8192)
    assert not config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2,), 2)
    assert not list(folder.parent.glob("*.partial"))


def test_every_machine_makes_the_same_weights(folder: Path) -> None:
    digest = hashlib.sha256()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in sorted(file.keys()):
            digest.update(file.get_tensor(name).view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == WEIGHTS


def test_bf16_checkpoint_still_speaks_like_the_original(folder: Path, source: Source) -> None:
    model = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = logits(model, source.ids)
    divergence = torch.nn.functional.kl_div(
        ours.log_softmax(-1), source.reference.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert float(divergence.mean()) < 2e-3
    prompt = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in AutoTokenizer.from_pretrained(folder).decode(answer)


def test_llama_cpp_gives_the_original_the_logits_we_took_for_it(source: Source) -> None:
    """The row order of q and k, once more, against the program whose convention it is."""
    model = llama_cpp.Llama(str(smollm2.find_gguf()), n_ctx=512, n_threads=2, logits_all=True, verbose=False)
    model.eval(source.ids[0].tolist())
    theirs = torch.from_numpy(np.array(model.scores[: source.ids.shape[1]]))
    agree = (theirs.argmax(-1) == source.reference.argmax(-1)).float().mean()
    assert float(agree) > 0.9  # llama.cpp rounds activations to 8 bits


def test_an_existing_folder_is_kept_unless_forced(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="already exists"):
        make_model.make_model(tmp_path / "model")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["mine.txt"]


def test_model_card_names_base_licence_and_changes(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    for fact in ("SmolLM2-135M-Instruct", "apache-2.0", "exp(uniform(±0.15))", "seed 0", "bfloat16"):
        assert fact in card
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
