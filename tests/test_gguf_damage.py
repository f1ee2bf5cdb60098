"""GGUF files that were cut, or whose header lies: what is wrong is named."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rounded import quantized_model

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import InputError
from phi4edge.quant.scheme import parse_scheme
from phi4edge.writers import gguf
from phi4edge.writers._api import WriteOptions


def test_every_truncation_is_told(phi4_checkpoint: Path, tmp_path: Path) -> None:
    whole = gguf.write(quantized_model(phi4_checkpoint, "q4_0"), tmp_path / "m.gguf", WriteOptions()).path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 400, 7), *range(400, len(whole) - 32, len(whole) // 60)]:
        cut.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.gguf: "):
            gguf.read(cut)


def edited(path: Path, change: Callable[[bytearray], None]) -> Path:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def put(offset: int, code: str, value: Any) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into(code, data, offset, value)


def replace(old: bytes, new: bytes) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        assert data.count(old) == 1
        at = data.index(old)
        data[at : at + len(old)] = new

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put(0, "4s", b"GGML"), "begins with b'GGML'"),
        (put(4, "<I", 1), "GGUF version 1 is not supported"),
        (put(8, "<Q", 10**12), "axes, 1 to 4 are possible|needs .* bytes at byte"),
        (put(16, "<Q", 2**63), "needs .* bytes at byte"),
        (put(24, "<Q", 2**60), "a key needs"),
        (replace(b"phi3.block_count\x04\x00\x00\x00\x02", b"phi3.block_count\x04\x00\x00\x00\x03"), "num_layers is 3"),
        (replace(b"phi3.block_count", b"phi3.block_cound"), "phi3.block_count is missing"),
        (replace(b"general.architecture\x08\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00phi3",
                 b"general.architecture\x08\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00phi2"), "'phi2', not 'phi3'"),
        (replace(b"phi4edge.scheme\x08\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00q4_0",
                 b"phi4edge.scheme\x08\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00q9_0"), "'q9_0', not a scheme"),
        (replace(b"general.file_type\x04\x00\x00\x00\x02", b"general.file_type\x09\x00\x00\x00\x09"),
         "list of unknown type 9"),
        (replace(b"general.file_type\x04\x00\x00\x00", b"general.file_type\x63\x00\x00\x00"), "has unknown type 99"),
        (replace(b"phi4edge.method", b"phi4edge.scheme"), "key phi4edge.scheme stands in it twice"),
        (replace(b"phi3.context_length\x04\x00\x00\x00", b"phi3.context_length\x06\x00\x00\x00"),
         "phi3.context_length is .*, expected a positive whole number"),
        (replace(b"blk.1.ffn_up.weight", b"blk.7.ffn_up.weight"), "blk.1.ffn_up.weight is missing"),
        (replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"), "blk.0.ffn_up.weight stands in it twice"),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_told(
    phi4_checkpoint: Path, tmp_path: Path, change: Callable[[bytearray], None], words: str
) -> None:
    path = gguf.write(quantized_model(phi4_checkpoint, "q4_0"), tmp_path / "m.gguf", WriteOptions()).path
    with pytest.raises(InputError, match=words):
        gguf.read(edited(path, change))


def tensor_entry(path: Path, name: str) -> int:
    """Where the entry of tensor ``name`` goes on behind its name."""
    needle = struct.pack("<Q", len(name)) + name.encode()
    data = path.read_bytes()
    assert data.count(needle) == 1
    return data.index(needle) + len(needle)


@pytest.mark.parametrize(
    ("behind", "code", "value", "words"),
    [
        (0, "<I", 9, "has 9 axes"),
        (4, "<Q", 63, "rows of 63 weights are not whole Q4_0 blocks"),
        (12, "<Q", 2**40, "ends at byte"),
        (12, "<Q", 96, r"blk.1.ffn_up.weight is \[96, 64\], the keys say \[256, 64\]"),
        (20, "<I", 999, "unknown tensor type 999"),
        (24, "<Q", 2**50, "ends at byte"),
        (24, "<Q", 33, "not a multiple of the alignment 32"),
    ],
)
def test_a_tensors_place_that_lies_is_told(
    phi4_checkpoint: Path, tmp_path: Path, behind: int, code: str, value: int, words: str
) -> None:
    path = gguf.write(quantized_model(phi4_checkpoint, "q4_0"), tmp_path / "m.gguf", WriteOptions()).path
    at = tensor_entry(path, "blk.1.ffn_up.weight")
    with pytest.raises(InputError, match=words):
        gguf.read(edited(path, put(at + behind, code, value)))


def test_rope_factors_of_another_type_are_told(mini_checkpoint: Path, tmp_path: Path) -> None:
    path = gguf.write_f16(open_checkpoint(mini_checkpoint), tmp_path / "m.gguf", WriteOptions()).path
    at = tensor_entry(path, "rope_factors_long.weight")
    with pytest.raises(InputError, match=r"rope_factors_long\.weight is F16 \[6\], expected an F32 list"):
        gguf.read(edited(path, put(at + 12, "<I", 1)))


def test_a_block_type_that_contradicts_the_scheme_is_told(phi4_checkpoint: Path, tmp_path: Path) -> None:
    path = gguf.write(quantized_model(phi4_checkpoint, "q4_0"), tmp_path / "m.gguf", WriteOptions()).path
    key = b"phi4edge.scheme\x08\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00"
    reader = gguf.read(edited(path, replace(key + b"q4_0", key + b"q8_0")))
    assert reader.scheme == parse_scheme("q8_0")
    with pytest.raises(InputError, match="is q4_0, but the file says q8_0"):
        reader.quantized("model.layers.0.mlp.down_proj")
