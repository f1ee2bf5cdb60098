"""Blocks of GGML: what we pack, libggml reads as the linear; what libggml rounds, we round the same or better."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import pytest
import torch
from gguf_support import libggml_dequantize, libggml_quantize, traits
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from phi4edge.core.errors import InputError
from phi4edge.quant.ggml import (
    BLOCK_TYPES,
    block_type_of,
    dequantize,
    pack_linear,
    packing_refusal,
    unpack_linear,
)
from phi4edge.quant.ggml_rounding import quantize_q6_k, quantize_q8_0, store_float
from phi4edge.quant.grid import NestedGrid, grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.packing import pack_nibbles, unpack_nibbles
from phi4edge.quant.scheme import GGML_SCHEMES, parse_scheme

SCHEMES = (*GGML_SCHEMES, "w4g32", "w4g96", "w4row", "w8g32")
F16_MAX, F16_DENORMAL = 65504.0, 2.0**-24
# Scales and minima that break careless arithmetic: none, subnormal, negative, the largest.
EDGES = (0.0, -0.0, F16_DENORMAL, -F16_DENORMAL, 2.0**-14, F16_MAX, -F16_MAX, 1.0, -0.3)


@st.composite
def linears(draw: st.DrawFn, name: str | None = None) -> QuantizedLinear:
    """A linear of any codes and any finite parameters, edges preferred; on scheme ``name`` or any."""
    scheme = parse_scheme(name or draw(st.sampled_from(SCHEMES)))
    grid = grid_for(scheme)
    rows, in_features = draw(st.integers(1, 3)), draw(st.sampled_from((256, 512) if scheme.nested else (96, 192)))
    lowest = 1 if scheme.bits == 8 else grid.low
    codes = draw(arrays(np.uint8, (rows, in_features), elements=st.integers(lowest, grid.high)))
    half = st.sampled_from(EDGES) | st.floats(-F16_MAX, F16_MAX, width=16)
    groups = scheme.groups(in_features)
    params = {}
    for field in grid.fields:
        if field in grid.tunable:
            shape = (rows, in_features // scheme.unit if scheme.nested else groups)
            found = draw(arrays(np.float16, shape, elements=half, fill=st.nothing()))
        else:
            assert isinstance(grid, NestedGrid)
            low, high = grid.sub_range
            found = draw(arrays(np.int16, (rows, groups), elements=st.integers(low, high), fill=st.nothing()))
            found = found.astype(np.int8 if scheme.symmetric else np.uint8)
        params[field] = torch.from_numpy(found)
    return QuantizedLinear("linear", scheme, torch.from_numpy(codes), params)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit, but that a zero may carry either sign."""
    return torch.equal(a, b) and torch.equal(torch.isnan(a), torch.isnan(b))


@settings(deadline=None)
@given(linears())
def test_libggml_reads_packed_blocks_as_the_linear(linear: QuantizedLinear) -> None:
    kind = block_type_of(linear.scheme)
    assert kind is not None
    packed = pack_linear(linear)
    assert packed.shape == (linear.out_features, kind.row_bytes(linear.in_features))
    assert same_bits(libggml_dequantize(kind, packed), linear.dequantize())
    assert same_bits(dequantize(kind, packed), linear.dequantize())
    with np.errstate(over="ignore"):
        theirs = gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType(kind.code))
    assert same_bits(torch.from_numpy(theirs), linear.dequantize())


def test_every_quantized_block_type_is_among_those_tested() -> None:
    assert set(GGML_SCHEMES) == {"q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k"}
    assert set(GGML_SCHEMES) == set(BLOCK_TYPES) - {"f32", "f16", "bf16"}


@pytest.mark.parametrize("name", GGML_SCHEMES)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_each_block_type_is_read_by_libggml_bit_for_bit(name: str, data: st.DataObject) -> None:
    linear = data.draw(linears(name))
    packed = pack_linear(linear)
    assert same_bits(libggml_dequantize(BLOCK_TYPES[name], packed), linear.dequantize())


def filled(name: str, codes: str, half: float, whole: str) -> QuantizedLinear:
    """A linear of adversarial blocks: every code, every float16 and every whole number at an end of its range."""
    scheme = parse_scheme(name)
    grid, rows, width = grid_for(scheme), 4, 512
    lowest = 1 if scheme.bits == 8 else grid.low
    ends = torch.tensor([lowest, grid.high], dtype=torch.uint8)
    zero = grid.middle if scheme.symmetric else grid.low
    spread = torch.full((rows, width), zero, dtype=torch.uint8)
    chosen = {
        "lowest": ends[:1].expand(rows, width).clone(),
        "highest": ends[1:].expand(rows, width).clone(),
        "alternating": ends.repeat(width // 2).expand(rows, width).clone(),
        "zero": spread,
        "one huge": spread.index_fill(1, torch.tensor([37, 300]), grid.high),
    }[codes]
    params: dict[str, Tensor] = {}
    for field in grid.fields:
        if field in grid.tunable:
            columns = width // scheme.unit if scheme.nested else scheme.groups(width)
            params[field] = torch.full((rows, columns), half, dtype=torch.float16)
            params[field][1::2] *= -1  # of either sign
        else:
            assert isinstance(grid, NestedGrid)
            low, high = grid.sub_range
            value = {"low": low, "high": high, "mixed": high}[whole]
            shape = (rows, scheme.groups(width))
            params[field] = torch.full(shape, value, dtype=torch.int8 if scheme.symmetric else torch.uint8)
            if whole == "mixed":
                params[field][:, ::2] = low
    return QuantizedLinear("linear", scheme, chosen, params)


@pytest.mark.parametrize("name", GGML_SCHEMES)
@pytest.mark.parametrize("codes", ["lowest", "highest", "alternating", "zero", "one huge"])
def test_adversarial_blocks_are_read_by_libggml_bit_for_bit(name: str, codes: str) -> None:
    """Scales of nothing, subnormal, smallest normal, ±largest; products that leave float32's float16 range too."""
    kind = BLOCK_TYPES[name]
    for half in (0.0, F16_DENORMAL, 2.0**-15, 2.0**-14, 0.1, F16_MAX):
        for whole in ("low", "high", "mixed") if parse_scheme(name).nested else ("low",):
            linear = filled(name, codes, half, whole)
            packed, expected = pack_linear(linear), linear.dequantize()
            assert same_bits(libggml_dequantize(kind, packed), expected), (half, whole)
            back = unpack_linear("linear", kind, packed)
            assert torch.equal(back.codes, linear.codes)
            if codes == "zero" and parse_scheme(name).symmetric:
                assert not expected.any()


@settings(deadline=None)
@given(linears())
def test_unpacking_gives_back_codes_and_parameters(linear: QuantizedLinear) -> None:
    kind = block_type_of(linear.scheme)
    assert kind is not None
    back = unpack_linear("linear", kind, pack_linear(linear), linear.scheme)
    assert back.scheme == linear.scheme
    assert torch.equal(back.codes, linear.codes)
    for field, values in linear.params.items():
        assert back.params[field].numpy().tobytes() == values.numpy().tobytes(), field
    # Without the scheme each block has a scale of its own, and stands for the same weights.
    assert torch.equal(unpack_linear("linear", kind, pack_linear(linear)).dequantize(), linear.dequantize())


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_sizes_are_those_of_libggml_and_of_gguf_py(name: str) -> None:
    kind = BLOCK_TYPES[name]
    assert (traits(kind).blck_size, traits(kind).type_size) == (kind.weights, kind.nbytes)
    assert traits(kind).type_name.decode().lower() == name
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind.code)] == (kind.weights, kind.nbytes)


VALUES: dict[str, Callable[[torch.Generator], Tensor]] = {
    "gaussian": lambda g: torch.randn(16, 1024, generator=g) * 0.02,
    "heavy tails": lambda g: torch.randn(16, 1024, generator=g) ** 3,
    "uniform": lambda g: torch.rand(16, 1024, generator=g) - 0.5,
    "outlier channels": lambda g: torch.randn(16, 1024, generator=g) * torch.rand(1024, generator=g) ** 4,
    "one huge value in a block": lambda g: torch.randn(16, 1024, generator=g).index_fill(
        1, torch.arange(0, 1024, 256), 3e4
    ),
    "halves": lambda g: torch.randint(-254, 255, (16, 1024), generator=g) / 2.0,
}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("scale", [1.0, 1e-7, 100.0])
def test_q8_0_rounding_is_libggmls_bit_for_bit(kind: str, scale: float) -> None:
    values = VALUES[kind](torch.Generator().manual_seed(0)) * scale
    values[3, 32:64] = 0
    assert torch.equal(quantize_q8_0(values), libggml_quantize(BLOCK_TYPES["q8_0"], values))


@settings(deadline=None)
@given(arrays(np.float32, (1, 64), elements=st.floats(-8e6, 8e6, width=32, allow_subnormal=False)))
def test_q8_0_rounding_is_libggmls_on_any_values(values: np.ndarray) -> None:
    tensor = torch.from_numpy(values)
    if bool((tensor.reshape(2, 32).abs().amax(1) < 1e-35).any()):
        return  # 1/d is infinite there, and what C makes of such a float as int8 is undefined
    assert torch.equal(quantize_q8_0(tensor), libggml_quantize(BLOCK_TYPES["q8_0"], tensor))


def test_q8_0_of_subnormal_values_is_zero() -> None:
    values = torch.full((1, 32), 1e-44)
    assert not dequantize(BLOCK_TYPES["q8_0"], quantize_q8_0(values)).any()


@pytest.mark.parametrize("kind", VALUES)
def test_q6_k_rounding_loses_less_than_libggmls(kind: str) -> None:
    values, block = VALUES[kind](torch.Generator().manual_seed(1)), BLOCK_TYPES["q6_k"]

    def error(packed: Tensor) -> float:
        return float((libggml_dequantize(block, packed) - values).double().square().sum())

    ours, theirs = error(quantize_q6_k(values)), error(libggml_quantize(block, values))
    assert ours <= theirs
    if kind in ("gaussian", "heavy tails", "uniform"):
        assert ours <= 0.92 * theirs  # 0.85 to 0.90 on large samples


def test_q6_k_of_zeros_is_zero_beside_anything() -> None:
    values = torch.zeros(2, 512)
    values[1, 256:272] = 7.0
    restored = dequantize(BLOCK_TYPES["q6_k"], quantize_q6_k(values))
    assert torch.equal(restored == 0, values == 0)
    assert torch.allclose(restored, values, rtol=1e-3)


def test_q6_k_rounding_does_not_depend_on_rows_beside_it() -> None:
    values = torch.randn(700, 256, generator=torch.Generator().manual_seed(2))
    assert torch.equal(quantize_q6_k(values)[450:460], quantize_q6_k(values[450:460]))


def test_values_beyond_float16_are_refused_by_name() -> None:
    huge = torch.zeros(4, 256)
    huge[2, 7] = 1e12
    with pytest.raises(InputError, match=r"head: 1e\+12 at \[2, 7\] exceeds float16's 65504"):
        store_float(huge, torch.float16, "head")
    with pytest.raises(InputError, match="head: scale"):
        quantize_q8_0(huge, "head")
    with pytest.raises(InputError, match="head: values up to 1e\\+12 need a Q6_K scale"):
        quantize_q6_k(huge, "head")


def test_a_code_of_minus_128_is_refused_with_its_place() -> None:
    codes = torch.full((3, 64), 128, dtype=torch.uint8)
    codes[2, 40] = 0
    linear = QuantizedLinear("mlp", parse_scheme("w8g32"), codes, {"scales": torch.ones(3, 2).half()})
    with pytest.raises(InputError, match="mlp: code −128 at row 2, column 40"):
        pack_linear(linear)


@pytest.mark.parametrize(
    ("scheme", "in_features", "words"),
    [
        ("w4g32-asym", 64, "−scale·zero is not exact"),
        ("w8g64-asym", 64, "−scale·zero is not exact"),
        ("w4g16", 64, "group_size 16 is not a multiple of 32"),
        ("w4row", 48, "group_size 48 is not a multiple of 32"),
        ("q4_0", 48, "in_features 48 is not divisible by group_size 32"),
        ("q4_k", 384, "in_features 384 is not divisible by 256, the weights in a q4_k super-block"),
    ],
)
def test_what_no_block_type_holds_is_refused_with_the_reason(scheme: str, in_features: int, words: str) -> None:
    assert words in (packing_refusal(parse_scheme(scheme), 32, in_features) or "")


@pytest.mark.parametrize(
    ("scheme", "in_features"), [("q4_0", 64), ("q4_1", 64), ("q8_0", 32), ("w4row", 96), ("q6_k", 512)]
)
def test_what_a_block_type_holds_is_not_refused(scheme: str, in_features: int) -> None:
    assert packing_refusal(parse_scheme(scheme), 32, in_features) is None


def test_blocks_of_a_group_that_differ_in_scale_are_not_taken_for_the_scheme() -> None:
    linear = QuantizedLinear(
        "x", parse_scheme("q4_0"), torch.zeros(1, 64, dtype=torch.uint8), {"scales": torch.tensor([[1.0, 2.0]]).half()}
    )
    with pytest.raises(InputError, match="x: blocks of one group differ in scale"):
        unpack_linear("x", BLOCK_TYPES["q4_0"], pack_linear(linear), parse_scheme("w4g64"))


def test_a_scale_that_is_not_finite_is_damage() -> None:
    packed = torch.zeros(1, 18, dtype=torch.uint8)
    packed[0, :2] = torch.tensor([0x00, 0x7C], dtype=torch.uint8)
    with pytest.raises(InputError, match="x: 1 of its scales are NaN or Inf"):
        unpack_linear("x", BLOCK_TYPES["q4_0"], packed)


@pytest.mark.parametrize("shape", [(2,), (3, 8), (1, 6), (4, 2, 10)])
def test_nibbles_are_two_codes_a_byte_the_first_low_whatever_the_strides(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator)
    expected = codes[..., ::2] + 16 * codes[..., 1::2]
    holder = torch.zeros(codes.numel() + 1, dtype=torch.uint8)
    holder[1:] = codes.reshape(-1)
    for view in (codes, codes.mT.contiguous().mT if codes.dim() > 1 else codes, holder[1:].reshape(shape)):
        assert torch.equal(pack_nibbles(view), expected)
    for view in (expected, expected.mT.contiguous().mT if codes.dim() > 1 else expected):
        assert torch.equal(unpack_nibbles(view), codes)
