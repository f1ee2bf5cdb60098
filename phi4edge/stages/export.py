"""Export: a finished run's codes into one artifact, without a second rounding."""

from __future__ import annotations

__all__ = ["export", "plan", "reader_of", "writer_of"]

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import InputError
from phi4edge.core.registry import load as load_plugin
from phi4edge.core.registry import names
from phi4edge.core.sums import drop_sums, write_sums
from phi4edge.core.workdir import RUN_FILE
from phi4edge.model.source import QuantizedModel
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
        checkpoint = open_checkpoint(run)
        if options.force:
            drop_sums(out)
        unrounded: Artifact = writer.write_f16(checkpoint, out, options)
        _seal(unrounded, {"base_model": checkpoint.index.name, "method": "none"})
        return unrounded
    source = _held(run, format_name, options, model)
    if options.force:
        drop_sums(out)
    artifact: Artifact = writer.write(source, out, options)
    _seal(artifact, source.provenance)
    return artifact


def _seal(artifact: Artifact, made: Mapping[str, str]) -> None:
    manifest = {
        "format": artifact.format,
        "scheme": artifact.scheme,
        "bytes": artifact.nbytes,
        "quantized_fraction": artifact.quantized_fraction,
        "made": dict(made),
    }
    write_sums(artifact.path, artifact.files, manifest)


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


def _alternatives(source: QuantizedModel, refused: str, options: WriteOptions) -> str:
    able = [n for n in names(WRITERS) if n != refused and load_plugin(WRITERS, n).refusal(source, options) is None]
    hint = f"schemes that fit {refused}: {load_plugin(WRITERS, refused).SCHEMES}"
    return f"{hint}; formats that can hold {source.scheme.name}: {', '.join(able)}" if able else hint


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
