"""The tensors of a GGUF to be: name, type, shape, and their data in slices of rows, made when they are written."""

from __future__ import annotations

__all__ = ["PLAIN", "PlannedTensor", "plan_tensors"]

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from phi4edge.model.source import QuantizedModel, WeightSource
from phi4edge.quant.ggml import BLOCK_TYPES, BlockType, block_type_of, pack_linear
from phi4edge.quant.ggml_rounding import quantize_q6_k, quantize_q8_0, store_float
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.writers._gguf_names import FACTORS, gguf_name

PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_CHUNK = 1 << 22  # weights in RAM at a time, of a tensor that is not read whole


Pieces = Callable[[], Iterator[Callable[[], Tensor]]]  # what makes pieces, one after the other, when it is called


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file to be."""

    name: str  # the GGUF's
    type: BlockType
    shape: tuple[int, ...]
    data: Pieces  # its bytes, uint8 [rows, bytes of a row], some rows at a time; made in any thread

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        rows = self.shape[0] if len(self.shape) > 1 else 1
        return rows * self.type.row_bytes(self.shape[-1])


def plan_tensors(
    source: WeightSource, types: Mapping[str, str], model: QuantizedModel | None, kind: BlockType
) -> list[PlannedTensor]:
    """Rope factors, then every tensor in model order from ``source``; matrices of the blocks from ``model``'s codes,
    or in ``kind``.

    llama.cpp reads factors for a whole head, also where fewer channels turn, as in Phi-4-mini: past the tensor's end.
    At the end of a mapped file that can be the end of the process, so they stand first, as its own converter has them.

    ``types`` of "head" and "embedding"; a tied one is the head.
    """
    config = source.config
    embedding = types["head" if config.tie_word_embeddings else "embedding"]
    tables = {"lm_head.weight": types["head"], "model.embed_tokens.weight": embedding}
    plan = []
    for field, place in FACTORS.items():
        factors = getattr(config.rope, field)
        if factors is not None:
            plan.append(PlannedTensor(place, BLOCK_TYPES["f32"], (len(factors),), _constant(factors)))
    for name, shape in config.tensor_shapes().items():
        target = gguf_name(name)
        assert target is not None, f"{name} has no place in a GGUF"
        linear = name.removesuffix(".weight")
        if model is not None and linear in model.linears:
            packed = block_type_of(model.scheme_of(linear))
            assert packed is not None, f"{linear} was to be refused"
            plan.append(PlannedTensor(target, packed, shape, _codes(model, linear, shape)))
        else:
            stored = BLOCK_TYPES["f32"] if len(shape) == 1 else BLOCK_TYPES[tables[name]] if name in tables else kind
            plan.append(PlannedTensor(target, stored, shape, _rounded(source, name, shape, stored)))
    return plan


def _codes(model: QuantizedModel, linear: str, shape: tuple[int, ...]) -> Pieces:
    def pieces() -> Iterator[Callable[[], Tensor]]:
        some = model.load_rows
        rows = (lambda part: some(linear, part)) if some is not None else _rows_of(model.load(linear))
        step = max(1, _CHUNK // shape[1])
        for start in range(0, shape[0], step):
            yield partial(_packed, rows, slice(start, min(start + step, shape[0])))

    return pieces


def _rows_of(whole: QuantizedLinear) -> Callable[[slice], QuantizedLinear]:
    return lambda part: whole.rows(part.start, part.stop)


def _packed(rows: Callable[[slice], QuantizedLinear], part: slice) -> Tensor:
    return pack_linear(rows(part))


def _rounded(source: WeightSource, name: str, shape: tuple[int, ...], kind: BlockType) -> Pieces:
    def store(values: Tensor) -> Tensor:
        if kind.name == "q8_0":
            return quantize_q8_0(values, name)
        if kind.name == "q6_k":
            return quantize_q6_k(values, name)
        return store_float(values, PLAIN[kind.name], name)

    def piece(rows: slice | None) -> Tensor:
        return store(source.tensor(name)[None] if rows is None else source.tensor(name, rows))

    def pieces() -> Iterator[Callable[[], Tensor]]:
        if len(shape) == 1:
            yield partial(piece, None)
            return
        step = max(1, _CHUNK // shape[1])
        for start in range(0, shape[0], step):
            yield partial(piece, slice(start, start + step))

    return pieces


def _constant(values: tuple[float, ...]) -> Pieces:
    return lambda: iter([lambda: store_float(torch.tensor([values]), torch.float32, "rope factors")])
