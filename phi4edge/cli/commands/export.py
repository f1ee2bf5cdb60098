"""``phi4edge export RUN --format F --out PATH``."""

from __future__ import annotations

from pathlib import Path

import click

from phi4edge.cli.options import common, dry_run_option, force_option
from phi4edge.cli.progress import progress_for
from phi4edge.cli.render import emit
from phi4edge.core.errors import UsageError
from phi4edge.core.memory import format_bytes, parse_bytes
from phi4edge.core.registry import names

_IMATRIX = "imatrix"  # what a run measured; no artifact of codes, so no writer
_TYPES = click.Choice(["q8_0", "q6_k", "f16"])


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format_name",
    type=click.Choice([*names("phi4edge.writers"), _IMATRIX]),
    required=True,
    help="gguf for llama.cpp; onnx for ONNX Runtime GenAI; gptq and awq for transformers, vLLM and ONNX Runtime; "
    "compressed_tensors for vLLM; mlx for mlx-lm; imatrix for llama-quantize.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File (gguf, imatrix) or folder to write.")
@click.option("--target", metavar="ID", help="Refuse (exit 4) if the artifact would not fit this device.")
@click.option(
    "--context",
    type=int,
    help="Tokens that must fit the target, that ONNX's KV cache is for, and num_ctx of --modelfile.  "
    "[default: the target's; in onnx 4096]",
)
@click.option(
    "--head",
    type=_TYPES,
    help="Type of lm_head in gguf and onnx; q8_0 also in gptq and mlx.  [default: the run's mix, or q8_0; gptq, mlx: "
    "as it is]",
)
@click.option(
    "--embedding", type=_TYPES, help="Type of the embedding in gguf and onnx.  [default: the run's mix, or q8_0]"
)
@click.option(
    "--accuracy-level",
    type=click.Choice(["1", "4"]),
    default="4",
    show_default=True,
    help="In onnx: 4 rounds activations to int8, which is faster; 1 leaves them in float32.",
)
@click.option("--split-size", metavar="SIZE", help="Write a GGUF in files of at most this size, e.g. 2GiB.")
@click.option("--modelfile", is_flag=True, help="Write Ollama's Modelfile beside a GGUF, with --context as num_ctx.")
@click.option("--model", help="Where the checkpoint lies now, if it was moved since `quantize`.")
@force_option
@dry_run_option
@common
def command(
    run: Path,
    format_name: str,
    out: Path,
    target: str | None,
    context: int | None,
    head: str | None,
    embedding: str | None,
    accuracy_level: str,
    split_size: str | None,
    modelfile: bool,
    model: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Write the codes of finished run directory RUN into an artifact, bit for bit, without rounding again.

    RUN may also be a full-precision checkpoint folder: with --format gguf it is written in float16.
    """
    if format_name == _IMATRIX:
        _export_imatrix(run, out, force=force, dry_run=dry_run, as_json=as_json)
        return
    from phi4edge.stages.export import export, plan
    from phi4edge.stages.fitting import check_run_fits
    from phi4edge.writers._api import WriteOptions

    if target is not None:
        context = check_run_fits(
            run, target, format_name=format_name, context=context, head=head, embedding=embedding, model=model
        )
    for flag, given in (("--split-size", split_size), ("--modelfile", modelfile)):
        if given and format_name != "gguf":
            raise UsageError(f"{flag} is for gguf, not {format_name}")
    options = WriteOptions(
        head=head,
        embedding=embedding,
        accuracy_level=int(accuracy_level),
        context=context,
        split_bytes=parse_bytes(split_size) if split_size else None,
        modelfile=modelfile,
        force=force,
        progress=progress_for(quiet),
    )
    if dry_run:
        planned = plan(run, format_name, out, options, model=model)
        shown = f"would write {planned['path']}: {planned['format']} {planned['scheme']}; nothing was written"
        emit("export", planned, shown, as_json=as_json)
        return
    artifact = export(run, format_name, out, options, model=model)
    data = {
        "path": str(artifact.path),
        "format": artifact.format,
        "scheme": artifact.scheme,
        "bytes": artifact.nbytes,
        "quantized_fraction": artifact.quantized_fraction,
        "files": dict(artifact.files),
        "target": target,
    }
    count = sum(name.endswith(".gguf") for name in artifact.files)
    parts = f" in {count} files" if count > 1 else ""
    text = (
        f"{artifact.path}{parts}: {artifact.format} {artifact.scheme}, {format_bytes(artifact.nbytes)}, "
        f"{100 * artifact.quantized_fraction:.1f} % of the parameters as integer codes"
    )
    emit("export", data, text, as_json=as_json)


def _export_imatrix(run: Path, out: Path, *, force: bool, dry_run: bool, as_json: bool) -> None:
    from phi4edge.stages.imatrix import export_imatrix

    data = export_imatrix(run, out, force=force, dry_run=dry_run)
    text = (
        f"{'would write ' if dry_run else ''}{out}: imatrix of {data['linears']} linears, {data['tokens']} tokens of "
        f"{data['dataset']}, measured on {data['measured_on']}"
    )
    emit("export", data, text, as_json=as_json)
