"""A block's file has the bytes that the library would write, and its hash is known when it is there."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from phi4edge.core.workdir import Workdir
from phi4edge.stages.block_writer import write_block


def some() -> dict[str, torch.Tensor]:
    """Tensors of every dtype that a block holds, one of them large, empty, a view, or named beyond ASCII."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 255, (1100, 1024), dtype=torch.uint8, generator=generator)
    return {
        "b.codes": codes,
        "a.codes": codes[::2],
        "a.turned": codes[:64, :32].T,
        "b.scales": torch.randn(1100, 8, generator=generator).half(),
        "a.sub_scales": torch.randint(-9, 9, (30, 16), dtype=torch.int8, generator=generator),
        "a.imatrix": torch.rand(33, generator=generator),
        "a.long": torch.arange(5),
        "a.none": torch.empty(0, 4),
        "ä.bfloat16": torch.rand(7, generator=generator).bfloat16(),
    }


@pytest.mark.parametrize("names", [None, ("b.codes",), ()])
def test_bytes_are_the_librarys(names: tuple[str, ...] | None, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in some().items() if names is None or name in names}
    digest = write_block(tmp_path / "block.safetensors", tensors)
    data = (tmp_path / "block.safetensors").read_bytes()
    assert data == save({name: tensor.contiguous() for name, tensor in tensors.items()})
    assert digest == hashlib.sha256(data).hexdigest()
    assert all(torch.equal(found, tensors[name]) for name, found in load_file(tmp_path / "block.safetensors").items())
    assert [path.name for path in tmp_path.iterdir()] == ["block.safetensors"]


def test_a_step_takes_a_known_hash_or_reads_its_file(tmp_path: Path) -> None:
    with Workdir.open(tmp_path / "run", {}) as work:
        digest = write_block(work.path / "block", some())
        work.commit({"step": 0}, {"block": digest})
        work.commit({"step": 1}, ["block"])
        first, second = work.records
        assert first["files"] == second["files"] == {"block": digest}
    with Workdir.open(tmp_path / "run", {}) as work:
        assert work.records == [first, second]
