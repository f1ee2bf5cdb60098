"""Verify: an artifact read back, held against its hashes, and, bit for bit, against the run that it was written from.

Every matrix of the run is compared: codes, parameters and what they stand for; embedding and head against the same
tensor of the base model, rounded to the type in which the artifact stores it; norms in float32.
"""

from __future__ import annotations

__all__ = ["Verification", "verify"]

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from phi4edge.core.errors import VerifyError
from phi4edge.core.events import SILENT, Progress
from phi4edge.core.sums import changed_files, has_sums
from phi4edge.model.source import QuantizedModel
from phi4edge.quant.ggml import BLOCK_TYPES, dequantize
from phi4edge.quant.ggml_rounding import quantize_q6_k, quantize_q8_0
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.stages.export import writer_of
from phi4edge.stages.run_reader import open_run
from phi4edge.writers._api import ArtifactReader

_PIECE = 1 << 22  # weights of a table in RAM at a time
_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_HINT = "the artifact is damaged or was made from another run; export it again"


@dataclass(frozen=True)
class Verification:
    """What ``verify`` looked at."""

    path: Path
    format: str
    tensors: int  # all that were read, every value finite
    compared: int  # of them, those that were compared with the run
    linears: int  # of those, the ones whose codes and parameters were
    hashes: bool  # whether its files were held against a list of hashes
    against: Path | None


def verify(path: Path, run: Path | None, *, model: str | None = None, progress: Progress = SILENT) -> Verification:
    """Read every tensor of an artifact; with ``run``, compare each with it. Then its files with their hashes.

    Raises:
        InputError: the artifact cannot be read.
        VerifyError: a value differs; the first tensor, row and column are named. Or a file's hash does.
    """
    writer = writer_of(path)
    reader: ArtifactReader = writer.read(path)
    source = open_run(run, model) if run is not None else None
    if source is not None:
        _compare_configs(reader, source)
    shapes = reader.config.tensor_shapes()
    linears = compared = 0
    progress.start("verify", len(shapes), "tensor")
    for name, shape in shapes.items():
        progress.status(name)
        linear = name.removesuffix(".weight")
        if ".layers." in name and len(shape) == 2:
            found = reader.quantized(linear)
            _check_finite(path, name, found.dequantize() if found is not None else reader.tensor(name))
            if source is not None and linear in source.linears:
                _compare_linears(path, found, source.load(linear))
                linears, compared = linears + 1, compared + 1
        else:
            compared += _compare_plain(path, name, shape, reader, source)
        progress.advance()
    progress.finish()
    changed = changed_files(path) if has_sums(path) else {}
    if changed:
        named = ", ".join(f"{name} is {what}" for name, what in changed.items())
        raise VerifyError(f"{path}: {named} since it was written (SHA-256)", _HINT)
    return Verification(path, writer.FORMAT, len(shapes), compared, linears, has_sums(path), run)


def _check_finite(path: Path, name: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise VerifyError(f"{path}: {name} holds a value that is not finite", _HINT)


def _compare_plain(
    path: Path, name: str, shape: tuple[int, ...], reader: ArtifactReader, source: QuantizedModel | None
) -> int:
    """A norm, the embedding or the head, some rows at a time; whether it was compared."""
    kind = reader.stored_type(name)
    step = max(1, _PIECE // shape[-1]) if len(shape) > 1 else shape[0]
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        found = reader.tensor(name, rows)
        _check_finite(path, name, found)
        if source is not None:
            expected = _stored(source.tensor(name, rows), kind, name)
            where = "value" if len(shape) > 1 else "gain"
            _first_difference(path, name, where, found.reshape(len(found), -1), expected.reshape(len(found), -1), start)
    return int(source is not None)


def _stored(values: Tensor, kind: str, name: str) -> Tensor:
    """What ``values`` become in type ``kind``."""
    if kind in _FLOATS:
        return values.to(_FLOATS[kind]).float()
    rounding = {"q8_0": quantize_q8_0, "q6_k": quantize_q6_k}.get(kind)
    if rounding is None:
        raise VerifyError(f"{name}: is stored as {kind}, which no writer of ours does", _HINT)
    return dequantize(BLOCK_TYPES[kind], rounding(values, name))


def _compare_configs(reader: ArtifactReader, source: QuantizedModel) -> None:
    ours, theirs = source.config, reader.config
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "rope"):
        if getattr(ours, field) != getattr(theirs, field):
            raise VerifyError(f"{field} is {getattr(theirs, field)} in the artifact, {getattr(ours, field)} in the run")


def _compare_linears(path: Path, found: QuantizedLinear | None, expected: QuantizedLinear) -> None:
    name = expected.name
    if found is None:
        raise VerifyError(f"{path}: {name} is not stored as integer codes")
    if found.codes.shape != expected.codes.shape:
        raise VerifyError(f"{path}: {name} is {list(found.codes.shape)}, the run has {list(expected.codes.shape)}")
    _first_difference(path, name, "code", found.codes, expected.codes)
    if found.scheme == expected.scheme:
        for field, values in expected.params.items():
            _first_difference(path, name, field, found.params[field], values)
    # A grid may be held under another name (w4g32 as q4_0): then what the codes stand for must agree.
    _first_difference(path, name, "weight", found.dequantize(), expected.dequantize())


def _first_difference(path: Path, name: str, kind: str, found: Tensor, expected: Tensor, first: int = 0) -> None:
    if torch.equal(found, expected):
        return
    different = found != expected
    row, column = different.nonzero()[0].tolist()
    raise VerifyError(
        f"{path}: {name}: {kind} at row {first + row}, column {column} is {found[row, column].item()}, "
        f"the run has {expected[row, column].item()} ({int(different.sum())} differ in all)",
        _HINT,
    )
