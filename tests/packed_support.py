"""What every packed folder must do, damage for it, and codes with the scales that packing could get wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rounded import quantized_model, rounded
from safetensors.torch import load_file, save_file
from torch import Tensor

from phi4edge.core.errors import InputError
from phi4edge.core.hashing import sha256_file
from phi4edge.model.source import QuantizedModel
from phi4edge.quant.grid import grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.scheme import Scheme, parse_scheme
from phi4edge.writers._api import Artifact, WriteOptions

DTYPES = {torch.int32: "I32", torch.int64: "I64", torch.uint32: "U32", torch.float16: "F16", torch.float32: "F32"}
SMALLEST, LARGEST = 2.0**-24, 65504.0  # of float16
ADVERSARIAL = (0.0, SMALLEST, -SMALLEST, 3 * SMALLEST, 2.0**-14, -(2.0**-14), 1.0, -0.3, LARGEST, -LARGEST)


def adversarial_linear(
    scheme: Scheme, out_features: int, in_features: int, seed: int, largest: float = LARGEST
) -> QuantizedLinear:
    """Any codes; scales and minima zero, subnormal, negative, up to ``largest``, or anything between."""
    generator = torch.Generator().manual_seed(seed)
    grid, shape = grid_for(scheme), (out_features, scheme.groups(in_features))

    def floats() -> Tensor:
        choices = torch.tensor([max(-largest, min(value, largest)) for value in ADVERSARIAL])
        exponent = torch.randint(-24, 8, shape, generator=generator)
        some = torch.randn(shape, generator=generator) * 2.0**exponent
        hard = choices[torch.randint(0, len(choices), shape, generator=generator)]
        return torch.where(torch.rand(shape, generator=generator) < 0.5, hard, some).half()

    codes = torch.randint(grid.low, grid.high + 1, (out_features, in_features), generator=generator)
    params = {"scales": floats()}
    if "zeros" in grid.fields:
        zeros = torch.randint(0, grid.high + 1, shape, generator=generator).to(torch.uint8)
        params["zeros"] = torch.where(params["scales"] == 0, torch.zeros_like(zeros), zeros)
    if "mins" in grid.fields:
        params["mins"] = floats()
    return QuantizedLinear("linear", scheme, codes.to(torch.uint8), params)


def assert_same(ours: QuantizedLinear | None, theirs: QuantizedLinear) -> None:
    """Name, scheme, codes, and parameters down to their bits and strides."""
    assert ours is not None
    assert (ours.name, ours.scheme) == (theirs.name, theirs.scheme)
    assert torch.equal(ours.codes, theirs.codes)
    assert ours.codes.dtype == torch.uint8
    assert ours.params.keys() == theirs.params.keys()
    for field, value in theirs.params.items():
        read = ours.params[field]
        assert (read.dtype, read.stride()) == (value.dtype, value.stride())
        bits = torch.int16 if value.dtype == torch.float16 else value.dtype
        assert torch.equal(read.view(bits), value.view(bits)), field


def check_round_trip(writer: ModuleType, model: QuantizedModel, out: Path) -> Artifact:
    """Write, read back: codes and parameters bit for bit, the rest as the base model has it, every file hashed."""
    artifact: Artifact = writer.write(model, out, WriteOptions())
    assert writer.matches(artifact.path)
    reader = writer.read(artifact.path)
    for name in model.linears:
        expected = model.load(name)
        assert_same(reader.quantized(name), expected)
        assert torch.equal(reader.tensor(f"{name}.weight"), expected.dequantize())
        assert torch.equal(reader.tensor(f"{name}.weight", slice(3, 9)), expected.dequantize()[3:9])
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(reader.tensor(name), model.tensor(name))
    assert reader.quantized("lm_head") is None
    assert (reader.config, artifact.format, artifact.scheme) == (model.config, writer.FORMAT, model.scheme.name)
    assert {p.name: sha256_file(p) for p in artifact.path.iterdir()} == dict(artifact.files)
    return artifact


def check_refused(writer: ModuleType, model: QuantizedModel, options: WriteOptions, reason: str, out: Path) -> None:
    """Refused with ``reason`` before anything is written, and every scheme that the hint names would fit."""
    assert reason in str(writer.refusal(model, options))
    with pytest.raises(InputError, match=f"{writer.FORMAT} cannot hold this run") as caught:
        writer.write(model, out, options)
    assert not list(out.parent.glob(f"{out.name}*"))
    assert caught.value.hint == f"schemes that fit: {writer.SCHEMES}"


def described(tensors: dict[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Safetensors dtype and shape of each."""
    return {name: (DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def edit_json(change: Callable[[dict[str, Any]], Any], file: str = "config.json") -> Callable[[Path], None]:
    """Damage that passes a folder's ``file`` through ``change``."""

    def apply(folder: Path) -> None:
        document = json.loads((folder / file).read_text())
        change(document)
        (folder / file).write_text(json.dumps(document))

    return apply


def edit_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Damage that passes a folder's tensors through ``change``."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def mixed_model(folder: Path) -> QuantizedModel:
    """Down projections on q8_0, everything else on q4_1."""
    model = quantized_model(folder, "q4_1")
    exceptions = {name: parse_scheme("q8_0") for name in model.linears if name.endswith("down_proj")}

    def load(name: str) -> QuantizedLinear:
        weight = model.checkpoint.tensor(f"{name}.weight")
        return rounded(name, weight, exceptions.get(name, model.scheme))

    return replace(model, load=load, exceptions=exceptions)
