"""A linear as a run stores it: the same whether codes were given, or come two to a byte and are not unpacked yet."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from phi4edge.quant import linear as module
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.packing import pack_words
from phi4edge.quant.scheme import parse_scheme


def made(scheme: str = "w4g32") -> QuantizedLinear:
    generator = torch.Generator().manual_seed(5)
    parsed = parse_scheme(scheme)
    codes = torch.randint(0, 2**parsed.bits, (24, 64), generator=generator, dtype=torch.uint8)
    scales = torch.rand(24, 2, generator=generator).half()
    return QuantizedLinear("model.layers.0.mlp.down_proj", parsed, codes, {"scales": scales})


@pytest.mark.parametrize("scheme", ["w4g32", "q4_0", "w8g32"])
def test_what_was_stored_is_read_back_whole_and_in_rows(scheme: str) -> None:
    linear = made(scheme)
    stored = QuantizedLinear.from_tensors(linear.name, linear.scheme, linear.to_tensors())
    assert (stored.out_features, stored.in_features) == (24, 64)
    part = stored.rows(3, 9)
    assert torch.equal(part.codes, linear.codes[3:9])
    assert torch.equal(part.params["scales"], linear.params["scales"][3:9])
    thinned = stored.every(5)
    assert torch.equal(thinned.codes, linear.codes[::5])
    assert torch.equal(thinned.dequantize(), linear.dequantize()[::5])
    assert torch.equal(stored.words(), pack_words(linear.codes, linear.scheme.bits))
    assert torch.equal(stored.dequantize(), linear.dequantize())
    assert torch.equal(stored.rows(3, 9).codes, linear.codes[3:9])  # now that all are unpacked
    assert torch.equal(stored.every(5).codes, linear.codes[::5])
    assert stored.to_tensors().keys() == linear.to_tensors().keys()
    assert torch.equal(stored.to("cpu").codes, linear.codes)


def test_packing_as_stored_unpacks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = made()
    tensors = linear.to_tensors()

    def refuse(packed: torch.Tensor) -> torch.Tensor:
        raise AssertionError("codes were unpacked")

    monkeypatch.setattr(module, "unpack_nibbles", refuse)
    stored = QuantizedLinear.from_tensors(linear.name, linear.scheme, tensors)
    assert torch.equal(stored.rows(1, 5).packed(), linear.rows(1, 5).packed())
    assert torch.equal(stored.words(), linear.words())
    with pytest.raises(AssertionError, match="unpacked"):
        _ = stored.codes


def test_codes_and_parameters_can_be_replaced_in_a_stored_linear() -> None:
    linear = made()
    stored = QuantizedLinear.from_tensors(linear.name, linear.scheme, linear.to_tensors())
    doubled = replace(stored, params={"scales": 2 * linear.params["scales"]})
    assert torch.equal(doubled.codes, linear.codes)
    moved = replace(stored, codes=linear.codes.roll(1, dims=1))
    assert torch.equal(moved.words(), pack_words(linear.codes.roll(1, dims=1), 4))
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        getattr(stored, "weight")  # noqa: B009  not an attribute that a type checker would let pass


def test_words_of_bytes_that_begin_anywhere() -> None:
    linear = made()
    whole = torch.cat([torch.zeros(1, dtype=torch.uint8), linear.packed().reshape(-1)])
    nibbles = whole[1:].reshape(24, 32)
    stored = QuantizedLinear.from_tensors(
        linear.name, linear.scheme, {**linear.to_tensors(), f"{linear.name}.codes": nibbles}
    )
    assert torch.equal(stored.words(), linear.words())
    assert torch.equal(stored.codes, linear.codes)
