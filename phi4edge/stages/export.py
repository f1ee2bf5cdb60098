"""Export: a finished run's codes into one artifact, without a second rounding; and back, to verify it."""

from __future__ import annotations

__all__ = ["Verification", "export", "plan", "reader_of", "verify"]

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import InputError, VerifyError
from phi4edge.core.events import SILENT, Progress
from phi4edge.core.registry import load as load_plugin
from phi4edge.core.registry import names
from phi4edge.core.workdir import RUN_FILE
from phi4edge.model.source import QuantizedModel
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.stages.run_reader import open_run
from phi4edge.writers._api import Artifact, ArtifactReader, WriteOptions

WRITERS = "phi4edge.writers"


def export(run: Path, format_name: str, out: Path, options: WriteOptions, *, model: str | None = None) -> Artifact:
    """Write run directory ``run`` as ``format_name`` to ``out``; a checkpoint folder as it is, in float16.

    Raises:
        InputError: the run is not finished, the format cannot hold its scheme, or ``out`` exists.
    """
    writer = load_plugin(WRITERS, format_name)
    if (run / "config.json").is_file() and not (run / RUN_FILE).is_file():
        if not hasattr(writer, "write_f16"):
            raise InputError(f"{run}: is a checkpoint, and {format_name} is written from a run", "quantize it first")
        unrounded: Artifact = writer.write_f16(open_checkpoint(run), out, options)
        return unrounded
    artifact = writer.write(_held(run, format_name, options, model), out, options)
    assert isinstance(artifact, Artifact)
    return artifact


def plan(run: Path, format_name: str, out: Path, options: WriteOptions, *, model: str | None = None) -> dict[str, str]:
    """The same checks as :func:`export`; writes nothing.

    Raises:
        InputError: as :func:`export`.
    """
    source = _held(run, format_name, options, model)
    if out.exists() and not options.force:
        raise InputError(f"{out}: already exists", "choose another --out, or pass --force to replace it")
    return {"path": str(out), "format": format_name, "scheme": source.scheme.name}


def _held(run: Path, format_name: str, options: WriteOptions, model: str | None) -> QuantizedModel:
    """The run, after the format was asked whether it can hold it."""
    source = open_run(run, model)
    reason = load_plugin(WRITERS, format_name).refusal(source, options)
    if reason is not None:
        raise InputError(f"{format_name} cannot hold this run: {reason}", _alternatives(source, format_name, options))
    return source


def _alternatives(source: QuantizedModel, refused: str, options: WriteOptions) -> str | None:
    able = [n for n in names(WRITERS) if n != refused and load_plugin(WRITERS, n).refusal(source, options) is None]
    return f"formats that can hold {source.scheme.name}: {', '.join(able)}" if able else None


def writer_of(path: Path) -> ModuleType:
    """The writer whose artifact lies at ``path``.

    Raises:
        InputError: nothing there, or no known artifact.
    """
    if not path.exists():
        raise InputError(f"{path}: no such artifact")
    for name in names(WRITERS):
        module = load_plugin(WRITERS, name)
        if module.matches(path):
            return module
    raise InputError(f"{path}: not an artifact of a known format", f"known formats: {', '.join(names(WRITERS))}")


def reader_of(path: Path) -> ArtifactReader:
    """A reader for the artifact at ``path``, whatever its format."""
    reader: ArtifactReader = writer_of(path).read(path)
    return reader


@dataclass(frozen=True)
class Verification:
    """What ``verify`` looked at."""

    path: Path
    format: str
    tensors: int  # all that were read, every value finite
    linears: int  # whose codes and parameters were compared with the run
    against: Path | None


def verify(path: Path, run: Path | None, *, model: str | None = None, progress: Progress = SILENT) -> Verification:
    """Read every tensor of an artifact; with ``run``, compare codes and parameters bit for bit.

    Raises:
        InputError: the artifact cannot be read.
        VerifyError: a value differs; the first tensor, row and column are named.
    """
    writer = writer_of(path)
    reader: ArtifactReader = writer.read(path)
    source = open_run(run, model) if run is not None else None
    if source is not None:
        _compare_configs(reader, source)
    shapes = reader.config.tensor_shapes()
    linears = 0
    progress.start("verify", len(shapes), "tensor")
    for name, shape in shapes.items():
        progress.status(name)
        linear = name.removesuffix(".weight")
        found = reader.quantized(linear) if ".layers." in name and len(shape) == 2 else None
        values = found.dequantize() if found is not None else reader.tensor(name)
        if not bool(torch.isfinite(values).all()):
            raise VerifyError(f"{path}: {name} holds a value that is not finite")
        if source is not None:
            if linear in source.linears:
                _compare_linears(path, found, source.load(linear))
                linears += 1
            elif len(shape) == 1 and not torch.equal(values, source.tensor(name)):
                raise VerifyError(f"{path}: {name} differs from the run's")
        progress.advance()
    progress.finish()
    return Verification(path, writer.__name__.rsplit(".", 1)[-1], len(shapes), linears, run)


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


def _first_difference(path: Path, name: str, kind: str, found: Tensor, expected: Tensor) -> None:
    if torch.equal(found, expected):
        return
    different = found != expected
    row, column = different.nonzero()[0].tolist()
    raise VerifyError(
        f"{path}: {name}: {kind} at row {row}, column {column} is {found[row, column].item()}, "
        f"the run has {expected[row, column].item()} ({int(different.sum())} differ in all)",
        "the artifact is damaged or was made from another run; export it again",
    )
