"""Bad checkpoints are refused with what and where, exit code 3, before anything is written."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_config, write_checkpoint

from phi4edge.checkpoint.config import parse_config
from phi4edge.checkpoint.index import open_index
from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import InputError


def copy(source: Path, out: Path) -> Path:
    return Path(shutil.copytree(source, out / "model"))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def another_architecture(folder: Path) -> None:
    config = tiny_config(architectures=["LlamaForCausalLM"])
    (folder / "config.json").write_text(json.dumps(config))


def missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def truncated_shard(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def header_lies_about_its_length(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", len(data) * 2) + data[8:])


def header_lies_about_a_tensor(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = next(n for n in header if n != "__metadata__")
    header[name]["shape"][0] += 1
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def empty_shard(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")


def wrong_shape(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("qkv_proj.weight"))
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, path)


def missing_tensor(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("layernorm.weight"))
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())
    del weight_map["weight_map"][name]
    index.write_text(json.dumps(weight_map))
    del tensors[name]
    save_file(tensors, path)


def integer_weights(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("_proj.weight"))
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, path)


CASES: list[tuple[Callable[[Path], None], str]] = [
    (no_config, r"no config\.json"),
    (broken_json, r"config\.json: not valid JSON"),
    (another_architecture, "architecture is LlamaForCausalLM, not Phi3ForCausalLM"),
    (missing_shard, r"model-00002-of-00002\.safetensors: no such file"),
    (truncated_shard, r"ends at byte \d+, but the file has \d+"),
    (header_lies_about_its_length, r"header says it is \d+ bytes long, but only \d+ bytes follow"),
    (header_lies_about_a_tensor, r"header gives it \d+ bytes, but BF16 \[.*\] takes \d+"),
    (empty_shard, "0 bytes are too few"),
    (wrong_shape, r"qkv_proj\.weight has shape \[127, 64\], config\.json says \[128, 64\]"),
    (missing_tensor, r"tensor .*layernorm\.weight is missing"),
    (integer_weights, "is I8; full-precision weights are needed"),
]


@pytest.mark.parametrize(("damage", "message"), CASES, ids=[damage.__name__ for damage, _ in CASES])
def test_a_damaged_checkpoint_is_refused_saying_what_and_where(
    phi4_checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = copy(phi4_checkpoint, tmp_path)
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        open_index(folder)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(phi4_checkpoint: Path, tmp_path: Path, value: float) -> None:
    folder = copy(phi4_checkpoint, tmp_path)
    path = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("down_proj.weight"))
    tensors[name][3, 5] = value
    save_file(tensors, path)
    with pytest.raises(InputError, match=rf"{name} holds 1 value\(s\) that are NaN or Inf, the first at \[3, 5\]"):
        open_checkpoint(folder).tensor(name)
    with pytest.raises(InputError, match=r"the first at \[3, 5\]"):
        open_checkpoint(folder).tensor(name, slice(2, 4))


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model folder"):
        open_index(tmp_path / "nowhere")


def test_rows_of_a_tensor_are_those_of_the_whole(phi4_checkpoint: Path) -> None:
    reader = open_checkpoint(phi4_checkpoint)
    whole = reader.tensor("lm_head.weight")
    assert torch.equal(reader.tensor("lm_head.weight", slice(100, 230)), whole[100:230])
    assert torch.equal(reader.tensor("lm_head.weight", slice(500, 600)), whole[500:])


def test_one_file_and_shards_hold_the_same(tmp_path: Path) -> None:
    single = open_checkpoint(write_checkpoint(tmp_path / "one", "phi4"))
    sharded = open_checkpoint(write_checkpoint(tmp_path / "three", "phi4", shards=3))
    assert len(sharded.index.shards) == 3
    for name in single.config.tensor_shapes():
        assert torch.equal(single.tensor(name), sharded.tensor(name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, "hidden_size 64 is not divisible by num_attention_heads 3"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not divisible by num_key_value_heads 3"),
        ({"hidden_size": "big"}, "hidden_size is 'big', expected a positive whole number"),
        ({"attention_bias": True}, "biases in the linears"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "rope type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "short_factor has 1 entries, expected 8"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_config(tiny_config("phi4", **changes))


def test_published_configs_give_the_published_sizes() -> None:
    phi4 = tiny_config(
        hidden_size=5120, intermediate_size=17920, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=10, vocab_size=100352, max_position_embeddings=16384,
    )  # fmt: skip
    config = parse_config(phi4)
    assert config.parameters == 14_659_507_200
    assert config.kv_bytes_per_token() == 204_800
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "type": "longrope"}
    mini = tiny_config(
        "mini", hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=24,
        num_key_value_heads=8, vocab_size=200064, max_position_embeddings=131072,
        original_max_position_embeddings=4096, rope_scaling=factors,
    )  # fmt: skip
    config = parse_config(mini)
    assert config.parameters == 3_836_021_760
    assert config.rope.dim == 96
    assert config.rope.attention_factor == pytest.approx(1.190238, abs=1e-6)
