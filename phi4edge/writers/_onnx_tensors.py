"""The weights of an ONNX model to be: what lies where in its data file, and their bytes, made when they are written.

Tensors come in units that are made from one thing read once, such as the two halves of gate_up_proj with their codes,
scales and zero points. Of a unit some rows of each tensor may come in turn, so each has a place of its own from the
beginning and is written there.
"""

from __future__ import annotations

__all__ = ["Place", "Unit", "place", "plan_units", "table_names", "write_units"]

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from phi4edge.core.events import Progress
from phi4edge.model.rope import rotary_table
from phi4edge.model.source import QuantizedModel
from phi4edge.quant.ggml import BLOCK_TYPES, unpack_linear
from phi4edge.quant.ggml_rounding import quantize_q8_0, store_float
from phi4edge.quant.matmulnbits_packing import pack_linear, packed_layout
from phi4edge.quant.scheme import GGML_SCHEMES
from phi4edge.writers._onnx_names import EMBEDDING, HEAD, norm_name, part_name, parts
from phi4edge.writers._safetensors import Piece, PlannedTensor

_CHUNK = 1 << 22  # weights in RAM at a time, of a table
_LARGE, _COARSE, _FINE = (
    1 << 20,
    1 << 16,
    64,
)  # runtimes map large tensors into memory, on Windows at multiples of 64 KiB


@dataclass(frozen=True)
class Unit:
    """Tensors that are made together."""

    name: str  # for progress
    tensors: tuple[PlannedTensor, ...]
    pieces: Callable[[], Iterator[Piece]]  # their bytes: of each in order, of several in any turn


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the data file, and as what it is read."""

    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def table_names(role: str, kind: str) -> tuple[str, ...]:
    """The tensors that the table of ``role``, EMBEDDING or HEAD, is stored as: codes and scales, or one."""
    return (f"{role}.qweight", f"{role}.scales") if kind == "q8_0" else (f"{role}.weight",)


def plan_units(model: QuantizedModel, tables: Mapping[str, str]) -> list[Unit]:
    """Everything in model order; ``tables`` are the types of "head" and "embedding", and a tied one is the head."""
    config = model.config
    roles = {"lm_head.weight": (HEAD, tables["head"]), "model.embed_tokens.weight": (EMBEDDING, tables["embedding"])}
    if config.tie_word_embeddings:
        roles["model.embed_tokens.weight"] = (HEAD, tables["head"])
    units = []
    for name, shape in config.tensor_shapes().items():
        linear = name.removesuffix(".weight")
        if name in roles:
            units.append(_table(model, name, shape, *roles[name]))
        elif len(shape) == 1:
            units.append(_whole(norm_name(name, config), shape, lambda name=name: model.tensor(name)))  # type: ignore[misc]
        else:
            units.append(_linear(model, linear, shape))
    if not config.rope.is_longrope:  # longrope's caches stand in the graph, in branches
        half = config.rope.dim // 2
        for field in ("cos", "sin"):
            made = lambda field=field: getattr(rotary_table(config.rope, config.context_length), field)[:, :half]  # noqa: E731
            units.append(_whole(f"{field}_cache", (config.context_length, half), made))
    return units


def _whole(name: str, shape: tuple[int, ...], made: Callable[[], Tensor]) -> Unit:
    return Unit(name, (PlannedTensor(name, "F32", shape),), lambda: iter([(name, made().float())]))


def _linear(model: QuantizedModel, linear: str, shape: tuple[int, ...]) -> Unit:
    scheme, (out_features, in_features) = model.scheme_of(linear), shape
    split = parts(linear, out_features)
    planned = tuple(
        PlannedTensor(part_name(part, field), *form)
        for part, start, stop in split
        for field, form in packed_layout(scheme, stop - start, in_features).items()
    )

    def pieces() -> Iterator[Piece]:
        whole = model.load(linear)
        for part, start, stop in split:
            for field, values in pack_linear(whole.rows(start, stop)).items():
                yield part_name(part, field), values

    return Unit(linear, planned, pieces)


def _table(model: QuantizedModel, name: str, shape: tuple[int, ...], role: str, kind: str) -> Unit:
    rows, columns = shape
    stored = table_names(role, kind)
    if kind == "q8_0":
        layout = packed_layout(GGML_SCHEMES[kind], rows, columns)
        planned = tuple(PlannedTensor(n, *layout[field]) for n, field in zip(stored, layout, strict=True))
    else:
        planned = (PlannedTensor(stored[0], "F16", shape),)

    def pieces() -> Iterator[Piece]:
        step = max(1, _CHUNK // columns)
        for start in range(0, rows, step):
            values = model.rest.tensor(name, slice(start, start + step))
            if kind == "q8_0":
                codes = unpack_linear(name, BLOCK_TYPES[kind], quantize_q8_0(values, name))
                yield from zip(stored, pack_linear(codes).values(), strict=True)
            else:
                yield stored[0], store_float(values, torch.float16, name)

    return Unit(name, planned, pieces)


def place(units: Sequence[Unit]) -> tuple[dict[str, Place], int]:
    """Where each tensor of ``units`` lies, by name, and the bytes of all with the gaps between them."""
    places: dict[str, Place] = {}
    end = 0
    for tensor in (tensor for unit in units for tensor in unit.tensors):
        step = _COARSE if tensor.nbytes >= _LARGE else _FINE
        start = end + -end % step
        places[tensor.name] = Place(tensor.dtype, tensor.shape, start, tensor.nbytes)
        end = start + tensor.nbytes
    return places, end


def write_units(file: BinaryIO, units: Sequence[Unit], places: Mapping[str, Place], progress: Progress) -> None:
    """Write the data of ``units`` to their ``places`` in the empty file ``file``."""
    for unit in units:
        progress.status(unit.name)
        written = dict.fromkeys((tensor.name for tensor in unit.tensors), 0)
        for name, piece in unit.pieces():
            data = piece.contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.seek(places[name].offset + written[name])
            file.write(data)
            written[name] += len(data)
        for tensor in unit.tensors:
            assert written[tensor.name] == tensor.nbytes, f"{tensor.name} has {written[tensor.name]} bytes"
        progress.advance()
